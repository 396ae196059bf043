"""A process that works for this one: `python -m MODULE FD`, where FD is the end of a pipe.

Flows in: what is sent to it. Flows out: what it sends. It ends with this one, however that ends, and hears no Ctrl-C.
"""

from __future__ import annotations

import contextlib
import ctypes
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

PR_SET_PDEATHSIG = 1  # of Linux


class Ended(Exception):
    """The process has gone, with this exit code."""

    def __init__(self, code: int):
        super().__init__(f"ended with code {code}")
        self.code = code


class Child:
    """Takes a pipe at first and starts when asked to, so that its owner knows it before it lives; `close` ends it."""

    def __init__(self, module: str):
        self._module = module
        self.pipe, self._theirs = Pipe()
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, folder: Path | None = None, environment: Mapping[str, str] | None = None) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", self._module, str(self._theirs.fileno())],
            cwd=folder,
            env=environment,
            pass_fds=[self._theirs.fileno()],
            start_new_session=True,  # Ctrl-C is for the parent alone
        )
        self._theirs.close()

    def receive(self) -> Any:
        """What the process says next. Raises Ended when it has ended instead."""
        try:
            return self.pipe.recv()
        except (EOFError, ConnectionResetError) as error:
            assert self._process is not None  # it was started
            raise Ended(self._process.wait()) from error

    def close(self) -> None:
        """Ends the process wherever it is."""
        self.pipe.close()
        self._theirs.close()
        if self._process is not None:
            self._process.kill()  # in the middle of a phase the compilers hear nothing
            self._process.wait()


def serve(work: Callable[[Connection], None]) -> None:
    """The main function of such a process. Ends quietly where there is nobody to tell."""
    be_killed_with_parent()
    pipe = Connection(int(sys.argv[1]))
    with contextlib.suppress(EOFError, ConnectionError):
        work(pipe)


def be_killed_with_parent() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
