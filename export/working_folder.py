"""A folder to build in, which lasts no longer than its process; and a lock for what processes change together.

Flows in: the folder in which whole files are to appear. Flows out: a hidden one inside it. Locks are `flock`'s, which
the system gives back when a process ends, however it ends: so what a killed one left is known by its lock, which is
free.
"""

from __future__ import annotations

import fcntl
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO

LOCK = ".lock"


@contextmanager
def working_folder(parent: Path) -> Iterator[Path]:
    """A new folder, removed at the end; where this process is killed, by the next that asks for one."""
    with ExitStack() as stack:
        with locked(parent):  # or another process would take the new folder for a left one
            _remove_left(parent)
            folder = Path(stack.enter_context(TemporaryDirectory(prefix=".", dir=parent, ignore_cleanup_errors=True)))
            _lock(stack.enter_context((folder / LOCK).open("w")))
        yield folder


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Waits until no other process is here for this folder."""
    with (folder / LOCK).open("w") as file:
        _lock(file)
        yield


def _remove_left(parent: Path) -> None:
    for left in parent.glob(".*/"):
        with suppress(OSError), (left / LOCK).open("w") as file:
            _lock(file, fcntl.LOCK_NB)  # BlockingIOError: its process lives
            shutil.rmtree(left, ignore_errors=True)


def _lock(file: IO[str], flag: int = 0) -> None:
    fcntl.flock(file, fcntl.LOCK_EX | flag)
