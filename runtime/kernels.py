"""The four operations around the denoiser: rotary tables, latents to tokens and back, and the fused sampler step.

Flows in and out: NumPy arrays, which the compiled extension (or, where it is absent, NumPy) reads and writes in place;
or, with a stream, arrays on its device, on which the same is queued. Values are float32, float16 or bfloat16:
`ml_dtypes.bfloat16` arrays, or uint16 arrays holding their bits. Knows nothing of samplers, models and videos. An array
or number of the wrong dtype, shape, layout or range raises a ValueError that names the argument; what is no array or
number at all raises whatever Python does with it.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from importlib import import_module
from typing import Any, TypeVar, overload

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from . import kernels_numpy
from .kernels_cuda import StreamKernels
from .memory import DeviceArray, Stream

try:
    _implementation = import_module("tubelet.runtime._kernels")
except ModuleNotFoundError:  # absent; one that is there but broken is an error
    _implementation = kernels_numpy

IMPLEMENTATION = "numpy" if _implementation is kernels_numpy else "extension"
THREADED: bool = _implementation.THREADED

Array = NDArray[Any]
A = TypeVar("A", Array, DeviceArray)
Triple = tuple[int, int, int]

_CACHE_LINE = 64  # bytes


def set_threads(limit: int | None) -> None:
    """Limits the threads of every operation from now on, in the whole process; None: as many as there are cores."""
    _implementation.set_threads(limit or 0)


@overload
def rope3d(
    grid: Triple,
    head_dim: int,
    *,
    theta: float = ...,
    offset: tuple[float, float, float] = ...,
    ntk: tuple[float, float, float] = ...,
    out: tuple[Array, Array] | None = ...,
    stream: None = ...,
) -> tuple[Array, Array]: ...
@overload
def rope3d(
    grid: Triple,
    head_dim: int,
    *,
    theta: float = ...,
    offset: tuple[float, float, float] = ...,
    ntk: tuple[float, float, float] = ...,
    out: tuple[DeviceArray, DeviceArray] | None = ...,
    stream: Stream,
) -> tuple[DeviceArray, DeviceArray]: ...
def rope3d(
    grid: Triple,
    head_dim: int,
    *,
    theta: float = 10000.0,
    offset: tuple[float, float, float] = (0.0, 0.0, 0.0),
    ntk: tuple[float, float, float] = (1.0, 1.0, 1.0),
    out: tuple[Any, Any] | None = None,
    stream: Stream | None = None,
) -> tuple[Any, Any]:
    """Cosines and sines of the 3D rotary embedding, float32 [N, head_dim/2] each, for the token grid (t, h, w).

    Rows run over tokens, w fastest. Columns are [t | h | w]: h and w turn 2*(head_dim//6) values of the head each, t
    the rest. Column i of an axis of d values turns by theta^(-2i/d) a position (RoFormer, eq. 15; the split is Wan's),
    computed in float64. `offset` is added to the positions of each axis; `ntk` multiplies theta by ntk^(d/(d-2)) on
    each axis (NTK-aware scaling as in Cosmos). `out` is a pair of float32 arrays to write into.
    """
    grid = _triple("grid", grid)
    if out is None:
        shape = (math.prod(grid), max(0, head_dim) // 2)
        out = (_empty(shape, np.float32, stream), _empty(shape, np.float32, stream))
    _on(stream, *out).rope3d(*out, grid, head_dim, theta, _reals("offset", offset), _reals("ntk", ntk))
    return out


def pack(latent: A, patch: Triple, *, out: A | None = None, stream: Stream | None = None) -> A:
    """Latent [C, T*pt, H*ph, W*pw] -> tokens [N, P], N = T*H*W with w fastest, P = C*pt*ph*pw in that order.

    The order within a token is that of a Conv3d weight [*, C, pt, ph, pw], so patch embedding is one matrix product.
    `out` may have rows longer than P, or lying apart: only the first P values of each are written.
    """
    patch = _triple("patch", patch)
    if out is None:
        tokens = math.prod(extent // size for extent, size in zip(latent.shape[1:], patch, strict=False))
        out = _empty((tokens, math.prod((*latent.shape[:1], *patch))), latent.dtype, stream)
    _on(stream, out, latent).pack(_bits(out), _bits(latent), patch)
    return out


def unpack(
    tokens: A, channels: int, grid: Triple, patch: Triple, *, out: A | None = None, stream: Stream | None = None
) -> A:
    """Tokens [N, >= P] -> latent [channels, T*pt, H*ph, W*pw] of the token grid (T, H, W): the inverse of `pack`.

    Rows may be longer than P = channels*pt*ph*pw, or lie apart: their first P values are read.
    """
    grid, patch = _triple("grid", grid), _triple("patch", patch)
    shape = (channels, grid[0] * patch[0], grid[1] * patch[1], grid[2] * patch[2])
    if out is None:
        out = _empty(shape, tokens.dtype, stream)
    elif out.shape != shape:
        raise ValueError(f"out must have shape {list(shape)}, has {list(out.shape)}")
    _on(stream, out, tokens).unpack(_bits(out), _bits(tokens), patch)
    return out


def guided_step(
    state: Sequence[A],
    velocity: A,
    tokens: A,
    matrix: ArrayLike,
    *,
    guidance: float = 1.0,
    known: A | None = None,
    clean: A | None = None,
    noise: A | None = None,
    clean_scale: float = 1.0,
    noise_scale: float = 0.0,
    stream: Stream | None = None,
) -> None:
    """One step of any sampler, in place and in one pass over memory; arithmetic is float32.

    v = velocity[0], or velocity[1] + guidance * (velocity[0] - velocity[1]) where velocity holds the conditional and
    the unconditional prediction (classifier-free guidance). Then state = matrix @ [*state, v], and x = state[0] becomes
    clean_scale * clean + noise_scale * noise where known is not 0. x is also written to the first P values of each row
    of `tokens`, the denoiser's next input.

    Args:
        state: x and at most 4 history buffers, float32 [N, P] each. Buffers whose column of `matrix` is zero are not
            read, those whose row is the identity's are not written.
        velocity: [1 or 2, N, P].
        tokens: [1 or 2, N, >= P], of velocity's batch and dtype.
        matrix: [S, S+1] for S state buffers; always in host memory.
        known: float32 [N], with clean (and noise unless noise_scale is 0): float32 [N, P].
    """
    _on(stream, *state, velocity, tokens, known, clean, noise).guided_step(
        state,
        _bits(velocity),
        _bits(tokens),
        np.ascontiguousarray(matrix, np.float32),
        guidance,
        known,
        clean,
        noise,
        clean_scale,
        noise_scale,
    )


def empty(shape: Sequence[int], dtype: DTypeLike) -> Array:
    """np.empty at the start of a cache line, where the kernels write large results fastest."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    memory = np.empty(size + _CACHE_LINE, np.uint8)
    start = -memory.ctypes.data % _CACHE_LINE
    return memory[start : start + size].view(dtype).reshape(shape)


def _empty(shape: Sequence[int], dtype: DTypeLike, stream: Stream | None) -> Any:
    return empty(shape, dtype) if stream is None else DeviceArray.empty(stream.device, shape, dtype)


def _on(stream: Stream | None, *arrays: Array | DeviceArray | None) -> Any:
    """What works on these arrays: the extension or NumPy at once, or a stream later."""
    if any(isinstance(array, DeviceArray) is (stream is None) for array in arrays if array is not None):
        raise ValueError("stream must be given for arrays in device memory, and only for them")
    return _implementation if stream is None else StreamKernels(stream)


def _bits(array: A) -> A:
    """bfloat16 arrays as uint16, which every NumPy knows."""
    if isinstance(array, DeviceArray) or array.dtype.type.__name__ != "bfloat16":
        return array
    return array.view(np.uint16)


def _triple(name: str, values: Sequence[int]) -> Triple:
    if len(values) != 3 or min(values) < 1:
        raise ValueError(f"{name} must be 3 positive integers, is {list(values)}")
    return operator.index(values[0]), operator.index(values[1]), operator.index(values[2])


def _reals(name: str, values: Sequence[float]) -> tuple[float, float, float]:
    if len(values) != 3:
        raise ValueError(f"{name} must be 3 numbers, is {list(values)}")
    return float(values[0]), float(values[1]), float(values[2])
