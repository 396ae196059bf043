"""One decoded frame to a picture of the wanted size: upright, opaque, RGB.

Flows in: PyAV's frame, how it is meant to be shown, a size and a way to fit it. Flows out: uint8 RGB [H,W,3]. Knows
nothing of files or time. Colours follow the frame's tags; without tags, BT.601.
"""

from __future__ import annotations

from enum import StrEnum
from fractions import Fraction

import av
import numpy as np
from av.video.reformatter import Interpolation

from .errors import UserError
from .orientation import Matrix, is_turned, upright
from .video import RESAMPLE, Frames

Size = tuple[int, int]  # width, height
SCALING = RESAMPLE | Interpolation.FULL_CHR_H_INT


class Fit(StrEnum):
    """How a picture of another aspect ratio becomes the size that is wanted."""

    CROP = "crop"  # its middle
    LETTERBOX = "letterbox"  # all of it, between black bars
    STRETCH = "stretch"  # all of it, distorted


def shown_size(frame: av.VideoFrame, matrix: Matrix, pixel_aspect: Fraction) -> Size:
    """Width and height of a frame that is upright and has square pixels."""
    width, height = max(1, round(frame.width * pixel_aspect)), frame.height
    return (height, width) if is_turned(matrix) else (width, height)


def fitted(frame: av.VideoFrame, matrix: Matrix, shown: Size, size: Size, fit: Fit, max_pixels: int) -> Frames:
    """A frame as RGB [H,W,3] of that size: scaled to cover it or to lie inside it, then cut or laid on black.

    Raises UserError when covering it takes over `max_pixels`.
    """
    across, down = size
    scales = Fraction(across, shown[0]), Fraction(down, shown[1])
    if fit is not Fit.STRETCH:
        scales = (max(scales) if fit is Fit.CROP else min(scales),) * 2
    width, height = (max(1, round(side * scale)) for side, scale in zip(shown, scales, strict=True))
    if width * height > max_pixels:
        raise UserError(f"a picture of {shown[0]}x{shown[1]} is too long to crop to {across}x{down}; letterbox it")
    picture = upright(_rgb(frame, *((height, width) if is_turned(matrix) else (width, height))), matrix)
    framed = np.zeros((down, across, 3), np.uint8)
    common = min(height, down), min(width, across)
    _middle(framed, *common)[:] = _middle(picture, *common)
    return framed


def _rgb(frame: av.VideoFrame, width: int, height: int) -> Frames:
    """[H,W,3] of that size. Blended before it is scaled: the colours that transparency hides must not leak out."""
    if frame.format.has_palette or any(component.is_alpha for component in frame.format.components):
        rgba = frame.to_ndarray(format="rgba", interpolation=SCALING, threads=1).astype(np.uint16)
        rgb = ((rgba[..., :3] * rgba[..., 3:] + 127) // 255).astype(np.uint8)
        frame = av.VideoFrame.from_ndarray(rgb, format="rgb24")
    picture = frame.to_ndarray(width=width, height=height, format="rgb24", interpolation=SCALING, threads=1)
    return picture.astype(np.uint8, copy=False)


def _middle(picture: Frames, height: int, width: int) -> Frames:
    top, left = (picture.shape[0] - height) // 2, (picture.shape[1] - width) // 2
    return picture[top : top + height, left : left + width]
