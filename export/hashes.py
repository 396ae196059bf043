"""SHA-256 of a checkpoint's tensors and files, found by a thread while graphs are traced and measured.

Flows in: files and where tensors lie in them. Flows out: futures of hashes and file records.
"""

from __future__ import annotations

import threading
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from tubelet.runtime.bundle import FileRecord

from .storage import StoredTensor, sha256


class Hashes:
    """One thread, in the order of asking. Leaving the context drops what nobody waited for."""

    def __init__(self) -> None:
        self._thread, self._stop = ThreadPoolExecutor(1, "hashes"), threading.Event()

    def __enter__(self) -> Hashes:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self._thread.shutdown(cancel_futures=True)

    def tensor(self, path: Path, stored: StoredTensor) -> Future[str]:
        return self._thread.submit(sha256, path, stored.offset, stored.bytes, self._stop)

    def file(self, path: Path) -> Future[FileRecord]:
        return self._thread.submit(self._record, path)

    def _record(self, path: Path) -> FileRecord:
        size = path.stat().st_size
        return FileRecord(size, sha256(path, 0, size, self._stop))
