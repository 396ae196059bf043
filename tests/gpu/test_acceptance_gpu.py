"""The acceptance of a GPU: its plans are built, loaded and compared, and what was measured is written to a report.

Proves, where there is a GPU and TensorRT or TensorRT-RTX: each component is near ONNX Runtime's, a whole clip is, a
step is a graph, every profile can be switched to. Writes gpu-report.json: parity of each component, seconds of each
stage, with and without a graph, and of switching profiles. Skipped elsewhere.

Run: pytest -m gpu tests/gpu
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import acceptance
import pytest

from tubelet.export.engines import build_engines
from tubelet.export.profiles import choose
from tubelet.export.traffic import Shape
from tubelet.runtime import EMBEDDED, Bundle, Pipeline
from tubelet.runtime.cuda import CudaDevice
from tubelet.runtime.errors import UserError
from tubelet.runtime.plans import ARCHITECTURES, Target
from tubelet.runtime.tensorrt import load_module

pytestmark = pytest.mark.gpu
REPORT = Path("gpu-report.json")
WORST = {"bf16": 0.05, "fp16": 0.02}  # relative error of a component
LEAST_PSNR = 25.0  # dB


@pytest.fixture(scope="module")
def target() -> Target:
    """For the GPU at hand, by the first of its compilers that is installed."""
    try:
        with CudaDevice() as device:
            architecture = device.architecture
    except UserError as error:
        pytest.skip(str(error))
    problems = []
    for compiler in ARCHITECTURES[architecture].compilers:
        try:
            load_module(compiler)
        except UserError as error:
            problems.append(str(error))
        else:
            return Target(compiler, (architecture,), "fp16" if architecture == "sm75" else "bf16")
    pytest.skip("; ".join(problems))


@pytest.fixture(scope="module")
def report(target: Target) -> Iterator[dict[str, Any]]:
    found: dict[str, Any] = {"target": target.name}
    yield found
    REPORT.write_text(json.dumps(found, indent=1) + "\n")
    print(f"\nwrote {REPORT.resolve()}")


@pytest.fixture(scope="module")
def pipeline(target: Target, report: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pipeline]:
    bundle = Bundle.open(shutil.copytree(EMBEDDED, tmp_path_factory.mktemp("acceptance") / "bundle"))
    shapes = [Shape(r.width, r.height, r.frames, 1.0) for r in (acceptance.SMALL, acceptance.LARGE)]
    start = time.perf_counter()
    build_engines(bundle, target, choose(bundle.spec, shapes, 2).profiles, workers=4)
    built = time.perf_counter()
    with Pipeline.open(bundle) as pipeline:
        opened = time.perf_counter()
        pipeline.warm_up()
        warm = time.perf_counter()
        report["runs on"] = str(pipeline.target)
        report["seconds"] = {"build": built - start, "open": opened - built, "warm up": warm - opened}
        yield pipeline


@pytest.fixture(scope="module")
def on_cpu() -> Pipeline:
    return Pipeline.open(EMBEDDED, "cpu")


def test_the_gpu_is_chosen(pipeline: Pipeline, target: Target) -> None:
    assert pipeline.target.target == target.compiler


def test_every_component_is_near(pipeline: Pipeline, on_cpu: Pipeline, target: Target, report: dict[str, Any]) -> None:
    report["parity"] = acceptance.parity(pipeline, on_cpu)

    assert max(report["parity"].values()) < WORST[target.precision], report["parity"]


def test_a_clip_is_near(pipeline: Pipeline, on_cpu: Pipeline, report: dict[str, Any]) -> None:
    report["psnr"] = acceptance.psnr(pipeline, on_cpu)

    assert report["psnr"] > LEAST_PSNR


def test_a_step_is_a_graph(pipeline: Pipeline, report: dict[str, Any]) -> None:
    report["graphs"] = acceptance.graphs(pipeline)

    assert report["graphs"]["why no graph"] is None


def test_stages_and_switches_are_measured(pipeline: Pipeline, report: dict[str, Any]) -> None:
    report["latency"] = acceptance.latency(pipeline)
    report["switching"] = acceptance.switching(pipeline)

    assert min(report["latency"].values()) > 0
