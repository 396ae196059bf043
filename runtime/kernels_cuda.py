"""The kernels on a stream of a CUDA device, with the interface of `csrc/ops.h`.

Flows in: arrays in device memory, which the compiled extension checks without touching them. Flows out: launches on the
stream. Knows nothing of the driver: the stream launches.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import Any

from numpy.typing import NDArray

from .errors import UserError
from .memory import DeviceArray, Extent, Stream

Description = tuple[int, str, tuple[int, ...], tuple[int, ...]]
Launch = tuple[str, Extent, Extent, bytes]  # kernel, grid, block, and its one parameter


def _extension() -> Any:
    try:
        return import_module("tubelet.runtime._kernels").cuda
    except ModuleNotFoundError as error:
        raise UserError(
            "kernels on a GPU need the compiled extension: install tubelet where there is a C++ compiler"
        ) from error


def step_bytes() -> int:
    """The size of `guided_step`'s arguments."""
    return int(_extension().STEP_BYTES)


class StreamKernels:
    def __init__(self, stream: Stream):
        """Raises UserError where the extension is absent."""
        self._described, self._stream = _extension(), stream

    def rope3d(self, cos: DeviceArray, sin: DeviceArray, *rest: object) -> None:
        self._stream.launch(*self._described.rope3d(_describe(cos), _describe(sin), *rest))

    def pack(self, tokens: DeviceArray, latent: DeviceArray, patch: tuple[int, int, int]) -> None:
        self._stream.launch(*self._described.pack(_describe(tokens), _describe(latent), patch))

    def unpack(self, latent: DeviceArray, tokens: DeviceArray, patch: tuple[int, int, int]) -> None:
        self._stream.launch(*self._described.unpack(_describe(latent), _describe(tokens), patch))

    def guided_step(self, *arguments: Any) -> None:
        self._stream.launch(*self.guided_step_launch(*arguments))

    def guided_step_launch(
        self,
        state: Sequence[DeviceArray],
        velocity: DeviceArray,
        tokens: DeviceArray,
        matrix: NDArray[Any],
        guidance: float = 1.0,
        known: DeviceArray | None = None,
        clean: DeviceArray | None = None,
        noise: DeviceArray | None = None,
        clean_scale: float = 1.0,
        noise_scale: float = 0.0,
    ) -> Launch:
        """What `guided_step` would launch."""
        launch: Launch = self._described.guided_step(
            [_describe(buffer) for buffer in state],
            _describe(velocity),
            _describe(tokens),
            matrix,
            guidance,
            *(None if array is None else _describe(array) for array in (known, clean, noise)),
            clean_scale,
            noise_scale,
        )
        return launch


def _describe(array: DeviceArray) -> Description:
    """Address, dtype, shape, and strides in elements."""
    dtype = "bfloat16" if array.dtype.name == "uint16" else array.dtype.name
    return array.pointer, dtype, array.shape, tuple(stride // array.dtype.itemsize for stride in array.strides)
