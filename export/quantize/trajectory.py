"""Whole denoising trajectories with any graph in the denoiser's place: what calibration and measuring run.

Flows in: a pipeline, an engine and a request. Flows out: the generation, finished; what linear layers read on the way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from tubelet.runtime import Pipeline, Request
from tubelet.runtime.engines import Arrays, Binding, Engine, OnnxRuntimeEngine
from tubelet.runtime.generation import Generation
from tubelet.runtime.loop import HostLoop

from .formats import Float32
from .linear import Site, sites

TOKENS = 512  # whose inputs of each site are kept, of both branches, drawn from all requests and steps
SAMPLED, LARGEST, READ = "sampled", "largest/", "read/"


def denoise(pipeline: Pipeline, engine: Engine, request: Request) -> Generation:
    """The request after all its steps, each taken by this engine."""
    generation = pipeline.prepare(request)
    generation.loop = HostLoop(engine, generation.loop.steps)
    pipeline.finish(generation)
    return generation


@dataclass(frozen=True)
class Seen:
    """What the layers of a site read."""

    largest: Float32  # [I]: greatest absolute value of each input
    rows: Float32  # [rows,I]: some of the inputs


def observe(pipeline: Pipeline, graph: Path, folder: Path, requests: Sequence[Request]) -> dict[str, Seen]:
    """Runs trajectories in a folder that has the graph's weights, and returns what every site read, by its name.

    Every step of every request counts, with and without the prompt where the request is guided.
    """
    watching = Watching(graph, folder, sum(pipeline.check(request)[0].steps for request in requests))
    for request in requests:
        denoise(pipeline, watching, request)
    return watching.seen()


def _watch(model: ir.Model, found: Sequence[Site]) -> list[str]:
    """Adds outputs: each site's greatest inputs, and its inputs of the tokens that the input SAMPLED names."""
    graph = model.graph
    sampled = ir.Value(name=SAMPLED, type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape(["rows"]))
    axes = ir.Value(name="watched/axes", const_value=ir.tensor(np.array([0, 1], np.int64), name="watched/axes"))
    graph.inputs.append(sampled)
    graph.register_initializer(axes)
    for site in found:
        size = ir.node("Abs", [site.source])
        largest = ir.node("ReduceMax", [size.outputs[0], axes], {"keepdims": 0})
        read = ir.node("Gather", [site.source, sampled], {"axis": 1})
        for node, name in ((largest, LARGEST + site.name), (read, READ + site.name)):
            node.outputs[0].name, node.outputs[0].type = name, ir.TensorType(ir.DataType.FLOAT)
            graph.outputs.append(node.outputs[0])
        graph.extend([size, largest, read])
    return [site.name for site in found]


class Watching:
    """A denoiser's engine that keeps what its sites read."""

    def __init__(self, graph: Path, folder: Path, evaluations: int):
        """Draws TOKENS evenly from so many evaluations; the folder has the graph's weights."""
        model = ir.load(graph)
        self._names = _watch(model, sites(model))
        ir.save(model, folder / "watched.onnx")
        self._engine, self._evaluations, self._done = OnnxRuntimeEngine(folder / "watched.onnx"), evaluations, 0
        self._random = np.random.default_rng(0)
        self._largest: dict[str, Float32] = {}
        self._read: dict[str, list[Float32]] = {}

    def bind(self, inputs: Arrays, outputs: Arrays) -> Binding:
        return _WatchedBinding(self, inputs, outputs)

    def __call__(self, inputs: Arrays) -> dict[str, Any]:
        before, after = (TOKENS * done // self._evaluations for done in (self._done, self._done + 1))
        self._done += 1
        sampled = self._random.integers(0, inputs["tokens"].shape[1], after - before)
        results = self._engine({**inputs, SAMPLED: sampled})
        for name in [name for name in results if name.startswith(LARGEST)]:
            site, values = name.removeprefix(LARGEST), results.pop(name)
            self._largest[site] = np.maximum(self._largest.get(site, values), values)
        for name in [name for name in results if name.startswith(READ)]:
            values = results.pop(name)
            self._read.setdefault(name.removeprefix(READ), []).append(values.reshape(-1, values.shape[-1]))
        return results

    def advance(self, inputs: Arrays) -> dict[str, Any]:
        return self(inputs)

    def seen(self) -> dict[str, Seen]:
        """What every site has read so far, by its name."""
        return {name: Seen(self._largest[name], np.concatenate(self._read[name])) for name in self._names}


@dataclass(frozen=True)
class _WatchedBinding:
    engine: Watching
    inputs: Arrays
    outputs: Arrays

    def run(self) -> None:
        np.copyto(self.outputs["velocity"], self.engine(self.inputs)["velocity"])
