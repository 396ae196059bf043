"""Tiles cover a picture, blend without a seam, and change nothing where one is enough.

pytest tests/test_tiles.py
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tubelet.export.profiles import choose
from tubelet.export.traffic import Shape
from tubelet.runtime import Pipeline, UserError, vae
from tubelet.runtime.geometry import plan
from tubelet.runtime.profiles import nearest
from tubelet.runtime.spec import ModelSpec, VaeSpec
from tubelet.runtime.tiles import OVERLAP, cut, tile_size, weights

SPEC = VaeSpec(4, 2, (8, 8, 8), (True, True), 1, 1, (0.0,) * 4, (1.0,) * 4, chunk=1, tile=64)  # 8 latent pixels

sides = st.integers(1, 60)
most = st.integers(4, 40)


def of(largest: int) -> VaeSpec:
    """A VAE whose tiles have so many latent pixels a side."""
    return dataclasses.replace(SPEC, tile=largest * SPEC.spatial_factor)


@settings(deadline=None, max_examples=50)
@given(height=sides, width=sides, largest=most)
def test_tiles_cover_the_picture_and_overlap(height: int, width: int, largest: int) -> None:
    tiles = cut(of(largest), height, width)
    covered = np.zeros((height, width), int)
    for tile in tiles:
        assert (tile.height, tile.width) == tile_size(of(largest), height, width)
        assert tile.height <= min(height, largest) and tile.width <= min(width, largest)
        assert tile.of(covered).shape == (tile.height, tile.width)
        part = tile.of(covered)
        part += 1
    assert covered.min() >= 1
    for start, size in (("top", "height"), ("left", "width")):
        starts = sorted({getattr(tile, start) for tile in tiles})
        for before, after in itertools.pairwise(starts):
            assert before + getattr(tiles[0], size) - after >= min(OVERLAP, largest // 4)
    if height <= largest and width <= largest:
        assert len(tiles) == 1


@settings(deadline=None, max_examples=50)
@given(height=sides, width=sides, largest=most, scale=st.sampled_from([1, 2, 8]))
def test_weights_sum_to_one_and_fade_to_the_edge(height: int, width: int, largest: int, scale: int) -> None:
    tiles = cut(of(largest), height, width)
    total = np.zeros((height * scale, width * scale))
    for tile, share in zip(tiles, weights(tiles, scale), strict=True):
        assert share.dtype == np.float32 and (share > 0).all()
        if tile.left:
            assert (np.diff(share[0, : scale * tile.width // 2]) >= -1e-6).all() and share[0, 0] < share[0].max()
        part = tile.of(total, scale)
        part += share
    np.testing.assert_allclose(total, 1, atol=1e-6)


def test_a_tile_of_three_pixels_is_refused() -> None:
    with pytest.raises(UserError, match=r"vae.tile must be at least 32 pixels, 4 latent ones, is 24"):
        dataclasses.replace(SPEC, tile=24)


class Local:
    """Engines of a VAE without neighbours: a latent pixel is the mean of its 4x8x8 pixels, brighter by its age."""

    def __init__(self, half: str, first: bool, sizes: list[tuple[int, ...]]):
        self.half, self.first, self.sizes = half, first, sizes

    def __call__(self, inputs: dict[str, Any]) -> dict[str, Any]:
        x = inputs["latents" if self.half == "vae_decoder" else "pixels"]
        self.sizes.append(x.shape)
        age = np.zeros(1, np.float32) if self.first else inputs["cache_00"]
        frames = 1 if self.first else 4
        if self.half == "vae_decoder":
            y = x[:, :3].repeat(frames, axis=2).repeat(8, axis=3).repeat(8, axis=4) + age / 100
            return {"pixels": y, "next_cache_00": age + 1}
        b, c, t, h, w = x.shape
        y = x.reshape(b, c, t // frames, frames, h // 8, 8, w // 8, 8).mean(axis=(3, 5, 7)) + age / 100
        return {"latents": np.concatenate([y, y[:, :1]], axis=1), "next_cache_00": age + 1}

    advance = __call__


class LocalEngines:
    def __init__(self) -> None:
        self.sizes: list[tuple[int, ...]] = []

    def __getitem__(self, name: str) -> Any:
        return Local(name.removesuffix("_first"), name.endswith("_first"), self.sizes)


@settings(deadline=None, max_examples=25)
@given(h=st.integers(1, 20), w=st.integers(1, 20), t=st.integers(1, 4), seed=st.integers(0, 99))
def test_tiled_equals_whole_where_a_pixel_has_no_neighbours(h: int, w: int, t: int, seed: int) -> None:
    """Every tile runs through the clip with its own caches; what is kept between rounds to 1/2048 (float16)."""
    latent = np.random.default_rng(seed).uniform(-0.9, 0.9, (4, t, h, w)).astype(np.float32)
    engines = LocalEngines()
    tiled = np.concatenate(list(vae.decode(SPEC, engines, latent)))
    assert {size[3:] for size in engines.sizes} == {tile_size(SPEC, h, w)}
    whole = np.concatenate(list(vae.decode(of(99), LocalEngines(), latent)))
    assert tiled.shape == whole.shape == (4 * t - 3, 8 * h, 8 * w, 3)
    assert np.abs(tiled.astype(int) - whole).max() <= 1

    encoded = vae.encode(SPEC, LocalEngines(), whole)
    np.testing.assert_allclose(encoded, vae.encode(of(99), LocalEngines(), whole), atol=1e-6)


def clip(width: int, height: int, frames: int) -> np.ndarray:
    """A red circle that moves right on a white background, as the model knows it."""
    t, y, x = np.ogrid[:frames, :height, :width]
    inside = (x - 20 - 8 * t) ** 2 + (y - height / 2) ** 2 < 14**2
    return np.where(inside[..., None], np.array([220, 40, 40]), 255).astype(np.uint8)


def test_the_embedded_vae_is_as_good_in_tiles(pipeline: Pipeline) -> None:
    """What tiles change is below what the VAE loses; the circle crosses the seams."""
    frames = clip(128, 96, 9)
    tiled = dataclasses.replace(pipeline.spec.vae, tile=64)
    latent, parts = pipeline.encode(frames), vae.encode(tiled, pipeline.engines, frames)
    whole = psnr(np.concatenate(list(pipeline.decode_latent(latent))), frames)
    in_tiles = psnr(np.concatenate(list(vae.decode(tiled, pipeline.engines, latent))), frames)
    both = psnr(np.concatenate(list(vae.decode(tiled, pipeline.engines, parts))), frames)
    assert whole > 20 and min(in_tiles, both) > whole - 1, (whole, in_tiles, both)


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(10 * np.log10(255**2 / np.square(a.astype(float) - b).mean()))


def test_advancing_is_running_in_the_caches_own_memory(pipeline: Pipeline) -> None:
    """Over many chunks, so that what is written over is what the next chunk reads."""
    latent = np.random.default_rng(0).standard_normal((1, 8, 9, 6, 8), np.float32)
    first, engine = pipeline.engines["vae_decoder_first"], pipeline.engines["vae_decoder"]
    frames = [np.ascontiguousarray(latent[:, :, at : at + 1]) for at in range(9)]
    expected, found = first({"latents": frames[0]}), first.advance({"latents": frames[0]})
    for frame in frames[1:]:
        given = {"latents": frame}
        addresses = {name: cache.ctypes.data for name, cache in caches(found).items()}
        expected, found = engine({**given, **caches(expected)}), engine.advance({**given, **caches(found)})
        np.testing.assert_array_equal(found["pixels"], expected["pixels"])
        for name, cache in caches(found).items():
            np.testing.assert_array_equal(cache, caches(expected)[name])
            assert cache.ctypes.data == addresses[name]


def caches(results: dict[str, Any]) -> dict[str, Any]:
    return {name.removeprefix("next_"): value for name, value in results.items() if name.startswith("next_")}


def test_plans_are_asked_for_a_tile(spec: ModelSpec) -> None:
    """A picture of four tiles needs a VAE's plan for one of them."""
    tiled = dataclasses.replace(spec, vae=dataclasses.replace(spec.vae, tile=64))
    choice = choose(tiled, [Shape(112, 96, 9, 1.0)], 1)
    (box,) = choice.profiles["vae_decoder_first"]
    assert (box["h"].max, box["w"].max) == tile_size(tiled.vae, 12, 14) == (7, 8)
    found = nearest(tiled, choice.profiles, 112, 96, 9)
    assert (found.width, found.height) == (112, 96)
    assert plan(tiled, 112, 96, 9).latent == (3, 12, 14)
