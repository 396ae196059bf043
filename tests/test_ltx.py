"""LTX-Video behind the interfaces that Wan has: diffusers' folder is read, its pipelines are reproduced.

    pytest tests/test_ltx.py

The reference models run in torch here, in the place of engines; `test_ltx_graphs.py` proves the graphs. 1e-4 of a latent
after eight steps: float32 in another order of summation, through eight evaluations and guidance; 1e-5 of a component.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from ltx_published import pipeline
from numpy.typing import NDArray
from published import TEXTS, randomise
from safetensors.torch import load_file, save_file
from torch_engines import TorchEngines

from tubelet.export.build import open_checkpoint
from tubelet.export.checkpoint import Checkpoint
from tubelet.export.dit import Conditioner, Denoiser
from tubelet.export.estimate import KINDS
from tubelet.export.lora import Lora, merged
from tubelet.export.ltx_names import TRANSFORMER
from tubelet.export.names import Layout
from tubelet.export.profiles import choose
from tubelet.export.traffic import Shape
from tubelet.runtime import Pipeline, Request, UserError
from tubelet.runtime.bundle import required
from tubelet.runtime.canvas import Canvas
from tubelet.runtime.geometry import plan
from tubelet.runtime.kernels import pack
from tubelet.runtime.residency import PARTS
from tubelet.runtime.rope import rope_tables
from tubelet.runtime.schedule import time_features
from tubelet.runtime.spec import LtxDenoiserSpec
from tubelet.runtime.targets import Choice

STEPS, TOLERANCE = 8, 1e-5
CLIPS = {"portrait, an odd grid": (96, 160, 17), "one frame": (96, 64, 1), "wide": (224, 32, 9)}
Latent = NDArray[np.float32]


@dataclasses.dataclass(frozen=True)
class Published:
    """diffusers' pipeline, its folder, and ours."""

    theirs: Any
    folder: Path
    checkpoint: Checkpoint
    ours: Pipeline


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Published:
    theirs, folder = pipeline(), tmp_path_factory.mktemp("ltx") / "ltx"
    theirs.save_pretrained(folder, max_shard_size="60KB")
    checkpoint = open_checkpoint(folder)
    bundle = SimpleNamespace(spec=checkpoint.spec, key="ltx", path=lambda _: checkpoint.tokenizer)
    ours = Pipeline(bundle, TorchEngines(checkpoint), Choice("cpu", "torch", ()))  # type: ignore[arg-type]
    return Published(theirs, folder, checkpoint, ours)


def request(width: int, height: int, frames: int) -> Request:
    return Request(
        TEXTS[1], negative_prompt="blurry", width=width, height=height, frames=frames, steps=STEPS, guidance=3.0
    )


def arguments(width: int, height: int, frames: int, latents: Latent) -> dict[str, Any]:
    return {
        "prompt": TEXTS[1], "negative_prompt": "blurry", "width": width, "height": height, "num_frames": frames,
        "num_inference_steps": STEPS, "guidance_scale": 3.0, "output_type": "latent",
        "latents": torch.from_numpy(pack(latents, (1, 1, 1)))[None],
    }  # fmt: skip


def noise_of(model: Published, width: int, height: int, frames: int) -> Latent:
    shape = plan(model.checkpoint.spec, width, height, frames).latent
    return np.random.default_rng(0).standard_normal((model.checkpoint.spec.vae.latent_channels, *shape), np.float32)


def finished(ours: Pipeline, request: Request, canvas: Canvas) -> Latent:
    generation = ours.prepare(request, canvas)
    ours.finish(generation)
    return ours.latent(generation)


def relative(found: Any, wanted: Any) -> float:
    return float(np.linalg.norm(np.asarray(found) - np.asarray(wanted)) / np.linalg.norm(np.asarray(wanted)))


@pytest.mark.parametrize("clip", CLIPS)
def test_text_to_video_is_diffusers(model: Published, clip: str) -> None:
    noise = noise_of(model, *CLIPS[clip])
    canvas = Canvas(np.zeros_like(noise), np.zeros(noise.shape[1:], np.bool_), noise)

    found = finished(model.ours, request(*CLIPS[clip]), canvas)
    wanted = model.theirs(**arguments(*CLIPS[clip], noise)).frames[0].numpy()

    assert relative(pack(found, (1, 1, 1)), wanted) < 1e-4
    assert np.abs(wanted).max() > 0.5
