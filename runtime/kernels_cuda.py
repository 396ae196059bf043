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
from .memory import DeviceArray, Stream

Description = tuple[int, str, tuple[int, ...], tuple[int, ...]]


class StreamKernels:
    def __init__(self, stream: Stream):
        """Raises UserError where the extension is absent."""
        try:
            self._described = import_module("tubelet.runtime._kernels").cuda
        except ModuleNotFoundError as error:
            raise UserError(
                "kernels on a GPU need the compiled extension: install tubelet where there is a C++ compiler"
            ) from error
        self._stream = stream

    def rope3d(self, cos: DeviceArray, sin: DeviceArray, *rest: object) -> None:
        self._stream.launch(*self._described.rope3d(_describe(cos), _describe(sin), *rest))

    def pack(self, tokens: DeviceArray, latent: DeviceArray, patch: tuple[int, int, int]) -> None:
        self._stream.launch(*self._described.pack(_describe(tokens), _describe(latent), patch))

    def unpack(self, latent: DeviceArray, tokens: DeviceArray, patch: tuple[int, int, int]) -> None:
        self._stream.launch(*self._described.unpack(_describe(latent), _describe(tokens), patch))

    def guided_step(
        self,
        state: Sequence[DeviceArray],
        velocity: DeviceArray,
        tokens: DeviceArray,
        matrix: NDArray[Any],
        guidance: float,
        known: DeviceArray | None,
        clean: DeviceArray | None,
        noise: DeviceArray | None,
        clean_scale: float,
        noise_scale: float,
    ) -> None:
        self._stream.launch(
            *self._described.guided_step(
                [_describe(buffer) for buffer in state],
                _describe(velocity),
                _describe(tokens),
                matrix,
                guidance,
                *(None if array is None else _describe(array) for array in (known, clean, noise)),
                clean_scale,
                noise_scale,
            )
        )


def _describe(array: DeviceArray) -> Description:
    """Address, dtype, shape, and strides in elements."""
    dtype = "bfloat16" if array.dtype.name == "uint16" else array.dtype.name
    return array.pointer, dtype, array.shape, tuple(stride // array.dtype.itemsize for stride in array.strides)
