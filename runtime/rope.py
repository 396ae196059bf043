"""Rotary tables of a clip: what each kind of denoiser turns its queries and keys by.

Flows in: a ModelSpec and a Geometry. Flows out: cosines and sines, float32, in the shape that the denoiser's spec
names. The graphs have one rotary operation; how a family counts positions is a row of `TABLES`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import kernels
from .geometry import Geometry
from .spec import DenoiserSpec, LtxDenoiserSpec, ModelSpec

Float32 = NDArray[np.float32]
Tables = tuple[Float32, Float32]


def rope_tables(spec: ModelSpec, geometry: Geometry) -> Tables:
    """Cosines and sines for every token of a clip."""
    return TABLES[type(spec.denoiser)](spec, spec.denoiser, geometry)


def _of_positions(spec: ModelSpec, denoiser: DenoiserSpec, geometry: Geometry) -> Tables:
    """[N, D/2]: a token's row, column and frame turn a third of each head (see `kernels.rope3d`)."""
    return kernels.rope3d(geometry.grid, denoiser.head_size, theta=denoiser.theta)


def _of_places(spec: ModelSpec, denoiser: LtxDenoiserSpec, geometry: Geometry) -> Tables:
    """[heads, N, D/2]: seconds and pixels, as fractions of an extent, turn pairs through the whole width.

    With x from -1 at 0 to 1 at the extent, pair 3i + axis turns by pi/2 theta^(i/(n-1)) x (LTX-Video, HaCohen et al.
    2024), where n is a sixth of the width; pairs that are left stand before them and do not turn. In float32, rounded
    after each operation as in diffusers: the last angles reach 15,708, where one rounding is 1e-3, so the model was
    trained with them.
    """
    _, ph, pw = denoiser.patch
    side = spec.vae.spatial_factor
    steps = np.array((spec.vae.temporal_factor / spec.fps, side * ph, side * pw), np.float32)
    grid = np.meshgrid(*(np.arange(count, dtype=np.float32) for count in geometry.grid), indexing="ij")
    tokens = np.stack([axis.ravel() for axis in grid], axis=1)  # [N, 3]
    places = tokens * steps / np.array(denoiser.extent, np.float32)
    angles = (places * 2 - 1)[:, None] * _frequencies(denoiser.width // 6, denoiser.theta)[:, None]  # [N, n, 3]
    return _by_head(np.cos(angles), 1, denoiser), _by_head(np.sin(angles), 0, denoiser)


def _frequencies(count: int, theta: float) -> Float32:
    """[n]: from pi/2 to pi/2 theta. Exponents are counted from both ends, as torch.linspace does."""
    step, index = float(np.float32(1 / (count - 1))), np.arange(count)
    exponents = np.where(index < count // 2, step * index, 1 - step * index[::-1]).astype(np.float32)
    return (theta ** exponents.astype(np.float64)).astype(np.float32) * np.float32(np.pi) / np.float32(2)


def _by_head(pairs: Float32, still: float, denoiser: LtxDenoiserSpec) -> Float32:
    """[N, n, 3] -> [heads, N, D/2], after pairs of the value `still`."""
    tokens = len(pairs)
    before = np.full((tokens, denoiser.width % 6 // 2), still, np.float32)
    table = np.concatenate([before, pairs.reshape(tokens, -1)], axis=1)
    return np.ascontiguousarray(table.reshape(tokens, denoiser.heads, -1).transpose(1, 0, 2))


TABLES: Mapping[type[DenoiserSpec], Callable[[ModelSpec, Any, Geometry], Tables]] = MappingProxyType(
    {DenoiserSpec: _of_positions, LtxDenoiserSpec: _of_places}
)
