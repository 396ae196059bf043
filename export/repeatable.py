"""Processes that find their memory at the same addresses each time they run.

The compilers walk sets that are ordered by address, so what they write depends on where things lie: on the kernel's
random layout, on Python's random hashes, and on threads that take memory as they start.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager

QUERY, ADDR_NO_RANDOMIZE = 0xFFFFFFFF, 0x0040000  # of personality(2)


@contextmanager
def repeatable_processes() -> Iterator[dict[str, str]]:
    """The environment for processes started by this thread meanwhile; where the kernel refuses, they are as any."""
    personality = ctypes.CDLL(None).personality
    personality.argtypes = (ctypes.c_ulong,)
    before = personality(QUERY)
    personality(before | ADDR_NO_RANDOMIZE)  # a thread's own, and inherited by what it starts
    try:
        yield os.environ | {"PYTHONHASHSEED": "0", "OPENBLAS_NUM_THREADS": "1"}
    finally:
        personality(before)
