"""What runs a bundle: the engines of the best target that the machine and the bundle have.

Flows in: a bundle and a target's name, or "auto". Flows out: its engines, and a Choice that says why these.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

from .bundle import TO_GENERATE, Bundle
from .cuda import CudaDevice
from .engines import CPU, CUDA, Components, Engine, OnnxRuntimeEngine, require_provider
from .errors import UserError
from .geometry import Geometry
from .loop import HostLoop, Loop, Steps
from .memory import Device, DeviceError
from .plan_engines import PlanEngines
from .plans import FOLDER, find_plans
from .residency import footprint, plan_host_residency, plan_residency
from .session import Session
from .tensorrt import TensorRt, compiler_of, load_module

PROVIDERS = {"cuda": CUDA, "cpu": CPU}
TARGETS = ("tensorrt", "rtx", "cuda", "cpu")  # in the order in which "auto" tries them
AUTO = "auto"


class Engines(Components, Protocol):
    """A bundle's engines, and what depends on where they run."""

    def check(self, geometry: Geometry, batch: int) -> None:
        """Raises UserError for a clip that the engines were not compiled for."""
        ...

    def loop(self, steps: Steps) -> Loop:
        """Makes all that the steps of one request need."""
        ...

    def warm_up(self) -> None:
        """Does ahead what engines would do when a shape is first met."""
        ...

    def close(self) -> None: ...


class HostEngines:
    """Engines whose arrays are the host's, each loaded when it is first asked for.

    Those of one of `groups` make room for those of another, and that of a clip's first frame, which has run, for that
    of the frames after it: it holds the same weights.
    """

    def __init__(self, load: Callable[[str], Engine], groups: Sequence[Collection[str]] = ()):
        self._load, self._groups = load, groups
        self._loaded: dict[str, Engine] = {}

    def __getitem__(self, name: str) -> Engine:
        if name not in self._loaded:
            beside = next((group for group in self._groups if name in group), self._loaded.keys())
            self._loaded = {other: engine for other, engine in self._loaded.items() if other in beside}
            self._loaded[name] = self._load(name)
        self._loaded.pop(f"{name}_first", None)
        return self._loaded[name]

    def check(self, geometry: Geometry, batch: int) -> None:
        """Any clip of the model's."""

    def loop(self, steps: Steps) -> Loop:
        return HostLoop(self[steps.denoiser], steps)

    def warm_up(self) -> None:
        """Nothing depends on shapes."""

    def close(self) -> None:
        self._loaded.clear()


@dataclass(frozen=True)
class Choice:
    """The target that was chosen."""

    target: str
    detail: str  # on what it runs, and how
    passed_over: tuple[tuple[str, str], ...]  # targets that are faster, and why each is not it

    def __str__(self) -> str:
        reasons = "".join(f"; not {target}: {reason}" for target, reason in self.passed_over)
        return f"{self.target}, {self.detail}{reasons}"


def open_engines(bundle: Bundle, target: str, threads: int | None) -> tuple[Engines, Choice]:
    """The engines of a target, or of the first of TARGETS that works where it is "auto".

    Raises UserError where it does not work, and DeviceError when its GPU fails.
    """
    if target != AUTO:
        engines, detail = _open(bundle, target, threads)
        return engines, Choice(target, detail, ())
    passed_over: list[tuple[str, str]] = []
    for name in TARGETS[:-1]:
        try:
            engines, detail = _open(bundle, name, threads)
        except (UserError, DeviceError) as error:
            passed_over.append((name, str(error)))
        else:
            return engines, Choice(name, detail, tuple(passed_over))
    engines, detail = _open(bundle, TARGETS[-1], threads)
    return engines, Choice(TARGETS[-1], detail, tuple(passed_over))


def examine(target: str) -> str:
    """What a target runs on here. Raises UserError where it cannot run."""
    if target in PROVIDERS:
        return require_provider(PROVIDERS[target])
    module = load_module(target)
    with CudaDevice() as device:
        return _named(module.__name__, module.__version__, device)


def _open(bundle: Bundle, target: str, threads: int | None) -> tuple[Engines, str]:
    if target not in TARGETS:
        raise UserError(f"target {target!r} is not one of {', '.join((AUTO, *TARGETS))}")
    return _open_host(bundle, target, threads) if target in PROVIDERS else _open_plans(bundle, target)


def _open_host(bundle: Bundle, target: str, threads: int | None) -> tuple[Engines, str]:
    if "cpu" not in bundle.manifest.targets:
        targets = ", ".join(bundle.manifest.targets) or "nothing"
        raise UserError(f"{bundle.folder} runs on {targets}, this version of tubelet runs cpu; export it again")
    provider = PROVIDERS[target]
    detail = require_provider(provider)
    residency = plan_host_residency(bundle.manifest.components)

    def load(name: str) -> Engine:
        return OnnxRuntimeEngine(bundle.graph(name), threads, provider, frugal=name.startswith("vae_"))

    engines = HostEngines(load, residency.groups)
    if len(residency.groups) > 1:
        return engines, f"{detail}: {residency.sentence}"
    for name in bundle.manifest.components:
        if name in TO_GENERATE:
            _ = engines[name]
    return engines, detail


def _open_plans(bundle: Bundle, target: str) -> tuple[Engines, str]:
    if not any((bundle.folder / FOLDER).glob(f"{target}-*")):
        raise UserError(f"the bundle has no plans of {target}; make them with `tubelet build --target {target}:...`")
    module = load_module(target)
    session = Session(CudaDevice())
    try:
        device = session.device
        plans = find_plans(bundle, target, compiler_of(module), device.architecture, device.name)
        components = bundle.manifest.components
        footprints = {name: footprint(components[name], plan.record) for name, plan in plans.items()}
        residency = plan_residency(footprints, device.memory(), device.name)
        engines = PlanEngines(TensorRt(module, session), bundle, plans, residency)
    except BaseException:
        session.close()
        raise
    return engines, f"{_named(module.__name__, module.__version__, device)}: {residency.sentence}"


def _named(module: str, version: str, device: Device) -> str:
    return f"{module} {version} on {device.name} ({device.architecture})"
