"""TensorRT's runtime on a fake device: whole generations and tasks, memory, graphs, and what goes wrong.

Proves: with plans that ONNX Runtime runs in float32 the target rtx gives the frames of the target cpu, bit for bit,
saved and resumed too; a step is one graph for all steps and requests of the same shapes; scratch memory grows with
shapes and graphs are captured anew then; engines that do not fit together are loaded in turn; every fault has its
message; and nothing stays allocated. `fake_tensorrt.py` says what is not TensorRT's.

Run: pytest tests/test_tensorrt.py
"""

from __future__ import annotations

import ctypes
import dataclasses
import gc
import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_device import FakeDevice, FakeStream
from fake_tensorrt import RTX, RTX_FP16, FakeTensorRt, build_plans, spans
from gpu import acceptance
from numpy.typing import NDArray

from tubelet.runtime import (
    EMBEDDED,
    Bundle,
    Cancelled,
    Generation,
    Pipeline,
    Request,
    Studio,
    UserError,
    plans,
    targets,
    tensorrt,
)
from tubelet.runtime.bundle import FileRecord
from tubelet.runtime.bundle import record as file_record
from tubelet.runtime.canvas import Canvas
from tubelet.runtime.device_loop import IDLE, Workspaces
from tubelet.runtime.loop import Pinned
from tubelet.runtime.memory import DeviceError
from tubelet.runtime.plans import Target, plan_path
from tubelet.runtime.profiles import Range
from tubelet.runtime.session import Session

SMALL = Request("a red circle moves right on a white background", width=48, height=48, frames=9, steps=4)


def request(**changes: object) -> Request:
    return Request(**(vars(SMALL) | changes))  # type: ignore[arg-type]


@dataclasses.dataclass
class Machine:
    """A machine with a GPU, and a bundle without plans."""

    bundle: Bundle
    device: FakeDevice
    module: FakeTensorRt

    def open(self, target: str = "rtx") -> Pipeline:
        return Pipeline.open(self.bundle, target, threads=1)


@pytest.fixture
def machine(
    cuda_host: ctypes.CDLL, embedded_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Machine]:
    """Fails the test when memory is still allocated at its end."""
    device = FakeDevice(cuda_host, total=4 << 30, architecture="sm89")
    module = FakeTensorRt(device)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", module)
    monkeypatch.setattr(targets, "CudaDevice", lambda: device)
    monkeypatch.setattr(FakeDevice, "close", lambda self: None)  # what is left is looked at here
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    yield Machine(Bundle.open(embedded_copy), device, module)
    gc.collect()
    assert not device.buffers


@pytest.fixture
def on_gpu(machine: Machine) -> Iterator[Pipeline]:
    build_plans(machine.bundle, RTX)
    with machine.open() as pipeline:
        yield pipeline


@pytest.fixture(scope="module")
def on_cpu() -> Pipeline:
    """One thread, as the fake: with several, sums are in another order."""
    return Pipeline.open(EMBEDDED, "cpu", threads=1)


# ---- the same frames ----


@pytest.mark.parametrize("sampler", ["euler", "unipc"])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_frames_are_those_of_the_cpu(on_gpu: Pipeline, on_cpu: Pipeline, sampler: str, guidance: float) -> None:
    wanted = request(sampler=sampler, guidance=guidance)

    np.testing.assert_array_equal(on_gpu.generate(wanted), on_cpu.generate(wanted))


def test_every_task_is_that_of_the_cpu(on_gpu: Pipeline, on_cpu: Pipeline) -> None:
    """Canvases, encoding, windows, inversion and captions."""
    fast = request(width=32, height=32, steps=2, guidance=1.0)
    clip = on_cpu.generate(request(width=32, height=32, frames=13))
    mask = np.zeros(clip.shape[:3], np.bool_)
    mask[:, 8:24, 8:24] = True

    def tasks(pipeline: Pipeline) -> Iterator[NDArray[Any] | str]:
        studio = Studio(pipeline)
        yield np.concatenate(list(studio.extend(clip, fast, 9)))
        yield np.concatenate(list(studio.edit(clip, dataclasses.replace(fast, strength=0.5))))
        yield np.concatenate(list(studio.inpaint(clip, mask, fast)))
        yield studio.blend(clip, clip[::-1], fast, 0.5, True)
        yield studio.describe(clip, 3)

    for ours, theirs in zip(tasks(on_gpu), tasks(on_cpu), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_a_model_of_one_level_pins_with_noise(
    on_gpu: Pipeline, on_cpu: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Known tokens get their place on the way from noise: other numbers at every step, in the same graph."""
    tokens, values = on_cpu.prepare(SMALL).state.shape[1:]
    rng = np.random.default_rng(0)
    clean, noise = rng.standard_normal((2, tokens, values), np.float32)
    pinned = Pinned((np.arange(tokens) % 3 == 0).astype(np.float32), clean, noise)

    def states(pipeline: Pipeline) -> NDArray[Any]:
        loop = pipeline.engines.loop
        monkeypatch.setattr(pipeline.engines, "loop", lambda steps: loop(dataclasses.replace(steps, pinned=pinned)))
        generation = pipeline.prepare(SMALL)
        pipeline.finish(generation)
        return generation.state

    np.testing.assert_array_equal(states(on_gpu), states(on_cpu))


@pytest.mark.parametrize("stop", [0, 1, 4])
def test_a_saved_generation_goes_on_anywhere(on_gpu: Pipeline, on_cpu: Pipeline, tmp_path: Path, stop: int) -> None:
    whole, path = on_cpu.generate(SMALL), tmp_path / "half.safetensors"
    for first, second in ((on_gpu, on_cpu), (on_cpu, on_gpu)):
        generation = first.prepare(SMALL)
        for _ in range(stop):
            first.step(generation)
        generation.save(path)
        resumed = Generation.load(path, second)
        second.finish(resumed)

        np.testing.assert_array_equal(np.concatenate(list(second.decode(resumed))), whole)


def test_interleaved_generations_and_threads_do_not_touch(on_gpu: Pipeline, on_cpu: Pipeline) -> None:
    requests = [request(seed=1), request(seed=2), request(frames=5), request(width=96, height=96)]
    generations = [on_gpu.prepare(each) for each in requests]
    for _ in range(4):
        for generation in generations:
            on_gpu.step(generation)
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(on_gpu.generate, requests))
    for each, generation, other in zip(requests, generations, together, strict=True):
        wanted = on_cpu.generate(each)
        np.testing.assert_array_equal(np.concatenate(list(on_gpu.decode(generation))), wanted)
        np.testing.assert_array_equal(other, wanted)


def test_no_steps_leave_the_canvas(on_gpu: Pipeline, on_cpu: Pipeline) -> None:
    latents = np.random.default_rng(0).standard_normal((8, 3, 6, 6), np.float32)
    canvas = Canvas(latents, np.zeros((3, 3, 3), np.bool_))

    kept = on_gpu.latent(on_gpu.prepare(request(strength=0.0), canvas))

    np.testing.assert_array_equal(kept, latents)


@pytest.mark.parametrize(("precision", "least"), [("fp16", 40), ("bf16", 30)])
def test_narrow_plans_are_near(machine: Machine, on_cpu: Pipeline, precision: str, least: float) -> None:
    """PSNR in dB; the host's arrays are rounded on their way in and widened on their way out."""
    build_plans(machine.bundle, dataclasses.replace(RTX, precision=precision))
    with machine.open() as on_gpu:
        difference = on_gpu.generate(SMALL).astype(np.float64) - on_cpu.generate(SMALL)

    assert 10 * np.log10(255**2 / np.mean(difference**2)) > least


def test_the_acceptance_of_a_gpu_runs(on_gpu: Pipeline, on_cpu: Pipeline) -> None:
    """What `tests/gpu` measures, here in the time of the CPU."""
    assert max(acceptance.parity(on_gpu, on_cpu).values()) == 0
    assert acceptance.psnr(on_gpu, on_cpu) > 100
    assert acceptance.graphs(on_gpu)["why no graph"] is None
    assert min(acceptance.latency(on_gpu).values()) > 0
    assert set(acceptance.switching(on_gpu)) == {"in a row", "in turn", "switch"}


# ---- graphs and memory ----


def test_a_step_is_one_graph_for_all_steps_and_requests(machine: Machine, on_gpu: Pipeline) -> None:
    """Nothing is allocated from one request to the next of its shapes, beyond what each brings."""
    on_gpu.generate(SMALL)
    captures, allocations = machine.device.counts["capture"], machine.device.counts["allocation"]
    generation = on_gpu.prepare(request(seed=5))
    prepared = machine.device.counts["allocation"]
    on_gpu.finish(generation)

    assert captures == 1 == machine.device.counts["capture"]
    assert machine.device.counts["allocation"] == prepared
    assert prepared - allocations == len(("embeddings", "cross_k", "cross_v", "times", "state", "updates"))


def test_graphs_are_captured_anew_when_scratch_memory_moves(machine: Machine, on_gpu: Pipeline) -> None:
    small = on_gpu.prepare(SMALL)
    on_gpu.step(small)
    large = on_gpu.prepare(request(width=96, height=96))
    on_gpu.step(large)
    assert machine.device.counts["capture"] == 2
    on_gpu.step(small)
    assert machine.device.counts["capture"] == 3
    on_gpu.finish(small)
    assert machine.device.counts["capture"] == 3


def test_shapes_that_take_turns_keep_their_graphs(machine: Machine, on_gpu: Pipeline) -> None:
    """One request at a time, each when the one before is done; in the first round scratch memory grows."""
    shapes = [SMALL, request(guidance=1.0), request(frames=5), request(width=96, height=96)]
    for each in shapes * 2:
        on_gpu.generate(each)
    captures, allocations = machine.device.counts["capture"], machine.device.counts["allocation"]
    for each in shapes:
        on_gpu.step(on_gpu.prepare(each))

    assert machine.device.counts["capture"] == captures
    per_request = len(("embeddings", "cross_k", "cross_v", "times", "state", "updates"))
    uploads = 2 * len(shapes)  # ids and mask of a batch of another size
    assert machine.device.counts["allocation"] - allocations <= len(shapes) * per_request + uploads


def test_the_workspace_that_waits_longest_goes_when_memory_is_short(cuda_host: ctypes.CDLL) -> None:
    device = FakeDevice(cuda_host)
    dtypes = {"tokens": "fp16", "velocity": "fp16"}

    def shapes(tokens: int) -> dict[str, tuple[int, ...]]:
        return {"tokens": (1, tokens, 8), "velocity": (1, tokens, 8)}  # 32 bytes a token

    workspaces = Workspaces(Session(device), limit=32 * 400)
    first, second = (workspaces.take(dtypes, shapes(tokens)) for tokens in (100, 200))
    assert (first.nbytes, second.nbytes) == (3200, 6400)
    for each in (first, second):
        workspaces.give_back(each)
    places = first.velocity.pointer, second.velocity.pointer
    del first, second, each
    third = workspaces.take(dtypes, shapes(150))

    assert places[0] not in device.buffers and places[1] in device.buffers
    assert workspaces.take(dtypes, shapes(200)).velocity.pointer == places[1]
    assert third.velocity.pointer in device.buffers
    for tokens in range(1, 2 * IDLE):
        workspaces.give_back(workspaces.take(dtypes, shapes(tokens)))
    assert len(workspaces._idle) == IDLE


def test_without_a_graph_steps_are_queued_one_by_one(machine: Machine, on_gpu: Pipeline, on_cpu: Pipeline) -> None:
    machine.device.faults.capture = 0
    generation = on_gpu.prepare(SMALL)
    on_gpu.finish(generation)

    assert "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED" in generation.loop.eager
    assert machine.device.counts["capture"] == 1
    np.testing.assert_array_equal(np.concatenate(list(on_gpu.decode(generation))), on_cpu.generate(SMALL))


def test_garbage_is_collected_during_a_capture(
    machine: Machine, on_gpu: Pipeline, on_cpu: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A generation in a reference cycle frees its memory while a step is captured, whose graph has all its work."""
    garbage = on_gpu.prepare(request(frames=5))
    garbage.itself = garbage  # type: ignore[attr-defined]
    state, capture = garbage.loop._state.pointer, FakeStream.capture  # type: ignore[attr-defined]
    monkeypatch.setattr(FakeStream, "capture", lambda self, work: capture(self, lambda: (work(), gc.collect())))
    gc.disable()
    try:
        del garbage
        generation = on_gpu.prepare(SMALL)
        assert state in machine.device.buffers
        on_gpu.step(generation)
        assert state not in machine.device.buffers
    finally:
        gc.enable()
    on_gpu.finish(generation)

    np.testing.assert_array_equal(np.concatenate(list(on_gpu.decode(generation))), on_cpu.generate(SMALL))


def test_the_profile_nearest_to_the_clip_runs(machine: Machine, on_gpu: Pipeline) -> None:
    """27 tokens are the first profile's optimum, 108 are in the second; contexts assert the rest."""
    for width, height in ((48, 48), (96, 96)):
        on_gpu.generate(request(width=width, height=height))


def test_warming_up_runs_every_profile_and_keeps_the_kernels(machine: Machine, on_gpu: Pipeline) -> None:
    on_gpu.warm_up()

    (folder,) = (machine.bundle.folder / "engines").iterdir()
    kept = {path.name: path.read_text() for path in folder.glob("*.sm89.cache")}
    assert len(kept) == len(machine.bundle.manifest.components)
    assert kept["denoiser.sm89.cache"].count("denoiser-") == 2
    on_gpu.close()
    with machine.open() as again:
        again.generate(request(frames=5))
    assert (folder / "denoiser.sm89.cache").read_text().count("denoiser-") == 3


def test_kernels_of_a_read_only_bundle_are_kept_at_home(
    machine: Machine, on_gpu: Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace = os.replace

    def refuse(source: Path, target: Path) -> None:
        if machine.bundle.folder in Path(target).parents:
            raise PermissionError("read-only")
        replace(source, target)

    monkeypatch.setattr(os, "replace", refuse)
    on_gpu.warm_up()

    kept = list((tmp_path / "home" / ".cache" / "tubelet").iterdir())
    assert len(kept) == len(machine.bundle.manifest.components)
    assert not list((machine.bundle.folder / "engines").glob("*/.*.part"))


def test_a_generation_keeps_one_copy_of_its_keys_and_values(machine: Machine, on_gpu: Pipeline) -> None:
    """That of its workspace: what the conditioner made is free when the generation is prepared."""
    generation = on_gpu.prepare(SMALL)

    size = 4 * 6 * 2 * 4 * 16 * 48  # float32 [blocks,B,heads,L,D]
    assert list(machine.device.buffers.values()).count(size) == len(("cross_k", "cross_v"))
    on_gpu.finish(generation)


def test_warming_up_leaves_no_arrays(machine: Machine, on_gpu: Pipeline) -> None:
    """The memory plan counts the denoiser's buffers once, as a workspace."""
    before = set(machine.device.buffers)
    on_gpu.warm_up()

    assert len(set(machine.device.buffers) - before) == 1  # scratch memory


def test_engines_that_do_not_fit_are_loaded_in_turn(machine: Machine, on_cpu: Pipeline) -> None:
    """Weights are claimed: 2.5 GiB of text encoder and 2 of denoiser in 4; interleaving takes turns too."""
    build_plans(machine.bundle, RTX, weights={"text_encoder": 5 << 29, "denoiser": 2 << 30})
    with machine.open() as on_gpu:
        assert "fake GPU has 3.5 GiB to spare: will swap the text encoder out" in str(on_gpu.target)
        loaded = on_gpu.engines._loaded  # type: ignore[attr-defined]
        first = on_gpu.prepare(SMALL)
        on_gpu.step(first)
        assert "denoiser" in loaded and "text_encoder" not in loaded
        second = on_gpu.prepare(request(seed=3))
        assert set(loaded) == {"text_encoder", "conditioner", "denoiser"} - {"text_encoder", "conditioner"}
        for generation, seed in ((first, 0), (second, 3)):
            on_gpu.finish(generation)
            frames = np.concatenate(list(on_gpu.decode(generation)))
            np.testing.assert_array_equal(frames, on_cpu.generate(request(seed=seed)))


def test_plans_are_read_whole_once_and_again_when_they_change(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_plans(machine.bundle, RTX, weights={"text_encoder": 5 << 29, "denoiser": 2 << 30})
    verified: list[str] = []

    def verify_file(path: Path, expected: FileRecord) -> None:
        verified.append(path.stem)
        plans.verify_file(path, expected)

    monkeypatch.setattr(tensorrt, "verify_file", verify_file)
    with machine.open() as on_gpu:
        for _ in range(2):
            on_gpu.generate(SMALL)
        assert sorted(verified) == sorted(set(verified)) and "text_encoder" in verified
        (plan,) = (machine.bundle.folder / "engines").glob("*/text_encoder.plan")
        truncate(plan)
        with pytest.raises(UserError, match=r"text_encoder\.plan is damaged: it is not what its record says"):
            on_gpu.generate(SMALL)


# ---- what goes wrong ----


def test_a_cancelled_generation_frees_its_memory(machine: Machine, on_gpu: Pipeline) -> None:
    on_gpu.generate(SMALL)
    before = dict(machine.device.buffers)
    with pytest.raises(Cancelled):
        on_gpu.generate(SMALL, cancel=iter([False, True]).__next__)
    gc.collect()

    assert machine.device.buffers == before


@pytest.mark.parametrize("number", range(0, 40, 3))
def test_out_of_memory_says_so_and_leaves_nothing(machine: Machine, number: int) -> None:
    """An allocation fails while loading, preparing, stepping or decoding; after that a request is served."""
    build_plans(machine.bundle, RTX)
    machine.device.faults.allocation = number
    with pytest.raises(DeviceError, match=r"CUDA_ERROR_OUT_OF_MEMORY: free device memory, or make a smaller"):  # noqa: SIM117
        with machine.open() as on_gpu:
            on_gpu.generate(SMALL)
    with machine.open() as on_gpu:
        assert on_gpu.generate(SMALL).shape == (9, 48, 48, 3)


def test_a_shape_outside_of_the_plans_is_refused_at_once(machine: Machine) -> None:
    narrow = spans(machine.bundle)
    narrow["denoiser"] = [{**narrow["denoiser"][0], "B": Range(1, 1, 1)}]
    build_plans(machine.bundle, RTX, narrow)
    with machine.open() as on_gpu:
        with pytest.raises(
            UserError,
            match=r"96x96 with 33 frames is 324 tokens, which the plans were not built for; the nearest shape "
            r"that they take is 96x96 with 5 frames",
        ):
            on_gpu.check(request(width=96, height=96, frames=33))
        with pytest.raises(UserError, match="take no batch of 2 for 48x48 with 9 frames; leave guidance at 1"):
            on_gpu.check(SMALL)
        with pytest.raises(UserError, match="no profile of the vae_encoder_first's plan takes B 1, h 32, w 6"):
            on_gpu.encode(np.zeros((9, 256, 48, 3), np.uint8))


def test_an_engine_that_fails_says_what_was_logged(machine: Machine, on_gpu: Pipeline) -> None:
    machine.module.failing = "denoiser"
    with pytest.raises(DeviceError, match="running the denoiser failed with no reason given"):
        on_gpu.generate(SMALL)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def rewrite(path: Path, **changes: Any) -> None:
    """Changes a plan's record."""
    record = path.with_suffix(".json")
    record.write_text(json.dumps(json.loads(record.read_text()) | changes))


def corrupt(path: Path) -> None:
    """A plan that its record belongs to but that no runtime takes."""
    path.write_text("no plan")
    rewrite(path, file=dataclasses.asdict(file_record(path)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (truncate, r"denoiser\.plan is damaged: it is not what its record says; build the target again"),
        (corrupt, r"denoiser\.plan cannot be loaded: magic tag does not match; build the target again"),
        (Path.unlink, r"cannot read .*denoiser\.plan: No such file or directory; build the target again"),
        (lambda p: p.with_suffix(".json").unlink(), r"no rtx plan of denoiser for sm89 \(none was built\); build the"),
        (lambda p: rewrite(p, key="0" * 64), "rtx-sm89-fp32 was built from another graph, other weights or"),
        (lambda p: rewrite(p, budget=5), "its key differs"),
        (
            lambda p: rewrite(p, compiler={"name": "tensorrt_rtx", "version": "1.0"}),
            "rtx-sm89-fp32 was built by tensorrt_rtx 1.0, installed is tensorrt_rtx 11.0.0.1",
        ),
        (lambda p: rewrite(p, dtypes=1), r"denoiser\.json is not usable: plan\.dtypes must be an object, is 1; build"),
    ],
)  # fmt: skip
def test_a_plan_that_is_not_for_this_machine_is_refused(
    machine: Machine, change: Callable[[Path], Any], message: str
) -> None:
    build_plans(machine.bundle, RTX)
    (plan,) = (machine.bundle.folder / "engines").glob("*/denoiser.plan")
    change(plan)

    with pytest.raises(UserError, match=message):
        machine.open()
    on_cpu = machine.open("auto")
    assert on_cpu.target.target == "cpu"
    assert re.search(message, str(on_cpu.target))


def test_a_runtime_that_cannot_be_made_is_named_and_passed_over(machine: Machine) -> None:
    build_plans(machine.bundle, RTX)
    machine.module.broken = True
    message = "tensorrt_rtx cannot run here: CUDA initialization failure with error: 35; does the NVIDIA driver"
    with pytest.raises(UserError, match=message):
        machine.open()
    on_cpu = machine.open("auto")

    assert on_cpu.target.target == "cpu" and message in str(on_cpu.target)


def test_a_module_without_its_libraries_is_named_and_passed_over(
    machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    build_plans(machine.bundle, RTX)
    (tmp_path / "tensorrt_rtx.py").write_text("import ctypes; ctypes.CDLL('libtensorrt_rtx.so.0')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "tensorrt_rtx")
    message = r"tensorrt_rtx cannot load its libraries \(libtensorrt_rtx\.so\.0: .*\); install it again"
    with pytest.raises(UserError, match=message):
        machine.open()
    on_cpu = machine.open("auto")

    assert on_cpu.target.target == "cpu" and re.search(message, str(on_cpu.target))


def test_an_unreadable_record_hides_no_other_plan(machine: Machine) -> None:
    build_plans(machine.bundle, RTX)
    build_plans(machine.bundle, RTX_FP16)
    plan_path(machine.bundle, RTX_FP16, "denoiser").with_suffix(".json").write_text("{")

    assert machine.open().target.target == "rtx"


def test_a_plan_of_tensorrt_is_for_one_gpu(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    build_plans(machine.bundle, Target("tensorrt", ("sm89",), "fp32", "other GPU"))
    monkeypatch.setitem(sys.modules, "tensorrt", FakeTensorRt(machine.device, "tensorrt"))
    with pytest.raises(UserError, match=r"tensorrt-sm89-other_GPU-fp32 was built on other GPU, this is fake GPU"):
        machine.open("tensorrt")


def test_another_gpu_and_no_driver_are_named(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    build_plans(machine.bundle, RTX)
    machine.device.architecture = "sm120"
    with pytest.raises(UserError, match=r"no rtx plan of text_encoder, .* for sm120 \(rtx-sm89-fp32 is for sm89\)"):
        machine.open()
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", machine.module)
    with pytest.raises(UserError, match=r"NVIDIA driver|cuda"):
        machine.open()


def test_real_plans_meet_the_real_runtime(
    compiled: Bundle, cuda_host: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As far as it goes without a GPU: TensorRT-RTX takes the file and says that it finds no driver."""
    pytest.importorskip("tensorrt_rtx")
    device = FakeDevice(cuda_host, total=4 << 30, architecture="sm120")
    monkeypatch.setattr(targets, "CudaDevice", lambda: device)

    with pytest.raises(UserError, match=r"text_encoder\.plan cannot be loaded: .*(CUDA|Cuda)"):
        Pipeline.open(compiled, "rtx")

    assert not device.buffers


# ---- which target ----


def test_auto_takes_the_first_that_works_and_says_why_not_others(machine: Machine, monkeypatch: Any) -> None:
    told = str(machine.open("auto").target)
    assert told.startswith("cpu, onnxruntime ") and "not rtx: the bundle has no plans of rtx; make them with" in told
    assert "not cuda: onnxruntime " in told and "has no CUDAExecutionProvider; install onnxruntime-gpu" in told
    build_plans(machine.bundle, RTX)
    build_plans(machine.bundle, Target("tensorrt", ("sm89",), "fp32", "fake GPU"))
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with machine.open("auto") as pipeline:
        assert pipeline.target.target == "rtx"
        assert pipeline.target.detail.startswith("tensorrt_rtx 11.0.0.1 on fake GPU (sm89): needs ")
        assert [name for name, _ in pipeline.target.passed_over] == ["tensorrt"]
    monkeypatch.setitem(sys.modules, "tensorrt", FakeTensorRt(machine.device, "tensorrt"))
    with machine.open("auto") as pipeline:
        assert pipeline.target.target == "tensorrt"
        assert pipeline.generate(SMALL).shape == (9, 48, 48, 3)
    with pytest.raises(UserError, match="target 'gpu' is not one of auto, tensorrt, rtx, cuda, cpu"):
        machine.open("gpu")


def test_the_command_line_says_what_runs(machine: Machine, tubelet: Any) -> None:
    build_plans(machine.bundle, RTX)
    options = ("generate", SMALL.prompt, "-o", "a.png", "--frames", "1", "--steps", "2", "--bundle")

    made = tubelet(*options, str(machine.bundle.folder), "--target", "rtx")
    assert made.code == 0 and made.err.startswith("target: rtx, tensorrt_rtx 11.0.0.1 on fake GPU (sm89): needs ")
    machine.device.faults.allocation = machine.device.counts["allocation"]
    failed = tubelet(*options, str(machine.bundle.folder), "--target", "rtx")
    assert failed.code == 1 and "error: cuMemAlloc failed with CUDA_ERROR_OUT_OF_MEMORY" in failed.err
