"""Exporting: the embedded bundle comes out again, weights stay references, parity holds, damage is refused.

pytest tests/test_export.py
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import signal
import struct
import subprocess
import sys
from pathlib import Path

import onnx
import pytest
import torch
from safetensors.torch import load_file, save_file

from tubelet.export.build import build
from tubelet.export.checkpoint import Checkpoint
from tubelet.export.components import build_modules, components
from tubelet.export.hashes import Hashes
from tubelet.export.storage import StoredTensor, read_header
from tubelet.export.trace import trace
from tubelet.runtime import EMBEDDED, Bundle, UserError
from tubelet.runtime.bundle import COMPONENTS, TO_CAPTION

GRAPHS = [EMBEDDED / f"{name}.onnx" for name in COMPONENTS + TO_CAPTION]


def test_the_embedded_bundle_comes_out_again(checkpoint: Path, tmp_path: Path) -> None:
    """Every file byte for byte, and every component within float32 rounding of torch (1e-5 relative) on each shape."""
    made = build(checkpoint, tmp_path / "bundle")

    shipped = Bundle.open(EMBEDDED)
    assert made.manifest.files == shipped.manifest.files
    assert made.manifest.components == shipped.manifest.components
    assert made.key == shipped.key
    assert {row.component for row in made.manifest.parity} == set(made.manifest.components)
    assert max(row.relative for row in made.manifest.parity) < 1e-5
    assert not [p for p in tmp_path.iterdir() if p.name not in ("bundle", "checkpoint")]


@pytest.mark.parametrize("path", GRAPHS, ids=lambda path: path.stem)
def test_graphs_hold_no_weights_and_no_paths(path: Path) -> None:
    model = onnx.load(path, load_external_data=False)
    onnx.checker.check_model(str(path))

    external = [t for t in model.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL]
    internal = [t for t in model.graph.initializer if t.data_location != onnx.TensorProto.EXTERNAL]
    assert external
    assert {entry.value for t in external for entry in t.external_data if entry.key == "location"} == {
        "weights.safetensors"
    }
    assert max(len(t.SerializeToString()) for t in internal) < 1_000  # shape arithmetic, no weight
    assert path.stat().st_size < 400_000
    assert b"site-packages" not in path.read_bytes()
    assert {opset.version for opset in model.opset_import} == {23}


@pytest.mark.parametrize(
    ("name", "attention", "norms"),
    [
        ("denoiser", 12, 37),
        ("text_encoder", 2, 5),
        ("conditioner", 0, 6),
        ("captioner_memory", 2, 5),
        ("captioner", 4, 7),
    ],
)
def test_attention_and_norms_are_native(name: str, attention: int, norms: int) -> None:
    """12 = self and cross in 6 blocks; 37 = 3 norms and 3 query or key norms in 6 blocks, and the last one.

    The conditioner normalises each block's text keys. The captioner has two blocks in each half, with two norms and
    with three, and a last one. The VAE's norms are over channels: see docs/decisions.md.
    """
    kinds = [node.op_type for node in onnx.load(EMBEDDED / f"{name}.onnx", load_external_data=False).graph.node]
    assert kinds.count("Attention") == attention
    assert kinds.count("RMSNormalization") + kinds.count("LayerNormalization") == norms
    assert "Softmax" not in kinds and "ScatterND" not in kinds and "Loop" not in kinds


def test_varying_extents_are_named() -> None:
    components = Bundle.open(EMBEDDED).manifest.components
    assert components["denoiser"].inputs["tokens"] == ("B", "N", 49)
    assert components["captioner_memory"].inputs["tokens"] == ("B", "N", 49)
    assert components["captioner"].inputs["past_k"] == (2, "B", 4, 16, 32)
    assert components["captioner"].outputs["logits"] == ("B", 64)
    assert components["vae_decoder"].inputs["latents"] == ("B", 8, "t", "h", "w")
    assert components["vae_decoder"].outputs["pixels"] == ("B", 3, "4*t", "8*h", "8*w")


def test_a_model_with_one_noise_level_exports_without_known(checkpoint: Path) -> None:
    opened = Checkpoint.open(checkpoint)
    one_level = dataclasses.replace(
        opened.spec.denoiser, two_levels=False, depth=1, coordinates=False, pooled_text=False
    )
    spec = dataclasses.replace(opened.spec, denoiser=one_level)
    with torch.device("meta"):
        modules = build_modules(spec)
    (denoiser,) = [c for c in components(spec, modules) if c.name == "denoiser"]

    graph = trace(denoiser, opened.tensors).graph

    assert "known" not in [value.name for value in graph.inputs]


def test_a_model_without_a_captioner_exports_without_its_graphs(checkpoint: Path) -> None:
    spec = dataclasses.replace(Checkpoint.open(checkpoint).spec, captioner=None)
    (checkpoint / "spec.json").write_text(json.dumps(spec.to_json()))
    with torch.device("meta"):
        modules = build_modules(spec)

    assert {component.name for component in components(spec, modules)} == set(COMPONENTS)
    with pytest.raises(UserError, match=r"unknown: captioner\.blocks"):
        Checkpoint.open(checkpoint)


def test_tracing_needs_no_memory_for_weights(tmp_path: Path) -> None:
    """Six blocks as wide as a 14B model's: 8 GiB in float32, traced in less than 1 GiB with no weights file at all."""
    script = """
import dataclasses, sys
from pathlib import Path
import onnx_ir, torch
from tubelet.export.storage import StoredTensor
from tubelet.export.components import build_modules, components
from tubelet.export.trace import trace
from tubelet.runtime import EMBEDDED, Bundle
from tubelet.runtime.resident import peak_resident_bytes

spec = Bundle.open(EMBEDDED).spec
spec = dataclasses.replace(
    spec, denoiser=dataclasses.replace(spec.denoiser, width=5120, heads=40, ffn_width=13824)
)
with torch.device("meta"):
    modules = build_modules(spec)
(denoiser,) = [c for c in components(spec, modules) if c.name == "denoiser"]
tensors, end = {}, 0
for prefix, module in modules.items():
    for name, tensor in module.state_dict().items():
        tensors[f"{prefix}.{name}"] = StoredTensor("weights", "F32", tuple(tensor.shape), end, 4 * tensor.numel())
        end += 4 * tensor.numel()
onnx_ir.save(trace(denoiser, tensors), sys.argv[1])
print(end >> 20, Path(sys.argv[1]).stat().st_size >> 20, peak_resident_bytes() >> 20)
"""
    command = [sys.executable, "-c", script, str(tmp_path / "denoiser.onnx")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    weights, graph, peak = map(int, done.stdout.split())
    assert weights > 8_000 and graph == 0 and peak < 1_024


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("denoiser.embed.bias"), "missing: denoiser.embed.bias"),
        (lambda w: w.update(extra=torch.zeros(1)), "unknown: extra"),
        (lambda w: w.update({"denoiser.embed.bias": torch.zeros(3)}), r"denoiser.embed.bias is \[3\], must be \[192\]"),
        (lambda w: w["vae.latent_std"].mul_(2), r"vae.latent_std is \[.*weights.safetensors, but \[.*spec.json"),
    ],
)
def test_weights_must_fit_the_spec(checkpoint: Path, tmp_path: Path, change, message: str) -> None:
    weights = load_file(checkpoint / "weights.safetensors")
    change(weights)
    save_file(weights, checkpoint / "weights.safetensors")

    with pytest.raises(UserError, match=message):
        build(checkpoint, tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


def test_damaged_checkpoints_are_refused(checkpoint: Path, tmp_path: Path) -> None:
    weights = checkpoint / "weights.safetensors"
    whole = weights.read_bytes()
    for damaged in (
        b"",
        whole[:4],
        whole[:1000],
        whole[:-1],
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 3) + b"{x}",
    ):
        weights.write_bytes(damaged)
        with pytest.raises(UserError, match="is not a usable safetensors file"):
            read_header(weights)
    weights.write_bytes(whole)
    with pytest.raises(UserError, match="exists; remove it or choose another folder"):
        build(checkpoint, tmp_path)
    with pytest.raises(UserError, match="is not a folder"):
        build(checkpoint, tmp_path / "absent" / "bundle")
    (checkpoint / "spec.json").write_text("{")
    with pytest.raises(UserError, match="is not usable"):
        build(checkpoint, tmp_path / "bundle")
    (checkpoint / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"has no tokenizer.json"):
        build(checkpoint, tmp_path / "bundle")


def test_an_interrupt_leaves_no_bundle(checkpoint: Path, tmp_path: Path) -> None:
    def interrupt(stage: str) -> None:
        if stage == "trace conditioner":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build(checkpoint, tmp_path / "bundle", on_stage=interrupt)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint"]
    assert not tracing()


@pytest.mark.parametrize(
    ("number", "error", "message"),
    [
        (signal.SIGKILL, UserError, "the process that traced .* ended with code -9; free memory"),
        (signal.SIGABRT, RuntimeError, "the process that traced .* ended with code -6"),
    ],
)
def test_a_killed_process_is_an_error(
    checkpoint: Path, tmp_path: Path, number: int, error: type[Exception], message: str
) -> None:
    def kill(stage: str) -> None:
        if stage == "trace conditioner":
            os.kill(tracing()[0], number)

    with pytest.raises(error, match=message):
        build(checkpoint, tmp_path / "bundle", on_stage=kill)
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint"]
    assert not tracing()


def tracing() -> list[int]:
    """Processes of this one's that trace."""
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    return [int(each) for each in children if b"trace_process" in Path(f"/proc/{each}/cmdline").read_bytes()]


def test_hashes_are_found_beside_other_work(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(range(100)))
    with Hashes() as hashes:
        record, tensor = hashes.file(path), hashes.tensor(path, StoredTensor("file", "F32", (5,), 10, 20))
        assert (record.result().bytes, record.result().sha256) == (100, hashlib.sha256(bytes(range(100))).hexdigest())
        assert tensor.result() == hashlib.sha256(bytes(range(10, 30))).hexdigest()


def test_leaving_drops_hashes_that_are_not_found_yet(tmp_path: Path) -> None:
    """Of which one is read and one waits: nobody waits for a terabyte."""
    path = tmp_path / "file"
    with path.open("wb") as file:
        file.truncate(1 << 40)
    with Hashes() as hashes:
        reading, waiting = hashes.file(path), hashes.file(path)
        while not reading.running():
            pass
    assert isinstance(reading.exception(), InterruptedError) and waiting.cancelled()
