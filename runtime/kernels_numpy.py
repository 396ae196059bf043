"""The kernels in plain NumPy: what runs where the compiled extension is absent, with the extension's interface.

Flows in and out: the arguments of `csrc/ops.h`, bfloat16 as its uint16 bits. `guided_step` gives the extension's bits:
the same float32 operations in the same order. Knows nothing of defaults and allocation: see `kernels.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .dtypes import from_float, to_float

Array = NDArray[Any]
Triple = tuple[int, int, int]

_BLOCK = 1 << 16  # elements that guided_step handles at once
_NAMES = {"f4": "float32", "f2": "float16", "u2": "bfloat16"}


THREADED = False


def set_threads(limit: int) -> None:
    """Nothing to limit: these run on one thread."""


def rope3d(
    cos: Array,
    sin: Array,
    grid: Triple,
    head_dim: int,
    theta: float,
    offset: tuple[float, float, float],
    ntk: tuple[float, float, float],
) -> None:
    _require(head_dim >= 2 and head_dim % 2 == 0, "head_dim", f"must be even and positive, is {head_dim}")
    _require(all(1 <= size <= 1 << 20 for size in grid), "grid", f"must lie within 1 and 2^20, is {list(grid)}")
    _require(theta > 0, "theta", f"must be positive, is {theta}")
    _require(all(factor > 0 for factor in ntk), "ntk", f"must be positive, is {list(ntk)}")
    shape = (grid[0] * grid[1] * grid[2], head_dim // 2)
    _check("cos", cos, shape, "f4", writable=True)
    _check("sin", sin, shape, "f4", writable=True)
    _check_apart("sin", sin, cos=cos)

    space = 2 * (head_dim // 6)
    at = 0
    for axis, values in enumerate((head_dim - 2 * space, space, space)):
        _require(
            ntk[axis] == 1 or values > 2, "ntk", "needs more than 2 values of the head on the axis that it stretches"
        )
        stretched = theta if ntk[axis] == 1 else theta * ntk[axis] ** (values / (values - 2))
        frequencies = 1.0 / stretched ** (np.arange(0, values, 2) / max(values, 1))
        positions = np.arange(grid[axis]) + float(offset[axis])
        angles = np.expand_dims(np.outer(positions, frequencies), [i for i in range(3) if i != axis])
        columns = slice(at, at := at + values // 2)
        for table, function in ((cos, np.cos), (sin, np.sin)):
            table.reshape(*grid, -1)[..., columns] = function(angles)


def pack(tokens: Array, latent: Array, patch: Triple) -> None:
    grid, values = _patching(latent, patch, writable=False)
    _check_tokens(tokens, latent, grid, values, writable=True)
    _check_apart("tokens", tokens, latent=latent)
    tokens[:, :values] = _split(latent, grid, patch).transpose(1, 3, 5, 0, 2, 4, 6).reshape(-1, values)


def unpack(latent: Array, tokens: Array, patch: Triple) -> None:
    grid, values = _patching(latent, patch, writable=True)
    _check_tokens(tokens, latent, grid, values, writable=False)
    _check_apart("latent", latent, tokens=tokens)
    patches = tokens[:, :values].reshape(*grid, latent.shape[0], *patch)
    _split(latent, grid, patch)[...] = patches.transpose(3, 0, 4, 1, 5, 2, 6)


@np.errstate(all="ignore")  # infinities and NaNs pass through silently, as in the extension
def guided_step(
    state: Sequence[Array],
    velocity: Array,
    tokens: Array,
    matrix: Array,
    guidance: float,
    known: Array | None,
    clean: Array | None,
    noise: Array | None,
    clean_scale: float,
    noise_scale: float,
) -> None:
    _check_step(state, velocity, tokens, matrix, known, clean, noise, noise_scale)
    count, width = velocity.shape[1:]
    rows = max(1, _BLOCK // max(1, width))
    for at in range(0, count, rows):
        block = slice(at, at + rows)
        guided = to_float(velocity[0, block])
        if len(velocity) == 2:
            unconditional = to_float(velocity[1, block])
            guided = unconditional + np.float32(guidance) * (guided - unconditional)
        terms = [*(buffer[block] for buffer in state), guided]
        changed = {row: _combine(matrix[row], terms) for row in range(len(state)) if row == 0 or _changes(matrix, row)}
        if known is not None and clean is not None:
            pinned = np.float32(clean_scale) * clean[block]
            if noise is not None and noise_scale:
                pinned += np.float32(noise_scale) * noise[block]
            changed[0] = np.where(known[block, None] != 0, pinned, changed[0])
        for row, values in changed.items():
            state[row][block] = values
        tokens[:, block, :width] = from_float(changed[0], tokens.dtype)


def _combine(factors: Array, terms: Sequence[Array]) -> Array:
    """Sums in column order in float32; a term whose factor is zero is not looked at, so it may hold anything."""
    used = [factor * term for factor, term in zip(factors, terms, strict=True) if factor]
    return sum(used[1:], used[0]) if used else np.zeros_like(terms[-1])


def _changes(matrix: Array, row: int) -> bool:
    return bool(np.any(matrix[row] != np.eye(1, matrix.shape[1], row, dtype=np.float32)))


def _split(latent: Array, grid: Triple, patch: Triple) -> Array:
    """[C, T*pt, H*ph, W*pw] -> a view [C, T, pt, H, ph, W, pw]."""
    (t, h, w), (pt, ph, pw) = grid, patch
    return (
        latent.reshape(-1, t, pt, h, ph, w, pw) if latent.size else latent.reshape(latent.shape[0], t, pt, h, ph, w, pw)
    )


def _require(condition: bool, name: str, problem: str) -> None:
    if not condition:
        raise ValueError(f"{name} {problem}")


def _check(
    name: str, array: Array, shape: tuple[int | None, ...], dtype: str = "", *, dense: int = 9, writable: bool = False
) -> None:
    """One argument's dtype ("" for any of the three), shape (None for any size) and layout of its last axes."""
    found = array.dtype.str[1:]
    if dtype:
        _require(found == dtype, name, f"must be {_NAMES[dtype]}, is {_NAMES.get(found, array.dtype)}")
    _require(found in _NAMES, name, f"must be float32, float16 or bfloat16, is {array.dtype}")
    fits = array.ndim == len(shape) and all(want in (None, has) for want, has in zip(shape, array.shape, strict=True))
    _require(
        fits,
        name,
        f"must have shape {[want if want is not None else 'any' for want in shape]}, has {list(array.shape)}",
    )
    expected = array.itemsize
    for axis in reversed(range(array.ndim)):
        if array.size and array.shape[axis] > 1:
            stride, last = array.strides[axis], axis >= array.ndim - dense
            problem = f"contiguous in its last {min(dense, array.ndim)} axes" if last else "free of overlap"
            _require(
                stride == expected if last else stride >= expected,
                name,
                f"must be {problem}, has strides {array.strides}",
            )
            expected = stride * array.shape[axis]
    _require(array.flags.aligned, name, "must be aligned to its dtype")
    _require(array.flags.writeable or not writable, name, "must be a writable array")


def _check_apart(name: str, written: Array, **others: Array) -> None:
    for other, array in others.items():
        _require(not np.may_share_memory(written, array), name, f"must not overlap {other}")


def _patching(latent: Array, patch: Triple, *, writable: bool) -> tuple[Triple, int]:
    """The token grid of a latent and the values of one token."""
    _check("latent", latent, (None,) * 4, writable=writable)
    _require(all(size >= 1 for size in patch), "patch", f"must be positive, is {list(patch)}")
    for axis, extent, size in zip(("frames", "rows", "columns"), latent.shape[1:], patch, strict=True):
        _require(
            extent % size == 0, "latent", f"must have a number of {axis} that is a multiple of {size}, has {extent}"
        )
    t, h, w = (extent // size for extent, size in zip(latent.shape[1:], patch, strict=True))
    return (t, h, w), latent.shape[0] * patch[0] * patch[1] * patch[2]


def _check_tokens(tokens: Array, latent: Array, grid: Triple, values: int, *, writable: bool) -> None:
    _check("tokens", tokens, (grid[0] * grid[1] * grid[2], None), latent.dtype.str[1:], dense=1, writable=writable)
    _require(tokens.shape[1] >= values, "tokens", f"must have at least {values} values a token, has {tokens.shape[1]}")


def _check_step(
    state: Sequence[Array],
    velocity: Array,
    tokens: Array,
    matrix: Array,
    known: Array | None,
    clean: Array | None,
    noise: Array | None,
    noise_scale: float,
) -> None:
    _require(1 <= len(state) <= 5, "state", f"must be x and at most 4 history buffers, has {len(state)} arrays")
    _check("velocity", velocity, (None,) * 3)
    batch, count, width = velocity.shape
    _require(batch in (1, 2), "velocity", f"must have 1 row, or 2 for guidance, has {batch}")
    for i, buffer in enumerate(state):
        _check(f"state[{i}]", buffer, (count, width), "f4", writable=True)
    _check("tokens", tokens, (batch, count, None), velocity.dtype.str[1:], dense=1, writable=True)
    _require(tokens.shape[2] >= width, "tokens", f"must have at least {width} values a token, has {tokens.shape[2]}")
    _check("matrix", matrix, (len(state), len(state) + 1), "f4")
    read = {"velocity": velocity}
    if known is not None:
        _check("known", known, (count,), "f4")
        if clean is None:
            raise ValueError("clean is missing: known tokens are set to it")
        _check("clean", clean, (count, width), "f4")
        read["clean"] = clean
        if noise is not None:
            _check("noise", noise, (count, width), "f4")
            read["noise"] = noise
        _require(noise is not None or not noise_scale, "noise", f"is missing although noise_scale is {noise_scale}")
    buffers = {f"state[{i}]": buffer for i, buffer in enumerate(state)}
    for i, (name, buffer) in enumerate(buffers.items()):
        _check_apart(name, buffer, **dict(list(buffers.items())[:i]), **read)
    _check_apart("tokens", tokens, **buffers, velocity=velocity)
