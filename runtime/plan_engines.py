"""A bundle's compiled engines on one GPU, loaded together or in turn.

Flows in: plans, and which of them may be loaded at the same time. Flows out: engines by component; one that is not
loaded is when it is used, and others make room for it. May be shared by threads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .bundle import Bundle
from .device_loop import DeviceLoop, Workspaces
from .engines import Arrays, Binding, Engine
from .errors import UserError
from .geometry import Geometry
from .loop import Steps
from .memory import Resource
from .plans import Plan
from .profiles import Profile, nearest, select
from .residency import Residency
from .session import Session
from .tensorrt import TensorRt, TensorRtEngine
from .tiles import tile_size

DENOISER = "denoiser"  # how the name of a component begins that takes steps


class PlanEngines(Resource):
    def __init__(self, runtime: TensorRt, bundle: Bundle, plans: dict[str, Plan], residency: Residency):
        """Loads all engines if there is room. Raises UserError for a plan that is damaged or refused."""
        self._runtime, self._bundle, self._plans, self._residency = runtime, bundle, plans, residency
        self.session = runtime.session
        self._loaded: dict[str, TensorRtEngine] = {}
        denoisers = [name for name in plans if name.startswith(DENOISER)]
        limit = residency.workspaces // len(denoisers)
        self._workspaces = {name: Workspaces(self.session, limit) for name in denoisers}
        super().__init__(_release, self._loaded, self._workspaces, self.session)
        if len(residency.groups) == 1:
            try:
                for name in plans:
                    self.load(name)
            except BaseException:
                self.close()
                raise

    def __getitem__(self, name: str) -> Engine:
        if name not in self._plans:
            raise KeyError(name)
        return _Engine(self, name)

    def check(self, geometry: Geometry, batch: int) -> None:
        """Raises UserError, with the nearest shape, for a clip that no profile takes."""
        profiles = {name: self.profiles(name) for name in self._plans}
        rows, columns = tile_size(self._bundle.spec.vae, *geometry.latent[1:])
        tokens = {"N": geometry.tokens}
        clip = f"{geometry.width}x{geometry.height} with {geometry.frames} frames"
        inside = select(profiles["vae_decoder"], {"h": rows, "w": columns}) is not None
        if not inside or select(profiles["denoiser"], tokens) is None:
            other = nearest(self._bundle.spec, profiles, geometry.width, geometry.height, geometry.frames)
            raise UserError(
                f"{clip} is {geometry.tokens} tokens, which the plans were not built for; the nearest shape that they "
                f"take is {other.width}x{other.height} with {other.frames} frames"
            )
        if select(profiles["denoiser"], {**tokens, "B": batch}) is None:
            raise UserError(f"the plans take no batch of {batch} for {clip}; leave guidance at 1, or build for it")

    def profiles(self, name: str) -> Sequence[Profile]:
        return self._plans[name].record.profiles

    def loop(self, steps: Steps) -> DeviceLoop:
        name = steps.denoiser  # and no more of `steps`, which a loop copies
        return DeviceLoop(self.session, self._workspaces[name], lambda: self.load(name), steps)

    def warm_up(self) -> None:
        for name in self._plans:
            with self.session.lock:
                self.load(name).warm_up()

    def run(self, name: str, inputs: Arrays) -> dict[str, Any]:
        with self.session.lock:
            return self.load(name)(inputs)

    def load(self, name: str) -> TensorRtEngine:
        """A loaded engine; the caller holds the session's lock while it uses it."""
        if name not in self._loaded:
            for other in self._loaded.keys() - set(self._residency.beside(name)):
                self._unload(other)
            resident = frozenset(port for port in self._bundle.manifest.components[name].outputs if _stays(name, port))
            self._loaded[name] = self._runtime.load(self._plans[name], self._bundle.manifest.components[name], resident)
        return self._loaded[name]

    def _unload(self, name: str) -> None:
        if name in self._workspaces:
            self._workspaces[name].unload()
        self._loaded.pop(name).close()
        self.session.scratch.release()


def _release(loaded: dict[str, TensorRtEngine], workspaces: dict[str, Workspaces], session: Session) -> None:
    """Engines go before their device, at the end of the process too."""
    with session.lock:
        for each in workspaces.values():
            each.unload()
        for engine in loaded.values():
            engine.close()
        loaded.clear()
        session.close()


def _stays(component: str, output: str) -> bool:
    """Whether an output is only ever another engine's input, so that it need not leave the device."""
    conditioning = component.startswith(("text_encoder", "conditioner", "image_conditioner"))
    return conditioning or output.startswith("next_cache_")


class _Engine:
    def __init__(self, engines: PlanEngines, name: str):
        self._engines, self._name = engines, name

    def __call__(self, inputs: Arrays) -> dict[str, Any]:
        return self._engines.run(self._name, inputs)

    def advance(self, inputs: Arrays) -> dict[str, Any]:
        return self(inputs)

    def bind(self, inputs: Arrays, outputs: Arrays) -> Binding:
        return _Binding(self, inputs, outputs)


class _Binding:
    """Arrays of the host, copied to the device and back at every run."""

    def __init__(self, engine: _Engine, inputs: Arrays, outputs: Arrays):
        self._engine, self._inputs, self._outputs = engine, inputs, outputs

    def run(self) -> None:
        results = self._engine(self._inputs)
        for name, array in self._outputs.items():
            np.copyto(array, results[name])
