"""What a model is asked for: shapes of clips, and how often each.

    [[shape]]
    width = 832
    height = 480
    seconds = 5      # or frames = 81
    fps = 16         # beside seconds; the model's if not given
    share = 0.6      # of all requests; any unit, the sum counts as 1; 1 if not given

Flows in: a TOML file. Flows out: shapes, not yet checked against what the model can make. A shape is a clip as it is
denoised: one window of a long video.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tubelet.runtime.errors import UserError
from tubelet.runtime.geometry import frames_for
from tubelet.runtime.spec import ModelSpec
from tubelet.runtime.strict import read, read_toml, require, require_positive

MOST = 1_000_000  # pixels of a side, frames: more than any model makes


@dataclass(frozen=True)
class Shape:
    """A size of clip in pixels and frames, and its part of all requests."""

    width: int
    height: int
    frames: int
    share: float

    def __post_init__(self) -> None:
        require_positive(self, "shape")
        for name in ("width", "height", "frames"):
            value = getattr(self, name)
            require(value <= MOST, f"shape.{name} must be at most {MOST}, is {value}")


@dataclass(frozen=True)
class _Entry:
    """A `[[shape]]` as it is written."""

    width: int
    height: int
    frames: int | None = None
    seconds: float | None = None
    fps: float | None = None
    share: float = 1.0

    def __post_init__(self) -> None:
        require_positive(self, "shape")
        require(
            (self.frames is None) != (self.seconds is None),
            f"shape needs either frames or seconds, has frames {self.frames} and seconds {self.seconds}",
        )
        require(self.fps is None or self.seconds is not None, f"shape.fps {self.fps} needs seconds; leave it out")

    def shape(self, spec: ModelSpec) -> Shape:
        frames = self.frames
        if self.seconds is not None:
            fps = self.fps or spec.fps
            require(
                self.seconds * fps <= MOST,
                f"shape.seconds {self.seconds:g} at {fps:g} fps is over {MOST} frames; give fewer",
            )
            frames = frames_for(spec, self.seconds, fps)
        assert frames is not None  # one of both is given
        return Shape(self.width, self.height, frames, self.share)


def read_traffic(path: Path, spec: ModelSpec) -> tuple[Shape, ...]:
    """The shapes of a traffic file, seconds as the model's nearest frames, shares with the sum 1.

    Raises UserError that names the file, the entry, what is wrong and its value.
    """
    value = read_toml(path)
    entries = value.get("shape")
    if set(value) != {"shape"} or not isinstance(entries, list) or not entries:
        raise UserError(f"{path} must hold one [[shape]] or more and nothing else, holds {sorted(value)}")
    shapes = [_shape(entry, spec, f"{path}, number {number}") for number, entry in enumerate(entries, 1)]
    total = sum(shape.share for shape in shapes)
    return tuple(dataclasses.replace(shape, share=shape.share / total) for shape in shapes)


def _shape(entry: Any, spec: ModelSpec, where: str) -> Shape:
    try:
        return read(_Entry, entry, "shape").shape(spec)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
