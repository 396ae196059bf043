"""Rounding of linear layers as explicit nodes, as one visible list of passes.

Flows in: a denoiser's graph, and Roundings of some of its layers. Flows out: the same graph, where

    inputs   source -> Mul (factors that move outliers into the weights) -> QuantizeLinear -> DequantizeLinear
    weights  stored values -> DequantizeLinear -> Transpose -> MatMul

For nvfp4, which ONNX Runtime lacks, the pairs are functions of `nvfp4.py`. New weights are computed when they are
written. int8 inputs are stored as uint8 around 128, the only form that ONNX Runtime multiplies natively where layers
share an input; `export/explicit.py` turns it into TensorRT's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import onnx_ir.passes.common as common

from .formats import E4M3, Float32, Format, Rounded, round_weight
from .linear import Linear, sites
from .nvfp4 import DOMAIN, functions

ZEROS: Mapping[str, Any] = {"int8": np.uint8(128), "fp8": np.zeros((), E4M3)}


@dataclass(frozen=True)
class Rounding:
    """How the layers of a site are rounded."""

    format: Format
    factors: Float32 | None  # [I], powers of two: inputs times, weights divided by them; where inputs are rounded
    scale: float  # of the inputs


Roundings = Mapping[str, Rounding]  # by layer; layers of one site have the same


class RoundInputs(ir.passes.InPlacePass):
    """Moves outliers of a source into the weights and rounds it, once for all layers that read it."""

    def __init__(self, roundings: Roundings):
        super().__init__()
        self._roundings = roundings

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        for site in sites(model):
            readers = [layer for layer in site.layers if layer.name in self._roundings]
            if readers and self._roundings[readers[0].name].format.rounds_inputs:
                _round_source(model.graph, site.source, readers, self._roundings[readers[0].name])
        return ir.passes.PassResult(model, modified=bool(self._roundings))


class RoundWeights(ir.passes.InPlacePass):
    """Replaces each weight by its stored values and what restores them, and names the product as its layer."""

    def __init__(self, roundings: Roundings):
        super().__init__()
        self._roundings = roundings

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        for layer in [layer for site in sites(model) for layer in site.layers if layer.name in self._roundings]:
            restored = _restored(model.graph, layer, self._roundings[layer.name])
            turned = _node("Transpose", [restored.outputs[0]], f"{layer.name}/turned", perm=[1, 0])
            model.graph.insert_before(layer.product, [restored, turned])
            layer.product.replace_input_with(1, turned.outputs[0])
            layer.product.name = layer.name
        return ir.passes.PassResult(model, modified=bool(self._roundings))


class AddFunctions(ir.passes.InPlacePass):
    """Adds the functions that the graph calls."""

    def call(self, model: ir.Model) -> ir.passes.PassResult:
        used = {node.op_type for node in model.graph if node.domain == DOMAIN}
        for function in functions():
            if function.name in used:
                model.functions[function.identifier()] = function
                model.graph.opset_imports[DOMAIN] = 1
        return ir.passes.PassResult(model, modified=bool(used))


def round_layers(model: ir.Model, roundings: Roundings) -> ir.Model:
    """Runs every pass in order and returns the model; a layer without a Rounding stays as it is."""
    passes = ir.passes.Sequential(
        RoundInputs(roundings),  # before the weights, which no longer look like weights afterwards
        RoundWeights(roundings),
        AddFunctions(),
        common.RemoveUnusedNodesPass(),
        common.TopologicalSortPass(),
    )
    return passes(model).model


def _round_source(graph: ir.Graph, source: ir.Value, readers: Sequence[Linear], rounding: Rounding) -> None:
    value, nodes, name = source, [], readers[0].name
    if rounding.factors is not None:
        nodes.append(_node("Mul", [value, _constant(graph, f"{name}/factors", rounding.factors)], f"{name}/migrated"))
        value = nodes[-1].outputs[0]
    scale = _constant(graph, f"{name}/scale", np.float32(rounding.scale))
    if rounding.format.block is None:
        zero = _constant(graph, f"{name}/zero", ZEROS[rounding.format.name])
        nodes.append(_node("QuantizeLinear", [value, scale, zero], f"{name}/quantized", dtype=zero.dtype))
        nodes.append(_node("DequantizeLinear", [nodes[-1].outputs[0], scale, zero], f"{name}/rounded"))
    else:
        nodes.append(_node("RoundInputs", [value, scale], f"{name}/rounded", domain=DOMAIN))
    graph.insert_before(readers[0].product, nodes)
    for layer in readers:
        layer.product.replace_input_with(0, nodes[-1].outputs[0])


def _restored(graph: ir.Graph, layer: Linear, rounding: Rounding) -> ir.Node:
    """The node that restores a weight [O,I] from initializers whose values are computed when they are asked for."""
    shape = layer.shape
    block, dtype = rounding.format.block, ir.DataType.from_numpy(rounding.format.dtype)

    def rounded() -> Rounded:
        values = layer.values()
        return round_weight(rounding.format, values if rounding.factors is None else values / rounding.factors)

    name = str(layer.weight.name)
    if block is None:
        values = _initializer(graph, name, dtype, shape, lambda: rounded().values)
        scales = _initializer(graph, f"{name}.scales", ir.DataType.FLOAT, shape[:1], lambda: rounded().scales)
        inputs = [values, scales]
        if dtype == ir.DataType.INT8:  # each its own: ONNX Runtime writes into it on CPUs without VNNI
            zeros = np.zeros(shape[:1], np.int8)
            inputs.append(_initializer(graph, f"{name}.zeros", dtype, shape[:1], lambda: zeros))
        return _node("DequantizeLinear", inputs, f"{layer.name}/weight", axis=0)
    codes = ir.DataType.UINT4  # E2M1's bits
    values = _initializer(graph, name, codes, shape, lambda: rounded().values.view(ml_dtypes.uint4))
    blocks = (shape[0], shape[1] // block)
    scales = _initializer(graph, f"{name}.scales", ir.DataType.FLOAT8E4M3FN, blocks, lambda: rounded().scales)
    tensor_scale = _initializer(
        graph, f"{name}.scale", ir.DataType.FLOAT, (), lambda: np.asarray(rounded().tensor_scale, np.float32)
    )
    return _node("RestoreWeight", [values, scales, tensor_scale], f"{layer.name}/weight", domain=DOMAIN)


def _initializer(graph: ir.Graph, name: str, dtype: ir.DataType, shape: tuple[int, ...], compute: Any) -> ir.Value:
    """A new initializer; it takes the name of one that is there, which then has another."""
    if name in graph.initializers:
        replaced = graph.initializers[name]
        replaced.name = f"{name}/wide"
    extents = ir.Shape(shape)
    tensor = ir.LazyTensor(lambda: ir.tensor(compute(), dtype=dtype), dtype=dtype, shape=extents, name=name)
    value = ir.Value(name=name, type=ir.TensorType(dtype), shape=extents, const_value=tensor)
    graph.register_initializer(value)
    return value


def _constant(graph: ir.Graph, name: str, value: Any) -> ir.Value:
    tensor = ir.tensor(np.asarray(value), name=name)
    constant = ir.Value(
        name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(tensor.shape.numpy()), const_value=tensor
    )
    graph.register_initializer(constant)
    return constant


def _node(
    kind: str,
    inputs: list[ir.Value],
    output: str,
    domain: str = "",
    dtype: ir.DataType | None = ir.DataType.FLOAT,
    **attributes: Any,
) -> ir.Node:
    node = ir.node(kind, inputs, attributes, domain=domain, name=output)
    node.outputs[0].name, node.outputs[0].type = output, ir.TensorType(dtype or ir.DataType.FLOAT)
    return node
