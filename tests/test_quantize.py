"""What `tubelet quantize` promises: graphs that round as the formats say, run on ONNX Runtime, and tell their damage.

pytest tests/test_quantize.py
"""

from __future__ import annotations

import dataclasses
import errno
import functools
import json
import math
import os
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from tubelet.export.compiler_report import Layer, Report
from tubelet.export.components import build_modules, components
from tubelet.export.content import graph_digest
from tubelet.export.engines import build_engines
from tubelet.export.explicit import to_tensorrt
from tubelet.export.profiles import choose as choose_profiles
from tubelet.export.quantize import Plan, quantize
from tubelet.export.quantize.bundle import _require_blocks, seal, workplace, write
from tubelet.export.quantize.choose import Cost, cheapest, choose
from tubelet.export.quantize.compare import psnr, ssim
from tubelet.export.quantize.formats import FORMATS, input_scale, round_inputs, round_weight
from tubelet.export.quantize.linear import sites
from tubelet.export.quantize.passes import Rounding, round_layers
from tubelet.export.quantize.search import search
from tubelet.export.quantize.trajectory import Seen, observe
from tubelet.export.quantize.trials import damage, latents_error
from tubelet.export.quantize.weights import digest, is_new, store
from tubelet.export.storage import read_header
from tubelet.export.trace import trace
from tubelet.export.traffic import Shape
from tubelet.runtime import EMBEDDED, Bundle, Pipeline, Request, UserError
from tubelet.runtime.bundle import TOKENIZER, WEIGHTS
from tubelet.runtime.engines import OnnxRuntimeEngine
from tubelet.runtime.plans import PlanRecord, Target
from tubelet.runtime.precision import FILE, Damage, Precision, read_precision, refusal, write_precision

LAYERS = tuple(
    f"blocks.0.{name}"
    for name in (
        *(f"self_attention.{part}" for part in "qkvo"),
        *(f"cross_attention.{part}" for part in "qo"),
        *("ffn.0", "ffn.2"),
    )
)


@pytest.fixture(scope="session")
def one_block(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The embedded bundle with a denoiser of its first block alone, which draws small and short clips in 3 steps."""
    folder = Path(shutil.copytree(EMBEDDED, tmp_path_factory.mktemp("one_block") / "bundle"))
    source = Bundle.open(folder)
    denoiser = dataclasses.replace(source.spec.denoiser, depth=1)
    defaults = dataclasses.replace(source.spec.defaults, width=32, height=32, frames=9, steps=3)
    spec = dataclasses.replace(source.spec, denoiser=denoiser, defaults=defaults)
    with torch.device("meta"):
        modules = build_modules(spec)
    graphs, tensors = dict(source.manifest.components), read_header(folder / WEIGHTS)
    for component in components(spec, modules):
        if component.name in ("conditioner", "denoiser"):
            ir.save(trace(component, tensors), folder / f"{component.name}.onnx")
            model = ir.load(folder / f"{component.name}.onnx")
            graphs[component.name] = dataclasses.replace(
                graphs[component.name],
                graph_digest=graph_digest(model),
                weights_digest=digest(model.graph),
                inputs={name: port.shape for name, port in component.inputs.items()},
                outputs={name: port.shape for name, port in component.outputs.items()},
            )
    manifest = dataclasses.replace(source.manifest, spec=spec, components=graphs)
    small = folder.with_name("small")
    small.mkdir()
    return seal(write(seal(Bundle(folder, manifest)), small, {}))  # with the weights that are used alone


def one_layer(weight: np.ndarray) -> ir.Model:
    """A graph that multiplies x [B,N,I] with a turned weight [O,I], as exported ones do."""
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(["B", "N", weight.shape[1]]))
    name = "denoiser.blocks.0.ffn.0.weight"
    stored = ir.Value(name=name, shape=ir.Shape(weight.shape), const_value=ir.tensor(weight, name=name))
    turned = ir.node("Transpose", [stored], {"perm": [1, 0]})
    product = ir.node("MatMul", [x, turned.outputs[0]])
    product.outputs[0].name, product.outputs[0].type = "y", ir.TensorType(ir.DataType.FLOAT)
    nodes = [turned, product]
    graph = ir.Graph([x], product.outputs, nodes=nodes, initializers=[stored], opset_imports={"": 23}, name="one_layer")
    return ir.Model(graph, ir_version=11)


@pytest.mark.parametrize(
    ("name", "migrated"), [(n, m) for n in FORMATS for m in (False, True) if FORMATS[n].rounds_inputs or not m]
)
def test_onnx_runtime_computes_what_the_format_says(name: str, migrated: bool, tmp_path: Path) -> None:
    """Beside NumPy's rounding, whose types are ml_dtypes'; float32 sums in another order differ by 1e-6 or so."""
    rng, format = np.random.default_rng(7), FORMATS[name]
    weight, x = (rng.standard_normal(shape).astype(np.float32) for shape in ((24, 64), (2, 9, 64)))
    x[..., 5] *= 20  # an outlier
    factors = np.exp2(rng.integers(-3, 4, 64)).astype(np.float32) if migrated else None
    moved = x if factors is None else x * factors
    scale = input_scale(format, 0.7 * float(np.abs(moved).max()))  # some are clipped
    model = round_layers(one_layer(weight), {"blocks.0.ffn.0": Rounding(format, factors, scale)})
    store([model.graph], tmp_path / WEIGHTS, is_new)
    ir.save(model, tmp_path / "graph.onnx")

    found = OnnxRuntimeEngine(tmp_path / "graph.onnx", 1)({"x": x})["y"]
    wide = weight if factors is None else weight / factors
    if format.rounds_inputs:
        moved = round_inputs(format, moved, scale)
    expected = moved @ round_weight(format, wide).restore().T
    exact = moved @ wide.T
    np.testing.assert_allclose(found, expected, atol=2e-5 * np.abs(expected).max())
    assert np.abs(found - exact).max() > 1e-3 * np.abs(exact).max()  # it was rounded


def test_large_products_do_not_overflow(tmp_path: Path) -> None:
    """The greatest int8 values in every place, whose pairs pass 16 bits: exact but for the scales' roundings."""
    x, weight = np.ones((1, 3, 64), np.float32), np.ones((24, 64), np.float32)
    roundings = {"blocks.0.ffn.0": Rounding(FORMATS["int8"], None, input_scale(FORMATS["int8"], 1.0))}
    model = round_layers(one_layer(weight), roundings)
    store([model.graph], tmp_path / WEIGHTS, is_new)
    ir.save(model, tmp_path / "graph.onnx")
    found = OnnxRuntimeEngine(tmp_path / "graph.onnx", 1)({"x": x})["y"]
    np.testing.assert_allclose(found, 64.0, rtol=2 * 2**-8)


def test_signed_inputs_are_the_same_numbers(tmp_path: Path) -> None:
    """What TensorRT gets of int8, on ONNX Runtime: its float32 sums differ by 1e-6 or so."""
    rng = np.random.default_rng(3)
    weight, x = (rng.standard_normal(shape).astype(np.float32) for shape in ((24, 64), (2, 9, 64)))
    model = round_layers(one_layer(weight), {"blocks.0.ffn.0": Rounding(FORMATS["int8"], None, 2.0**-6)})
    store([model.graph], tmp_path / WEIGHTS, is_new)
    ir.save(model, tmp_path / "portable.onnx")
    to_tensorrt(model)
    ir.save(model, tmp_path / "explicit.onnx")
    kinds = {node.op_type: node.outputs[0].dtype for node in model.graph}
    assert kinds["QuantizeLinear"] == ir.DataType.INT8
    portable, explicit = (OnnxRuntimeEngine(tmp_path / f"{n}.onnx", 1)({"x": x})["y"] for n in ("portable", "explicit"))
    np.testing.assert_allclose(explicit, portable, atol=2e-5 * np.abs(portable).max())


def test_four_bits_are_the_same_bytes(tmp_path: Path) -> None:
    weight = np.random.default_rng(3).standard_normal((24, 64)).astype(np.float32)
    model = round_layers(one_layer(weight), {"blocks.0.ffn.0": Rounding(FORMATS["nvfp4"], None, 2.0**-6)})
    store([model.graph], tmp_path / WEIGHTS, is_new)
    to_tensorrt(model)
    assert not model.functions and {node.domain for node in model.graph} == {"", "trt"}
    codes = model.graph.initializers["denoiser.blocks.0.ffn.0.weight"].const_value
    assert codes is not None and codes.dtype == ir.DataType.FLOAT4E2M1
    expected = round_weight(FORMATS["nvfp4"], weight).values
    np.testing.assert_array_equal(codes.numpy().astype(np.float32), expected.astype(np.float32))


@settings(deadline=None, max_examples=50)
@given(st.data())
def test_rounding_a_weight_is_off_by_half_a_step(data: st.DataObject) -> None:
    """A step: for int8 the scale; E4M3 has 3 bits after the first, E2M1 one. Scales in bfloat16 or E4M3 add theirs."""
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    size = np.float32(10.0 ** data.draw(st.integers(-6, 6)))
    weight = size * rng.standard_normal((3, 32)).astype(np.float32)
    weight[data.draw(st.integers(0, 2))] = 0
    for name, step in (("int8", 1 / 127), ("fp8", 2**-3), ("nvfp4", 1 / 3)):
        format = FORMATS[name]
        blocks = weight.reshape(3, -1, format.block or 32)
        largest = np.abs(blocks).max(axis=-1, keepdims=True)
        error = np.abs(round_weight(format, weight).restore().reshape(blocks.shape) - blocks)
        assert (error <= 0.6 * step * largest).all(), name


def test_blocks_are_rounded_as_onnx_says() -> None:
    """Beside ONNX's own reference of QuantizeLinear and DequantizeLinear in blocks of FLOAT4E2M1: the same values."""
    weight = np.random.default_rng(1).standard_normal((4, 64)).astype(np.float32)
    rounded = round_weight(FORMATS["nvfp4"], weight)
    steps = (rounded.scales.astype(np.float32) * np.float32(rounded.tensor_scale)).astype(np.float32)
    graph = onnx.parser.parse_model(
        """<ir_version: 11, opset_import: ["" : 23]>
        rounding (float[4,64] x, float[4,4] steps) => (float[4,64] y) {
          stored = QuantizeLinear <axis: int = 1, block_size: int = 16, output_dtype: int = 23> (x, steps)
          y = DequantizeLinear <axis: int = 1, block_size: int = 16> (stored, steps)
        }"""
    )
    (expected,) = onnx.reference.ReferenceEvaluator(graph).run(None, {"x": weight, "steps": steps})
    np.testing.assert_array_equal(rounded.restore(), expected)


def rounded_bundle(source: Bundle, folder: Path, name: str) -> Bundle:
    """A bundle with all layers in a format, without calibration."""
    folder.mkdir()
    layers = [layer.name for site in sites(ir.load(source.graph("denoiser"))) for layer in site.layers]
    bundle = write(source, folder, dict.fromkeys(layers, Rounding(FORMATS[name], None, 2.0**-5)))
    write_precision(folder, Precision(name, source.key, (), None, 0, 0, 0, (), Damage(0, 0.0, 0.0, 0.0)))
    return seal(bundle)


@pytest.fixture(scope="session")
def rounded(one_block: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Bundle]:
    """The small bundle in a format, made once."""
    return functools.cache(lambda name: rounded_bundle(one_block, tmp_path_factory.mktemp(name) / "rounded", name))


@pytest.mark.parametrize(("name", "kernel"), [("int8", "MatMulIntegerToFloat"), ("w8", "MatMulNBits")])
def test_onnx_runtime_multiplies_natively(
    rounded: Callable[[str], Bundle], tmp_path: Path, name: str, kernel: str
) -> None:
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3
    ort.InferenceSession(rounded(name).graph("denoiser"), options)
    kinds = [node.op_type for node in onnx.load(options.optimized_model_filepath, load_external_data=False).graph.node]
    assert kinds.count(kernel) == len(LAYERS)


def read_tensors(path: Path) -> set[str]:
    """The names of a safetensors file's tensors."""
    with safe_open(path, "np") as file:
        return set(file.keys())


@pytest.mark.parametrize("name", FORMATS)
def test_weights_are_in_one_file_and_once(one_block: Bundle, rounded: Callable[[str], Bundle], name: str) -> None:
    bundle = rounded(name)
    stored = read_tensors(bundle.path(WEIGHTS))
    referred = set()
    for component in bundle.manifest.components:
        graph = ir.load(bundle.graph(component)).graph
        assert bundle.graph(component).stat().st_size < 400_000
        for value in graph.initializers.values():
            if isinstance(value.const_value, ir.ExternalTensor):
                referred.add(value.name)
            else:
                assert value.const_value is not None and value.const_value.size <= 1024, value.name
    assert stored == referred
    assert {f"denoiser.{layer}.weight" for layer in LAYERS} <= stored
    values = sum(math.prod(layer.shape) for s in sites(ir.load(one_block.graph("denoiser"))) for layer in s.layers)
    saved = one_block.path(WEIGHTS).stat().st_size - bundle.path(WEIGHTS).stat().st_size
    assert saved > 0.95 * values * (2 - FORMATS[name].bits / 8)


def test_digests_name_what_is_stored(one_block: Bundle, rounded: Callable[[str], Bundle]) -> None:
    """A digest from a graph and its files is the exporter's; of a rounded denoiser it is another one."""
    for bundle in (Bundle.open(EMBEDDED), rounded("nvfp4")):
        component = bundle.manifest.components["denoiser"]
        model = ir.load(bundle.graph("denoiser"))
        assert (graph_digest(model), digest(model.graph)) == (component.graph_digest, component.weights_digest)
    before, after = one_block.manifest.components, bundle.manifest.components
    assert {name for name in before if before[name] != after[name]} == {"denoiser"}
    assert bundle.key != one_block.key


@pytest.fixture
def in_two_files(one_block: Bundle, tmp_path: Path) -> Callable[[str, str], Bundle]:
    """The small bundle with the text encoder's weights in a file of their own, as published checkpoints have them."""

    def make(text: str, others: str) -> Bundle:
        folder = tmp_path / "source"
        folder.mkdir()
        shutil.copyfile(one_block.path(TOKENIZER), folder / TOKENIZER)
        for name, component in one_block.manifest.components.items():
            model = onnx.load(one_block.graph(name), load_external_data=False)
            for tensor in model.graph.initializer:  # the files stay whole: what is unused there is unused
                for entry in [entry for entry in tensor.external_data if entry.key == "location"]:
                    entry.value = text if name == "text_encoder" else others
            onnx.save(model, folder / component.graph)
        for name in (text, others):
            shutil.copyfile(one_block.path(WEIGHTS), folder / name)
        return seal(Bundle(folder, dataclasses.replace(one_block.manifest, weights=(text, others))))

    return make


@pytest.mark.parametrize(
    ("text", "others", "made"),
    [("text.safetensors", WEIGHTS, WEIGHTS), (WEIGHTS, "model.safetensors", "weights-2.safetensors")],
)
def test_files_that_hold_nothing_of_the_denoisers_are_linked(
    in_two_files: Callable[[str, str], Bundle], tmp_path: Path, text: str, others: str, made: str
) -> None:
    source = in_two_files(text, others)
    before = source.path(text).read_bytes()
    bundle = rounded_bundle(source, tmp_path / "linked", "w8")
    assert sorted(bundle.manifest.weights) == sorted([text, made]) and Bundle.open(bundle.folder).key == bundle.key
    assert bundle.path(text).samefile(source.path(text)) and source.path(text).read_bytes() == before
    assert not [name for name in read_tensors(bundle.path(made)) if name.startswith("text_encoder")]
    assert Pipeline.open(bundle, "cpu").generate(Request(PROMPTS[0])).shape == (9, 32, 32, 3)


def test_another_file_system_needs_a_copy_of_what_stays(
    in_two_files: Callable[[str, str], Bundle],
    one_block: Bundle,
    tubelet: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What is only used on the way is copied unasked."""

    def link(source: Path, target: Path) -> None:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    monkeypatch.setattr(os, "link", link)
    arguments = ("-o", "narrow", "--precision", "w8")
    source = in_two_files("text.safetensors", WEIGHTS)
    result = tubelet("quantize", str(source.folder), *arguments)
    assert result.code == 2 and "Invalid cross-device link; write the bundle to the same file system" in result.err
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
    assert tubelet("quantize", str(source.folder), *arguments, "--copy").code == 0
    assert Bundle.open(tmp_path / "narrow").path("text.safetensors").stat().st_nlink == 1
    assert tubelet("quantize", str(one_block.folder), "-o", "unlinked", "--precision", "w8").code == 0


PROMPTS = tuple(f"a {colour} circle moves right on a white background" for colour in ("red", "green", "blue", "yellow"))


@pytest.fixture(scope="session")
def quantized(one_block: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """The small bundle in int8 under a budget that some layers do not meet, with one kept."""
    output = tmp_path_factory.mktemp("quantized") / "bundle"
    return quantize(one_block, output, Plan("int8", PROMPTS, keep=("*.ffn.2",), budget=0.04))


def precision_of(bundle: Bundle) -> Precision:
    known = read_precision(bundle)
    assert known is not None
    return known


def test_the_bundle_tells_its_damage(one_block: Bundle, quantized: Bundle) -> None:
    """And tells the truth: the latents are measured here once more."""
    known = precision_of(quantized)
    assert [layer.name for layer in known.layers] == list(LAYERS)
    assert {layer.precision for layer in known.layers} == {"int8", "fp32"}
    assert all(0 < layer.relative < 0.1 for layer in known.layers if layer.precision == "int8")
    assert (known.source, known.prompts, known.keep) == (one_block.key, len(PROMPTS), ("*.ffn.2",))
    assert 0 < known.damage.latents <= 0.04 and known.damage.psnr_db > 30 and 0.9 < known.damage.ssim <= 1
    narrow, wide = Pipeline.open(quantized, "cpu"), Pipeline.open(one_block, "cpu")
    assert (
        damage(narrow, wide, [Request(prompt, seed=1_000_000 + i) for i, prompt in enumerate(PROMPTS)]) == known.damage
    )


def test_a_kept_layer_is_kept(one_block: Bundle, quantized: Bundle) -> None:
    (layer,) = [layer for layer in precision_of(quantized).layers if layer.name == "blocks.0.ffn.2"]
    assert (layer.precision, layer.relative) == ("fp32", 0.0)
    before, after = (ir.load(bundle.graph("denoiser")).graph.initializers for bundle in (one_block, quantized))
    name = "denoiser.blocks.0.ffn.2.weight"
    np.testing.assert_array_equal(before[name].const_value.numpy(), after[name].const_value.numpy())


def test_inspect_shows_the_precision(tubelet: Callable[..., Any], quantized: Bundle) -> None:
    shown = tubelet("inspect", str(quantized.folder)).out
    assert "Quantized to int8" in shown and "blocks.0.self_attention.q" in shown
    told = json.loads(tubelet("inspect", str(quantized.folder), "--json").out)
    assert told["precision"]["damage"]["latents"] == precision_of(quantized).damage.latents
    assert json.loads(tubelet("inspect", "--json").out)["precision"] is None


def test_the_command_makes_a_bundle(tubelet: Callable[..., Any], one_block: Bundle, tmp_path: Path) -> None:
    result = tubelet("quantize", str(one_block.folder), "-o", "narrow", "--precision", "w8")
    assert result.code == 0, result.err
    assert "Quantized to w8" in result.out
    known = precision_of(Bundle.open(tmp_path / "narrow"))
    assert {layer.precision for layer in known.layers} == {"w8"} and not any(layer.migrated for layer in known.layers)
    assert tubelet("generate", PROMPTS[0], "--bundle", "narrow", "-o", "clip.mp4").code == 0
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_budget_falls_back_from_four_bits_to_eight(one_block: Bundle, tmp_path: Path) -> None:
    known = precision_of(quantize(one_block, tmp_path / "narrow", Plan("nvfp4", PROMPTS, budget=0.2)))
    assert {"nvfp4", "fp8"} <= {layer.precision for layer in known.layers}
    assert 0 < known.damage.latents <= 0.2


def test_a_budget_that_cannot_be_met_says_one_that_can(
    tubelet: Callable[..., Any], one_block: Bundle, tmp_path: Path
) -> None:
    arguments = ("quantize", str(one_block.folder), "-o", "narrow", "--precision", "int8", "--budget")
    result = tubelet(*arguments, "1e-9")
    assert result.code == 2 and not list(tmp_path.iterdir())
    found = re.search(r"--budget 1e-09 cannot be met: .* the final latents' error is (\S+); give at", result.err)
    assert found, result.err
    assert tubelet(*arguments, found[1]).code == 0
    assert precision_of(Bundle.open(tmp_path / "narrow")).damage.latents <= float(found[1])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_leaves_nothing(
    tubelet: Callable[..., Any], one_block: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def interrupted(*_: Any) -> None:
        assert list(tmp_path.iterdir())  # the bundle is being made
        signal.raise_signal(number)

    monkeypatch.setattr("tubelet.export.quantize.bundle.search", interrupted)
    result = tubelet("quantize", str(one_block.folder), "-o", "narrow", "--precision", "w8")
    assert result.code == 128 + number and not list(tmp_path.iterdir())


def test_inputs_are_drawn_evenly_from_any_number_of_steps(
    one_block: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two requests of three steps, each with and without the prompt."""
    pipeline, requests = Pipeline.open(one_block, "cpu"), [Request(prompt) for prompt in PROMPTS[:2]]
    with workplace(one_block, tmp_path) as work:
        for tokens in (512, 4):
            monkeypatch.setattr("tubelet.export.quantize.trajectory.TOKENS", tokens)
            seen = observe(pipeline, one_block.graph("denoiser"), work, requests)
            assert {len(each.rows) for each in seen.values()} == {2 * tokens}


def test_a_layer_of_zeros_has_no_error() -> None:
    rows = np.random.default_rng(0).standard_normal((9, 32)).astype(np.float32)
    for weight, read in ((np.zeros((8, 32), np.float32), rows), (rows[:8], np.zeros_like(rows))):
        (site,) = sites(one_layer(weight))
        for format in FORMATS.values():
            found = search(site, Seen(np.abs(read).max(axis=0), read), format)
            assert (found.total, found.errors) == (0.0, {"blocks.0.ffn.0": 0.0})


@pytest.mark.parametrize(
    ("found", "expected", "message"),
    [
        (np.nan, 1.0, "are NaN or infinite with these layers rounded; leave layers out with --keep"),
        (1.0, np.inf, "are NaN or infinite before anything is rounded; export the bundle again"),
    ],
)
def test_latents_that_are_not_finite_are_named(found: float, expected: float, message: str) -> None:
    """Under a budget such an error would be compared for ever."""
    with pytest.raises(UserError, match=message):
        latents_error([(np.float32([0, found]), np.float32([0, expected]))])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--precision", "int4"), "precision 'int4' is not one of int8, fp8, nvfp4, w8"),
        (
            ("--precision", "int8", "--keep", "blocks.9.*"),
            "--keep 'blocks.9.*' matches no linear layer; layers are named",
        ),
        (("--precision", "int8", "--keep", "*"), "--keep leaves no linear layer to quantize; give narrower patterns"),
        (("--precision", "int8", "--budget", "0"), "--budget must be above 0, is 0"),
        (("--precision", "int8", "--budget", "nan"), "--budget must be above 0, is nan"),
        (("--precision", "int8", "--prompts", "few.txt"), "calibration needs 4 prompts or more, has 2; add some"),
        (
            ("--precision", "int8", "--prompts", "none.txt"),
            "cannot read none.txt: No such file or directory; give a text",
        ),
        (("--precision", "int8", "--prompts", "long.txt"), "tokens, the model reads 16; shorten it"),
        (("--precision", "int8", "-o", "few.txt"), "few.txt exists; remove it or choose another folder"),
    ],
)
def test_a_wrong_argument_is_named(
    tubelet: Callable[..., Any], one_block: Bundle, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    (tmp_path / "few.txt").write_text("a red circle\n\na blue square\n")
    (tmp_path / "long.txt").write_text("a red circle\n" * 4 + "red " * 20)
    result = tubelet("quantize", str(one_block.folder), *(() if "-o" in arguments else ("-o", "narrow")), *arguments)
    assert result.code == 2 and message in result.err, result.err
    assert {path.name for path in tmp_path.iterdir()} == {"few.txt", "long.txt"}


def test_models_that_need_more_than_a_prompt_are_refused(one_block: Bundle, tmp_path: Path) -> None:
    spec = one_block.spec
    shown = dataclasses.replace(spec.denoiser, two_levels=False, mask_channels=spec.vae.temporal_factor)
    for changes, message in (
        ({"boundary": 0.9}, "has two denoisers; only models of one can be quantized yet"),
        ({"denoiser": shown}, "makes clips of pictures; only models that need a prompt alone can be quantized yet"),
    ):
        manifest = dataclasses.replace(one_block.manifest, spec=dataclasses.replace(spec, **changes))
        with pytest.raises(UserError, match=message):
            quantize(Bundle(one_block.folder, manifest), tmp_path / "narrow", Plan("int8", PROMPTS))


def test_a_quantized_bundle_is_not_quantized_again(
    tubelet: Callable[..., Any], one_block: Bundle, quantized: Bundle
) -> None:
    result = tubelet("quantize", str(quantized.folder), "-o", "narrow", "--precision", "fp8")
    assert result.code == 2
    assert f"is quantized to int8 already; quantize the bundle with key {one_block.key[:16]} that it was" in result.err


def test_a_record_that_is_not_readable_is_named(quantized: Bundle, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(quantized.folder, tmp_path / "copy"))
    (folder / FILE).write_text("{}")
    with pytest.raises(UserError, match=r"precision.json is not usable: precision lacks .*; quantize the bundle again"):
        read_precision(seal(Bundle(folder, quantized.manifest)))


COSTS = {"a": Cost((0.03, 0.0), (8, 16)), "b": Cost((0.04, 0.0), (80, 160)), "c": Cost((0.5, 0.01, 0.0), (4, 8, 16))}


@pytest.mark.parametrize(
    ("budget", "levels"),
    [(1.0, (0, 0, 0)), (0.06, (0, 0, 1)), (0.045, (1, 0, 1)), (0.02, (1, 1, 1)), (0.009, (1, 1, 2))],
)
def test_what_saves_most_error_for_its_bits_is_widened_first(budget: float, levels: tuple[int, ...]) -> None:
    assert tuple(cheapest(COSTS, budget).values()) == levels


def test_a_choice_that_measures_worse_is_made_again_more_strictly() -> None:
    """As if errors of layers added up to twice what their squares say."""
    seen = []

    def measure(levels: Any) -> float:
        seen.append(dict(levels))
        return 2 * sum(COSTS[site].errors[at] ** 2 for site, at in levels.items()) ** 0.5

    chosen = choose(COSTS, 0.06, measure)
    assert len(seen) == 2 and seen[0] != seen[1] == chosen and measure(chosen) <= 0.06


def test_a_budget_below_every_site_says_the_least_error() -> None:
    def measure(levels: Any) -> float:
        return 1.0301 * sum(COSTS[site].errors[at] ** 2 for site, at in levels.items()) ** 0.5

    with pytest.raises(UserError, match=r"--budget 0.001 cannot be met: .* error is 0.011; give at least"):
        choose(COSTS, 0.001, measure)
    assert measure(choose(COSTS, 0.011, measure)) == pytest.approx(0.010301)


def test_clips_are_compared_as_pixels_say() -> None:
    rng = np.random.default_rng(0)
    clip = rng.integers(0, 256, (3, 32, 48, 3), np.uint8)
    noisy = np.clip(clip.astype(int) + rng.integers(-9, 10, clip.shape), 0, 255).astype(np.uint8)
    expected = 10 * math.log10(255**2 / np.mean((clip.astype(float) - noisy) ** 2))
    assert psnr(noisy, clip) == pytest.approx(expected, abs=1e-4)  # the filter rounds to six decimals
    assert psnr(clip, clip) == math.inf and ssim(clip, clip) == 1 > ssim(noisy, clip)


@pytest.fixture(scope="session")
def wide_plan(one_block: Bundle) -> PlanRecord:
    return built(one_block, "bf16", "sm89")


def built(bundle: Bundle, precision: str, *architectures: str) -> PlanRecord:
    """The denoiser's plan for two profiles."""
    shapes = [Shape(32, 32, frames, 1.0) for frames in (9, 33)]
    profiles = choose_profiles(bundle.spec, shapes, 2).profiles["denoiser"]
    (known,) = build_engines(bundle, Target("rtx", architectures, precision), {"denoiser": profiles}, 1)
    return known


@pytest.mark.parametrize(
    ("precision", "architectures"),
    [("int8", ("sm75", "sm80")), ("fp8", ("sm89", "sm120")), ("nvfp4", ("sm120", "sm121"))],
)
def test_plans_multiply_what_the_graph_rounds(
    one_block: Bundle,
    wide_plan: PlanRecord,
    rounded: Callable[[str], Bundle],
    precision: str,
    architectures: tuple[str, ...],
) -> None:
    """Every layer in 8 or 4 bits, every attention one kernel, and weights as small as the format says."""
    measured = built(rounded(precision), precision, *architectures).measured
    assert (measured.rounded_products, measured.fallen_back) == (len(LAYERS), ())
    assert measured.fused_attentions == wide_plan.measured.fused_attentions == 2
    values = sum(math.prod(layer.shape) for s in sites(ir.load(one_block.graph("denoiser"))) for layer in s.layers)
    saved = wide_plan.measured.weights_bytes - measured.weights_bytes
    assert saved > 0.9 * values * (2 - FORMATS[precision].bits / 8)


@pytest.mark.parametrize(
    ("quantized_to", "asked", "message"),
    [
        (None, "int8", "is not quantized; make a bundle with `tubelet quantize .* --precision int8 -o ...`"),
        ("int8", "bf16", "is quantized to int8, not made for bf16; build it with --precision int8"),
        ("fp8", "int8", "is quantized to fp8, not made for int8; build it with --precision fp8"),
        ("w8", "bf16", "is quantized to w8, not made for bf16; it runs on the target cpu"),
    ],
)
def test_a_plan_is_in_the_bundles_precision(
    quantized: Bundle, tmp_path: Path, quantized_to: str | None, asked: str, message: str
) -> None:
    folder = Path(shutil.copytree(quantized.folder, tmp_path / "copy"))
    if quantized_to is None:
        (folder / FILE).unlink()
    else:
        write_precision(folder, dataclasses.replace(precision_of(quantized), precision=quantized_to))
    bundle = seal(Bundle(folder, quantized.manifest))
    assert re.search(message, refusal(bundle, Target("rtx", ("sm89",), asked), "denoiser") or "")
    assert refusal(bundle, Target("rtx", ("sm89",), "bf16"), "text_encoder") is None


def test_layers_that_fell_back_are_listed() -> None:
    """One profile of two multiplies b in 16 bits; c's kernel does more than a product; d's product is elsewhere."""
    layers = (
        Layer("a+b_myl0_1", "gemm", ("int8",), frozenset("ab")),
        Layer("a_myl1_1", "gemm", ("int8",), frozenset("a")),
        Layer("b_myl1_2", "gemm", ("bf16",), frozenset("b")),
        *2 * [Layer("__myl_FcAdd_myl0_3", "runtime_fusion", ("fp8",), frozenset("c"))],
        *2 * [Layer("__myl_MulAdd_myl0_4", "kgen", ("int8",), frozenset("d"))],
    )
    report = Report(layers, {}, ({}, {}), (1, 1), 1)
    assert report.fallen_back("abcd") == ("b", "d")


def test_inputs_that_fill_no_blocks_are_named() -> None:
    found = sites(one_layer(np.ones((8, 40), np.float32)))
    _require_blocks(Plan("int8", PROMPTS), found)
    with pytest.raises(
        UserError, match=r"nvfp4 needs inputs in blocks of 16, blocks.0.ffn.0 has 40; leave it out with"
    ):
        _require_blocks(Plan("nvfp4", PROMPTS), found)
