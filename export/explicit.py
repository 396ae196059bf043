"""A quantized graph's portable nodes -> the ones that TensorRT fuses with matrix products; the same numbers.

    uint8 around 128        -> int8 around 0
    tubelet::RoundInputs    -> trt::TRT_FP4DynamicQuantize, and DequantizeLinear of scales and values
    tubelet::RestoreWeight  -> the same bytes as FLOAT4E2M1, and DequantizeLinear of scales and values

Flows in and out: a graph in float32 with shapes, changed in place. `export/quantize` makes it; `precision.py` types
what comes out.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from .quantize.formats import BLOCK

FLOAT, FP4, E4M3 = ir.DataType.FLOAT, ir.DataType.FLOAT4E2M1, ir.DataType.FLOAT8E4M3FN
DYNAMIC = "TRT_FP4DynamicQuantize"


def to_tensorrt(model: ir.Model) -> None:
    """Replaces every portable node of a quantized graph; leaves other graphs as they are."""
    graph = model.graph
    for node in list(graph):
        if node.op_type == "QuantizeLinear" and node.outputs[0].dtype == ir.DataType.UINT8:
            _center(graph, node)
        elif node.op_type == "RoundInputs":
            _replace(graph, node, _round_inputs(node))
        elif node.op_type == "RestoreWeight":
            _replace(graph, node, _restore_weight(node))
    if model.functions:
        model.functions.clear()
        graph.opset_imports["trt"] = 1


def _center(graph: ir.Graph, node: ir.Node) -> None:
    """Moves the zero point of a QuantizeLinear and of what reads it to 0."""
    name = f"{node.name}/zero"
    tensor = ir.tensor(np.zeros((), np.int8), name=name)
    zero = ir.Value(name=name, type=ir.TensorType(ir.DataType.INT8), shape=ir.Shape(()), const_value=tensor)
    graph.register_initializer(zero)
    node.outputs[0].dtype = ir.DataType.INT8
    for each in (node, *(use.node for use in node.outputs[0].uses())):
        each.replace_input_with(2, zero)


def _round_inputs(node: ir.Node) -> list[ir.Node]:
    value, scale = node.inputs
    attributes = {"axis": -1, "block_size": BLOCK, "scale_type": int(E4M3)}
    rounded = ir.node(DYNAMIC, [value, scale], attributes, domain="trt", num_outputs=2, name=f"{node.name}/fp4")
    values, scales = rounded.outputs
    values.name, values.type, values.shape = f"{node.name}/values", ir.TensorType(FP4), node.outputs[0].shape
    scales.name, scales.type = f"{node.name}/scales", ir.TensorType(E4M3)
    return [rounded, *_dequantize(node, values, scales, scale)]


def _restore_weight(node: ir.Node) -> list[ir.Node]:
    codes, scales, scale = node.inputs
    assert codes is not None and isinstance(codes.const_value, ir.ExternalTensor)
    stored = codes.const_value
    codes.const_value = ir.ExternalTensor(
        stored.location,
        stored.offset,
        stored.length,
        FP4,
        shape=stored.shape,
        name=stored.name,
        base_dir=stored.base_dir,
    )
    codes.dtype = FP4
    return _dequantize(node, codes, scales, scale)


def _dequantize(node: ir.Node, values: ir.Value, scales: ir.Value | None, scale: ir.Value | None) -> list[ir.Node]:
    """Values times their blocks' scales, which are times the one of all."""
    steps = ir.node("DequantizeLinear", [scales, scale], name=f"{node.name}/steps")
    steps.outputs[0].name, steps.outputs[0].type = f"{node.name}/steps", ir.TensorType(FLOAT)
    attributes = {"axis": -1, "block_size": BLOCK}
    return [steps, ir.node("DequantizeLinear", [values, steps.outputs[0]], attributes, name=str(node.name))]


def _replace(graph: ir.Graph, node: ir.Node, nodes: list[ir.Node]) -> None:
    """Puts nodes in another's place; the last one's output takes over its output's name, type and shape."""
    old, new = node.outputs[0], nodes[-1].outputs[0]
    new.name, new.type, new.shape = old.name, old.type, old.shape
    ir.convenience.replace_nodes_and_values(graph, node, [node], nodes, [old], [new])
