"""torch against each engine, component by component: the error table kept in the bundle.

Flows in: a checkpoint and the graphs made from it. Flows out: ParityRows over several shapes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from torch import nn

from tubelet.runtime.bundle import WEIGHTS, ParityRow
from tubelet.runtime.engines import OnnxRuntimeEngine

from .checkpoint import Checkpoint
from .components import Component, build_modules, components

Array = NDArray[Any]


@contextmanager
def weights_of(checkpoint: Checkpoint, module: nn.Module, prefix: str) -> Iterator[None]:
    """Gives a module on the meta device the checkpoint's weights, in float32, for a while."""
    with safe_open(checkpoint.folder / WEIGHTS, "pt") as file:
        module.load_state_dict(
            {name: file.get_tensor(prefix + name).float() for name in module.state_dict()}, assign=True
        )
    try:
        yield
    finally:
        module.to("meta")


@torch.no_grad()
def measure(checkpoint: Checkpoint, folder: Path) -> list[ParityRow]:
    """Runs every graph of `folder` beside its module on the shapes of the graph contract; the worst output counts.

    Holds the weights of one component at a time: torch's in float32, and the engine's.
    """
    rows = []
    torch.manual_seed(0)
    with torch.device("meta"):
        modules = build_modules(checkpoint.spec)
    for component in components(checkpoint.spec, modules):
        with weights_of(checkpoint, component.module, component.weights):
            rows += _measure(component, folder)
    return rows


def _measure(component: Component, folder: Path) -> list[ParityRow]:
    engine, rows = OnnxRuntimeEngine(folder / f"{component.name}.onnx"), []
    for extents in component.shapes:
        inputs = {name: port.example(extents) for name, port in component.inputs.items()}
        expected = component.module(*inputs.values())
        expected = (expected,) if isinstance(expected, torch.Tensor) else expected
        results = engine({name: value.numpy() for name, value in inputs.items()})
        errors = [_error(a.numpy(), results[name]) for name, a in zip(component.outputs, expected, strict=True)]
        shape = " ".join(f"{name}={size}" for name, size in extents.items())
        worst_abs, worst_relative = (max(values) for values in zip(*errors, strict=True))
        rows.append(ParityRow(component.name, "cpu", shape, worst_abs, worst_relative))
    return rows


def _error(expected: Array, result: Array) -> tuple[float, float]:
    """Largest difference, and L2 of the difference over L2 of what was expected (or 0 where nothing was)."""
    difference = np.abs(result - expected)
    scale = float(np.linalg.norm(expected))
    return float(difference.max()), float(np.linalg.norm(difference)) / scale if scale else float(difference.max())
