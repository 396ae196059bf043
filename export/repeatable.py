"""Processes, and work in them, that find their memory at the same addresses each time.

The compilers walk sets that are ordered by address, so what they write depends on where things lie: on the kernel's
random layout, on Python's random hashes, on threads that take memory as they start, and on the holes that names of
folders and variables of the environment left in Python's memory.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")

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


def in_fresh_memory(work: Callable[[], T]) -> T:
    """Does the work in a thread of its own, as the system's allocator gives each thread a region of its own."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(work).result()
