"""A component and its checkpoint -> an ONNX graph whose weights stay in the checkpoint's files.

Flows in: a Component on the meta device and where its tensors lie. Flows out: an onnx_ir model at opset 23 with native
Attention and normalisations, whose named extents vary. No weight is read.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import onnx_ir as ir
import torch
from torch import Tensor, nn
from torch.fx.experimental.symbolic_shapes import optimization_hint

from .components import Component
from .passes import optimize
from .stack import called, inlined
from .storage import StoredTensor

OPSET = 23
TRACED = {"B": 2, "N": 36, "L": 16, "h": 6, "w": 8, "t": 3}  # none is 0 or 1, which tracing would take for constants
STORED_TYPES = {"F32": ir.DataType.FLOAT, "F16": ir.DataType.FLOAT16, "BF16": ir.DataType.BFLOAT16}


def trace(component: Component, tensors: Mapping[str, StoredTensor]) -> ir.Model:
    """Returns the component's graph, to be saved beside the weights files."""
    with _quiet():
        with called(component.module) as firsts:
            model = _to_onnx(_export(component))
        model = inlined(model, firsts, _export_one)
    for value in model.graph.initializers.values():
        value.const_value = None
    model = optimize(model)
    _name_ports(model, component)
    _reference_weights(model, component, tensors)
    model.producer_name, model.producer_version = "tubelet", None
    return model


def _export(component: Component) -> torch.export.ExportedProgram:
    """The traced module; a VAE step takes its caches as one variadic tuple."""
    examples = {name: port.example(TRACED).to("meta") for name, port in component.inputs.items()}
    varying = {
        name: {axis: torch.export.Dim.DYNAMIC for axis, extent in enumerate(port.shape) if isinstance(extent, str)}
        for name, port in component.inputs.items()
    }
    if component.by_name:
        return torch.export.export(component.module, (), examples, dynamic_shapes=varying)
    first, *caches = varying.values()
    dynamic = (first, tuple(caches)) if caches else (first,)
    return torch.export.export(component.module, tuple(examples.values()), dynamic_shapes=dynamic)


def _export_one(module: nn.Module, traced: tuple[Tensor, ...]) -> ir.Model:
    """The graph of a module of a stack, whose extents vary where those of the traced tensors do."""
    examples = tuple(
        torch.empty([optimization_hint(extent) for extent in each.shape], dtype=each.dtype, device="meta")
        for each in traced
    )
    varying = tuple(
        {axis: torch.export.Dim.DYNAMIC for axis, extent in enumerate(each.shape) if not isinstance(extent, int)}
        for each in traced
    )
    return _to_onnx(torch.export.export(module, examples, dynamic_shapes=(varying,)))


def _to_onnx(exported: torch.export.ExportedProgram) -> ir.Model:
    program = torch.onnx.export(exported, dynamo=True, opset_version=OPSET, optimize=False, verbose=False)
    assert program is not None
    return program.model


def _name_ports(model: ir.Model, component: Component) -> None:
    """Gives inputs and outputs the contract's names and extents."""
    for node in model.graph:
        for value in node.outputs:
            value.shape = None  # the tracer's own names for extents
    contract = (*component.inputs.items(), *component.outputs.items())
    for value, (name, port) in zip((*model.graph.inputs, *model.graph.outputs), contract, strict=True):
        value.name = name
        value.shape = ir.Shape(port.shape)


def _reference_weights(model: ir.Model, component: Component, tensors: Mapping[str, StoredTensor]) -> None:
    """Points each parameter at its bytes in a weights file; one stored in 16 bits is cast where it is used."""
    casts = []
    for name, value in list(model.graph.initializers.items()):
        if value.const_value is not None:
            continue  # a constant of the graph
        stored = tensors[component.weights + name]
        dtype = STORED_TYPES[stored.dtype]
        wide = ir.TensorType(ir.DataType.FLOAT)
        del model.graph.initializers[name]
        value.name = component.weights + name
        value.const_value = ir.ExternalTensor(
            stored.file, stored.offset, stored.bytes, dtype, shape=ir.Shape(stored.shape), name=value.name
        )
        value.dtype = dtype
        model.graph.initializers[value.name] = value
        if dtype != ir.DataType.FLOAT:
            cast = ir.node("Cast", [value], {"to": ir.DataType.FLOAT}, name=f"{value.name}/cast")
            cast.outputs[0].name, cast.outputs[0].type, cast.outputs[0].shape = f"{value.name}/float", wide, value.shape
            ir.convenience.replace_all_uses_with(value, cast.outputs[0])
            cast.replace_input_with(0, value)
            casts.append(cast)
    if casts:
        model.graph.insert_before(model.graph[0], casts)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences the exporter's notes about packages that it does not need."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
