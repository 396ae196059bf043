"""LTX-Video as a bundle: ONNX Runtime gives what torch gives, and the pipeline the latents of diffusers.

pytest tests/test_ltx_graphs.py
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from ltx_published import arguments, finished, noise_of, pipeline, request
from published import relative

from tubelet.export.build import build, open_checkpoint
from tubelet.export.components import build_modules, components
from tubelet.export.parity import weights_of
from tubelet.export.precision import lower
from tubelet.runtime import Bundle, Pipeline
from tubelet.runtime.bundle import Extents, extents, required, sizes
from tubelet.runtime.canvas import Canvas
from tubelet.runtime.engines import OnnxRuntimeEngine
from tubelet.runtime.kernels import pack

GRIDS = ((1, 1, 1), (1, 2, 3), (1, 5, 5), (2, 2, 2), (3, 3, 5), (3, 5, 3), (2, 4, 7), (5, 3, 2), (6, 1, 8), (4, 6, 6))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path, Bundle]:
    """diffusers' pipeline, its folder, and the bundle made from it; with a VAE of 2x8x8, which is quicker to trace."""
    theirs, folder = pipeline((4, 4), (4, 8), (1, 1, 1), depth=1), tmp_path_factory.mktemp("ltx")
    theirs.save_pretrained(folder / "ltx")
    return theirs, folder / "ltx", build(folder / "ltx", folder / "bundle")


def test_every_graph_is_its_module(made: tuple[Any, Path, Bundle]) -> None:
    """1e-5 relative: float32 in another order of summation."""
    _, _, bundle = made
    assert {row.component for row in bundle.manifest.parity} == set(required(bundle.spec))
    assert max(row.relative for row in bundle.manifest.parity) < 1e-5
    assert "vae_decoder_first" not in bundle.manifest.components


@pytest.mark.parametrize("clip", [(64, 96, 5), (32, 64, 1)])
def test_the_bundle_gives_diffusers_latents(made: tuple[Any, Path, Bundle], clip: tuple[int, int, int]) -> None:
    """1e-4 after eight steps with guidance, in portrait and of one frame."""
    theirs, _, bundle = made
    noise = noise_of(bundle.spec, *clip)
    canvas = Canvas(np.zeros_like(noise), np.zeros(noise.shape[1:], np.bool_), noise)
    with Pipeline.open(bundle, "cpu", threads=1) as ours:
        found = finished(ours, request(*clip), canvas)
        frames = ours.generate(request(*clip))
    wanted = theirs(**arguments(*clip, noise)).frames[0].numpy()

    assert relative(pack(found, (1, 1, 1)), wanted) < 1e-4
    assert frames.shape == (clip[2], clip[1], clip[0], 3)


@torch.no_grad()
def test_one_denoiser_engine_serves_ten_shapes(made: tuple[Any, Path, Bundle]) -> None:
    _, folder, bundle = made
    checkpoint = open_checkpoint(folder)
    with torch.device("meta"):
        parts = components(checkpoint.spec, build_modules(checkpoint.spec))
    (part,) = (part for part in parts if part.name == "denoiser")
    engine = OnnxRuntimeEngine(bundle.graph("denoiser"), 1)
    torch.manual_seed(0)
    with weights_of(checkpoint, part.module, part.weights):
        for number, (t, h, w) in enumerate(GRIDS):
            shape: Extents = {"B": 1 + number % 2, "N": t * h * w, "L": 128}
            inputs = {name: port.example(shape) for name, port in part.inputs.items()}

            (expected,) = part.run(inputs)
            found = engine({name: value.numpy() for name, value in inputs.items()})["velocity"]

            assert relative(found, expected) < 1e-5, (t, h, w)


def test_the_denoiser_has_native_operations(made: tuple[Any, Path, Bundle]) -> None:
    _, _, bundle = made
    kinds = [node.op_type for node in onnx.load(bundle.graph("denoiser"), load_external_data=False).graph.node]
    depth = bundle.spec.denoiser.depth
    assert kinds.count("Attention") == 2 * depth
    assert kinds.count("RMSNormalization") == 5 * depth  # two before what is modulated, two of queries, one of keys
    assert kinds.count("LayerNormalization") == 1
    assert lower(ir.load(bundle.graph("denoiser")), "bf16").attentions == 2 * depth  # each may be one fused kernel


def test_a_clip_decoded_whole_has_frames_in_its_extents(made: tuple[Any, Path, Bundle]) -> None:
    _, _, bundle = made
    part = bundle.manifest.components["vae_decoder"]
    shape = {"B": 1, "t": 3, "h": 2, "w": 5}
    assert sizes(part.outputs["pixels"], shape) == (1, 3, 5, 16, 40)
    assert extents(part.outputs, {"pixels": (1, 3, 5, 16, 40)}) == shape
