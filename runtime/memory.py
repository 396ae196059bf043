"""Device memory: what a device offers, and arrays that live there.

Flows in: NumPy arrays. Flows out: arrays on a device and, when a stream has been waited for, NumPy arrays. All work is
queued on an explicit stream and done in order; nothing waits but `synchronize`. Knows nothing of drivers (`cuda.py`
implements the protocols for NVIDIA GPUs) and of what is computed (`kernels.py`).
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, Self

import numpy as np
from numpy.typing import DTypeLike, NDArray

Extent = tuple[int, int, int]  # x, y, z


class Buffer(Protocol):
    """Device memory."""

    @property
    def pointer(self) -> int: ...
    def close(self) -> None: ...


class Graph(Protocol):
    """Work that was captured once, to be replayed on the same memory."""

    def launch(self, stream: Stream) -> None: ...
    def close(self) -> None: ...


class Stream(Protocol):
    """A queue of work on one device.

    Host arrays that it copies must not be changed or read until `synchronize`; the stream keeps them alive until then,
    and a graph as long as it lives.
    """

    @property
    def device(self) -> Device: ...
    @property
    def handle(self) -> int:
        """The driver's number of the stream, for other libraries."""
        ...

    def upload(self, pointer: int, host: NDArray[Any]) -> None: ...
    def download(self, host: NDArray[Any], pointer: int) -> None: ...
    def copy(self, to: int, source: int, size: int) -> None: ...
    def launch(self, symbol: str, grid: Extent, block: Extent, arguments: bytes) -> None:
        """Queues a kernel of `csrc/cuda`, whose one parameter has these bytes."""
        ...

    def capture(self, work: Callable[[], object]) -> Graph:
        """What `work` queues on this stream, as a graph; none of it runs now.

        Kernels must have been launched once before, outside a capture.
        """
        ...

    def synchronize(self) -> None: ...
    def close(self) -> None: ...


class MemoryInfo(NamedTuple):
    free: int  # bytes
    total: int


class Device(Protocol):
    @property
    def name(self) -> str: ...
    @property
    def architecture(self) -> str:
        """As engines are compiled for it, such as "sm90"."""
        ...

    def memory(self) -> MemoryInfo: ...
    def allocate(self, size: int) -> Buffer: ...
    def stream(self) -> Stream: ...
    def close(self) -> None: ...


_REMEDIES = {
    "CUDA_ERROR_OUT_OF_MEMORY": "free device memory, or make a smaller or shorter video",
    "CUDA_ERROR_NO_BINARY_FOR_GPU": "this GPU is older than any tubelet is built for (sm75); use target cpu",
    "CUDA_ERROR_UNSUPPORTED_PTX_VERSION": "the NVIDIA driver is older than tubelet's compiler; install a newer driver",
    "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH": "restart the machine after updating the NVIDIA driver",
    "CUDA_ERROR_ILLEGAL_ADDRESS": "an earlier piece of work touched wrong memory; restart the process and report it",
    "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED": "something waited for the device meanwhile; steps go on without a graph",
}


class DeviceError(RuntimeError):
    """A device refused or broke; `code` is the driver's name of the reason."""

    def __init__(self, what: str, code: str):
        super().__init__(f"{what} failed with {code}: {_REMEDIES.get(code, 'see the description in the CUDA manual')}")
        self.code = code


class Resource:
    """Something that is released by `close`, at the end of a `with` block, or at last with the object."""

    def __init__(self, release: Callable[..., object], *arguments: object):
        """`release(*arguments)` must not refer to the object."""
        self._finalizer = weakref.finalize(self, release, *arguments)

    def close(self) -> None:
        self._finalizer()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


@dataclass(frozen=True, eq=False)
class DeviceArray:
    """An array in device memory; bfloat16 is `ml_dtypes.bfloat16` or uint16, as in `kernels.py`.

    Views share the buffer and keep it alive; `close` frees it for all of them.
    """

    buffer: Buffer
    pointer: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    strides: tuple[int, ...]  # bytes

    @classmethod
    def empty(cls, device: Device, shape: Sequence[int], dtype: DTypeLike) -> DeviceArray:
        """Allocates; the values are arbitrary."""
        shape, dtype = tuple(map(int, shape)), np.dtype(dtype)
        buffer = device.allocate(math.prod(shape) * dtype.itemsize)
        return cls(buffer, buffer.pointer, shape, dtype, _dense(shape, dtype.itemsize))

    @classmethod
    def from_host(cls, host: NDArray[Any], stream: Stream) -> DeviceArray:
        """Allocates on the stream's device, and queues the copy."""
        array = cls.empty(stream.device, host.shape, host.dtype)
        array.upload(host, stream)
        return array

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def contiguous(self) -> bool:
        dense = _dense(self.shape, self.dtype.itemsize)
        axes = zip(self.shape, self.strides, dense, strict=True)
        return all(extent == 1 or stride == wanted for extent, stride, wanted in axes) or not self.nbytes

    def upload(self, host: NDArray[Any], stream: Stream) -> None:
        """Queues the copy of a host array of this shape and dtype; both must be contiguous."""
        self._check_like(host, host.flags.c_contiguous)
        stream.upload(self.pointer, host)

    def download(self, host: NDArray[Any], stream: Stream) -> None:
        """Queues the copy into a host array, which holds the values once the stream has been waited for."""
        self._check_like(host, host.flags.c_contiguous)
        stream.download(host, self.pointer)

    def copy_from(self, source: DeviceArray, stream: Stream) -> None:
        """Queues the copy of another array of this shape and dtype; both must be contiguous."""
        self._check_like(source, source.contiguous)
        stream.copy(self.pointer, source.pointer, self.nbytes)

    def to_host(self, stream: Stream) -> NDArray[Any]:
        """The values, after all that is queued on the stream: waits for it."""
        host = np.empty(self.shape, self.dtype)
        self.download(host, stream)
        stream.synchronize()
        return host

    def __getitem__(self, index: int | slice | tuple[int | slice, ...]) -> DeviceArray:
        """A view, as NumPy's; slices go forward one by one."""
        given = index if isinstance(index, tuple) else (index,)
        every = (*given, *[slice(None)] * (len(self.shape) - len(given)))
        pointer, kept = self.pointer, []
        for at, extent, stride in zip(every, self.shape, self.strides, strict=True):
            if isinstance(at, slice):
                start, stop, step = at.indices(extent)
                if step != 1:
                    raise IndexError(f"slices of device arrays have step 1, not {step}")
                kept.append((max(0, stop - start), stride))
            else:
                start = range(extent)[at]
            pointer += start * stride
        shape, strides = tuple(extent for extent, _ in kept), tuple(stride for _, stride in kept)
        return DeviceArray(self.buffer, pointer, shape, self.dtype, strides)

    def reshape(self, *shape: int) -> DeviceArray:
        """A view of a contiguous array with the same number of values."""
        if not self.contiguous or math.prod(shape) != math.prod(self.shape):
            raise ValueError(f"shape {self.shape} with strides {self.strides} cannot be seen as {shape}")
        return DeviceArray(self.buffer, self.pointer, shape, self.dtype, _dense(shape, self.dtype.itemsize))

    def close(self) -> None:
        self.buffer.close()

    def _check_like(self, other: NDArray[Any] | DeviceArray, contiguous: bool) -> None:
        if other.shape != self.shape or other.dtype != self.dtype:
            raise ValueError(
                f"an array {list(self.shape)} of {self.dtype} cannot be copied from or to "
                f"one {list(other.shape)} of {other.dtype}"
            )
        if not (contiguous and self.contiguous):
            raise ValueError(f"only contiguous arrays are copied; one of shape {list(self.shape)} is not")


def _dense(shape: Sequence[int], itemsize: int) -> tuple[int, ...]:
    return tuple(itemsize * math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
