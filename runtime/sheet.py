"""Clips to one labelled image, for looking at many at once.

Flows in: clips, uint8 RGB [T,H,W,3], and a label each. Flows out: one uint8 RGB image [H,W,3].
The only module that draws text.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from .errors import UserError

MAX_ROWS, COLUMNS = 100, 6
LABEL_HEIGHT = 18  # pixels, for text of 12
GAP = 2
BACKGROUND, INK = (255, 255, 255), (0, 0, 0)


def shown_frames(frames: int, columns: int = COLUMNS) -> list[int]:
    """The numbers of the frames that stand for a clip of `frames`: evenly spaced from the first to the last."""
    return sorted({round(i * (frames - 1) / max(1, columns - 1)) for i in range(columns)})


def sheet_size(shapes: Sequence[tuple[int, int, int]], columns: int = COLUMNS) -> tuple[int, int]:
    """Width and height in pixels of a contact sheet of clips of these (frames, height, width)."""
    rows = [(len(shown_frames(t, columns)) * (w + GAP), LABEL_HEIGHT + h + GAP) for t, h, w in shapes]
    return max(width for width, _ in rows), sum(height for _, height in rows)


def contact_sheet(
    clips: Sequence[NDArray[np.uint8]], labels: Sequence[str], columns: int = COLUMNS
) -> NDArray[np.uint8]:
    """Draws one row a clip: its label above `columns` frames, evenly spaced from the first to the last.

    clips: uint8 RGB [T,H,W,3], sizes may differ; a clip of fewer than `columns` frames shows each once. A label wider
    than the sheet is cut off, and the font knows ASCII only. Raises UserError for no clips, for a clip of another shape
    or dtype, for columns below 1, or if there is not one label a clip.
    """
    if not clips or len(clips) != len(labels):
        raise UserError(f"a contact sheet needs clips and one label each, got {len(clips)} clips, {len(labels)} labels")
    if columns < 1:
        raise UserError(f"columns must be at least 1, are {columns}")
    for label, clip in zip(labels, clips, strict=True):
        if clip.dtype != np.uint8 or clip.ndim != 4 or clip.shape[3] != 3 or 0 in clip.shape:
            raise UserError(f"clip {label!r} must be uint8 [T,H,W,3], is {clip.dtype} {list(clip.shape)}")
    rows = [_row(clip[shown_frames(len(clip), columns)]) for clip in clips]
    sheet = Image.new("RGB", sheet_size([clip.shape[:3] for clip in clips], columns), BACKGROUND)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    y = 0
    for row, label in zip(rows, labels, strict=True):
        draw.text((GAP, y + 2), label, fill=INK, font=font)
        sheet.paste(row, (0, y + LABEL_HEIGHT))
        y += LABEL_HEIGHT + row.height
    return np.asarray(sheet)


def _row(frames: NDArray[np.uint8]) -> Image.Image:
    """[T,H,W,3] -> frames side by side, `GAP` apart."""
    padded = np.pad(frames, ((0, 0), (0, GAP), (0, GAP), (0, 0)), constant_values=255)
    return Image.fromarray(np.concatenate(list(padded), axis=1))
