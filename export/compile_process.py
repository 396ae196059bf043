"""The process that builds one plan: `python -m tubelet.export.compile_process FD`.

Flows in: a Job, from the pipe whose file descriptor is FD, and the files of the working folder. Flows out: a plan
there, and Events to the same pipe; at the end a PlanRecord or an error.
"""

from __future__ import annotations

import sys
from multiprocessing.connection import Connection

from tubelet.runtime.errors import UserError

from .compile import compile_component
from .errors import CompilerError


def main() -> None:
    pipe = Connection(int(sys.argv[1]))
    job = pipe.recv()
    try:
        pipe.send(compile_component(job, pipe.send))
    except (CompilerError, UserError) as error:
        pipe.send(error)
    except OSError as error:
        pipe.send(UserError(f"cannot write the plan of {job.component}: {error.strerror}; free space for it"))


if __name__ == "__main__":
    main()
