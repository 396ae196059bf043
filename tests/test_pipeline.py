"""The pipeline on the embedded model: parts, determinism, guidance, cancel, save and resume, streaming.

pytest tests/test_pipeline.py
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tubelet.runtime import Bundle, Cancelled, Generation, Pipeline, Request, UserError, kernels, vae
from tubelet.runtime.geometry import plan
from tubelet.runtime.pipeline import starting_noise

FIRST_NOISE_OF_SEED_7 = (-0.293339, 1.703831, 1.539192)
SMALL = Request("a red circle moves right on a white background", width=48, height=48, frames=9, steps=4)


def request(**changes: object) -> Request:
    return Request(**(vars(SMALL) | changes))  # type: ignore[arg-type]


def test_parts_and_generate_agree(pipeline: Pipeline) -> None:
    generation = pipeline.prepare(SMALL)
    while not generation.finished:
        pipeline.step(generation)
    chunks = list(pipeline.decode(generation))

    frames = np.concatenate(chunks)
    assert frames.shape == (9, 48, 48, 3) and frames.dtype == np.uint8
    assert len(chunks[0]) == 1  # frames come as soon as they exist
    np.testing.assert_array_equal(frames, pipeline.generate(SMALL))


@pytest.mark.parametrize("sampler", ["euler", "unipc"])
def test_the_step_loop_is_the_samplers_definition(pipeline: Pipeline, sampler: str) -> None:
    """Replays three steps with plain engine calls and plain algebra. 1e-4: float32 rounding over a few steps."""
    generation = pipeline.prepare(request(sampler=sampler, guidance=3.0))
    state = np.stack(generation.state).astype(np.float64)
    inputs = {name: array.copy() for name, array in generation.loop.steps.inputs.items()}
    for i in range(3):
        inputs["tokens"][:, :, : state.shape[2]] = state[0]
        inputs["time_features"][:] = generation.loop.steps.time_table[i]
        cond, uncond = pipeline.engines["denoiser"](inputs)["velocity"].astype(np.float64)
        guided = uncond + 3.0 * (cond - uncond)
        state = np.tensordot(generation.schedule.matrices[i], np.concatenate([state, guided[None]]), axes=1)
        pipeline.step(generation)

        np.testing.assert_allclose(generation.state[0], state[0], atol=1e-4)


def test_the_same_seed_is_the_same_video_and_another_is_not(pipeline: Pipeline) -> None:
    first = pipeline.generate(SMALL)

    np.testing.assert_array_equal(first, pipeline.generate(SMALL))
    assert (first != pipeline.generate(request(seed=1))).any()


def test_noise_is_philox_keyed_by_the_seed(pipeline: Pipeline) -> None:
    """The first numbers are part of the contract: a seed means the same video on every backend."""
    geometry = plan(pipeline.spec, 48, 48, 9)
    noise = starting_noise(geometry, 8, seed=7)

    expected = np.random.Generator(np.random.Philox(key=7)).standard_normal(noise.size, np.float32)
    np.testing.assert_array_equal(noise.ravel(), expected)
    np.testing.assert_allclose(
        noise.ravel()[:3], FIRST_NOISE_OF_SEED_7, atol=1e-6
    )  # should NumPy ever change its stream
    np.testing.assert_array_equal(pipeline.prepare(request(seed=7)).state[0], kernels.pack(noise, (1, 2, 2)))


def test_guidance_of_one_runs_one_branch(pipeline: Pipeline) -> None:
    assert pipeline.prepare(request(guidance=1.0)).loop.steps.inputs["tokens"].shape[0] == 1
    assert pipeline.prepare(request(guidance=1.5)).loop.steps.inputs["tokens"].shape[0] == 2


def test_the_negative_prompt_steers(pipeline: Pipeline) -> None:
    plain, steered = pipeline.generate(SMALL), pipeline.generate(request(negative_prompt="a blue square"))
    assert (plain != steered).any()


def test_steps_are_reported_and_cancel_stops_between_them(pipeline: Pipeline) -> None:
    seen: list[tuple[int, int]] = []
    with pytest.raises(Cancelled, match="after 2 of 4 steps"):
        pipeline.generate(SMALL, on_step=lambda *step: seen.append(step), cancel=lambda: len(seen) == 2)
    assert seen == [(1, 4), (2, 4)]


@pytest.mark.parametrize("sampler", ["euler", "unipc"])
@pytest.mark.parametrize("stop", [0, 1, 3, 4])
def test_a_saved_generation_resumes_bit_for_bit(pipeline: Pipeline, tmp_path: Path, sampler: str, stop: int) -> None:
    wanted = request(sampler=sampler)
    generation = pipeline.prepare(wanted)
    for _ in range(stop):
        pipeline.step(generation)
    generation.save(tmp_path / "half.safetensors")

    resumed = Generation.load(tmp_path / "half.safetensors", pipeline)
    assert resumed.done == stop
    while not resumed.finished:
        pipeline.step(resumed)

    np.testing.assert_array_equal(np.concatenate(list(pipeline.decode(resumed))), pipeline.generate(wanted))
    assert [p.name for p in tmp_path.iterdir()] == ["half.safetensors"]


def test_a_finished_generation_takes_no_step(pipeline: Pipeline) -> None:
    generation = pipeline.prepare(request(steps=1))
    pipeline.step(generation)
    with pytest.raises(UserError, match="all 1 steps are done"):
        pipeline.step(generation)


def test_decoding_a_long_latent_keeps_memory_flat() -> None:
    """1025 frames at 64x64 (101 MB of float32 pixels) peak within 16 MB of the first 33, in the resident set."""
    script = """
import numpy as np
from tubelet.runtime import EMBEDDED, Pipeline
from tubelet.runtime.resident import peak_resident_bytes as peak
pipeline, peaks = Pipeline.open(EMBEDDED), []
for latents in (9, 257):
    for _ in pipeline.decode_latent(np.zeros((8, latents, 8, 8), np.float32)):
        pass
    peaks.append(peak())
print(peaks[1] - peaks[0])
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)

    assert run.returncode == 0, run.stderr
    assert int(run.stdout) < 16e6


def test_threads_share_a_pipeline(pipeline: Pipeline) -> None:
    requests = [request(seed=seed) for seed in range(4)]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(pipeline.generate, requests))
    for one, alone in zip(together, map(pipeline.generate, requests), strict=True):
        np.testing.assert_array_equal(one, alone)


def test_interleaved_generations_do_not_touch(pipeline: Pipeline) -> None:
    generations = [pipeline.prepare(request(seed=seed)) for seed in (1, 2)]
    for _ in range(4):
        for generation in generations:
            pipeline.step(generation)
    for seed, generation in zip((1, 2), generations, strict=True):
        frames = np.concatenate(list(pipeline.decode(generation)))
        np.testing.assert_array_equal(frames, pipeline.generate(request(seed=seed)))


def test_damaged_saves_are_refused(pipeline: Pipeline, tmp_path: Path) -> None:
    path = tmp_path / "half.safetensors"
    with pytest.raises(UserError, match="there is no saved generation"):
        Generation.load(path, pipeline)
    generation = pipeline.prepare(SMALL)
    generation.save(path)
    whole = path.read_bytes()

    path.write_bytes(whole[:-10])
    with pytest.raises(UserError, match="cannot resume"):
        Generation.load(path, pipeline)
    path.write_bytes(whole.replace(pipeline.bundle.key.encode(), b"0" * 64))
    with pytest.raises(UserError, match="saved with another bundle"):
        Generation.load(path, pipeline)
    path.write_bytes(whole)
    metadata = {"settings": json.dumps(vars(generation.settings)), "done": "1", "bundle": pipeline.bundle.key}
    save_file({"state": load_file(path)["state"][:, :5]}, path, metadata)
    with pytest.raises(UserError, match="does not fit its request"):
        Generation.load(path, pipeline)
    save_file({"state": np.stack(generation.state)}, path, metadata | {"done": "-1"})
    with pytest.raises(UserError, match="does not fit its request"):
        Generation.load(path, pipeline)
    wrong = json.dumps(vars(generation.settings) | {"width": "48"})
    save_file({"state": np.stack(generation.state)}, path, metadata | {"settings": wrong})
    with pytest.raises(UserError, match=r"settings\.width must be int"):
        Generation.load(path, pipeline)
    for target, problem in ((tmp_path / "absent" / "half.safetensors", "No such file"), (Path("."), "it is a folder")):
        with pytest.raises(UserError, match=f"cannot write .*{problem}"):
            generation.save(target)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 50}, "width 50 is not a positive multiple of 16; the nearest legal width is 48"),
        ({"height": 0}, "height 0 is not a positive multiple of 16; the nearest legal height is 16"),
        ({"frames": 10}, r"frames 10 is not 1 \+ 4\*k; the nearest legal count is 9"),
        ({"width": 1024, "height": 1024, "frames": 9}, "over the model's 4096; at 1024x1024 use at most 1 frames"),
        ({"width": 4096, "height": 2048, "frames": 1}, "over the model's 4096; use at most 1440x720"),
        ({"width": 48.0}, "width must be a whole number, is 48.0"),
        ({"steps": True}, "steps must be a whole number, is True"),
        ({"guidance": "3"}, "guidance must be a number, is '3'"),
        ({"prompt": None}, "prompt must be text, is None"),
        ({"negative_prompt": 5}, "negative_prompt must be text, is 5"),
        ({"seed": 2**64}, "seed must be from 0"),
        ({"steps": 0}, "steps must be"),
        ({"sampler": "ddim"}, "unknown sampler 'ddim'; choose one of euler, unipc"),
        ({"shift": 0.0}, "shift must be"),
        ({"guidance": -1.0}, "guidance must be from 0 to 100, is -1.0"),
        ({"guidance": float("nan")}, "guidance must be from 0 to 100, is nan"),
        ({"seed": -1}, "seed must be from 0"),
        ({"prompt": "red " * 40}, "the prompt has 41 tokens, the model reads 16; shorten it"),
        ({"prompt": "\udcff"}, "is not valid UTF-8"),
    ],
)
def test_bad_requests_are_refused(pipeline: Pipeline, changes: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        pipeline.prepare(request(**changes))


def test_numpy_numbers_are_numbers(pipeline: Pipeline) -> None:
    settings, _, _ = pipeline.check(request(width=np.int64(48), guidance=np.float32(2), shift=3))
    assert (settings.width, settings.guidance, settings.shift) == (48, 2.0, 3.0)
    assert type(settings.width) is int and type(settings.shift) is float


def test_a_bundle_for_other_targets_is_refused(pipeline: Pipeline) -> None:
    manifest = dataclasses.replace(pipeline.bundle.manifest, targets=("rtx",))
    with pytest.raises(UserError, match="runs on rtx, this version of tubelet runs cpu"):
        Pipeline.open(Bundle(pipeline.bundle.folder, manifest))


def test_the_step_loop_allocates_nothing_of_the_size_of_its_data(pipeline: Pipeline) -> None:
    generation = pipeline.prepare(request(width=96, height=96, frames=33, steps=6))
    pipeline.step(generation)
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    tracemalloc.reset_peak()
    for _ in range(4):
        pipeline.step(generation)
    peak = tracemalloc.get_traced_memory()[1] - before
    tracemalloc.stop()
    assert peak < 16 * 1024 < generation.state[0].nbytes


def test_chunked_decoding_equals_decoding_at_once(pipeline: Pipeline) -> None:
    """Bit for bit is not promised by ONNX Runtime's convolutions over other lengths; one level of 255 is."""
    latent = np.random.default_rng(0).standard_normal((8, 12, 6, 8), np.float32)
    results = []
    for chunk in (1, 4, 99):
        sizes = dataclasses.replace(pipeline.spec.vae, chunk=chunk)
        results.append(np.concatenate(list(vae.decode(sizes, pipeline.engines, latent))).astype(int))
    assert results[0].shape == (45, 48, 64, 3)
    for other in results[1:]:
        assert np.abs(other - results[0]).max() <= 1


def test_the_runtime_imports_no_torch() -> None:
    code = (
        "import sys, tubelet.runtime, tubelet.runtime.cli as cli, tubelet.runtime.doctor, tubelet.runtime.sheet\n"
        "p = tubelet.runtime.Pipeline.open(tubelet.runtime.EMBEDDED)\n"
        "r = tubelet.runtime.Request('a red circle', width=16, height=16, frames=1, steps=1)\n"
        "assert p.generate(r).shape == (1, 16, 16, 3)\n"
        "assert not any(m == 'torch' or m.startswith('tubelet.export') for m in sys.modules), 'torch was imported'\n"
    )
    # .ci/run names the interpreter of an environment that has no torch at all
    python = os.environ.get("TUBELET_TORCH_FREE_PYTHON", sys.executable)
    subprocess.run([python, "-c", code], check=True)
