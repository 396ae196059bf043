"""Cuts a large picture into equal tiles that overlap, and says how much of each pixel comes from which tile.

Flows in: a VaeSpec and a picture's size in latent pixels. Flows out: Tiles, whose weights sum to one at every pixel of
the picture. A tile is not smaller than it must be, so that as few as possible are computed. Pure functions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .spec import VaeSpec

OVERLAP = 8  # latent pixels that neighbours share at least; a quarter of the largest tile where that is less

Float32 = NDArray[np.float32]


@dataclass(frozen=True)
class Tile:
    """A part of a picture, in latent pixels from the top left."""

    top: int
    left: int
    height: int
    width: int

    def of(self, picture: NDArray, scale: int = 1) -> NDArray:
        """The part [...,h,w] of a picture [...,H,W] that has `scale` pixels to a latent one: a view."""
        rows = slice(self.top * scale, (self.top + self.height) * scale)
        return picture[..., rows, self.left * scale : (self.left + self.width) * scale]


def cut(vae: VaeSpec, height: int, width: int) -> list[Tile]:
    """The tiles of a picture [height,width]: one that is the whole, if it is not larger than `vae.tile`."""
    (tops, h), (lefts, w) = (_spans(length, _most(vae)) for length in (height, width))
    return [Tile(top, left, h, w) for top in tops for left in lefts]


def tile_size(vae: VaeSpec, height: int, width: int) -> tuple[int, int]:
    """The size of every tile of a picture, in latent pixels: what the VAE's graphs are run on."""
    tile = cut(vae, height, width)[0]
    return tile.height, tile.width


def weights(tiles: Sequence[Tile], scale: int = 1) -> list[Float32]:
    """For each tile [h,w] how much it gives to its pixels, `scale` to a latent one.

    Towards a neighbour a tile fades as its edge comes near.
    """
    rows = _fade(sorted({tile.top for tile in tiles}), tiles[0].height, scale)
    columns = _fade(sorted({tile.left for tile in tiles}), tiles[0].width, scale)
    return [rows[tile.top][:, None] * columns[tile.left] for tile in tiles]


def _most(vae: VaeSpec) -> int:
    return vae.tile // vae.spatial_factor


def _spans(length: int, most: int) -> tuple[list[int], int]:
    """Where equal spans begin that cover a length, and their size, which is at most `most`."""
    overlap = min(OVERLAP, most // 4)
    count = 1 if length <= most else -(-(length - overlap) // (most - overlap))
    size = -(-(length + (count - 1) * overlap) // count)
    return [(length - size) * i // max(1, count - 1) for i in range(count)], size


def _fade(starts: Sequence[int], size: int, scale: int) -> dict[int, Float32]:
    """By its start, a span's share of each of its pixels."""
    end = (starts[-1] + size) * scale
    pixels = np.arange(end) + 0.5
    distances = []  # of each pixel to the span's nearer edge; the picture's own edges are far away
    for start in starts:
        before = start * scale if start != starts[0] else -end
        after = (start + size) * scale if start != starts[-1] else 2 * end
        distances.append(np.minimum(pixels - before, after - pixels).clip(0))
    shares = np.divide(distances, np.sum(distances, axis=0)).astype(np.float32)
    return {start: share[start * scale :][: size * scale] for start, share in zip(starts, shares, strict=True)}
