"""Canvases: which tokens are known, what fills the holes, and that the pipeline keeps what is known.

pytest tests/test_canvas.py
"""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tubelet.runtime import Bundle, Generation, Pipeline, Request, UserError, vae
from tubelet.runtime.canvas import Canvas, fill, known_tokens, slerp
from tubelet.runtime.engines import Arrays, Binding, Engine
from tubelet.runtime.pipeline import starting_noise
from tubelet.runtime.spec import ModelSpec
from tubelet.runtime.targets import HostEngines

PROMPT = "a red circle moves right on a white background"


@given(st.data())
@settings(deadline=None)
def test_a_token_is_known_when_all_its_pixels_are(spec: ModelSpec, data: st.DataObject) -> None:
    latent_frames, rows, columns = (data.draw(st.integers(1, 4)) for _ in range(3))
    known = np.ones((1 + 4 * (latent_frames - 1), 16 * rows, 16 * columns), np.bool_)
    holes = data.draw(st.lists(st.tuples(*(st.integers(0, n - 1) for n in known.shape)), max_size=5))
    for hole in holes:
        known[hole] = False

    tokens = known_tokens(spec, known)

    expected = np.ones((latent_frames, rows, columns), np.bool_)
    for t, y, x in holes:
        expected[(t + 3) // 4, y // 16, x // 16] = False
    np.testing.assert_array_equal(tokens, expected)


@given(st.data())
@settings(deadline=None)
def test_holes_take_the_nearest_frame_that_knows(data: st.DataObject) -> None:
    shape = tuple(data.draw(st.integers(1, n)) for n in (6, 3, 3))
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    frames, known = rng.integers(0, 256, (*shape, 3), np.uint8), rng.random(shape) < 0.4

    filled = fill(frames, known)

    for t, y, x in itertools.product(*map(range, shape)):
        at = [s for s in range(shape[0]) if known[s, y, x]]
        nearest = min(at, key=lambda s: (abs(s - t), s), default=None)
        np.testing.assert_array_equal(filled[t, y, x], 127 if nearest is None else frames[nearest, y, x])


@given(st.integers(0, 99), st.floats(0, 1))
def test_slerp_turns_at_even_speed_and_keeps_the_spread(seed: int, weight: float) -> None:
    a, b = np.random.default_rng(seed).standard_normal((2, 400), np.float32)
    b *= np.linalg.norm(a) / np.linalg.norm(b)

    c = slerp(a, b, weight)

    def angle(x: np.ndarray, y: np.ndarray) -> float:
        return float(np.arccos(np.clip(x @ y / np.linalg.norm(x) / np.linalg.norm(y), -1, 1)))

    assert np.linalg.norm(c) == pytest.approx(np.linalg.norm(a), rel=1e-4)
    assert angle(a, c) == pytest.approx(weight * angle(a, b), abs=1e-3)
    np.testing.assert_allclose(slerp(a, a, weight), a, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"latents": np.zeros((8, 2, 4, 4))}, "latents must be float32 .*float64"),
        ({"known": np.zeros((2, 2, 2))}, "known must be bool .*float64"),
        ({"noise": np.zeros((8, 2, 4, 5), np.float32)}, r"noise must be float32 \[8, 2, 4, 4\]"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(changes: dict[str, Any], message: str) -> None:
    arrays = {"latents": np.zeros((8, 2, 4, 4), np.float32), "known": np.zeros((2, 2, 2), np.bool_)}
    with pytest.raises(UserError, match=message):
        Canvas(**arrays | changes)


def test_a_mask_of_another_grid_is_refused(pipeline: Pipeline) -> None:
    canvas = Canvas(np.zeros((8, 2, 4, 4), np.float32), np.zeros((2, 2, 3), np.bool_))
    with pytest.raises(UserError, match=r"known \[2, 2, 2\], not \[2, 2, 3\]"):
        pipeline.prepare(Request(PROMPT), canvas)


def test_strength_without_a_canvas_is_refused(pipeline: Pipeline) -> None:
    with pytest.raises(UserError, match=r"strength 0\.5 needs a canvas"):
        pipeline.prepare(Request(PROMPT, strength=0.5))


def half_known(pipeline: Pipeline) -> Canvas:
    """5 frames of 32x48 whose first latent frame and one more token are known."""
    latents = np.random.default_rng(1).standard_normal((8, 2, 4, 6), np.float32)
    known = np.zeros((2, 2, 3), np.bool_)
    known[0] = known[1, 0, 0] = True
    return Canvas(latents, known)


class Unleveled:
    """The embedded denoiser as one that knows a single noise level: it is never told which tokens are known."""

    def __init__(self, engine: Engine):
        self.engine = engine

    def bind(self, inputs: Arrays, outputs: Arrays) -> Binding:
        assert "known" not in inputs
        self.known = np.zeros(inputs["tokens"].shape[:2], np.float32)
        return self.engine.bind({**inputs, "known": self.known}, outputs)

    def __call__(self, inputs: Arrays) -> dict[str, np.ndarray]:
        return self.engine(inputs)


@pytest.fixture
def one_level(pipeline: Pipeline) -> Pipeline:
    spec = dataclasses.replace(pipeline.spec, denoiser=dataclasses.replace(pipeline.spec.denoiser, two_levels=False))
    manifest = dataclasses.replace(pipeline.bundle.manifest, spec=spec)

    def load(name: str) -> Engine:
        engine = pipeline.engines[name]
        return Unleveled(engine) if name == "denoiser" else engine

    return Pipeline(Bundle(pipeline.bundle.folder, manifest), HostEngines(load), pipeline.target)


@pytest.mark.parametrize("sampler", ["euler", "unipc"])
def test_known_tokens_are_clean_at_every_step(pipeline: Pipeline, sampler: str) -> None:
    canvas = half_known(pipeline)
    generation = pipeline.prepare(Request(PROMPT, steps=3, sampler=sampler), canvas)
    known, clean = canvas.known.ravel(), pipeline._pack(canvas.latents)

    for _ in range(4):
        np.testing.assert_array_equal(generation.state[0][known], clean[known])
        np.testing.assert_array_equal(generation.loop.steps.inputs["tokens"][0][:, :32][known], clean[known])
        np.testing.assert_array_equal(generation.loop.steps.inputs["known"], np.stack([known.astype(np.float32)] * 2))
        assert not (generation.state[0][~known] == clean[~known]).any()
        if not generation.finished:
            pipeline.step(generation)


@pytest.mark.parametrize("sampler", ["euler", "unipc"])
def test_without_two_levels_known_tokens_are_noised_as_the_others(one_level: Pipeline, sampler: str) -> None:
    canvas = half_known(one_level)
    generation = one_level.prepare(Request(PROMPT, steps=3, sampler=sampler, seed=5), canvas)
    noise = one_level._pack(starting_noise(generation.geometry, 8, 5))
    known, clean = canvas.known.ravel(), one_level._pack(canvas.latents)

    for done in range(4):
        sigma = generation.schedule.sigmas[done]
        expected = (1 - sigma) * clean + sigma * noise
        np.testing.assert_allclose(generation.state[0][known], expected[known], rtol=0, atol=1e-6)
        if not generation.finished:
            one_level.step(generation)


def test_below_strength_1_unknown_tokens_start_from_the_canvas(pipeline: Pipeline) -> None:
    canvas = half_known(pipeline)
    generation = pipeline.prepare(Request(PROMPT, steps=10, strength=0.5, seed=3), canvas)

    clean, noise = pipeline._pack(canvas.latents), pipeline._pack(starting_noise(generation.geometry, 8, 3))
    sigma, unknown = generation.schedule.sigmas[0], ~canvas.known.ravel()
    assert generation.schedule.steps == 5 and 0 < sigma < 1
    expected = (1 - sigma) * clean + sigma * noise
    np.testing.assert_allclose(generation.state[0][unknown], expected[unknown], rtol=0, atol=1e-6)


def test_at_strength_0_the_canvas_is_the_result(pipeline: Pipeline) -> None:
    canvas = half_known(pipeline)
    generation = pipeline.prepare(Request(PROMPT, strength=0.0), canvas)
    assert generation.finished
    np.testing.assert_array_equal(pipeline.latent(generation), canvas.latents)


def test_a_given_noise_replaces_the_seeds(pipeline: Pipeline) -> None:
    nothing_known = dataclasses.replace(half_known(pipeline), known=np.zeros((2, 2, 3), np.bool_))
    noise = starting_noise(pipeline.prepare(Request(PROMPT, seed=9), nothing_known).geometry, 8, 9)
    given = pipeline.generate(Request(PROMPT, steps=2), dataclasses.replace(nothing_known, noise=noise))
    np.testing.assert_array_equal(given, pipeline.generate(Request(PROMPT, steps=2, seed=9), nothing_known))
    without = Request(PROMPT, width=48, height=32, frames=5, steps=2, seed=9)
    np.testing.assert_array_equal(given, pipeline.generate(without))


@pytest.mark.parametrize("noise", [False, True])
def test_a_saved_generation_keeps_its_canvas(pipeline: Pipeline, tmp_path: Path, noise: bool) -> None:
    canvas = half_known(pipeline)
    if noise:
        canvas = dataclasses.replace(canvas, noise=canvas.latents[::-1].copy())
    wanted = Request(PROMPT, steps=4, strength=0.8)
    generation = pipeline.prepare(wanted, canvas)
    pipeline.step(generation)
    generation.save(tmp_path / "half")

    resumed = Generation.load(tmp_path / "half", pipeline)
    pipeline.finish(resumed)

    np.testing.assert_array_equal(np.concatenate(list(pipeline.decode(resumed))), pipeline.generate(wanted, canvas))


def test_encoding_in_chunks_equals_encoding_at_once(pipeline: Pipeline) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (25, 32, 32, 3), np.uint8)
    chunked = pipeline.encode(frames)
    at_once = vae.encode(dataclasses.replace(pipeline.spec.vae, chunk=100), pipeline.engines, frames)
    assert chunked.shape == (8, 7, 4, 4) and chunked.dtype == np.float32
    np.testing.assert_allclose(chunked, at_once, rtol=0, atol=1e-4)  # convolutions sum in another order


def test_a_clip_of_no_legal_size_is_not_encoded(pipeline: Pipeline) -> None:
    with pytest.raises(UserError, match="frames 4 is not 1"):
        pipeline.encode(np.zeros((4, 32, 32, 3), np.uint8))
