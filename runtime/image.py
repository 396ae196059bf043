"""Pictures as an image encoder of CLIP's takes them.

Flows in: uint8 pictures. Flows out: float32 pixels. Knows nothing of engines.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from PIL import Image

MEAN = np.array((0.48145466, 0.4578275, 0.40821073), np.float32)  # of CLIP's training pictures (Radford et al. 2021)
STD = np.array((0.26862954, 0.26130258, 0.27577711), np.float32)


def prepare_pictures(pictures: NDArray[np.uint8], size: int) -> NDArray[np.float32]:
    """[K,H,W,3] -> [K,3,size,size]: the shorter side is scaled to `size`, the middle is cut out, colours normalised."""
    return np.stack([_prepare(picture, size) for picture in pictures])


def _prepare(picture: NDArray[np.uint8], size: int) -> NDArray[np.float32]:
    height, width = picture.shape[:2]
    short = min(height, width)
    rows, columns = size * height // short, size * width // short
    scaled = np.asarray(Image.fromarray(picture).resize((columns, rows), Image.Resampling.BICUBIC))
    top, left = (rows - size) // 2, (columns - size) // 2
    middle = scaled[top : top + size, left : left + size].astype(np.float32) / np.float32(255)
    return np.ascontiguousarray(((middle - MEAN) / STD).transpose(2, 0, 1))
