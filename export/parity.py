"""torch against each engine, component by component: the error table kept in the bundle.

Flows in: a checkpoint and the graphs made from it. Flows out: ParityRows over several shapes. A component too large to
be held in float32 is measured by its first blocks, which are traced again.
"""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from tubelet.runtime.bundle import Extents, ParityRow
from tubelet.runtime.engines import OnnxRuntimeEngine
from tubelet.runtime.spec import ModelSpec

from .checkpoint import Checkpoint
from .components import Component, build_modules, components
from .storage import StoredTensor
from .trace import trace

Array = NDArray[Any]
LARGEST = 1 << 28  # parameters of a component that is measured whole: 1 GiB in float32
WORDS = 4096  # of the vocabulary, of one that is not


def shortened(spec: ModelSpec) -> ModelSpec:
    """The same model with one block in each transformer, and few words."""
    image = spec.image_encoder
    return dataclasses.replace(
        spec,
        text_encoder=dataclasses.replace(
            spec.text_encoder, depth=1, vocabulary=min(WORDS, spec.text_encoder.vocabulary)
        ),
        image_encoder=None if image is None else dataclasses.replace(image, depth=1),
        denoiser=dataclasses.replace(spec.denoiser, depth=1),
    )


@contextmanager
def weights_of(checkpoint: Checkpoint, module: nn.Module, prefix: str) -> Iterator[None]:
    """Gives a module on the meta device the checkpoint's weights, in float32, for a while."""
    module.load_state_dict({name: checkpoint.read(prefix + name).float() for name in module.state_dict()}, assign=True)
    try:
        yield
    finally:
        module.to("meta")


@torch.no_grad()
def measure(checkpoint: Checkpoint, folder: Path) -> list[ParityRow]:
    """Runs every graph of `folder` beside its module on the shapes of the graph contract; the worst output counts.

    Holds the weights of one component at a time, first torch's in float32 and then the engine's.
    """
    rows = []
    torch.manual_seed(0)
    small = shortened(checkpoint.spec)
    with torch.device("meta"):
        whole = components(checkpoint.spec, build_modules(checkpoint.spec))
        short = {component.name: component for component in components(small, build_modules(small))}
    for component in whole:
        if sum(tensor.numel() for tensor in component.module.state_dict().values()) <= LARGEST:
            rows += _measure(checkpoint, component, folder / f"{component.name}.onnx")
        else:
            rows += _measure_short(checkpoint, short[component.name], folder)
    return rows


def _measure_short(checkpoint: Checkpoint, component: Component, folder: Path) -> list[ParityRow]:
    tensors = _leading(checkpoint.tensors, component)
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".", suffix=".onnx") as graph:
        ir.save(trace(component, tensors), graph.name)
        rows = _measure(dataclasses.replace(checkpoint, tensors=tensors), component, Path(graph.name), fold=False)
    return [dataclasses.replace(row, shape=f"one block, {row.shape}") for row in rows]


def _leading(tensors: Mapping[str, StoredTensor], component: Component) -> dict[str, StoredTensor]:
    """A component's tensors, and of one that has fewer rows than are stored the first."""
    found = {}
    for name, parameter in component.module.state_dict().items():
        stored = tensors[component.weights + name]
        size = stored.bytes * parameter.shape[0] // stored.shape[0] if parameter.ndim else stored.bytes
        found[component.weights + name] = dataclasses.replace(stored, shape=tuple(parameter.shape), bytes=size)
    return found


def _measure(checkpoint: Checkpoint, component: Component, graph: Path, fold: bool = True) -> list[ParityRow]:
    cases = [_inputs(component, extents) for extents in component.shapes]
    with weights_of(checkpoint, component.module, component.weights):
        expected = [component.run(inputs) for inputs in cases]
    engine, rows = OnnxRuntimeEngine(graph, frugal=not fold, fold=fold), []
    for extents, inputs, wanted in zip(component.shapes, cases, expected, strict=True):
        results = engine({name: value.numpy() for name, value in inputs.items()})
        errors = [_error(a.numpy(), results[name]) for name, a in zip(component.outputs, wanted, strict=True)]
        shape = " ".join(f"{name}={size}" for name, size in extents.items())
        worst_abs, worst_relative = (max(values) for values in zip(*errors, strict=True))
        rows.append(ParityRow(component.name, "cpu", shape, worst_abs, worst_relative))
    return rows


def _inputs(component: Component, extents: Extents) -> dict[str, Tensor]:
    return {name: port.example(extents) for name, port in component.inputs.items()}


def _error(expected: Array, result: Array) -> tuple[float, float]:
    """Largest difference, and L2 of the difference over L2 of what was expected (or 0 where nothing was)."""
    difference = np.abs(result - expected)
    scale = float(np.linalg.norm(expected))
    return float(difference.max()), float(np.linalg.norm(difference)) / scale if scale else float(difference.max())
