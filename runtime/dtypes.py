"""Values as plans take them: the types of their inputs and outputs, by the names that records have.

Flows in and out: NumPy arrays. bfloat16 is kept as its bits in uint16, which every NumPy knows.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

DTYPES: dict[str, np.dtype[Any]] = {
    "fp32": np.dtype(np.float32),
    "fp16": np.dtype(np.float16),
    "bf16": np.dtype(np.uint16),
    "int64": np.dtype(np.int64),
    "int32": np.dtype(np.int32),
    "bool": np.dtype(np.bool_),
}


def to_plan(values: NDArray[Any], name: str) -> NDArray[Any]:
    """Values in a plan's type, contiguous; the same array where it is that already."""
    if name == "bf16" and values.dtype != DTYPES[name]:
        return from_float(values, DTYPES[name])
    return np.ascontiguousarray(values, DTYPES[name])


def from_plan(values: NDArray[Any], name: str) -> NDArray[Any]:
    """Values of a plan's type as the host works with them: floats in float32, others as they are."""
    return to_float(values) if name in ("fp16", "bf16") else values


def to_float(values: NDArray[Any]) -> NDArray[np.float32]:
    """float32, float16, or bfloat16's bits, as float32."""
    if values.dtype == np.uint16:
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float32)


def from_float(values: NDArray[np.float32], dtype: np.dtype[Any]) -> NDArray[Any]:
    """float32 rounded half to even, to bfloat16's bits where the dtype is uint16."""
    if dtype != np.uint16:
        return values.astype(dtype)
    bits = np.ascontiguousarray(values).view(np.uint32)
    half_to_even = (bits + np.uint32(0x7FFF) + (bits >> 16 & 1)) >> 16
    return np.where(np.isnan(values), bits >> 16 & 0x8000 | 0x7FC0, half_to_even).astype(np.uint16)
