"""What a caller asks for, and the same with nothing left open.

Flows in: a Request, silent where the caller does not care. Flows out: Settings, checked. Sizes are checked by
`geometry.plan`, samplers by `schedule.make_schedule`.
"""

from __future__ import annotations

import dataclasses
import operator
from dataclasses import dataclass
from numbers import Real

from .geometry import tokens_of
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
    strength: float
    guidance_low: float | None = None  # of the expert for low noise; None: as `guidance`

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, _PARSERS[str(field.type)](field.name, getattr(self, field.name)))
        require(0 <= self.seed < 2**64, f"seed must be from 0 to 2^64 - 1, is {self.seed}")
        require(0 <= self.strength <= 1, f"strength must be from 0 to 1, is {self.strength}")
        for name in ("guidance", "guidance_low"):
            value = getattr(self, name)
            require(value is None or 0 <= value <= 100, f"{name} must be from 0 to 100, is {value}")

    @property
    def guided(self) -> bool:
        """Whether an unconditional branch runs beside the conditional one."""
        return self.guidance != 1.0 or self.guidance_low not in (None, 1.0)


def _text(name: str, value: object) -> str:
    require(isinstance(value, str), f"{name} must be text, is {value!r}")
    return str(value)


def _whole(name: str, value: object) -> int:
    """Python's and NumPy's integers, but no bool."""
    require(hasattr(value, "__index__") and not isinstance(value, bool), f"{name} must be a whole number, is {value!r}")
    return operator.index(value)  # type: ignore[arg-type]


def _real(name: str, value: object) -> float:
    require(isinstance(value, Real) and not isinstance(value, bool), f"{name} must be a number, is {value!r}")
    return float(value)  # type: ignore[arg-type]


def _real_or_none(name: str, value: object) -> float | None:
    return None if value is None else _real(name, value)


_PARSERS = {"str": _text, "int": _whole, "float": _real, "float | None": _real_or_none}


@dataclass(frozen=True)
class Request:
    """What to generate; None means the model's default."""

    prompt: str
    negative_prompt: str | None = None  # what guidance leads away from
    width: int | None = None  # pixels, a multiple of `geometry.size_step`
    height: int | None = None
    frames: int | None = None  # 1 + k * `geometry.frames_step`
    steps: int | None = None  # model evaluations, 1 to 1000
    guidance: float | None = None  # 0 to 100; 1: no unconditional branch, half the work
    guidance_low: float | None = None  # of the expert for low noise, where the model has two
    sampler: str | None = None  # a name in `schedule.SAMPLERS`
    shift: float | None = None  # above 0; more spends more steps at high noise
    seed: int = 0  # 0 to 2^64 - 1
    strength: float = 1.0  # 0 to 1: of the noise that a canvas's unknown tokens start from; 1 hides what they hold

    def complete(self, spec: ModelSpec) -> Settings:
        """Fills in the model's defaults.

        A guidance that is given holds for both experts, unless another is given for low noise. A default shift may
        depend on the clip's tokens; of a clip made in parts it is the largest that the model takes. Raises UserError
        for a value of the wrong type, and for a seed or a guidance out of range.
        """
        require(
            self.guidance_low is None or spec.boundary is not None,
            f"{spec.name} has one denoiser; guidance_low is for models of two",
        )
        given = {name: value for name, value in vars(self).items() if value is not None or name == "prompt"}
        defaults = {**vars(spec.defaults), "shift": 1.0}
        if self.guidance is not None:
            defaults["guidance_low"] = None
        settings = Settings(**(defaults | given))
        if self.shift is not None:
            return settings
        tokens = min(tokens_of(spec, settings.width, settings.height, settings.frames), spec.max_tokens)
        return dataclasses.replace(settings, shift=spec.defaults.shift_at(tokens))
