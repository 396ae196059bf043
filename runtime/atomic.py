"""Files and folders that appear whole or not at all: written under a temporary name, then renamed."""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import UserError


def temporary_beside(path: Path) -> Path:
    """A new hidden name in the folder of `path`, for a rename to be atomic; short, however long the name of `path`."""
    return path.with_name(f".{secrets.token_hex(6)}.part")


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A hidden folder beside `path` to be filled; at the end it takes that name, after an error it is removed.

    Raises UserError when `path` exists or cannot be written.
    """
    if path.exists():
        raise UserError(f"{path} exists; remove it or choose another folder")
    if not path.parent.is_dir():
        raise UserError(f"{path.parent} is not a folder; create it first")
    try:
        partial = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    except OSError as error:
        raise UserError(f"cannot write to {path.parent}: {error.strerror}; choose a writable folder") from error
    try:
        yield partial
        partial.chmod(0o755)
        os.rename(partial, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; free space or choose another folder") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
