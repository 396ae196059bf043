"""The process that builds one plan: `python -m tubelet.export.compile_process FD`.

Flows in: a Job, from the pipe whose file descriptor is FD, and the files of the working folder. Flows out: a plan
there, and Events to the same pipe; at the end a PlanRecord or an error.
"""

from __future__ import annotations

import errno
from multiprocessing.connection import Connection

from tubelet.runtime.errors import UserError
from tubelet.runtime.plans import PlanRecord

from .compile import Job, compile_component
from .errors import CompilerError
from .processes import serve

FULL = (errno.ENOSPC, errno.EDQUOT)


def answer(pipe: Connection) -> None:
    job = pipe.recv()
    if not pipe.poll():  # what comes after the job is the end: the parent went before it could take this one along
        pipe.send(_build(job, pipe))


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
    serve(answer)
