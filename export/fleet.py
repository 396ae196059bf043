"""A fleet, its models and its traffic -> which plans to build on which machines, and what fits where.

    traffic = "traffic.toml"     # paths are relative to this file
    models = ["wan"]             # bundle folders
    max_profiles = 4             # of one engine

    [[sku]]
    name = "L4"
    architecture = "sm89"
    memory_gb = 24               # as on the card's name, 10^9 bytes; what it has beyond that is CUDA's
    count = 12
    precision = "fp8"            # of the denoiser; below 16 bits all else is bf16, before sm80 fp16
    gpu = "NVIDIA L4"            # as its driver names it: where only TensorRT builds, whose plans are for one GPU

Flows in: fleet.toml, the bundles and the traffic that it names. Flows out: a FleetPlan, which `fleet_build` builds and
`fleet_check` checks by. Needs no torch and no compiler; knows nothing of how a plan is built.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from tubelet.runtime.bundle import Bundle, Component
from tubelet.runtime.errors import UserError
from tubelet.runtime.memory import MemoryInfo
from tubelet.runtime.plans import ARCHITECTURES, COMPILERS, PRECISIONS, Target
from tubelet.runtime.profiles import Profile
from tubelet.runtime.residency import Footprint, plan_residency
from tubelet.runtime.spec import ModelSpec
from tubelet.runtime.strict import read, read_toml, require, require_positive

from .estimate import build_seconds, footprint, plan_growth, weight_bytes
from .profiles import Choice, Outside, choose
from .traffic import read_traffic


@dataclass(frozen=True)
class Sku:
    """One kind of machine."""

    name: str
    architecture: str
    memory_gb: float
    count: int
    precision: str
    gpu: str | None = None

    def __post_init__(self) -> None:
        require_positive(self, "sku")
        _require_one_of("sku.architecture", self.architecture, ARCHITECTURES)
        _require_one_of("sku.precision", self.precision, PRECISIONS)
        have = ARCHITECTURES[self.architecture].precisions
        require(
            self.precision in have,
            f"sku.precision {self.precision} is not there on {self.architecture}; choose from {', '.join(have)}",
        )
        require(
            self.gpu is not None or self.compiler != "tensorrt",
            f"sku.gpu is missing: plans for {self.architecture} are for one GPU; name it as `nvidia-smi -L` does",
        )

    @property
    def compiler(self) -> str:
        return ARCHITECTURES[self.architecture].compilers[0]

    def precision_of(self, component: str) -> str:
        """Only the denoiser goes below 16 bits."""
        if component == "denoiser" or PRECISIONS[self.precision] >= 2:
            return self.precision
        return "bf16" if "bf16" in ARCHITECTURES[self.architecture].precisions else "fp16"


@dataclass(frozen=True)
class Fleet:
    """What fleet.toml says."""

    traffic: str
    models: tuple[str, ...]
    max_profiles: int
    sku: tuple[Sku, ...]

    def __post_init__(self) -> None:
        require_positive(self, "fleet")
        names = [sku.name for sku in self.sku]
        for what, values in (("models", self.models), ("sku names", names)):
            require(
                len(values) == len(set(values)) > 0,
                f"fleet's {what} must be one or more, each once; they are {', '.join(values) or 'none'}",
            )


@dataclass(frozen=True)
class Build:
    """One plan: for TensorRT-RTX all architectures of a precision together, for TensorRT one GPU's."""

    model: str  # as fleet.toml names it
    component: str
    target: Target  # whose GPU it must be built on; none: any machine with TensorRT-RTX
    skus: tuple[str, ...]  # that load it
    memory_gb: float  # of the smallest of them
    profiles: tuple[Profile, ...]
    plan_bytes: int
    seconds: float  # beyond compiling the first profile's kernels


@dataclass(frozen=True)
class Cell:
    """One component on one SKU in one profile: its weights, inputs, outputs and activations."""

    model: str
    component: str
    sku: str
    profile: int
    memory_bytes: int


@dataclass(frozen=True)
class Loading:
    """Whether a SKU's memory takes a model, and which of its components at the same time."""

    sku: str
    fits: bool
    sentence: str


@dataclass(frozen=True)
class FleetPlan:
    fleet: Fleet
    bundles: Mapping[str, Bundle]  # by model
    builds: tuple[Build, ...]
    cells: tuple[Cell, ...]
    loading: Mapping[str, tuple[Loading, ...]]  # by model: for each SKU
    outside: Mapping[str, tuple[Outside, ...]]  # by model: shapes of the traffic that it cannot serve

    @property
    def complete(self) -> bool:
        """Whether every plan can be built, every model fits and every shape of the traffic is served."""
        return not any(
            (
                *(not build.target.can_be_built for build in self.builds),
                *(not each.fits for loading in self.loading.values() for each in loading),
                *self.outside.values(),
            )
        )

    def disk_bytes(self, sku: str) -> int:
        """All plans that one machine of a SKU loads."""
        return sum(build.plan_bytes for build in self.builds if sku in build.skus)


def read_fleet(path: Path) -> Fleet:
    """Raises UserError that names the file, the field, what is wrong and its value."""
    value = read_toml(path)
    try:
        return read(Fleet, value, "fleet")
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def plan_fleet(path: Path) -> FleetPlan:
    """The plans to build and every cell of component x SKU x profile.

    Raises UserError when the fleet, its traffic or a bundle cannot be read, or a model serves none of the traffic.
    """
    fleet, folder = read_fleet(path), path.parent
    bundles = {model: Bundle.open(folder / model) for model in fleet.models}
    builds: list[Build] = []
    cells: list[Cell] = []
    loading, outside = {}, {}
    for model, bundle in bundles.items():
        spec, components = bundle.spec, bundle.manifest.components
        choice = choose(spec, read_traffic(folder / fleet.traffic, spec), fleet.max_profiles)
        for name, component in components.items():
            builds += _builds(spec, model, name, component, choice.profiles[name], fleet.sku)
        for sku in fleet.sku:
            cells += _cells(spec, model, components, choice, sku)
        loading[model] = tuple(load(sku, _expected(spec, components, choice, sku)) for sku in fleet.sku)
        outside[model] = choice.outside
    return FleetPlan(fleet, bundles, tuple(builds), tuple(cells), loading, outside)


def load(sku: Sku, footprints: Mapping[str, Footprint]) -> Loading:
    """The runtime's own decision for a GPU of this memory."""
    memory = round(sku.memory_gb * 10**9)
    try:
        return Loading(sku.name, True, plan_residency(footprints, MemoryInfo(memory, memory), sku.name).sentence)
    except UserError as error:
        return Loading(sku.name, False, str(error))


def _builds(
    spec: ModelSpec, model: str, name: str, component: Component, profiles: Sequence[Profile], skus: Sequence[Sku]
) -> list[Build]:
    """The plans of one component, each for as many SKUs as it can serve."""
    shared: dict[tuple[str, str, tuple[str, ...]], list[Sku]] = {}
    for sku in skus:
        alone = () if sku.compiler == "rtx" else (sku.architecture, str(sku.gpu))
        shared.setdefault((sku.compiler, sku.precision_of(name), alone), []).append(sku)
    return [
        Build(
            model=model,
            component=name,
            target=Target(
                compiler,
                tuple(sorted({sku.architecture for sku in group}, key=COMPILERS[compiler].index)),
                precision,
                group[0].gpu if alone else None,
            ),
            skus=tuple(sku.name for sku in group),
            memory_gb=min(sku.memory_gb for sku in group),
            profiles=tuple(profiles),
            plan_bytes=weight_bytes(component, precision) + plan_growth(spec, name, len(profiles)),
            seconds=build_seconds(spec, name, len(profiles)),
        )
        for (compiler, precision, alone), group in shared.items()
    ]


def _cells(spec: ModelSpec, model: str, components: Mapping[str, Component], choice: Choice, sku: Sku) -> list[Cell]:
    cells = []
    for name, component in components.items():
        for index, profile in enumerate(choice.profiles[name]):
            alone = footprint(spec, name, component, [profile], sku.precision_of(name))
            cells.append(Cell(model, name, sku.name, index, sum(vars(alone).values())))
    return cells


def _expected(spec: ModelSpec, components: Mapping[str, Component], choice: Choice, sku: Sku) -> dict[str, Footprint]:
    return {
        name: footprint(spec, name, component, choice.profiles[name], sku.precision_of(name))
        for name, component in components.items()
    }


def _require_one_of(name: str, value: str, known: Mapping[str, object]) -> None:
    require(value in known, f"{name} must be one of {', '.join(known)}, is {value!r}")
