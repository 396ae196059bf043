"""Number formats of linear layers: float32 values -> what is stored of them, and what that stands for.

    w8     weights as int8 with a scale for each output; inputs as they are
    int8   the same weights; inputs as int8 with one scale
    fp8    both as E4M3, scaled in the same way
    nvfp4  both as E2M1 in blocks of 16 along the inputs: a scale in E4M3 for each block, and one for all

Flows in: arrays in float32. Flows out: rounded ones. Scales are values of bfloat16, so that a plan that computes in
bfloat16 has the same ones. Knows nothing of graphs. Sources: OCP 8-bit floating point (E4M3), OCP microscaling (E2M1).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

Float32 = NDArray[np.float32]
E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
E2M1 = np.dtype(ml_dtypes.float4_e2m1fn)
LARGEST_E4M3 = 448.0
BLOCK = 16  # of nvfp4


@dataclass(frozen=True)
class Format:
    name: str
    dtype: np.dtype[Any]  # of the values
    largest: float
    bits: float  # of a stored weight, its block's scale included
    rounds_inputs: bool = True
    block: int | None = None  # inputs that share a scale

    def round(self, values: Float32) -> NDArray[Any]:
        """The nearest values of the format, half to even; beyond the largest, the largest."""
        if self.dtype.kind == "i":
            return np.clip(np.rint(values), -self.largest - 1, self.largest).astype(self.dtype)
        return np.clip(values, -self.largest, self.largest).astype(self.dtype)


FORMATS: Mapping[str, Format] = MappingProxyType(
    {
        each.name: each
        for each in (
            Format("int8", np.dtype(np.int8), 127, 8),
            Format("fp8", E4M3, LARGEST_E4M3, 8),
            Format("nvfp4", E2M1, 6, 4.5, block=BLOCK),
            Format("w8", np.dtype(np.int8), 127, 8, rounds_inputs=False),
        )
    }
)


@dataclass(frozen=True)
class Rounded:
    """A weight [O,I] in a format."""

    values: NDArray[Any]  # [O,I]
    scales: NDArray[Any]  # float32 [O], or of blocks: E4M3 [O,I/block]
    tensor_scale: float | None  # that the blocks' scales are multiplied by

    def restore(self) -> Float32:
        """What it stands for, float32 [O,I]."""
        if self.tensor_scale is None:
            return self.values.astype(np.float32) * self.scales[:, None]
        return _restore_blocks(self.values, self.scales, self.tensor_scale)


def round_weight(format: Format, weight: Float32) -> Rounded:
    """A weight [O,I] with each output's, or each block's, greatest value at the format's largest."""
    if format.block is None:
        scales = _scale(np.abs(weight).max(axis=1) / format.largest)
        return Rounded(format.round(weight / scales[:, None]), scales, None)
    tensor_scale = float(input_scale(format, float(np.abs(weight).max())))
    return Rounded(*_round_blocks(format, weight, tensor_scale), tensor_scale)


def input_scale(format: Format, largest: float) -> float:
    """The scale of a layer's inputs, where `largest` is the greatest that they reach."""
    return float(_scale(np.float32(largest / format.largest / (LARGEST_E4M3 if format.block else 1))))


def round_inputs(format: Format, inputs: Float32, scale: float) -> Float32:
    """What inputs [...,I] of a layer become, with a scale from `input_scale`."""
    if not format.rounds_inputs:
        return inputs
    if format.block is None:
        return format.round(inputs / np.float32(scale)).astype(np.float32) * np.float32(scale)
    return _restore_blocks(*_round_blocks(format, inputs, scale), scale)


def _round_blocks(format: Format, values: Float32, tensor_scale: float) -> tuple[NDArray[Any], NDArray[Any]]:
    """Values [...,I] and the scales of their blocks [...,I/block]."""
    blocks = values.reshape(*values.shape[:-1], -1, format.block or 1)
    scales = np.abs(blocks).max(axis=-1) / np.float32(format.largest * tensor_scale)
    scales = np.clip(scales, 0, LARGEST_E4M3).astype(E4M3)
    steps = scales.astype(np.float32)[..., None] * np.float32(tensor_scale)
    rounded = format.round(np.divide(blocks, steps, out=np.zeros_like(blocks), where=steps > 0))
    return rounded.reshape(values.shape), scales


def _restore_blocks(values: NDArray[Any], scales: NDArray[Any], tensor_scale: float) -> Float32:
    blocks = values.astype(np.float32).reshape(*scales.shape, -1)
    return (blocks * (scales.astype(np.float32) * np.float32(tensor_scale))[..., None]).reshape(values.shape)


def _scale(values: NDArray[Any] | np.float32) -> NDArray[Any]:
    """The nearest value of bfloat16; 1 in place of 0, which only zeros have."""
    rounded = np.asarray(values, np.float32).astype(ml_dtypes.bfloat16).astype(np.float32)
    return np.where(rounded > 0, rounded, np.float32(1))
