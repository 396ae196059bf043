"""Pixels <-> latents <-> token grid <-> N: which shapes are legal, and the nearest legal one.

Flows in: a ModelSpec and a requested size in pixels and frames. Flows out: a validated Geometry. Pure functions.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .errors import UserError
from .spec import COORDINATE_COLUMNS, ModelSpec

LARGEST = 4.0  # pixels of the largest given picture that keeps its size, over those of the model's default


@dataclass(frozen=True)
class Geometry:
    """One clip's shape in each of the three spaces; triples are (time, rows, columns)."""

    width: int
    height: int
    frames: int
    latent: tuple[int, int, int]
    grid: tuple[int, int, int]

    @property
    def tokens(self) -> int:
        """N: spacetime tokens of the clip."""
        t, h, w = self.grid
        return t * h * w


def size_step(spec: ModelSpec) -> tuple[int, int]:
    """Width and height in pixels must be multiples of these (width, height)."""
    _, ph, pw = spec.denoiser.patch
    return spec.vae.spatial_factor * pw, spec.vae.spatial_factor * ph


def frames_step(spec: ModelSpec) -> int:
    """A legal count of frames is 1 + this * k."""
    return spec.vae.temporal_factor


def frames_for(spec: ModelSpec, seconds: float, fps: float) -> int:
    """The legal count of frames nearest to a duration."""
    return _nearest_frames(spec, seconds * fps)


def nearest_size(spec: ModelSpec, width: int, height: int) -> tuple[int, int]:
    """The legal size for a picture of this size: its own aspect ratio, as nearly as steps allow.

    A picture of more than `LARGEST` times the area of the model's default is made smaller.
    """
    scale = min(1.0, (LARGEST * spec.defaults.width * spec.defaults.height / (width * height)) ** 0.5)
    across, down = size_step(spec)
    return (
        max(across, round(width * scale / across) * across),
        max(down, round(height * scale / down) * down),
    )


def tokens_of(spec: ModelSpec, width: int, height: int, frames: int) -> int:
    """N of a clip of a legal size; of another one, of the legal size below it."""
    across, down = size_step(spec)
    return (1 + (frames - 1) // frames_step(spec)) * (height // down) * (width // across)


def plan(spec: ModelSpec, width: int, height: int, frames: int) -> Geometry:
    """Checks a clip's size and maps it to latents and tokens.

    Raises UserError with the nearest legal value when a side is not a multiple of `size_step`, the frames are not
    1 + `frames_step` * k, or the tokens exceed the model's `max_tokens`.
    """
    for name, value, step in zip(("width", "height"), (width, height), size_step(spec), strict=True):
        if value < step or value % step:
            nearest = max(step, (value + step // 2) // step * step)
            raise UserError(
                f"{name} {value} is not a positive multiple of {step}; the nearest legal {name} is {nearest}"
            )
    if frames < 1 or (frames - 1) % frames_step(spec):
        nearest = _nearest_frames(spec, frames)
        raise UserError(f"frames {frames} is not 1 + {frames_step(spec)}*k; the nearest legal count is {nearest}")
    _, ph, pw = spec.denoiser.patch
    s = spec.vae.spatial_factor
    latent = (1 + (frames - 1) // spec.vae.temporal_factor, height // s, width // s)
    grid = (latent[0], latent[1] // ph, latent[2] // pw)
    geometry = Geometry(width, height, frames, latent, grid)
    if geometry.tokens > spec.max_tokens:
        most = 1 + max(0, spec.max_tokens // (grid[1] * grid[2]) - 1) * frames_step(spec)
        advice = (
            f"at {width}x{height} use at most {most} frames"
            if grid[1] * grid[2] <= spec.max_tokens
            else f"use at most {_largest_size(spec, geometry)}"
        )
        raise UserError(
            f"{width}x{height} with {frames} frame{'s' * (frames > 1)} is {geometry.tokens} tokens, "
            f"over the model's {spec.max_tokens}; {advice}"
        )
    return geometry


def _largest_size(spec: ModelSpec, geometry: Geometry) -> str:
    """The largest legal size of the same aspect ratio, for one frame."""
    _, rows, columns = geometry.grid
    scale = (spec.max_tokens / (rows * columns)) ** 0.5
    columns, rows = max(1, int(columns * scale)), max(1, int(rows * scale))
    columns = max(1, min(columns, spec.max_tokens // rows))  # a side that was raised to 1 takes from the other
    rows = min(rows, spec.max_tokens // columns)
    across, down = size_step(spec)
    return f"{columns * across}x{rows * down}"


def _nearest_frames(spec: ModelSpec, frames: float) -> int:
    step = frames_step(spec)
    return 1 + step * max(0, round((frames - 1) / step))


def coordinate_columns(grid: tuple[int, int, int]) -> np.ndarray:
    """Where each token is, as conditioning columns, float32 [N, 17].

    With u in (-1,1) the place inside the clip along an axis, i the index and n the count: for each of t, h, w
    (u, sin(pi u), cos(pi u), i/16, n/16), then the products u_t u_h and u_t u_w, whose correlation with the picture is
    what "moves down" and "moves right" mean.
    """
    axes = np.meshgrid(*(np.arange(n, dtype=np.float64) for n in grid), indexing="ij")
    places = [2 * (i + 0.5) / n - 1 for i, n in zip(axes, grid, strict=True)]
    columns = []
    for i, u, n in zip(axes, places, grid, strict=True):
        columns += [u, np.sin(np.pi * u), np.cos(np.pi * u), i / 16, np.full_like(u, n / 16)]
    columns += [places[0] * places[1], places[0] * places[2]]
    assert len(columns) == COORDINATE_COLUMNS
    return np.stack([c.ravel() for c in columns], axis=1).astype(np.float32)
