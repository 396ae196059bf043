"""Wan's graphs: ONNX Runtime gives what torch gives, on ten shapes with one engine; both layouts give one hash.

pytest tests/test_wan_graphs.py
"""

from __future__ import annotations

import shutil
from pathlib import Path

import onnx
import onnx_ir as ir
import pytest
import torch
from published import pipeline, write_diffusers, write_original

from tubelet.export import build as build_module
from tubelet.export.build import build, write_graphs
from tubelet.export.checkpoint import Checkpoint
from tubelet.export.components import Component, build_modules, components
from tubelet.export.hashes import Hashes
from tubelet.export.parity import weights_of
from tubelet.export.precision import FLOAT, lower
from tubelet.export.trace import trace
from tubelet.export.wan import open_wan
from tubelet.runtime import UserError
from tubelet.runtime.bundle import Extents, content_key, record
from tubelet.runtime.engines import OnnxRuntimeEngine

GRIDS = ((1, 1, 1), (1, 2, 3), (1, 5, 5), (2, 2, 2), (3, 3, 5), (3, 5, 3), (2, 4, 7), (5, 3, 2), (6, 1, 8), (4, 6, 6))


@pytest.fixture(scope="module")
def i2v(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A model with everything: pictures, channels for them, and weights in bfloat16."""
    folder = tmp_path_factory.mktemp("i2v")
    made = pipeline("wan2.1-i2v")
    made.transformer.to(torch.bfloat16)
    return open_wan(write_diffusers(made, folder / "wan")).materialised(folder)


def parts(checkpoint: Checkpoint) -> dict[str, Component]:
    with torch.device("meta"):
        return {part.name: part for part in components(checkpoint.spec, build_modules(checkpoint.spec))}


@pytest.fixture(scope="module")
def denoiser(i2v: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its graph, beside the weights."""
    folder = tmp_path_factory.mktemp("graphs")
    for file, path in i2v.files.items():
        shutil.copyfile(path, folder / file)
    ir.save(trace(parts(i2v)["denoiser"], i2v.tensors), folder / "denoiser.onnx")
    return folder / "denoiser.onnx"


@torch.no_grad()
def test_one_denoiser_engine_serves_ten_shapes(i2v: Checkpoint, denoiser: Path) -> None:
    """1e-5 relative: float32 in another order of summation. Weights are bfloat16, both compute in float32."""
    part = parts(i2v)["denoiser"]
    engine = OnnxRuntimeEngine(denoiser)
    torch.manual_seed(0)
    with weights_of(i2v, part.module, part.weights):
        for number, (t, h, w) in enumerate(GRIDS):
            extents: Extents = {"B": 1 + number % 2, "N": t * h * w, "L": 512}
            inputs = {name: port.example(extents) for name, port in part.inputs.items()}

            (expected,) = part.run(inputs)
            found = torch.from_numpy(engine({name: value.numpy() for name, value in inputs.items()})["velocity"])

            assert torch.linalg.norm(found - expected) < 1e-5 * torch.linalg.norm(expected), (t, h, w)


def test_stored_types_are_kept_and_modulation_stays_wide(i2v: Checkpoint, denoiser: Path) -> None:
    """diffusers keeps norms, modulation and time embedding in float32 of a bfloat16 checkpoint; so do plans."""
    stored = {t.name: t.data_type for t in onnx.load(denoiser, load_external_data=False).graph.initializer}
    for name, tensor in i2v.tensors.items():
        if name in stored:
            assert stored[name] == {"F32": 1, "BF16": 16}[tensor.dtype], name
    assert i2v.tensors["denoiser.blocks.0.ffn.0.weight"].dtype == "BF16"

    lowered = lower(ir.load(denoiser), "bf16").model

    products = [node for node in lowered.graph if node.op_type == "Gemm" or node.op_type == "MatMul"]
    wide = [node for node in products if node.outputs[0].dtype == FLOAT]
    names = {value.name for node in wide for value in ancestors(node) if value.is_initializer()}
    assert any("time_embedding.0.weight" in str(name) for name in names)
    assert any("time_projection" in str(name) for name in names)
    assert not any("blocks" in str(name) and "weight" in str(name) for name in names)
    for node in lowered.graph:
        if node.op_type in ("LayerNormalization", "RMSNormalization"):
            assert node.attributes.get_int("stash_type", 1) == 1  # statistics in float32


def ancestors(node: ir.Node) -> list[ir.Value]:
    """A matrix product's inputs, through casts and turns of weights."""
    found, waiting = [], list(node.inputs)
    while waiting:
        value = waiting.pop()
        if value is None:
            continue
        found.append(value)
        producer = value.producer()
        if producer is not None and producer.op_type in ("Cast", "Transpose"):
            waiting += producer.inputs
    return found


def test_both_layouts_make_one_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of files with other names, shards and formats. The conditioners stand for all graphs, to be quick."""
    made = pipeline("wan2.1-t2v")
    monkeypatch.setattr(
        build_module, "components", lambda *a: [part for part in components(*a) if part.name == "conditioner"]
    )
    keys = []
    for folder in (
        write_diffusers(made, tmp_path / "diffusers"),
        write_original(made, "wan2.1-t2v", tmp_path / "original"),
    ):
        checkpoint = open_wan(folder)
        graphs = tmp_path / f"{folder.name}-graphs"
        graphs.mkdir()
        with Hashes() as hashes:
            written = write_graphs(checkpoint, graphs, hashes)
        keys.append(content_key(checkpoint.spec, written, record(checkpoint.tokenizer)))
    first, second = (tmp_path / f"{name}-graphs" / "conditioner.onnx" for name in ("diffusers", "original"))

    assert keys[0] == keys[1]
    assert first.read_bytes() != second.read_bytes()  # they say where the weights are


def test_weights_are_linked_not_copied(i2v: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build_module, "write_graphs", stop)
    seen = []
    monkeypatch.setattr("tubelet.export.content.os.link", lambda source, target: seen.append((source, target)))
    with pytest.raises(Stopped):
        build(i2v.folder, tmp_path / "bundle")
    assert {target.name for _, target in seen} == set(i2v.files) - {"made.safetensors"}

    def refuse(source: Path, target: Path) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr("tubelet.export.content.os.link", refuse)
    with pytest.raises(UserError, match=r"Invalid cross-device link; .* or copy with --copy"):
        build(i2v.folder, tmp_path / "bundle")
    with pytest.raises(Stopped):
        build(i2v.folder, tmp_path / "bundle", copy=True)
    assert [path.name for path in tmp_path.iterdir()] == []


class Stopped(Exception):
    pass


def stop(*arguments: object) -> None:
    raise Stopped
