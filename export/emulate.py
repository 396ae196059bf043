"""A typed graph -> a float32 graph that rounds every narrow value as its plan would: precision measured on any CPU.

Flows in: what `precision.lower` made. Flows out: a graph for ONNX Runtime, whose CPU kernels have no bfloat16. Sums run
in float32, as tensor cores accumulate them.
"""

from __future__ import annotations

import onnx_ir as ir

from .precision import FLOAT, TYPES


def emulate(model: ir.Model, precision: str) -> ir.Model:
    """Changes the graph in place: all floats are float32, narrow ones with the values that their type can hold."""
    narrow, graph = TYPES[precision], model.graph
    for node in list(graph):
        for index, value in enumerate(node.inputs):
            if value is not None and value.is_initializer() and value.dtype == narrow and node.op_type != "Cast":
                wide = _cast(value, FLOAT)
                graph.insert_before(node, wide)
                node.replace_input_with(index, wide.outputs[0])
        if node.op_type == "Cast" and node.attributes["to"].as_int() == narrow:
            node.attributes["to"] = ir.AttrInt64("to", FLOAT)
    for value in [*graph.inputs, *(value for node in list(graph) for value in node.outputs)]:
        if value.dtype != narrow:
            continue
        value.dtype = FLOAT
        uses, rounded = list(value.uses()), _cast(value, narrow)
        back = _cast(rounded.outputs[0], FLOAT)
        producer = value.producer()
        if producer is None:
            graph.insert_before(graph[0], [rounded, back])
        else:
            graph.insert_after(producer, [rounded, back])
        for use in uses:
            use.node.replace_input_with(use.idx, back.outputs[0])
    return model


def _cast(value: ir.Value, dtype: ir.DataType) -> ir.Node:
    node = ir.node("Cast", [value], {"to": dtype})
    node.outputs[0].name, node.outputs[0].type = f"{value.name}/{dtype.name}/emulated", ir.TensorType(dtype)
    return node
