"""Two clips -> how far they are apart, by PyAV's filters; and squared errors -> a relative one.

Flows in: clips, uint8 [T,H,W,3]. Flows out: PSNR in dB and SSIM, over all frames.
"""

from __future__ import annotations

import math
from fractions import Fraction

import av
import numpy as np
from numpy.typing import NDArray

Frames = NDArray[np.uint8]
RATE = Fraction(1, 24)  # the filters ask for one


def psnr(clip: Frames, reference: Frames) -> float:
    """In dB, of the mean squared error over the whole clip; infinite where the clips are equal."""
    error = float(np.mean(_filtered("psnr", "lavfi.psnr.mse_avg", clip, reference)))
    return 10 * math.log10(255**2 / error) if error else math.inf


def ssim(clip: Frames, reference: Frames) -> float:
    """Mean over the frames."""
    return float(np.mean(_filtered("ssim", "lavfi.ssim.All", clip, reference)))


def relative(lost: float, whole: float) -> float:
    """L2 of an error over L2 of what was expected, from their squares; 0 where nothing was lost, of nothing too."""
    return math.sqrt(lost / whole) if lost and whole else math.inf if lost else 0.0


def _filtered(name: str, key: str, clip: Frames, reference: Frames) -> list[float]:
    """What a filter of two inputs says of each pair of frames. Compares RGB planes, so no colour is subsampled."""
    if clip.shape != reference.shape:
        raise ValueError(f"clips differ in shape: {clip.shape} and {reference.shape}")
    _, height, width, _ = clip.shape
    graph = av.filter.Graph()
    planes = av.VideoFormat("gbrp", width, height)
    sources = [graph.add_buffer(width=width, height=height, format=planes, time_base=RATE) for _ in range(2)]
    comparing, sink = graph.add(name), graph.add("buffersink")
    for port, source in enumerate(sources):
        source.link_to(comparing, 0, port)
    comparing.link_to(sink)
    graph.configure()
    values = []
    for index, pair in enumerate(zip(clip, reference, strict=True)):
        for source, pixels in zip(sources, pair, strict=True):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24").reformat(format="gbrp")
            frame.pts, frame.time_base = index, RATE
            source.push(frame)
        values.append(float(sink.pull().metadata[key]))
    return values
