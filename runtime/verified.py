"""Which large files were read whole and are what they should be, so that they are read once and not at every start.

Flows in: a file and its hash. Flows out: whether it has that hash. An empty note in the user's cache folder stands for
a file as it was; a file that was written, replaced or linked since has none. Where notes cannot be kept every start
reads the file.
"""

from __future__ import annotations

import contextlib
import hashlib
from pathlib import Path

from .user_cache import user_cache

LARGE = 1 << 26  # bytes; smaller files are read every time, in less than a second


def has_hash(path: Path, sha256: str) -> bool:
    """Whether the file's SHA-256 is `sha256`. Raises OSError."""
    note = _note(path, sha256)
    if note is not None and note.is_file():
        return True
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest() == sha256
    if found and note is not None and note == _note(path, sha256):  # it did not change while it was read
        with contextlib.suppress(OSError):
            note.parent.mkdir(parents=True, exist_ok=True)
            note.touch()
    return found


def _note(path: Path, sha256: str) -> Path | None:
    """Where a file's note is; none for a small file."""
    now = path.stat()
    if now.st_size < LARGE:
        return None
    state = (sha256, now.st_dev, now.st_ino, now.st_size, now.st_mtime_ns, now.st_ctime_ns)
    try:
        return user_cache() / "verified" / hashlib.sha256(repr(state).encode()).hexdigest()
    except RuntimeError:  # a user without a home
        return None
