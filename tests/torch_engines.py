"""The reference models in the place of engines: a checkpoint's modules, run by torch; and what they are given."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from tubelet.export.checkpoint import Checkpoint
from tubelet.export.components import Component, build_modules, components
from tubelet.runtime import Pipeline, Request
from tubelet.runtime.canvas import Canvas
from tubelet.runtime.loop import HostLoop, Steps
from tubelet.runtime.studio import Studio


class TorchEngine:
    def __init__(self, component: Component):
        self._component = component

    @torch.no_grad()
    def __call__(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, Any]:
        results = self._component.run({name: torch.from_numpy(value) for name, value in inputs.items()})
        return {name: r.numpy() for name, r in zip(self._component.outputs, results, strict=True)}

    advance = __call__

    def bind(self, inputs: Mapping[str, Any], outputs: Mapping[str, Any]) -> SimpleNamespace:
        return SimpleNamespace(run=lambda: np.copyto(outputs["velocity"], self(inputs)["velocity"]))


class TorchEngines:
    """A checkpoint's modules as a pipeline's engines."""

    def __init__(self, checkpoint: Checkpoint):
        with torch.device("meta"):
            parts = components(checkpoint.spec, build_modules(checkpoint.spec))
        self.used: list[str] = []
        self._parts = {part.name: part for part in parts}
        for part in parts:
            for name, tensor in part.module.state_dict().items():
                assert tuple(tensor.shape) == checkpoint.tensors[part.weights + name].shape
            part.module.load_state_dict(
                {n: checkpoint.read(part.weights + n).float() for n in part.module.state_dict()}, assign=True
            )

    def __getitem__(self, name: str) -> TorchEngine:
        self.used.append(name)
        return TorchEngine(self._parts[name])

    def check(self, geometry: Any, batch: int) -> None:
        """Any clip."""

    def loop(self, steps: Steps) -> HostLoop:
        return HostLoop(self[steps.denoiser], steps)


def painted(ours: Pipeline, request: Request, shown: Mapping[int, NDArray[np.uint8]], frames: int) -> Canvas:
    """The first canvas that the studio paints for pictures at these frames."""
    canvases: list[Canvas] = []

    class Stopped(Exception):
        pass

    def prepare(request: Request, canvas: Canvas) -> None:
        canvases.append(canvas)
        raise Stopped

    stopping = SimpleNamespace(spec=ours.spec, encode=ours.encode, prepare=prepare)
    with pytest.raises(Stopped):
        Studio(stopping)._paint_around(request, shown, frames)  # type: ignore[arg-type]
    return canvases[0]
