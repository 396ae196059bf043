"""Optimization profiles: what sizes an engine was compiled for, which profile a run takes, and the nearest shape.

Flows in: the profiles of a bundle's components, and the extents of a run or a requested size. Flows out: a profile's
index, or a Geometry. Knows nothing of how profiles were chosen or of what compiles them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from .bundle import Extents
from .errors import UserError
from .geometry import Geometry, frames_step, plan, size_step
from .spec import ModelSpec
from .strict import require
from .tiles import tile_size

ASPECT = 4  # a changed aspect ratio weighs as much as this many times the change of area, both in doublings
LARGEST_IN_TILES = 4  # the advice for a picture that no profile takes goes no further


@dataclass(frozen=True)
class Range:
    """The values that a varying extent may take; kernels are chosen for `opt`."""

    min: int
    opt: int
    max: int

    def __post_init__(self) -> None:
        require(
            1 <= self.min <= self.opt <= self.max,
            f"a range must have 1 <= min <= opt <= max, has {self.min}, {self.opt}, {self.max}",
        )

    def __contains__(self, value: int) -> bool:
        return self.min <= value <= self.max


Profile = Mapping[str, Range]  # by the name of a varying extent in the component's ports: B, N, h, ...
Profiles = Mapping[str, Sequence[Profile]]  # by component


def select(profiles: Sequence[Profile], extents: Extents) -> int | None:
    """The index of the cheapest profile that takes a run of these extents, None where none does."""
    taking = [i for i, p in enumerate(profiles) if all(extent in p[name] for name, extent in extents.items())]
    return min(taking, key=lambda i: distance(profiles[i], extents), default=None)


def distance(profile: Profile, extents: Extents) -> float:
    """How far a run is from what a profile's kernels were chosen for: doublings, summed over the extents."""
    return sum(abs(math.log2(extent / profile[name].opt)) for name, extent in extents.items())


def nearest(spec: ModelSpec, profiles: Profiles, width: int, height: int, frames: int) -> Geometry:
    """The shape inside the profiles that is nearest to a requested one, which may be any.

    The picture decides first, by its aspect ratio before its area; then the number of frames. Raises UserError for a
    request that is not positive and where no legal shape is inside the profiles.
    """
    require(min(width, height, frames) > 0, f"a shape must be above 0, is {width}x{height} with {frames} frames")
    across, down = size_step(spec)
    latent_frames = 1 + round((frames - 1) / frames_step(spec))

    def far(grid: tuple[int, int, int]) -> tuple[float, float]:
        t, rows, columns = grid
        wider, taller = math.log2(columns * across / width), math.log2(rows * down / height)
        return ASPECT * abs(wider - taller) + abs(wider + taller), abs(math.log2(t / latent_frames))

    found = min(_grids(spec, profiles, latent_frames), key=far, default=None)
    if found is None:
        raise UserError(f"no shape of the model {spec.name} is inside the profiles; compile it for other traffic")
    t, rows, columns = found
    return plan(spec, columns * across, rows * down, 1 + (t - 1) * frames_step(spec))


def _grids(spec: ModelSpec, profiles: Profiles, latent_frames: int) -> Iterator[tuple[int, int, int]]:
    """Every picture inside the VAE's profiles, each with the number of latent frames nearest to the wanted one that a
    profile of the denoiser takes."""
    _, ph, pw = spec.denoiser.patch
    pictures = {
        (rows, columns)
        for box in profiles["vae_decoder"]
        for rows in _inside(spec, box["h"], ph)
        for columns in _inside(spec, box["w"], pw)
    }
    for rows, columns in sorted(pictures):
        for profile in profiles["denoiser"]:
            least, most = -(-profile["N"].min // (rows * columns)), profile["N"].max // (rows * columns)
            if least <= most:
                yield min(max(latent_frames, least), most), rows, columns


def _inside(spec: ModelSpec, extent: Range, patch: int) -> list[int]:
    """Rows or columns of tokens whose tiles the VAE takes, of pictures up to `LARGEST_IN_TILES` tiles a side."""
    most = LARGEST_IN_TILES * extent.max // patch
    return [tokens for tokens in range(1, most + 1) if tile_size(spec.vae, tokens * patch, 1)[0] in extent]
