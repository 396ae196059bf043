"""Proves that a contact sheet shows the right frames in the right places.

Run: pytest tests/test_sheet.py
"""

from __future__ import annotations

import numpy as np
import pytest

from tubelet.runtime.errors import UserError
from tubelet.runtime.sheet import BACKGROUND, GAP, LABEL_HEIGHT, contact_sheet, sheet_size


def clip(frames: int, height: int = 40, width: int = 48) -> np.ndarray:
    """Frame t has the grey level t."""
    return np.broadcast_to(np.arange(frames, dtype=np.uint8)[:, None, None, None], (frames, height, width, 3))


def test_each_row_shows_evenly_spaced_frames_from_first_to_last() -> None:
    sheet = contact_sheet([clip(21), clip(11)], ["one", "two"], columns=6)

    assert sheet.dtype == np.uint8
    assert sheet.shape == (2 * (LABEL_HEIGHT + 40 + GAP), 6 * (48 + GAP), 3)
    centres = np.arange(6) * (48 + GAP) + 24
    assert sheet[LABEL_HEIGHT + 20, centres, 0].tolist() == [0, 4, 8, 12, 16, 20]
    assert sheet[2 * LABEL_HEIGHT + 40 + GAP + 20, centres, 0].tolist() == [0, 2, 4, 6, 8, 10]


def test_labels_are_drawn_above_their_row_only() -> None:
    with_text, without = contact_sheet([clip(6)], ["a red square"]), contact_sheet([clip(6)], [""])

    assert (without[:LABEL_HEIGHT] == BACKGROUND).all()
    assert (with_text[:LABEL_HEIGHT] != BACKGROUND).any()
    np.testing.assert_array_equal(with_text[LABEL_HEIGHT:], without[LABEL_HEIGHT:])


def test_a_short_clip_shows_each_frame_once() -> None:
    sheet = contact_sheet([clip(2)], ["short"], columns=6)

    assert sheet.shape[1] == 2 * (48 + GAP)


def test_the_size_is_known_beforehand() -> None:
    clips = [clip(21), clip(2, 16, 80), clip(1)]

    height, width, _ = contact_sheet(clips, ["a", "b", "c"]).shape

    assert (width, height) == sheet_size([c.shape[:3] for c in clips])


@pytest.mark.parametrize(
    ("clips", "labels", "columns", "message"),
    [
        ([], [], 6, "got 0 clips"),
        ([clip(3)], ["a", "b"], 6, "1 clips, 2 labels"),
        ([clip(3)], ["a"], 0, "columns .* are 0"),
        ([clip(3)[0]], ["a"], 6, r"'a' must be uint8 \[T,H,W,3\], is uint8 \[40, 48, 3\]"),
        ([clip(3).astype(float)], ["a"], 6, "is float64"),
    ],
)
def test_bad_arguments_are_refused(clips: list[np.ndarray], labels: list[str], columns: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        contact_sheet(clips, labels, columns)
