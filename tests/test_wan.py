"""Wan's published models: both layouts read alike, damage is listed, and diffusers' pipelines are reproduced.

    pytest tests/test_wan.py

The reference models run in torch here, in the place of engines: what is proved is names, shapes, conditioning and the
loop; `test_wan_graphs.py` proves the graphs. 1e-4 of a latent after eight steps: float32 in another order of summation,
through eight evaluations and guidance.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from published import KINDS, TEXTS, pipeline, write_diffusers, write_original
from safetensors.torch import load_file, save_file

from tubelet.export.checkpoint import Checkpoint
from tubelet.export.components import Component, build_modules, components
from tubelet.export.parity import weights_of
from tubelet.export.storage import digest
from tubelet.export.wan import open_wan
from tubelet.runtime import Pipeline, Request, UserError
from tubelet.runtime.canvas import Canvas
from tubelet.runtime.loop import HostLoop, Steps
from tubelet.runtime.studio import Studio
from tubelet.runtime.targets import Choice
from tubelet.runtime.text import PromptTokenizer, clean

STEPS, SHIFT = 8, 3.0


class TorchEngine:
    def __init__(self, component: Component):
        self._component = component

    @torch.no_grad()
    def __call__(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, Any]:
        results = self._component.run({name: torch.from_numpy(value) for name, value in inputs.items()})
        return {name: r.numpy() for name, r in zip(self._component.outputs, results, strict=True)}

    def bind(self, inputs: Mapping[str, Any], outputs: Mapping[str, Any]) -> SimpleNamespace:
        return SimpleNamespace(run=lambda: np.copyto(outputs["velocity"], self(inputs)["velocity"]))


class TorchEngines:
    """A checkpoint's modules as a pipeline's engines."""

    def __init__(self, checkpoint: Checkpoint):
        with torch.device("meta"):
            parts = components(checkpoint.spec, build_modules(checkpoint.spec))
        self.used: list[str] = []
        self._parts = {part.name: part for part in parts}
        for part in parts:
            for name, tensor in part.module.state_dict().items():
                assert tuple(tensor.shape) == checkpoint.tensors[part.weights + name].shape
            part.module.load_state_dict(
                {n: checkpoint.read(part.weights + n).float() for n in part.module.state_dict()}, assign=True
            )

    def __getitem__(self, name: str) -> TorchEngine:
        self.used.append(name)
        return TorchEngine(self._parts[name])

    def check(self, geometry: Any, batch: int) -> None:
        """Any clip."""

    def loop(self, steps: Steps) -> HostLoop:
        return HostLoop(self[steps.denoiser], steps)


@dataclasses.dataclass(frozen=True)
class Published:
    """One model: diffusers' pipeline, its folders, and ours."""

    theirs: Any
    diffusers: Path
    original: Path
    checkpoint: Checkpoint
    ours: Pipeline


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Published]:
    return _Models(tmp_path_factory.mktemp("wan"))  # type: ignore[return-value]


class _Models(dict[str, Published]):
    """Made when first asked for."""

    def __init__(self, folder: Path):
        super().__init__()
        self._folder = folder

    def __missing__(self, name: str) -> Published:
        theirs = pipeline(name)
        theirs.set_progress_bar_config(disable=True)
        folder = write_diffusers(theirs, self._folder / name)
        original = write_original(theirs, name, self._folder / f"{name}-original")
        made = self._folder / f"{name}-made"
        made.mkdir()
        checkpoint = open_wan(folder).materialised(made)
        bundle = SimpleNamespace(spec=checkpoint.spec, key=name, path=lambda _: checkpoint.tokenizer)
        ours = Pipeline(bundle, TorchEngines(checkpoint), Choice("cpu", "torch", ()))  # type: ignore[arg-type]
        self[name] = Published(theirs, folder, original, checkpoint, ours)
        return self[name]


@pytest.mark.parametrize("name", KINDS)
def test_both_layouts_are_the_same_model(models: Mapping[str, Published], name: str) -> None:
    ours, other = models[name].checkpoint, open_wan(models[name].original)

    assert ours.spec == other.spec
    assert ours.spec.name == name
    assert other.tensors.keys() | other.made.keys() == ours.tensors.keys()
    for key, stored in other.tensors.items():
        mine = ours.tensors[key]
        assert (stored.dtype, stored.shape) == (mine.dtype, mine.shape)
        assert digest(other.files[stored.file], stored) == digest(ours.files[mine.file], mine), key


@pytest.mark.parametrize(
    ("name", "width", "height", "frames"),
    [
        ("wan2.1-t2v", 48, 80, 9),  # portrait, an odd grid
        ("wan2.1-t2v", 64, 32, 1),
        ("wan2.2-t2v-a14b", 80, 48, 5),
    ],
)
def test_text_to_video_is_diffusers(
    models: Mapping[str, Published], name: str, width: int, height: int, frames: int
) -> None:
    model = models[name]
    low = 2.0 if KINDS[name].boundary else None
    noise, canvas = _noise(model, width, height, frames)

    request = _request(width, height, frames, low)
    found = _finished(model.ours, request, canvas)
    wanted = model.theirs(**_arguments(width, height, frames, low, noise)).frames[0].numpy()

    _assert_close(found, wanted)
    used = [name for name in model.ours.engines.used if name.startswith("denoiser")]
    assert set(used) == ({"denoiser", "denoiser_low"} if low else {"denoiser"})


@pytest.mark.parametrize(
    ("name", "width", "height", "frames"),
    [
        ("wan2.1-i2v", 48, 80, 9),
        ("wan2.1-flf2v", 64, 48, 9),
        ("wan2.2-i2v-a14b", 80, 48, 5),
        ("wan2.2-ti2v", 96, 64, 9),
    ],
)
def test_image_to_video_is_diffusers(
    models: Mapping[str, Published], name: str, width: int, height: int, frames: int
) -> None:
    """Canvases made by the studio from pictures, as the command line makes them."""
    model, kind = models[name], KINDS[name]
    low = 2.0 if kind.boundary else None
    rng = np.random.default_rng(1)
    first, last = rng.integers(0, 256, (2, height, width, 3), np.uint8)
    noise, _ = _noise(model, width, height, frames)
    shown = {0: first, frames - 1: last} if kind.pictures == 2 else {0: first}

    request = _request(width, height, frames, low)
    canvas = _canvas(model.ours, request, shown, frames, noise)
    found = _finished(model.ours, request, canvas)
    pictures = {"image": Image.fromarray(first)}
    if kind.pictures == 2:
        pictures["last_image"] = Image.fromarray(last)
    wanted = model.theirs(**_arguments(width, height, frames, low, noise), **pictures).frames[0].numpy()

    _assert_close(found, wanted)


def _noise(model: Published, width: int, height: int, frames: int) -> tuple[NDArray[np.float32], Canvas]:
    """Noise, and a canvas on which nothing is known but it."""
    vae = model.checkpoint.spec.vae
    side = vae.spatial_factor
    shape = (vae.latent_channels, 1 + (frames - 1) // 4, height // side, width // side)
    noise = np.random.default_rng(0).standard_normal(shape, np.float32)
    grid = (shape[1], shape[2] // 2, shape[3] // 2)
    return noise, Canvas(np.zeros_like(noise), np.zeros(grid, np.bool_), noise)


def _request(width: int, height: int, frames: int, low: float | None) -> Request:
    return Request(
        TEXTS[2], negative_prompt="blurry,  &amp; dark", width=width, height=height, frames=frames, steps=STEPS,
        guidance=3.0, guidance_low=low, sampler="unipc", shift=SHIFT,
    )  # fmt: skip


def _arguments(width: int, height: int, frames: int, low: float | None, noise: NDArray[np.float32]) -> dict[str, Any]:
    return {
        "prompt": TEXTS[2], "negative_prompt": "blurry,  &amp; dark", "width": width, "height": height,
        "num_frames": frames, "num_inference_steps": STEPS, "guidance_scale": 3.0, "guidance_scale_2": low,
        "latents": torch.from_numpy(noise)[None], "output_type": "latent",
    }  # fmt: skip


def _canvas(
    ours: Pipeline, request: Request, shown: Mapping[int, NDArray[np.uint8]], frames: int, noise: NDArray[np.float32]
) -> Canvas:
    """The first canvas that the studio paints for these pictures, with this noise."""
    painted: list[Canvas] = []

    class Stopped(Exception):
        pass

    def prepare(request: Request, canvas: Canvas) -> None:
        painted.append(canvas)
        raise Stopped

    stopping = SimpleNamespace(spec=ours.spec, encode=ours.encode, prepare=prepare)
    with pytest.raises(Stopped):
        Studio(stopping)._paint_around(request, shown, frames)  # type: ignore[arg-type]
    return dataclasses.replace(painted[0], noise=noise)


def _finished(ours: Pipeline, request: Request, canvas: Canvas) -> NDArray[np.float32]:
    generation = ours.prepare(request, canvas)
    ours.finish(generation)
    return ours.latent(generation)


def _assert_close(found: NDArray[np.float32], wanted: NDArray[np.float32]) -> None:
    error = float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))
    assert found.shape == wanted.shape
    assert error < 1e-4, error
    assert np.abs(wanted).max() > 0.5
