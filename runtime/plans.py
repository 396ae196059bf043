"""Compiled plans in a bundle: what each was built from and for, and whether its file is whole.

    engines/rtx-sm89-sm120-bf16/denoiser.plan    what the compiler wrote
    engines/rtx-sm89-sm120-bf16/denoiser.json    its PlanRecord

Flows in: a bundle and a target. Flows out: verified plans, or UserError. Knows nothing of compilers.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from .atomic import temporary_beside
from .bundle import SCHEMA, WEIGHTS, Bundle, FileRecord, record
from .errors import UserError
from .profiles import Profile, Range
from .strict import read

FOLDER = "engines"
PRECISIONS = ("bf16", "fp16", "fp32")
# what each compiler builds for; bit i of an RTX plan's architecture mask is its i-th
ARCHITECTURES = {
    "rtx": ("sm75", "sm80", "sm86", "sm89", "sm120", "sm121"),
    "tensorrt": ("sm75", "sm80", "sm86", "sm89", "sm90", "sm100", "sm120"),
}


@dataclass(frozen=True)
class Target:
    """A compiler, the GPU architectures that one plan serves, and what it computes in."""

    compiler: str
    architectures: tuple[str, ...]
    precision: str

    def __post_init__(self) -> None:
        if self.compiler not in ARCHITECTURES:
            raise UserError(f"compiler {self.compiler!r} is not one of {', '.join(ARCHITECTURES)}")
        known = ARCHITECTURES[self.compiler]
        for name in self.architectures:
            if name not in known:
                raise UserError(f"{self.compiler} does not build for {name!r}; it builds for {', '.join(known)}")
        if not self.architectures or list(self.architectures) != sorted(set(self.architectures), key=known.index):
            raise UserError(
                f"architectures {','.join(self.architectures) or '(none)'} must be given once each and in the order "
                f"{', '.join(known)}"
            )
        if self.precision not in PRECISIONS:
            raise UserError(f"precision {self.precision!r} is not one of {', '.join(PRECISIONS)}")
        if self.precision != "fp16" and "sm75" in self.architectures:
            raise UserError(f"sm75 has no {self.precision} matrix products; build it with --precision fp16")

    @classmethod
    def parse(cls, text: str, precision: str) -> Target:
        """From "rtx:sm89,sm120". Raises UserError that says what can be built."""
        compiler, _, names = text.partition(":")
        return cls(compiler, tuple(name for name in names.split(",") if name), precision)

    @property
    def wide_products(self) -> bool:
        """Whether every architecture multiplies float32 matrices."""
        return "sm75" not in self.architectures

    @property
    def name(self) -> str:
        """The folder of its plans."""
        return "-".join((self.compiler, *self.architectures, self.precision))


@dataclass(frozen=True)
class Compiler:
    """A plan loads only in the exact release that built it."""

    name: str  # of the Python module
    version: str


@dataclass(frozen=True)
class Measured:
    """What the compiler said about a plan."""

    weights_bytes: int
    activation_bytes: tuple[int, ...]  # by profile
    layers: int  # kernels and calls, those of all profiles
    fused_attentions: int
    wide_products: int  # matrix products that run in float32
    seconds: float
    peak_bytes: int  # resident memory of the building process


@dataclass(frozen=True)
class PlanRecord:
    """What lies beside a plan, as JSON."""

    component: str
    key: str
    target: Target
    compiler: Compiler
    dtypes: Mapping[str, str]  # of all inputs and outputs
    profiles: tuple[Mapping[str, Range], ...]
    file: FileRecord
    measured: Measured


def plan_key(
    bundle: Bundle, component: str, target: Target, compiler: Compiler, profiles: Sequence[Profile], budget: int | None
) -> str:
    """SHA-256 of all that a plan is made from: a plan whose key differs is another plan."""
    files = bundle.manifest.files
    content = {
        "schema": SCHEMA,
        "graph": files[bundle.manifest.components[component].graph].sha256,
        "weights": files[WEIGHTS].sha256,
        "target": dataclasses.asdict(target),
        "compiler": dataclasses.asdict(compiler),
        "profiles": [{name: vars(extent) for name, extent in profile.items()} for profile in profiles],
        "budget": budget,
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def plan_path(bundle: Bundle, target: Target, component: str) -> Path:
    return bundle.folder / FOLDER / target.name / f"{component}.plan"


def read_record(plan: Path) -> PlanRecord | None:
    """The record beside a plan; None where there is none. Raises UserError when it is not readable."""
    path = plan.with_suffix(".json")
    try:
        return read(PlanRecord, json.loads(path.read_text(encoding="utf-8")), "plan")
    except FileNotFoundError:
        return None
    except (UserError, OSError, UnicodeDecodeError, RecursionError, json.JSONDecodeError) as error:
        raise UserError(f"{path} is not usable: {error}; build the target again") from error


def write_record(plan: Path, content: PlanRecord) -> None:
    """Writes the record that makes a plan valid, as the last step."""
    partial = temporary_beside(plan)
    try:
        partial.write_text(json.dumps(dataclasses.asdict(content), indent=1) + "\n", encoding="utf-8")
        os.replace(partial, plan.with_suffix(".json"))
    finally:
        partial.unlink(missing_ok=True)


def is_whole(plan: Path, expected: PlanRecord) -> bool:
    """Whether the plan's file is there, with the size and hash that its record names."""
    return plan.is_file() and plan.stat().st_size == expected.file.bytes and record(plan) == expected.file
