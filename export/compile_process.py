"""The process that builds one plan: `python -m tubelet.export.compile_process FD`.

Flows in: a Job, from the pipe whose file descriptor is FD, and the files of the working folder. Flows out: a plan
there, and Events to the same pipe; at the end a PlanRecord or an error.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import signal
import sys
from multiprocessing.connection import Connection

from tubelet.runtime.errors import UserError
from tubelet.runtime.plans import PlanRecord

from .compile import Job, compile_component
from .errors import CompilerError

PR_SET_PDEATHSIG = 1  # of Linux
FULL = (errno.ENOSPC, errno.EDQUOT)


def main() -> None:
    """Ends quietly where there is nobody to tell; is killed with the process that started it."""
    be_killed_with_parent()
    pipe = Connection(int(sys.argv[1]))
    with contextlib.suppress(EOFError, ConnectionError):
        job = pipe.recv()
        if not pipe.poll():  # what comes after the job is the end: the parent went before it could take this one along
            pipe.send(_build(job, pipe))


def be_killed_with_parent() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _build(job: Job, pipe: Connection) -> PlanRecord | Exception:
    try:
        return compile_component(job, pipe.send)
    except (CompilerError, UserError) as error:
        return error
    except OSError as error:
        remedy = "; free space for the plan" if error.errno in FULL else ""
        return CompilerError(f"cannot build {job.component}: {error}{remedy}")
    except Exception as error:
        return CompilerError(f"cannot build {job.component}: {type(error).__name__}: {error}")


if __name__ == "__main__":
    main()
