"""The four operations around the denoiser: rotary tables, latents to tokens and back, and the fused sampler step.

Flows in and out: NumPy arrays, which the compiled extension (or, where it is absent, NumPy) reads and writes in place.
Values are float32, float16 or bfloat16: `ml_dtypes.bfloat16` arrays, or uint16 arrays holding their bits. Knows nothing
of samplers, models and videos. An array or number of the wrong dtype, shape, layout or range raises a ValueError that
names the argument; what is no array or number at all raises whatever Python does with it.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from importlib import import_module
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from . import kernels_numpy

try:
    _implementation = import_module("tubelet.runtime._kernels")
except ModuleNotFoundError:  # absent; one that is there but broken is an error
    _implementation = kernels_numpy

IMPLEMENTATION = "numpy" if _implementation is kernels_numpy else "extension"
THREADED: bool = _implementation.THREADED

Array = NDArray[Any]
Triple = tuple[int, int, int]

_CACHE_LINE = 64  # bytes


def set_threads(limit: int | None) -> None:
    """Limits the threads of every operation from now on, in the whole process; None: as many as there are cores."""
    _implementation.set_threads(limit or 0)


def rope3d(
    grid: Triple,
    head_dim: int,
    *,
    theta: float = 10000.0,
    offset: tuple[float, float, float] = (0.0, 0.0, 0.0),
    ntk: tuple[float, float, float] = (1.0, 1.0, 1.0),
    out: tuple[Array, Array] | None = None,
) -> tuple[Array, Array]:
    """Cosines and sines of the 3D rotary embedding, float32 [N, head_dim/2] each, for the token grid (t, h, w).

    Rows run over tokens, w fastest. Columns are [t | h | w]: h and w turn 2*(head_dim//6) values of the head each, t
    the rest. Column i of an axis of d values turns by theta^(-2i/d) a position (RoFormer, eq. 15; the split is Wan's),
    computed in float64. `offset` is added to the positions of each axis; `ntk` multiplies theta by ntk^(d/(d-2)) on
    each axis (NTK-aware scaling as in Cosmos). `out` is a pair of float32 arrays to write into.
    """
    grid = _triple("grid", grid)
    if out is None:
        shape = (math.prod(grid), max(0, head_dim) // 2)
        out = (empty(shape, np.float32), empty(shape, np.float32))
    _implementation.rope3d(*out, grid, head_dim, theta, _reals("offset", offset), _reals("ntk", ntk))
    return out


def pack(latent: Array, patch: Triple, *, out: Array | None = None) -> Array:
    """Latent [C, T*pt, H*ph, W*pw] -> tokens [N, P], N = T*H*W with w fastest, P = C*pt*ph*pw in that order.

    The order within a token is that of a Conv3d weight [*, C, pt, ph, pw], so patch embedding is one matrix product.
    `out` may have rows longer than P, or lying apart: only the first P values of each are written.
    """
    patch = _triple("patch", patch)
    if out is None:
        tokens = math.prod(extent // size for extent, size in zip(latent.shape[1:], patch, strict=False))
        out = empty((tokens, math.prod((*latent.shape[:1], *patch))), latent.dtype)
    _implementation.pack(_bits(out), _bits(latent), patch)
    return out


def unpack(tokens: Array, channels: int, grid: Triple, patch: Triple, *, out: Array | None = None) -> Array:
    """Tokens [N, >= P] -> latent [channels, T*pt, H*ph, W*pw] of the token grid (T, H, W): the inverse of `pack`.

    Rows may be longer than P = channels*pt*ph*pw, or lie apart: their first P values are read.
    """
    grid, patch = _triple("grid", grid), _triple("patch", patch)
    shape = (channels, grid[0] * patch[0], grid[1] * patch[1], grid[2] * patch[2])
    if out is None:
        out = empty(shape, tokens.dtype)
    elif out.shape != shape:
        raise ValueError(f"out must have shape {list(shape)}, has {list(out.shape)}")
    _implementation.unpack(_bits(out), _bits(tokens), patch)
    return out


def guided_step(
    state: Sequence[Array],
    velocity: Array,
    tokens: Array,
    matrix: ArrayLike,
    *,
    guidance: float = 1.0,
    known: Array | None = None,
    clean: Array | None = None,
    noise: Array | None = None,
    clean_scale: float = 1.0,
    noise_scale: float = 0.0,
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
        matrix: [S, S+1] for S state buffers.
        known: float32 [N], with clean (and noise unless noise_scale is 0): float32 [N, P].
    """
    _implementation.guided_step(
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


def _bits(array: Array) -> Array:
    """bfloat16 arrays as uint16, which every NumPy knows."""
    return array.view(np.uint16) if array.dtype.type.__name__ == "bfloat16" else array


def _triple(name: str, values: Sequence[int]) -> Triple:
    if len(values) != 3 or min(values) < 1:
        raise ValueError(f"{name} must be 3 positive integers, is {list(values)}")
    return operator.index(values[0]), operator.index(values[1]), operator.index(values[2])


def _reals(name: str, values: Sequence[float]) -> tuple[float, float, float]:
    if len(values) != 3:
        raise ValueError(f"{name} must be 3 numbers, is {list(values)}")
    return float(values[0]), float(values[1]), float(values[2])
