"""What is measured of compiled engines: how exact they are, and how long each stage takes.

Flows in: a pipeline on a target of TensorRT, and one on the CPU. Flows out: numbers by name, as the report keeps them.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tubelet.runtime import Generation, Pipeline, Request, Studio
from tubelet.runtime.bundle import sizes
from tubelet.runtime.device_loop import DeviceLoop
from tubelet.runtime.dtypes import to_float
from tubelet.runtime.memory import DeviceArray
from tubelet.runtime.plan_engines import PlanEngines

PROMPT = "a red circle moves right on a white background"
SMALL = Request(PROMPT, width=64, height=64, frames=33, steps=20)
LARGE = Request(PROMPT, width=96, height=96, frames=33, steps=20)


def parity(pipeline: Pipeline, on_cpu: Pipeline) -> dict[str, float]:
    """By component, at the optimal sizes of its last profile: L2 of the difference over L2 of ONNX Runtime's outputs.

    Inputs are random; of all outputs the worst counts.
    """
    engines, rng = pipeline.engines, np.random.default_rng(0)
    assert isinstance(engines, PlanEngines)
    worst = {}
    for name, component in pipeline.bundle.manifest.components.items():
        optimal = {symbol: extent.opt for symbol, extent in engines.profiles(name)[-1].items()}
        inputs = {port: _random(port, sizes(shape, optimal), rng) for port, shape in component.inputs.items()}
        expected, found = on_cpu.engines[name](inputs), engines[name](inputs)
        worst[name] = max(_relative(_host(pipeline, found[port]), values) for port, values in expected.items())
    return worst


def latency(pipeline: Pipeline) -> dict[str, float]:
    """Seconds of each stage of a clip, when everything is warm."""
    generation = pipeline.prepare(LARGE)
    pipeline.finish(generation)
    frames = np.concatenate(list(pipeline.decode(generation)))
    return {
        "prepare": _median(lambda: pipeline.prepare(LARGE)),
        "step": _median(lambda: _again(generation)),
        "decode": _median(lambda: list(pipeline.decode(generation))),
        "encode": _median(lambda: pipeline.encode(frames)),
        "describe": _median(lambda: Studio(pipeline).describe(frames)),
    }


def graphs(pipeline: Pipeline) -> dict[str, Any]:
    """Seconds of a step that is one graph, and of one that is queued piece by piece; why there is no graph, if so."""
    generation = pipeline.prepare(SMALL)
    loop = generation.loop
    assert isinstance(loop, DeviceLoop)
    pipeline.step(generation)
    reason = loop.eager
    replayed = _median(lambda: _again(generation))
    workspace = loop._workspace
    workspace.unload()
    workspace.eager = "measured without"
    queued = _median(lambda: _again(generation))
    workspace.eager = None
    return {"graph": replayed, "no graph": queued, "why no graph": reason}


def switching(pipeline: Pipeline) -> dict[str, float]:
    """Seconds until a pair of requests of two profiles has its first steps, each request when the one before is gone.

    In turn the shapes alternate, in a row they do not; the difference is what it costs to switch twice.
    """

    def start(request: Request) -> None:
        pipeline.step(pipeline.prepare(request))

    in_a_row = sum(_median(lambda request=request: start(request)) for request in (SMALL, LARGE))  # type: ignore[misc]
    in_turn = _median(lambda: [start(request) for request in (SMALL, LARGE)])
    return {"in a row": in_a_row, "in turn": in_turn, "switch": in_turn - in_a_row}


def psnr(pipeline: Pipeline, on_cpu: Pipeline) -> float:
    """Of a whole clip against the CPU's, in dB."""
    difference = pipeline.generate(SMALL).astype(np.float64) - on_cpu.generate(SMALL)
    return float(10 * np.log10(255**2 / max(np.mean(difference**2), 1e-9)))


def _again(generation: Generation) -> None:
    """The step that the generation is at, without going on."""
    generation.loop.step(min(generation.done, generation.schedule.steps - 1))


def _median(work: Callable[[], object], repeats: int = 7) -> float:
    def seconds() -> float:
        start = time.perf_counter()
        work()
        return time.perf_counter() - start

    work()
    return statistics.median(seconds() for _ in range(repeats))


def _random(port: str, shape: tuple[int, ...], rng: np.random.Generator) -> NDArray[Any]:
    if port in ("ids", "mask", "position"):
        return np.ones(shape, np.int64)
    return rng.standard_normal(shape, np.float32)


def _host(pipeline: Pipeline, value: NDArray[Any] | DeviceArray) -> NDArray[Any]:
    assert isinstance(pipeline.engines, PlanEngines)
    return to_float(value.to_host(pipeline.engines.session.stream)) if isinstance(value, DeviceArray) else value


def _relative(found: NDArray[Any], expected: NDArray[Any]) -> float:
    return float(np.linalg.norm(found - expected) / max(float(np.linalg.norm(expected)), 1e-9))
