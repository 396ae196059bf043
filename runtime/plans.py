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
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from .atomic import temporary_beside
from .bundle import SCHEMA, WEIGHTS, Bundle, FileRecord, record
from .errors import UserError
from .profiles import Profile, Range
from .strict import read, require

FOLDER = "engines"
LOWERING = 1  # the version of the rules in export/precision.py: with another, plans are built again
BUILDABLE = ("fp32", "fp16", "bf16")  # of these: what graphs are lowered to
PRECISIONS = {"bf16": 2, "fp16": 2, "fp32": 4, "int8": 1, "fp8": 1, "nvfp4": 9 / 16}  # bytes of a weight and its scale


@dataclass(frozen=True)
class Architecture:
    """One generation of GPUs: which compilers build for it, the preferred one first, and what it multiplies in."""

    compilers: tuple[str, ...]
    precisions: tuple[str, ...]


ARCHITECTURES = {
    "sm75": Architecture(("rtx",), ("fp16", "int8")),
    "sm80": Architecture(("rtx", "tensorrt"), ("bf16", "fp16", "fp32", "int8")),
    "sm86": Architecture(("rtx", "tensorrt"), ("bf16", "fp16", "fp32", "int8")),
    "sm89": Architecture(("rtx", "tensorrt"), ("bf16", "fp16", "fp32", "int8", "fp8")),
    "sm90": Architecture(("tensorrt",), ("bf16", "fp16", "fp32", "int8", "fp8")),
    "sm100": Architecture(("tensorrt",), ("bf16", "fp16", "fp32", "int8", "fp8", "nvfp4")),
    "sm120": Architecture(("rtx", "tensorrt"), ("bf16", "fp16", "fp32", "int8", "fp8", "nvfp4")),
    "sm121": Architecture(("rtx", "tensorrt"), ("bf16", "fp16", "fp32", "int8", "fp8", "nvfp4")),
}
COMPILERS = {  # what each builds for; bit i of an RTX plan's architecture mask is its i-th
    compiler: tuple(name for name, row in ARCHITECTURES.items() if compiler in row.compilers)
    for compiler in ("rtx", "tensorrt")
}


@dataclass(frozen=True)
class Target:
    """A compiler, the GPU architectures that one plan serves, and what it computes in.

    A plan of TensorRT serves one model of GPU, that which it was built on.
    """

    compiler: str
    architectures: tuple[str, ...]
    precision: str
    gpu: str | None = None  # as its driver names it; of TensorRT alone, None before it is known

    def __post_init__(self) -> None:
        if self.compiler not in COMPILERS:
            raise UserError(f"compiler {self.compiler!r} is not one of {', '.join(COMPILERS)}")
        known = COMPILERS[self.compiler]
        for name in self.architectures:
            if name not in known:
                raise UserError(f"{self.compiler} does not build for {name!r}; it builds for {', '.join(known)}")
        if not self.architectures or list(self.architectures) != sorted(set(self.architectures), key=known.index):
            raise UserError(
                f"architectures {','.join(self.architectures) or '(none)'} must be given once each and in the order "
                f"{', '.join(known)}"
            )
        if self.compiler == "tensorrt" and len(self.architectures) > 1:
            raise UserError(f"tensorrt builds for one architecture at a time, not for {','.join(self.architectures)}")
        if self.precision not in PRECISIONS:
            raise UserError(f"precision {self.precision!r} is not one of {', '.join(PRECISIONS)}")
        for name in self.architectures:
            have = ARCHITECTURES[name].precisions
            if self.precision not in have:
                raise UserError(f"{name} has no {self.precision} matrix products; it has {', '.join(have)}")

    @classmethod
    def parse(cls, text: str, precision: str) -> Target:
        """From "rtx:sm89,sm120". Raises UserError that says what can be built."""
        compiler, _, names = text.partition(":")
        return cls(compiler, tuple(name for name in names.split(",") if name), precision)

    def __str__(self) -> str:
        """What `parse` reads."""
        return f"{self.compiler}:{','.join(self.architectures)}"

    @property
    def wide_products(self) -> bool:
        """Whether every architecture multiplies float32 matrices."""
        return all("fp32" in ARCHITECTURES[name].precisions for name in self.architectures)

    @property
    def can_be_built(self) -> bool:
        return self.precision in BUILDABLE

    @property
    def name(self) -> str:
        """The folder of its plans."""
        gpu = () if self.gpu is None else ("_".join(re.findall(r"\w+", self.gpu)),)
        return "-".join((self.compiler, *self.architectures, *gpu, self.precision))


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
    kernels: int  # those of all profiles, and calls
    fused_attentions: int  # in each profile
    wide_products: int  # matrix products that run in float32, in each profile
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
    budget: int | None  # bytes of device memory that activations were limited to
    file: FileRecord
    measured: Measured


def plan_key(
    bundle: Bundle, component: str, target: Target, compiler: Compiler, profiles: Sequence[Profile], budget: int | None
) -> str:
    """SHA-256 of all that a plan is made from: a plan whose key differs is another plan."""
    files = bundle.manifest.files
    content = {
        "schema": SCHEMA,
        "lowering": LOWERING,
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


def installed(bundle: Bundle, component: str, target: Target, profiles: Sequence[Profile]) -> PlanRecord:
    """The record of the plan for these profiles, from any release of its compiler and within any budget.

    Raises UserError when there is none, it is damaged, or it was built for something else.
    """
    plan = plan_path(bundle, target, component)
    known = read_record(plan)
    verify_plan(plan, known, plan_key(bundle, component, target, known.compiler, profiles, known.budget))
    return known


@dataclass(frozen=True)
class State:
    """A plan as it lies in a bundle: its record, where that can be read, and what is wrong with it."""

    path: Path
    record: PlanRecord | None
    problem: str | None


def states(bundle: Bundle) -> list[State]:
    """All plans of a bundle, by target, each verified against its record and the bundle."""
    records = sorted((bundle.folder / FOLDER).glob("*/*.json"))
    return [_state(bundle, path.with_suffix(".plan")) for path in records]


def _state(bundle: Bundle, plan: Path) -> State:
    known = None
    try:
        known = read_record(plan)
        require(known.component in bundle.manifest.components, f"the bundle has no component {known.component}")
        verify_plan(plan, known, _own_key(bundle, known))
    except UserError as error:
        return State(plan, known, str(error))
    return State(plan, known, None)


def _own_key(bundle: Bundle, known: PlanRecord) -> str:
    """The key that a plan like this has when it was built from this bundle."""
    return plan_key(bundle, known.component, known.target, known.compiler, known.profiles, known.budget)


def read_record(plan: Path) -> PlanRecord:
    """The record beside a plan. Raises UserError when there is none or it is not readable."""
    path = plan.with_suffix(".json")
    try:
        known = read(PlanRecord, json.loads(path.read_text(encoding="utf-8")), "plan")
        require(known.component == plan.stem, f"it is the {known.component}'s")
        return known
    except FileNotFoundError as error:
        raise UserError(f"{plan} is missing; build the target") from error
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


def verify_plan(plan: Path, known: PlanRecord, key: str) -> None:
    """Raises UserError unless the plan was built for this key and its file is what its record says."""
    if known.key != key:
        raise UserError(f"{plan} was built from other weights or for other profiles; build the target again")
    verify_file(plan, known.file)


def verify_file(plan: Path, expected: FileRecord) -> None:
    """Raises UserError unless the plan's file is what was recorded."""
    try:
        whole = plan.stat().st_size == expected.bytes and record(plan) == expected
    except OSError as error:
        raise UserError(f"cannot read {plan}: {error.strerror}; build the target again") from error
    if not whole:
        raise UserError(f"{plan} is damaged: it is not what its record says; build the target again")


@dataclass(frozen=True)
class Plan:
    path: Path
    record: PlanRecord


def find_plans(bundle: Bundle, kind: str, compiler: Compiler, architecture: str, gpu: str) -> dict[str, Plan]:
    """A plan of every component that this release of a compiler built, from this bundle, for a GPU.

    Where several are, the narrowest. Raises UserError that names the components without one, and why.
    """
    found, problems = {}, {}
    for name in bundle.manifest.components:
        usable, reasons = list[Plan](), list[str]()
        for path in sorted((bundle.folder / FOLDER).glob(f"{kind}-*/{name}.json")):
            try:
                plan = Plan(path.with_suffix(".plan"), read_record(path))
            except UserError as error:
                reasons.append(str(error))
                continue
            problem = _problem(bundle, plan, compiler, architecture, gpu)
            if problem is None:
                usable.append(plan)
            else:
                reasons.append(problem)
        if usable:
            found[name] = min(usable, key=_width)
        else:
            problems[name] = ", ".join(reasons) or "none was built"
    if problems:
        told = "; ".join(sorted(set(problems.values())))
        raise UserError(
            f"the bundle has no {kind} plan of {', '.join(problems)} for {architecture} ({told}); "
            f"build the target {kind}:{architecture}"
        )
    return found


def _width(plan: Plan) -> tuple[float, str]:
    precision = plan.record.target.precision
    return PRECISIONS[precision], precision


def _problem(bundle: Bundle, plan: Plan, compiler: Compiler, architecture: str, gpu: str) -> str | None:
    """Why a plan is not to be loaded, None where it is."""
    known, folder = plan.record, plan.path.parent.name
    if architecture not in known.target.architectures:
        return f"{folder} is for {', '.join(known.target.architectures)}"
    if known.target.compiler == "tensorrt" and known.target.gpu != gpu:
        return f"{folder} was built on {known.target.gpu}, this is {gpu}"
    if known.compiler != compiler:
        built, here = (f"{each.name} {each.version}" for each in (known.compiler, compiler))
        return f"{folder} was built by {built}, installed is {here}"
    if known.key != _own_key(bundle, known):
        return f"{folder} was built from another graph, other weights or profiles: its key differs"
    return None
