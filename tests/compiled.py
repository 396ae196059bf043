"""What the fixture `compiled` is built for: every architecture of TensorRT-RTX, and one small shape."""

from __future__ import annotations

from tubelet.export.profiles import choose
from tubelet.export.traffic import Shape
from tubelet.runtime import Bundle
from tubelet.runtime.plans import COMPILERS, Target
from tubelet.runtime.profiles import Profiles

TARGET = Target("rtx", COMPILERS["rtx"], "fp16")
TRAFFIC = "[[shape]]\nwidth = 64\nheight = 64\nframes = 9\nshare = 1\n"
MAX_PROFILES = 1
MEMORY_GB = 16  # of the smallest GPU


def profiles(bundle: Bundle, frames: int = 9) -> Profiles:
    """Those of TRAFFIC, or of another number of frames."""
    return choose(bundle.spec, [Shape(64, 64, frames, 1.0)], MAX_PROFILES).profiles
