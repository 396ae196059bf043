"""Clips to one labelled image, for looking at many at once.

Flows in: clips, uint8 RGB [T,H,W,3], and a label each. Flows out: one uint8 RGB image [H,W,3].
The only module that draws text, hence the only one that uses Pillow.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from .errors import UserError

MAX_ROWS = 100
LABEL_HEIGHT = 18  # pixels, for text of 12
GAP = 2
BACKGROUND, INK = (255, 255, 255), (0, 0, 0)


def contact_sheet(
    clips: Sequence[NDArray[np.uint8]], labels: Sequence[str], columns: int = 6, scale: int = 1
) -> NDArray[np.uint8]:
    """Draws one row a clip: its label above `columns` frames, evenly spaced from the first to the last.

    clips: uint8 RGB [T,H,W,3], sizes may differ; a clip of fewer than `columns` frames shows each once. `scale` repeats
    pixels. A label wider than the sheet is cut off, and the font knows ASCII only. Raises UserError for no clips, for a
    clip of another shape or dtype, for columns or scale below 1, or if there is not one label a clip.
    """
    if not clips or len(clips) != len(labels):
        raise UserError(f"a contact sheet needs clips and one label each, got {len(clips)} clips, {len(labels)} labels")
    if columns < 1 or scale < 1:
        raise UserError(f"columns and scale must be at least 1, are {columns} and {scale}")
    for label, clip in zip(labels, clips, strict=True):
        if clip.dtype != np.uint8 or clip.ndim != 4 or clip.shape[3] != 3 or 0 in clip.shape:
            raise UserError(f"clip {label!r} must be uint8 [T,H,W,3], is {clip.dtype} {list(clip.shape)}")
    rows = [_row(clip, columns, scale) for clip in clips]
    size = max(row.width for row in rows), sum(LABEL_HEIGHT + row.height for row in rows)
    sheet = Image.new("RGB", size, BACKGROUND)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    y = 0
    for row, label in zip(rows, labels, strict=True):
        draw.text((GAP, y + 2), label, fill=INK, font=font)
        sheet.paste(row, (0, y + LABEL_HEIGHT))
        y += LABEL_HEIGHT + row.height
    return np.asarray(sheet)


def _row(clip: NDArray[np.uint8], columns: int, scale: int) -> Image.Image:
    """[T,H,W,3] -> frames side by side, `GAP` apart."""
    times = np.unique(np.linspace(0, len(clip) - 1, columns).round().astype(int))
    frames = clip[times].repeat(scale, axis=1).repeat(scale, axis=2)
    padded = np.pad(frames, ((0, 0), (0, GAP), (0, GAP), (0, 0)), constant_values=255)
    return Image.fromarray(np.concatenate(list(padded), axis=1))
