"""Files that appear whole or not at all: written under a temporary name, then renamed by `os.replace`."""

from __future__ import annotations

import secrets
from pathlib import Path


def temporary_beside(path: Path) -> Path:
    """A new hidden name in the folder of `path`, for a rename to be atomic; short, however long the name of `path`."""
    return path.with_name(f".{secrets.token_hex(6)}.part")
