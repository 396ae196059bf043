"""How stored pictures have to be turned or mirrored to be upright.

Flows in: a decoded frame and the path of its file; a picture. Flows out: a matrix; the picture upright. Videos carry
that matrix, images a number (EXIF) that stands for one of eight.
"""

from __future__ import annotations

import struct
import warnings

import av
from av.sidedata.sidedata import SideData
from PIL import Image

from .video import Frames

Matrix = tuple[int, int, int, int]  # (a, b, c, d): the pixel at (x, y) is shown at (a x + c y, b x + d y), shifted

UPRIGHT = (1, 0, 0, 1)
EXIF_ORIENTATION = 0x0112
EXIF_MATRICES: dict[int | None, Matrix] = {
    2: (-1, 0, 0, 1),
    3: (-1, 0, 0, -1),
    4: (1, 0, 0, -1),
    5: (0, 1, 1, 0),
    6: (0, 1, -1, 0),
    7: (0, -1, -1, 0),
    8: (0, -1, 1, 0),
}


def matrix_of(frame: av.VideoFrame, path: str) -> Matrix:
    """What a frame, or else the image at `path` that it comes from, says of its orientation."""
    try:
        data = frame.side_data.get("DISPLAYMATRIX")
    except ValueError:  # PyAV 18 lists no side data where FFmpeg 8 adds EXIF to it
        return EXIF_MATRICES.get(_exif_orientation(path), UPRIGHT)
    if not isinstance(data, SideData):
        return UPRIGHT
    a, b, _, c, d = struct.unpack_from("=5i", data)
    return a, b, c, d


def _exif_orientation(path: str) -> int | None:
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(path) as image:
            return image.getexif().get(EXIF_ORIENTATION)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):  # what Pillow raises for damaged files
        return None


def is_turned(matrix: Matrix) -> bool:
    """Whether rows are shown as columns."""
    a, b, _, _ = matrix
    return abs(b) > abs(a)


def upright(picture: Frames, matrix: Matrix) -> Frames:
    """A view of a picture [H,W,3] as it is shown: [H,W,3], or [W,H,3] if it is turned."""
    a, b, c, d = matrix
    if is_turned(matrix):
        picture, a, d = picture.swapaxes(0, 1), c, b
    return picture[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]
