"""The kernels that TensorRT-RTX compiled for a GPU at run time, kept in a file for the next process.

Flows in: a plan and a runtime configuration. Flows out: the configuration with a cache, and a file beside the plan, or
in the user's cache folder where the bundle is read-only. A file that is missing, damaged or of another release costs
time, no more.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import Any

from .atomic import temporary_beside
from .memory import Resource
from .user_cache import user_cache


class KernelCache(Resource):
    """Written when it is closed, at the latest when the process ends."""

    def __init__(self, config: Any, plan: Path, key: str, architecture: str):
        self._cache, self._files = config.create_runtime_cache(), [plan.with_suffix(f".{architecture}.cache")]
        with contextlib.suppress(RuntimeError):  # a user without a home
            self._files.append(user_cache() / f"{key}.{architecture}.cache")
        for file in self._files:
            with contextlib.suppress(OSError):
                if self._cache.deserialize(file.read_bytes()):
                    break
        config.set_runtime_cache(self._cache)
        super().__init__(_write, self._cache, self._files)

    def write(self) -> None:
        """Writes what was compiled until now."""
        _write(self._cache, self._files)


def _write(cache: Any, files: list[Path]) -> None:
    data = bytes(cache.serialize())
    for file in files:
        partial = temporary_beside(file)
        with contextlib.suppress(OSError):
            if file.is_file() and file.read_bytes() == data:
                return
            file.parent.mkdir(parents=True, exist_ok=True)
            partial.write_bytes(data)
            os.replace(partial, file)
            return
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
