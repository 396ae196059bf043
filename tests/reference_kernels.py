"""The kernels as their definitions, in NumPy and float64 where arithmetic happens: slow, and easy to believe."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Triple = tuple[int, int, int]


def rope3d(
    grid: Triple, head_dim: int, theta: float, offset: Sequence[float], ntk: Sequence[float]
) -> tuple[Array, Array]:
    space = 2 * (head_dim // 6)
    angles = []
    for axis, values in enumerate((head_dim - 2 * space, space, space)):
        stretch = ntk[axis] ** (values / (values - 2)) if ntk[axis] != 1 else 1.0
        position = np.indices(grid)[axis].reshape(-1, 1) + offset[axis]
        angles.append(position * (theta * stretch) ** (-np.arange(0, values, 2) / max(values, 1)))
    angle = np.concatenate(angles, axis=1)
    return np.cos(angle), np.sin(angle)


def pack(latent: Array, patch: Triple) -> Array:
    channels, grid = latent.shape[0], [extent // size for extent, size in zip(latent.shape[1:], patch, strict=True)]
    tokens = np.empty((np.prod(grid), channels * np.prod(patch)), latent.dtype)
    for n, corner in enumerate(np.ndindex(*grid)):
        t, h, w = (slice(i * size, (i + 1) * size) for i, size in zip(corner, patch, strict=True))
        tokens[n] = latent[:, t, h, w].ravel()
    return tokens


def guided_step(
    state: Sequence[Array],
    velocity: Array,
    matrix: Array,
    guidance: float,
    known: Array | None,
    clean: Array | None,
    noise: Array | None,
    clean_scale: float,
    noise_scale: float,
) -> tuple[Array, Array]:
    """The new state [S,N,P], and for each element the sum of its terms' sizes, which its rounding error scales with."""
    v = velocity.astype(np.float64)
    guided, size = v[0], np.abs(v[0])
    if len(v) == 2:
        guided, size = v[1] + guidance * (v[0] - v[1]), np.abs(v[1]) + abs(guidance) * (np.abs(v[0]) + np.abs(v[1]))
    before = np.stack([*state]).astype(np.float64)
    new = np.einsum("ij,jnp->inp", matrix, np.concatenate([before, guided[None]]))
    sizes = np.einsum("ij,jnp->inp", np.abs(matrix), np.concatenate([np.abs(before), size[None]]))
    if known is not None and clean is not None:
        added = 0.0 if noise is None else noise_scale * noise.astype(np.float64)
        pinned = known != 0
        new[0, pinned] = (clean_scale * clean + added)[pinned]
        sizes[0, pinned] = (abs(clean_scale) * np.abs(clean) + np.abs(added))[pinned]
    return new, sizes
