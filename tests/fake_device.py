"""A device without a GPU: the protocols of `tubelet.runtime.memory` on host memory, with the CUDA kernels as host code.

Stricter than a GPU where that shows mistakes: queued work runs only when the stream is waited for or memory is freed,
fresh memory holds garbage, and allocating or waiting while a stream is captured is an error; freeing is not, since a
garbage collection can happen anywhere. `Faults` injects faults.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tubelet.runtime.memory import DeviceError, Extent, MemoryInfo, Resource, Stream

ROOT = Path(__file__).parent.parent
HOST_LIBRARY = "TUBELET_CUDA_HOST"  # environment: the folder of an instrumented library, instead of one made here
_ALIGNMENT = 256  # bytes, as the driver's
_GARBAGE = 0xA5

_libc = ctypes.CDLL(None)
_libc.free.argtypes = [ctypes.c_void_p]


def load_cuda_host(folder: Path) -> ctypes.CDLL:
    """The kernels of `csrc/cuda` as host code, with a driver of host memory: libcuda.so.1, compiled into a folder."""
    if HOST_LIBRARY not in os.environ:
        flags = ["-std=c++17", "-O2", "-ffp-contract=off", "-shared", "-fPIC", f"-I{ROOT / 'csrc'}"]
        sources = [str(ROOT / "csrc" / "tests" / name) for name in ("cuda_host.cpp", "cuda_driver.cpp")]
        subprocess.run(["c++", *flags, *sources, "-o", str(folder / "libcuda.so.1"), "-ldl"], check=True)
    return ctypes.CDLL(str(Path(os.environ.get(HOST_LIBRARY, folder)) / "libcuda.so.1"))


@dataclass
class Faults:
    """What goes wrong, counted from 0; None: nothing."""

    allocation: int | None = None  # which one finds no memory
    launch: int | None = None  # which kernel is refused
    capture: int | None = None  # which one ends cancelled


@dataclass
class FakeDevice:
    library: ctypes.CDLL
    total: int = 1 << 30  # bytes of memory
    faults: Faults = field(default_factory=Faults)
    architecture: str = "sm90"
    name: str = "fake GPU"
    launched: list[str] = field(default_factory=list)  # symbols, in the order in which they ran
    buffers: dict[int, int] = field(default_factory=dict)  # address -> bytes
    capturing: bool = False
    counts: dict[str, int] = field(default_factory=dict)
    streams: weakref.WeakSet[FakeStream] = field(default_factory=weakref.WeakSet)

    def memory(self) -> MemoryInfo:
        return MemoryInfo(self.total - sum(self.buffers.values()), self.total)

    def allocate(self, size: int) -> FakeBuffer:
        if self.capturing:
            raise DeviceError("cuMemAlloc", "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED")
        if self.fails("allocation") or size > self.memory().free:
            raise DeviceError("cuMemAlloc", "CUDA_ERROR_OUT_OF_MEMORY")
        return FakeBuffer(self, max(1, size))

    def stream(self) -> FakeStream:
        return FakeStream(self)

    def close(self) -> None:
        self.buffers.clear()

    def fails(self, kind: str) -> bool:
        """Whether this is the one that a fault is planned for."""
        number = self.counts.get(kind, 0)
        self.counts[kind] = number + 1
        return number == getattr(self.faults, kind)

    def bytes_at(self, pointer: int, size: int) -> NDArray[np.uint8]:
        inside = any(start <= pointer and pointer + size <= start + bytes for start, bytes in self.buffers.items())
        if size and not inside:
            raise DeviceError("cuMemcpyAsync", "CUDA_ERROR_ILLEGAL_ADDRESS")
        return np.frombuffer((ctypes.c_uint8 * size).from_address(pointer), np.uint8)


class FakeBuffer(Resource):
    """Exactly as much memory as asked for, so that a sanitizer sees a step beyond it."""

    def __init__(self, device: FakeDevice, size: int):
        address = ctypes.c_void_p()
        assert _libc.posix_memalign(ctypes.byref(address), _ALIGNMENT, ctypes.c_size_t(size)) == 0
        assert address.value is not None
        self.pointer = address.value
        ctypes.memset(self.pointer, _GARBAGE, size)
        device.buffers[self.pointer] = size
        super().__init__(_free, device, self.pointer)


def _free(device: FakeDevice, pointer: int) -> None:
    """Waits for what may use the memory, as the driver does."""
    for stream in device.streams:
        stream.run_queued()
    device.buffers.pop(pointer, None)
    _libc.free(pointer)


class FakeStream(Resource):
    def __init__(self, device: FakeDevice):
        super().__init__(int)  # nothing to release
        self.device = device
        self.handle = id(self)
        self._queue: list[Callable[[], None]] = []
        self._captured: list[Callable[[], None]] | None = None  # while it is captured
        device.streams.add(self)

    def upload(self, pointer: int, host: NDArray[Any]) -> None:
        self.enqueue(lambda: np.copyto(self.device.bytes_at(pointer, host.nbytes), _bytes(host)))

    def download(self, host: NDArray[Any], pointer: int) -> None:
        self.enqueue(lambda: np.copyto(_bytes(host), self.device.bytes_at(pointer, host.nbytes)))

    def copy(self, to: int, source: int, size: int) -> None:
        self.enqueue(lambda: np.copyto(self.device.bytes_at(to, size), self.device.bytes_at(source, size)))

    def launch(self, symbol: str, grid: Extent, block: Extent, arguments: bytes) -> None:
        if self.device.fails("launch"):
            raise DeviceError("cuLaunchKernel", "CUDA_ERROR_LAUNCH_FAILED")

        def run() -> None:
            extents = (ctypes.c_uint32 * 3)(*grid), (ctypes.c_uint32 * 3)(*block)
            assert self.device.library.tubelet_cuda_host_launch(symbol.encode(), *extents, arguments) == 0, symbol
            self.device.launched.append(symbol)

        self.enqueue(run)

    def enqueue(self, work: Callable[[], None]) -> None:
        """Queues other work, such as a fake engine's; called for each replay when captured."""
        assert self._finalizer.alive, "the stream is closed"
        (self._queue if self._captured is None else self._captured).append(work)

    def capture(self, work: Callable[[], object]) -> FakeGraph:
        self._captured = captured = []
        self.device.capturing = True
        try:
            work()
            if self.device.fails("capture"):
                raise DeviceError("cuStreamEndCapture", "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED")
            return FakeGraph(captured)
        finally:
            self.device.capturing, self._captured = False, None

    def synchronize(self) -> None:
        if self.device.capturing:
            raise DeviceError("cuStreamSynchronize", "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED")
        self.run_queued()

    def run_queued(self) -> None:
        queued, self._queue = self._queue, []
        for work in queued:
            work()


class FakeGraph(Resource):
    def __init__(self, work: list[Callable[[], None]]):
        super().__init__(work.clear)
        self._work = work

    def launch(self, stream: Stream) -> None:
        assert isinstance(stream, FakeStream) and self._finalizer.alive
        for work in self._work:
            stream.enqueue(work)


def _bytes(host: NDArray[Any]) -> NDArray[np.uint8]:
    return host.reshape(-1).view(np.uint8)
