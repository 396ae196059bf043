"""A VAE of Wan's, exported: against torch on ONNX Runtime, streamed and in tiles, lowered, and really compiled.

    pytest tests/test_wan_vae_graphs.py

Small, but with one head of more than 256 channels, as the published ones have: no fused attention takes it.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
import torch
from safetensors.torch import save_file
from test_wan_vae import randomise

from tubelet.export.checkpoint import read_header
from tubelet.export.compile import GRAPH, PLAN, Job, compile_component
from tubelet.export.components import Component, vae_components
from tubelet.export.precision import FLOAT, TYPES, lower
from tubelet.export.trace import trace
from tubelet.export.vae import Vae
from tubelet.runtime import vae
from tubelet.runtime.bundle import WEIGHTS
from tubelet.runtime.engines import Engine, OnnxRuntimeEngine
from tubelet.runtime.plans import Target
from tubelet.runtime.profiles import Range
from tubelet.runtime.spec import WanVaeSpec

SPEC = WanVaeSpec(
    latent_channels=4,
    pixel_patch=2,
    widths=(264, 264),
    temporal=(True,),
    encoder_blocks=1,
    decoder_blocks=1,
    latent_mean=(0.1, 0.0, -0.2, 0.0),
    latent_std=(1.0, 1.5, 0.5, 2.0),
    chunk=1,
    tile=64,
    decoder_widths=(264, 264),
    shortcuts=True,
)
NAMES = ("vae_decoder_first", "vae_decoder", "vae_encoder_first", "vae_encoder")
TOLERANCE = 1e-5  # L2 of the difference over L2: another order of summation in float32


class Exported:
    """The four graphs in a folder, and the module that they were made from; engines by name."""

    def __init__(self, folder: Path):
        self.folder, self.vae = folder, Vae(SPEC).eval()
        randomise(self.vae)
        save_file({f"vae.{name}": tensor for name, tensor in self.vae.state_dict().items()}, folder / WEIGHTS)
        with torch.device("meta"):
            components = vae_components(SPEC, Vae(SPEC).eval())
        for component in components:
            ir.save(trace(component, read_header(folder / WEIGHTS)), self.graph(component.name))
        self.engines = {name: OnnxRuntimeEngine(self.graph(name), 1) for name in NAMES}

    def graph(self, name: str) -> Path:
        return self.folder / f"{name}.onnx"

    def __getitem__(self, name: str) -> Engine:
        return self.engines[name]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    return Exported(tmp_path_factory.mktemp("wan_vae"))


def component_of(exported: Exported, name: str) -> Component:
    return next(each for each in vae_components(SPEC, exported.vae) if each.name == name)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_onnx_runtime_equals_torch(exported: Exported, name: str) -> None:
    component = component_of(exported, name)
    for extents in component.shapes:
        inputs = {port: each.example(extents) for port, each in component.inputs.items()}
        expected = component.module(*inputs.values())
        found = exported[name]({port: value.numpy() for port, value in inputs.items()})
        for port, value in zip(component.outputs, expected, strict=True):
            error = np.linalg.norm(found[port] - value.numpy()) / max(float(value.norm()), 1e-9)
            assert error <= TOLERANCE, (extents, port, error)


@pytest.mark.parametrize("name", NAMES)
def test_a_graph_has_no_loop_and_reads_a_cache_once(exported: Exported, name: str) -> None:
    """A cache is only ever prepended, so that the next one may take its memory."""
    graph = ir.load(exported.graph(name)).graph
    assert not {"Loop", "Scan", "If", "SequenceAt"} & {node.op_type for node in graph}
    assert sum(node.op_type == "Attention" for node in graph) == 1
    for value in graph.inputs:
        if str(value.name).startswith("cache_"):
            assert {use.node.op_type for use in value.uses()} - {"Shape"} == {"Concat"}


@torch.no_grad()
def test_streaming_equals_torch_and_tiles_are_tiles(exported: Exported) -> None:
    """Frames are rounded to 255 levels; a tile of the one graph is a tile of the other."""
    latent = np.random.default_rng(0).standard_normal((4, 4, 6, 5), np.float32)
    pixels, caches = exported.vae.decode(torch.from_numpy(latent[None, :, :1]))
    parts = [pixels, exported.vae.decode(torch.from_numpy(latent[None, :, 1:]), caches)[0]]
    expected = ((torch.cat(parts, dim=2)[0].clamp(-1, 1) + 1) * 127.5).permute(1, 2, 3, 0).numpy()

    whole = np.concatenate(list(vae.decode(SPEC, exported, latent)))
    assert np.abs(whole - expected).max() <= 0.501

    again = vae.encode(SPEC, exported, whole)
    assert again.shape == latent.shape
    small = dataclasses.replace(SPEC, tile=16)  # 4 latent pixels
    tiled = np.concatenate(list(vae.decode(small, exported, latent)))
    corner = np.concatenate(list(vae.decode(SPEC, exported, np.ascontiguousarray(latent[:, :, :4, :3]))))
    assert tiled.shape == whole.shape
    np.testing.assert_allclose(tiled[:, :8, :4].astype(int), corner[:, :8, :4], atol=1)  # where no neighbour reaches


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("name", NAMES)
def test_lowering_keeps_statistics_wide_and_marks_the_attention(exported: Exported, name: str, precision: str) -> None:
    lowered = lower(ir.load(exported.graph(name)), precision)
    (attention,) = (node for node in lowered.model.graph if node.op_type == "Attention")
    assert attention.attributes["TRT_decomposable"].as_int() == 1
    assert lowered.attentions == lowered.wide_products == 0
    for node in lowered.model.graph:
        if node.op_type in ("Conv", "Attention"):
            assert node.inputs[0] is not None and node.inputs[0].dtype == TYPES[precision]
        if node.op_type in ("ReduceMean", "Sqrt"):
            assert node.inputs[0] is not None and node.inputs[0].dtype == FLOAT


@pytest.mark.parametrize("name", NAMES)
def test_tensorrt_rtx_compiles_it(
    exported: Exported, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which refuses an attention of this head size where it is not marked; `compile_component` checks the rest."""
    monkeypatch.chdir(tmp_path)
    os.symlink(exported.folder / WEIGHTS, WEIGHTS)
    os.symlink(exported.graph(name), GRAPH)
    side, one = Range(4, 4, 6), Range(1, 1, 1)
    profile = {"B": one, "h": side, "w": side} | ({} if name.endswith("_first") else {"t": one})
    inputs = {port: each.shape for port, each in component_of(exported, name).inputs.items()}
    record = compile_component(
        Job(name, "key", inputs, Target("rtx", ("sm89",), "bf16"), (profile,), None), lambda event: None
    )
    assert record.file.bytes == PLAN.stat().st_size and record.measured.fused_attentions == 0
