"""A float32 graph -> the same graph in bfloat16 or float16, strongly typed: what TensorRT compiles.

Flows in: a bundle's graph. Flows out: a graph whose every value has an explicit type. Matrix products, attention and
the stream between blocks are narrow. Wide (float32) stay, as in the reference pipelines of diffusers:

    tables       inputs that the host computes in float32 (PRECISE), and what is computed from them alone
    modulation   a product of a narrow value and a wide one is wide, until the next matrix product
    residual     the sum of the narrow stream and a wide branch is computed wide and kept narrow
    statistics   reductions, powers and roots of a norm that is spelled out

In a quantized graph inputs of a product are rounded as they come, wide or narrow, and what is restored is narrow.
Scales are values of bfloat16, so bfloat16 plans have them in it; in float16 they could leave its range, so they stay
float32.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import onnx_ir as ir
import onnx_ir.passes.common as common

from .explicit import DYNAMIC, to_tensorrt

PRECISE = frozenset({"time_features", "rope_cos", "rope_sin"})
MATRIX = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
NORMS = frozenset({"LayerNormalization", "RMSNormalization"})
STATISTICS = frozenset({"Exp", "Log", "Pow", "Reciprocal", "ReduceL2", "ReduceMean", "ReduceSum", "Softmax", "Sqrt"})
ROUNDING = frozenset({"QuantizeLinear", "DequantizeLinear", DYNAMIC})
STREAM = frozenset({"tokens"})  # the tokens' own path, which a residual sum keeps narrow

LARGEST_FUSED_HEAD = 256
FLOAT = ir.DataType.FLOAT
TYPES = {"fp32": FLOAT, "fp16": ir.DataType.FLOAT16, "bf16": ir.DataType.BFLOAT16}
NAMES = {dtype: name for name, dtype in TYPES.items()} | {
    ir.DataType.INT64: "int64",
    ir.DataType.INT32: "int32",
    ir.DataType.BOOL: "bool",
}


@dataclass(frozen=True)
class Lowered:
    """A typed graph and what its plan must have."""

    model: ir.Model
    dtypes: dict[str, str]  # of inputs and outputs
    attentions: int  # each is to be one fused kernel
    wide_products: int  # matrix products in float32
    rounded: frozenset[str] = frozenset()  # names of products whose inputs and weights are both rounded


def lower(model: ir.Model, precision: str, wide_products: bool = True) -> Lowered:
    """Types the graph, in place, with float inputs and outputs of this precision but for PRECISE.

    Without `wide_products` matrix products of tables are narrow too.
    """
    common.ShapeInferencePass()(model)
    to_tensorrt(model)
    lowering = _Lowering(model, TYPES[precision], wide_products)
    lowering.run()
    ports = (*model.graph.inputs, *model.graph.outputs)
    return Lowered(
        model=model,
        dtypes={str(port.name): NAMES[port.dtype] for port in ports if port.dtype is not None},
        attentions=lowering.fused,
        wide_products=lowering.wide,
        rounded=frozenset(str(node.name) for node in model.graph if _is_rounded(node)),
    )


def _is_rounded(node: ir.Node) -> bool:
    """Whether a node is a matrix product of values that were restored."""
    if node.op_type != "MatMul":
        return False
    for value in node.inputs:
        producer = value.producer() if value is not None else None
        if producer is not None and producer.op_type == "Transpose":
            producer = producer.inputs[0].producer() if producer.inputs[0] is not None else None
        if producer is None or producer.op_type != "DequantizeLinear":
            return False
    return True


@dataclass
class _Lowering:
    model: ir.Model
    narrow: ir.DataType
    wide_products: bool
    fused: int = 0  # attentions that stay whole
    wide: int = 0  # matrix products in float32
    fixed: set[ir.Value] = field(default_factory=set)  # weights and constants: they take any type
    tables: set[ir.Value] = field(default_factory=set)  # values that depend on what the host computed
    stream: set[ir.Value] = field(default_factory=set)  # values that depend on the tokens
    casts: dict[tuple[ir.Value, ir.DataType], ir.Value] = field(default_factory=dict)

    def run(self) -> None:
        graph = self.model.graph
        self.fixed |= set(graph.initializers.values())
        for value in graph.inputs:
            if value.dtype == FLOAT and value.name not in PRECISE:
                value.dtype = self.narrow
            if value.name in PRECISE:
                self.tables.add(value)
            if value.name in STREAM:
                self.stream.add(value)
        for node in list(graph):
            self._lower(node)
        for index, value in enumerate(graph.outputs):
            if value.dtype == FLOAT:
                graph.outputs[index] = self._rename(self._typed(value, self.narrow), value)
        common.RemoveUnusedNodesPass()(self.model)

    def _lower(self, node: ir.Node) -> None:
        """Types one node, all before it being typed."""
        inputs = [value for value in node.inputs if value is not None]
        if node.op_type == "Cast" and inputs[0] in self.fixed:
            self.fixed.add(node.outputs[0])  # a weight stored in 16 bits; cast again where it is used
            return
        for dependent in (self.tables, self.stream):
            if any(value in dependent for value in inputs):
                dependent |= set(node.outputs)
        if node.op_type in ROUNDING:
            self._lower_rounding(node)
            return
        data = node.inputs[:1] if node.op_type == "Resize" else node.inputs  # a Resize's scales are always float32
        floats = [value for value in data if value is not None and value.dtype in TYPES.values()]
        if all(value in self.fixed for value in inputs):
            self._lower_fixed(node, floats)
            return
        if not floats:
            return
        computed = self._computed(node, [value for value in floats if value not in self.fixed])
        for index, value in enumerate(data):
            if value is not None and value in floats:
                node.replace_input_with(index, self._typed(value, computed))
        for value in node.outputs:
            if value.dtype == FLOAT:
                value.dtype = computed
        if node.op_type == "Attention":
            self._fuse(node)
        elif node.op_type in MATRIX:
            self.wide += computed == FLOAT
        if computed == FLOAT and self._is_residual(node, floats):
            sum_ = node.outputs[0]
            uses = list(sum_.uses())
            kept = self._typed(sum_, self.narrow)
            for use in uses:
                use.node.replace_input_with(use.idx, kept)

    def _lower_fixed(self, node: ir.Node, floats: list[ir.Value]) -> None:
        """What is computed from weights and constants is float32; a weight that only turns keeps its stored type."""
        self.fixed |= set(node.outputs)
        if node.op_type == "Transpose":
            weight = self._stored(floats[0])
            node.replace_input_with(0, weight)
            node.outputs[0].type = weight.type
            return
        for index, value in enumerate(node.inputs):
            if value in floats:
                node.replace_input_with(index, self._typed(value, FLOAT))

    def _lower_rounding(self, node: ir.Node) -> None:
        """Rounds from the type that comes, restores to the narrow one."""
        value, scale = node.inputs[:2]
        assert value is not None and scale is not None
        restores = node.op_type == "DequantizeLinear"
        outside = self.narrow if restores else value.dtype or self.narrow  # the type on the other side of the rounding
        scales = FLOAT if outside == ir.DataType.FLOAT16 else outside
        if scale.const_value is not None and scale.dtype == FLOAT != scales:
            node.replace_input_with(1, self._constant(scale, scales))
        if scales != outside:
            attribute = "output_dtype" if restores else "precision"
            node.attributes[attribute] = ir.AttrInt64(attribute, int(outside if restores else scales))
        if restores:
            node.outputs[0].dtype = outside

    def _fuse(self, node: ir.Node) -> None:
        """Marks an attention that no fused kernel computes: TensorRT takes it apart."""
        query = node.inputs[0]
        head = query.shape[-1] if query is not None and query.shape is not None else None
        if self.narrow == FLOAT or (isinstance(head, int) and head > LARGEST_FUSED_HEAD):
            node.attributes["TRT_decomposable"] = ir.AttrInt64("TRT_decomposable", 1)
            self.wide += 2 * (self.narrow == FLOAT)
        else:
            self.fused += 1

    def _computed(self, node: ir.Node, inputs: list[ir.Value]) -> ir.DataType:
        """The type that a node computes in, by those of its float inputs that are neither weights nor constants."""
        wide = any(value.dtype == FLOAT for value in inputs)
        if node.op_type == "Attention":
            return self.narrow
        if node.op_type in MATRIX:
            table = any(value in self.tables for value in inputs) and not any(value in self.stream for value in inputs)
            return FLOAT if wide and table and self.wide_products else self.narrow
        if node.op_type in STATISTICS:
            return FLOAT
        if node.op_type in NORMS:
            return inputs[0].dtype or self.narrow
        return FLOAT if wide else self.narrow

    def _is_residual(self, node: ir.Node, inputs: list[ir.Value]) -> bool:
        return node.op_type == "Add" and any(v in self.stream and v.dtype == self.narrow for v in inputs)

    def _typed(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        """The value in this type: itself, or through a cast that is shared by all who need it."""
        source = self._stored(value)
        if source.dtype == dtype:
            return source
        if (source, dtype) not in self.casts:
            cast = ir.node("Cast", [source], {"to": dtype}, name=f"{source.name}/{dtype.name}")
            output = cast.outputs[0]
            output.name, output.type, output.shape = f"{value.name}/{dtype.name}", ir.TensorType(dtype), value.shape
            graph, producer = self.model.graph, source.producer()
            if producer is None:
                graph.insert_before(graph[0], cast)
            else:
                graph.insert_after(producer, cast)
            self.casts[source, dtype] = output
            for dependent in (self.tables, self.stream):
                if value in dependent:
                    dependent.add(output)
        return self.casts[source, dtype]

    def _constant(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        """An initializer in another type, which some nodes take no cast of."""
        if (value, dtype) not in self.casts:
            assert value.const_value is not None
            name = f"{value.name}/{dtype.name}"
            tensor = ir.tensor(value.const_value.numpy().astype(dtype.numpy()), dtype=dtype, name=name)
            typed = ir.Value(name=name, type=ir.TensorType(dtype), shape=value.shape, const_value=tensor)
            self.model.graph.register_initializer(typed)
            self.casts[value, dtype] = typed
        return self.casts[value, dtype]

    def _stored(self, value: ir.Value) -> ir.Value:
        """What the weights file holds, where the value is a weight that was cast; else the value."""
        producer = value.producer()
        if value in self.fixed and producer is not None and producer.op_type == "Cast":
            return producer.inputs[0] or value
        return value

    @staticmethod
    def _rename(value: ir.Value, contract: ir.Value) -> ir.Value:
        """Gives a graph output the contract's name."""
        name, contract.name = contract.name, f"{contract.name}/wide"
        value.name, value.shape = name, contract.shape
        return value
