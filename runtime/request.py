"""What a caller asks for, and the same with nothing left open.

Flows in: a Request, silent where the caller does not care. Flows out: Settings, checked. Sizes are checked by
`geometry.plan`, samplers by `schedule.make_schedule`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from .spec import ModelSpec
from .strict import require


@dataclass(frozen=True)
class Settings:
    """A request with every field decided; saved generations keep it."""

    prompt: str
    negative_prompt: str
    width: int
    height: int
    frames: int
    steps: int
    guidance: float
    sampler: str
    shift: float
    seed: int

    def __post_init__(self) -> None:
        for name in ("width", "height", "frames", "steps", "seed"):
            require(type(getattr(self, name)) is int, f"{name} must be a whole number, is {getattr(self, name)!r}")
        require(0 <= self.seed < 2**64, f"seed must be from 0 to 2^64 - 1, is {self.seed}")
        require(0 <= self.guidance <= 100, f"guidance must be from 0 to 100, is {self.guidance}")

    @property
    def guided(self) -> bool:
        """Whether an unconditional branch runs beside the conditional one."""
        return self.guidance != 1.0


@dataclass(frozen=True)
class Request:
    """What to generate; None means the model's default."""

    prompt: str
    negative_prompt: str | None = None
    width: int | None = None  # pixels
    height: int | None = None
    frames: int | None = None
    steps: int | None = None
    guidance: float | None = None  # 1.0: no unconditional branch, half the work
    sampler: str | None = None
    shift: float | None = None
    seed: int = 0

    def complete(self, spec: ModelSpec) -> Settings:
        """Fills in the model's defaults. Raises UserError when the seed or the guidance is out of range."""
        given = {name: value for name, value in vars(self).items() if value is not None}
        return Settings(**(dataclasses.asdict(spec.defaults) | given))
