"""What lowering a graph to bfloat16 or float16 promises: which values are narrow, and how near the result stays.

pytest tests/test_precision.py
"""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from tubelet.export.emulate import emulate
from tubelet.export.precision import FLOAT, PRECISE, TYPES, lower
from tubelet.runtime import EMBEDDED, Bundle
from tubelet.runtime.bundle import WEIGHTS
from tubelet.runtime.engines import OnnxRuntimeEngine
from tubelet.runtime.plans import LOWERING
from tubelet.runtime.schedule import time_features

NARROW = ("bf16", "fp16")
COMPONENTS = tuple(Bundle.open(EMBEDDED).manifest.components)
PRODUCTS = {"MatMul", "Gemm", "Conv"}
EXTENTS = {"B": 2, "N": 36, "L": 16, "h": 6, "w": 4, "t": 2}
# Half a step of the type, eps / 2 = 2^-9 and 2^-12, times the square root of the roundings in a row: about 60 in each
# graph. Twice that is what a correct graph stays below; one that keeps a sum or a norm narrow is ten times above.
TOLERANCE = {"bf16": 2 * 2**-9 * 60**0.5, "fp16": 2 * 2**-12 * 60**0.5}


def graph_of(component: str) -> ir.Model:
    return ir.load(EMBEDDED / f"{component}.onnx")


def nodes(model: ir.Model, *kinds: str) -> list[ir.Node]:
    return [node for node in model.graph if node.op_type in kinds]


@pytest.mark.parametrize("precision", NARROW)
@pytest.mark.parametrize("component", COMPONENTS)
def test_every_node_has_inputs_of_one_type(component: str, precision: str) -> None:
    model = lower(graph_of(component), precision).model
    for node in model.graph:
        if node.op_type in ("Cast", "Resize"):
            continue
        floats = {value.dtype for value in node.inputs if value is not None and value.dtype in TYPES.values()}
        assert len(floats) <= 1, f"{node.op_type} {node.name}: {floats}"


@pytest.mark.parametrize("precision", NARROW)
@pytest.mark.parametrize("component", COMPONENTS)
def test_products_and_attention_are_narrow(component: str, precision: str) -> None:
    lowered = lower(graph_of(component), precision)
    products = nodes(lowered.model, *PRODUCTS)
    wide = [node for node in products if node.inputs[0] is not None and node.inputs[0].dtype == FLOAT]
    assert len(wide) == lowered.wide_products == (3 if component == "denoiser" else 0)  # of the noise level
    attentions = nodes(lowered.model, "Attention")
    assert {value.dtype for node in attentions for value in node.inputs if value} <= {
        TYPES[precision],
        ir.DataType.BOOL,
    }
    assert len(attentions) == lowered.attentions
    for value in (*lowered.model.graph.inputs, *lowered.model.graph.outputs):
        expected = (
            (FLOAT, ir.DataType.INT64) if value.name in (*PRECISE, "ids", "mask", "position") else (TYPES[precision],)
        )
        assert value.dtype in expected, value.name


def test_without_wide_products_the_noise_levels_are_narrow_too() -> None:
    lowered = lower(graph_of("denoiser"), "fp16", wide_products=False)
    assert lowered.wide_products == 0
    assert {node.inputs[0].dtype for node in nodes(lowered.model, *PRODUCTS) if node.inputs[0]} == {TYPES["fp16"]}


def test_the_stream_between_blocks_is_narrow_and_each_norm_reads_it() -> None:
    model = lower(graph_of("denoiser"), "bf16").model
    assert {
        node.inputs[0].dtype for node in nodes(model, "LayerNormalization", "RMSNormalization") if node.inputs[0]
    } == {TYPES["bf16"]}


def test_rotation_and_statistics_are_wide() -> None:
    denoiser = lower(graph_of("denoiser"), "bf16").model
    tables = [value for value in denoiser.graph.inputs if value.name in ("rope_cos", "rope_sin")]
    users = [use.node for table in tables for use in table.uses()]
    assert len(users) == 48 and {node.op_type for node in users} == {"Mul"}  # four for q and k of six blocks
    decoder = lower(graph_of("vae_decoder"), "bf16").model
    assert {node.inputs[0].dtype for node in nodes(decoder, "Pow", "ReduceMean", "Sqrt") if node.inputs[0]} == {FLOAT}


@pytest.mark.parametrize(("precision", "head", "decomposed"), [("bf16", 64, 0), ("bf16", 512, 1), ("fp32", 64, 1)])
def test_attention_that_cannot_be_fused_is_marked(precision: str, head: int, decomposed: int) -> None:
    ports = [ir.Value(name=name, type=ir.TensorType(FLOAT), shape=ir.Shape([1, 2, "N", head])) for name in "qkv"]
    node = ir.node("Attention", ports, version=23)
    node.outputs[0].name, node.outputs[0].type = "out", ir.TensorType(FLOAT)
    graph = ir.Graph(ports, node.outputs, nodes=[node], opset_imports={"": 23})
    lowered = lower(ir.Model(graph, ir_version=10), precision)
    (attention,) = nodes(lowered.model, "Attention")
    marked = attention.attributes.get("TRT_decomposable")
    assert (marked is not None and marked.as_int()) == decomposed
    assert lowered.attentions == 1 - decomposed


@pytest.mark.parametrize("component", COMPONENTS)
@pytest.mark.parametrize("precision", NARROW)
def test_a_lowered_graph_stays_near_the_float32_one(component: str, precision: str, tmp_path: Path) -> None:
    """Emulated: ONNX Runtime computes in float32 and rounds where the plan would."""
    shutil.copy(EMBEDDED / WEIGHTS, tmp_path)
    ir.save(emulate(lower(graph_of(component), precision).model, precision), tmp_path / "graph.onnx")
    inputs = example(component)
    reference = OnnxRuntimeEngine(EMBEDDED / f"{component}.onnx", 1)(inputs)
    found = OnnxRuntimeEngine(tmp_path / "graph.onnx", 1)(inputs)
    for name, wanted in reference.items():
        error, size = np.linalg.norm(found[name] - wanted), np.linalg.norm(wanted)
        assert error <= TOLERANCE[precision] * size, f"{name}: {error / size:.1e}"


def example(component: str) -> dict[str, np.ndarray]:
    """Inputs in the range of real ones."""
    rng, inputs = np.random.default_rng(3), {}
    for name, shape in Bundle.open(EMBEDDED).manifest.components[component].inputs.items():
        size = [int(np.prod([EXTENTS.get(part) or int(part) for part in str(n).split("*")])) for n in shape]
        inputs[name] = rng.standard_normal(size).astype(np.float32)
        if name in ("ids", "mask", "position"):
            inputs[name] = np.zeros(size, np.int64) + (name == "mask")
        if name == "time_features":
            inputs[name] = time_features(np.array([[700.0, 0.0]] * 2), size[2])
        if name == "known":
            inputs[name] = (inputs[name] > 0).astype(np.float32)
        if name in ("rope_cos", "rope_sin"):
            inputs[name] = (np.cos if name == "rope_cos" else np.sin)(
                np.arange(inputs[name].size, dtype=np.float32)
            ).reshape(size)
    return inputs


def test_the_version_of_the_rules_goes_with_the_rules() -> None:
    """Plans that are there are kept as long as LOWERING stays: who changes what graphs become must raise it."""
    digest = hashlib.sha256()
    for component in COMPONENTS:
        for node in lower(graph_of(component), "bf16").model.graph:
            types = [str(value and value.dtype) for value in (*node.inputs, *node.outputs)]
            digest.update(" ".join([node.op_type, *sorted(node.attributes), *types, "\n"]).encode())
    assert {LOWERING: digest.hexdigest()[:16]} == {1: "0942da8ba160a42c"}
