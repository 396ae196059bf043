"""torch against each engine, component by component: the error table kept in the bundle.

Flows in: a checkpoint and the graphs made from it. Flows out: ParityRows over several shapes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from torch import nn

from tubelet.runtime.bundle import WEIGHTS, ParityRow
from tubelet.runtime.engines import OnnxRuntimeEngine

from .checkpoint import Checkpoint
from .components import build_modules, components

Array = NDArray[Any]


def load_modules(checkpoint: Checkpoint) -> dict[str, nn.Module]:
    """The reference modules with the checkpoint's weights in float32."""
    modules = build_modules(checkpoint.spec)
    weights = load_file(checkpoint.folder / WEIGHTS)
    for prefix, module in modules.items():
        own = {
            name.removeprefix(f"{prefix}."): t.float() for name, t in weights.items() if name.startswith(f"{prefix}.")
        }
        module.load_state_dict(own)
    return modules


@torch.no_grad()
def measure(checkpoint: Checkpoint, folder: Path) -> list[ParityRow]:
    """Runs every graph of `folder` beside its module on the shapes of the graph contract; the worst output counts."""
    rows = []
    torch.manual_seed(0)
    for component in components(checkpoint.spec, load_modules(checkpoint)):
        engine = OnnxRuntimeEngine(folder / f"{component.name}.onnx")
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
