"""What is known of a clip before it is made: its tokens, which of them are known, and the noise it starts from.

Flows in: pixels and a mask of those that are given. Flows out: a Canvas for `Pipeline.prepare`. Every task is a way to
fill one: see `studio.py`. Knows nothing of engines, samplers and files.

A token spans 16x16 pixels of one latent frame (for the embedded model), and a latent frame is the clip's first frame
or four of those after it. A token is known when every pixel that it spans is given.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .errors import UserError
from .geometry import frames_step, size_step
from .spec import ModelSpec

Frames = NDArray[np.uint8]  # [T,H,W,3]
Mask = NDArray[np.bool_]  # [T,H,W]


@dataclass(frozen=True)
class Canvas:
    """Known tokens stay as they are; the others start from noise and, below strength 1, from what they hold."""

    latents: NDArray[np.float32]  # [C,T',H',W'], normalised, as `Pipeline.encode` makes them
    known: Mask  # the token grid
    noise: NDArray[np.float32] | None = None  # shaped as the latents; None: drawn from the request's seed
    shown: NDArray[np.float32] | None = None  # [S,T',H',W'] for a model with channels for it, see `shown_mask`
    pictures: Frames | None = None  # [K,H,W,3] for a model with an image encoder

    def __post_init__(self) -> None:
        if self.latents.dtype != np.float32 or self.latents.ndim != 4:
            raise UserError(f"latents must be float32 [C,T,H,W], are {self.latents.dtype} {list(self.latents.shape)}")
        if self.known.dtype != np.bool_ or self.known.ndim != 3:
            raise UserError(f"known must be bool [T,H,W], is {self.known.dtype} {list(self.known.shape)}")
        if self.noise is not None and (self.noise.dtype != np.float32 or self.noise.shape != self.latents.shape):
            raise UserError(
                f"noise must be float32 {list(self.latents.shape)}, is {self.noise.dtype} {list(self.noise.shape)}"
            )

        shape = self.latents.shape[1:]
        if self.shown is not None and (self.shown.dtype != np.float32 or self.shown.shape[1:] != shape):
            raise UserError(
                f"shown must be float32 [S,{','.join(map(str, shape))}], is {self.shown.dtype} {list(self.shown.shape)}"
            )
        if self.pictures is not None and (self.pictures.dtype != np.uint8 or self.pictures.shape[3:] != (3,)):
            raise UserError(f"pictures must be uint8 [K,H,W,3], are {self.pictures.dtype} {list(self.pictures.shape)}")

    def tensors(self) -> dict[str, NDArray]:
        """Its arrays by name."""
        return {name: array for name, array in vars(self).items() if array is not None}


def known_tokens(spec: ModelSpec, known: Mask) -> Mask:
    """Pixels [1 + 4k, H, W] -> tokens [1 + k, H/16, W/16] (for the embedded model): all pixels of a token are known."""
    height, width = known.shape[1:]
    step, (across, down) = frames_step(spec), size_step(spec)
    padded = np.concatenate([np.repeat(known[:1], step - 1, axis=0), known])
    cells = padded.reshape(len(padded) // step, step, height // down, down, width // across, across)
    return np.asarray(cells.all(axis=(1, 3, 5)))


def shown_mask(spec: ModelSpec, known: Mask) -> NDArray[np.float32]:
    """Pixels [1 + 4k, H, W] -> [4, 1 + k, H', W']: which of a latent frame's frames are known, all pixels of a cell.

    The first latent frame has one frame, which counts four times.
    """
    step, side = frames_step(spec), spec.vae.spatial_factor
    frames, height, width = known.shape
    cells = np.asarray(known.reshape(frames, height // side, side, width // side, side).all(axis=(2, 4)))
    padded = np.concatenate([np.repeat(cells[:1], step - 1, axis=0), cells])
    return padded.reshape(-1, step, *cells.shape[1:]).swapaxes(0, 1).astype(np.float32)


def fill(frames: Frames, known: Mask) -> Frames:
    """Gives every unknown pixel the value it has in the nearest frame in time that knows it, the earlier of two.

    A pixel that no frame knows becomes grey. The VAE's causal encoder sees these frames before a known token.
    """
    count = len(frames)
    time = np.arange(count)[:, None, None]
    before = np.maximum.accumulate(np.where(known, time, -count), axis=0)
    after = np.minimum.accumulate(np.where(known, time, 2 * count)[::-1], axis=0)[::-1]
    source = np.where(time - before <= after - time, before, after)
    found = np.asarray(known.any(axis=0))
    gathered = np.take_along_axis(frames, np.where(found, source, 0)[..., None], axis=0)
    return np.where(found[None, :, :, None], gathered, np.uint8(127))


def slerp(a: NDArray[np.float32], b: NDArray[np.float32], weight: float) -> NDArray[np.float32]:
    """Spherical interpolation between two arrays of one shape: `a` at weight 0, `b` at 1 (Shoemake 1985).

    Between two noises it keeps the spread that a model expects, which a mean does not.
    """
    cosine = np.vdot(a, b) / (np.linalg.norm(a) * np.linalg.norm(b))
    angle = np.arccos(np.clip(cosine, -1, 1))
    if angle < 1e-4:
        return a + np.float32(weight) * (b - a)
    first, second = np.sin((1 - weight) * angle) / np.sin(angle), np.sin(weight * angle) / np.sin(angle)
    return (first * a + second * b).astype(np.float32)
