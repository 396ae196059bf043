"""Latents to frames and back: chunk by chunk in time, and tile by tile where the picture is large.

Flows in: a VaeSpec, its engines, and latents or uint8 frames. Flows out: the other one. A clip's first frame goes
through a graph of its own; each later chunk takes the caches that the one before has left. A decoder that does not
stream takes a clip whole. A picture larger than
`vae.tile` is cut into tiles, each of which is run through the whole clip before the next, so that the caches of one are
held at a time. Knows nothing of how an engine runs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .engines import Components
from .spec import VaeSpec
from .tiles import cut, weights

Float32 = NDArray[np.float32]
Frames = NDArray[np.uint8]  # [T,H,W,3]

PORTS = {"vae_decoder": ("latents", "pixels"), "vae_encoder": ("pixels", "latents")}


def decode(vae: VaeSpec, engines: Components, latent: Float32) -> Iterator[Frames]:
    """Yields the frames of a normalised latent [C,T',H',W'], a chunk at a time.

    Memory does not grow with duration, but for the frames where there are tiles. A VAE that does not stream yields all
    frames at once, and its memory grows.
    """
    times, rows, columns = latent.shape[1:]
    chunks = _chunks(times, vae.chunk) if vae.streams else [slice(0, times)]
    tiles = cut(vae, rows, columns)
    if len(tiles) == 1:
        yield from map(_to_frames, _run(engines, "vae_decoder", latent, chunks, vae.streams))
        return
    scale, step = vae.spatial_factor, vae.temporal_factor
    blended = np.zeros((3, 1 + (times - 1) * step, rows * scale, columns * scale), np.float16)
    for tile, share in zip(tiles, weights(tiles, scale), strict=True):
        at = 0
        for pixels in _run(engines, "vae_decoder", tile.of(latent), chunks, vae.streams):
            part = tile.of(blended[:, at : at + pixels.shape[1]], scale)
            part += pixels * share
            at += pixels.shape[1]
    for chunk in _in_frames(chunks, step):
        yield _to_frames(blended[:, chunk].astype(np.float32))


def encode(vae: VaeSpec, engines: Components, frames: Frames | Float32) -> Float32:
    """Frames [1 + temporal_factor*k,H,W,3] -> normalised latent [C,T',H',W'], a chunk at a time.

    Frames are uint8, or float32 in [-1,1].
    """
    count, height, width, _ = frames.shape
    scale, step = vae.spatial_factor, vae.temporal_factor
    chunks = _chunks(1 + (count - 1) // step, vae.chunk)
    tiles = cut(vae, height // scale, width // scale)
    pixels = frames.transpose(3, 0, 1, 2)
    blended = np.zeros((vae.latent_channels, chunks[-1].stop, height // scale, width // scale), np.float32)
    for tile, share in zip(tiles, weights(tiles), strict=True):
        results = _run(engines, "vae_encoder", tile.of(pixels, scale), _in_frames(chunks, step))
        for chunk, latents in zip(chunks, results, strict=True):
            part = tile.of(blended[:, chunk])
            part += latents * share
    return blended


def _run(
    engines: Components, half: str, clip: NDArray[Any], chunks: Iterable[slice], streams: bool = True
) -> Iterator[Float32]:
    """Runs a half of the VAE over a clip [C,T,H,W]: the first frame, then the chunks behind it. Pixels may be uint8.

    A half that does not stream has one graph, for its only chunk.
    """
    source, result = PORTS[half]
    results: dict[str, Any] = {}
    for chunk in chunks:
        part = clip[None, :, chunk]
        inputs = {source: _to_pixels(part) if part.dtype == np.uint8 else np.ascontiguousarray(part)}
        inputs |= {name.removeprefix("next_"): cache for name, cache in results.items()}
        results = engines[f"{half}_first" if streams and not results else half].advance(inputs)
        yield results.pop(result)[0]


def _chunks(latent_frames: int, most: int) -> list[slice]:
    """Latent frames: the first alone, then as many as the graphs see at a time."""
    later = range(1, latent_frames, most)
    return [slice(0, 1), *(slice(start, min(start + most, latent_frames)) for start in later)]


def _in_frames(chunks: Iterable[slice], step: int) -> list[slice]:
    """The frames of which each chunk of latent frames is made."""
    return [slice(max(0, 1 + (chunk.start - 1) * step), 1 + (chunk.stop - 1) * step) for chunk in chunks]


def _to_pixels(frames: Frames) -> Float32:
    """uint8 -> float in [-1,1]."""
    return np.ascontiguousarray(frames.astype(np.float32) / np.float32(127.5) - 1)


def _to_frames(pixels: Float32) -> Frames:
    """Float [3,T,H,W] in [-1,1] -> uint8 [T,H,W,3]."""
    scaled = np.clip((pixels + 1) * 127.5, 0, 255)
    return np.ascontiguousarray(np.rint(scaled).astype(np.uint8).transpose(1, 2, 3, 0))
