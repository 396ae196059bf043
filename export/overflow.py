"""Whether 16 bits hold every value of a whole generation, from prompt to frames, found on any CPU.

Flows in: a bundle that is not quantized, bf16 or fp16, and a request. Flows out: for each component the greatest value
that a plan would have to keep in the narrow type, and the most that the type holds. Every graph runs as `emulate.py`
makes it.
"""

from __future__ import annotations

import math
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir

from tubelet.runtime import Bundle, Pipeline, Request
from tubelet.runtime.engines import CPU, Arrays, Binding, Engine, OnnxRuntimeEngine
from tubelet.runtime.targets import Choice, HostEngines

from .emulate import emulate
from .precision import FLOAT, TYPES, lower

LARGEST = "largest"


@dataclass
class Range:
    """What one component computed."""

    limit: float  # of the narrow type
    largest: float = 0.0  # absolute value, NaN where one was not a number

    @property
    def holds(self) -> bool:
        return self.largest <= self.limit  # which NaN is not


def examine(bundle: Bundle, precision: str, request: Request) -> dict[str, Range]:
    """Runs the request in a narrow precision; the ranges of all components that it needs."""
    limit = float(ml_dtypes.finfo(TYPES[precision].numpy()).max)
    ranges: dict[str, Range] = {}
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)
        for name in bundle.manifest.weights:
            shutil.copyfile(bundle.path(name), folder / name)

        def load(name: str) -> Engine:
            model = emulate(lower(ir.load(bundle.graph(name)), precision).model, precision)
            _report_largest(model, precision)
            ir.save(model, folder / f"{name}.onnx")
            ranges[name] = Range(limit)
            return _Ranged(OnnxRuntimeEngine(folder / f"{name}.onnx"), ranges[name])

        choice = Choice("cpu", f"{CPU}, emulating {precision}", ())
        with Pipeline(bundle, HostEngines(load), choice) as pipeline:
            pipeline.generate(request)
    return ranges


def _report_largest(model: ir.Model, precision: str) -> None:
    """Adds an output: the greatest of all values that the graph rounds."""
    graph, narrow = model.graph, TYPES[precision]
    found = []
    for node in list(graph):
        if node.op_type == "Cast" and node.attributes["to"].as_int() == narrow:
            size = ir.node("Abs", node.inputs)
            found.append(ir.node("ReduceMax", size.outputs, {"keepdims": 0}))
            graph.extend([size, found[-1]])
    largest = ir.node("Max", [node.outputs[0] for node in found])
    largest.outputs[0].name, largest.outputs[0].type = LARGEST, ir.TensorType(FLOAT)
    graph.append(largest)
    graph.outputs.append(largest.outputs[0])


@dataclass(frozen=True)
class _Ranged:
    """An engine that keeps its graph's range."""

    engine: Engine
    range: Range

    def bind(self, inputs: Arrays, outputs: Arrays) -> Binding:
        return _RangedBinding(self, inputs, outputs)

    def __call__(self, inputs: Arrays) -> dict[str, Any]:
        results = self.engine(inputs)
        largest = float(results.pop(LARGEST))
        if not all(np.isfinite(values).all() for values in results.values()):
            largest = math.nan
        self.range.largest = float(np.maximum(self.range.largest, largest))  # NaN stays
        return results

    def advance(self, inputs: Arrays) -> dict[str, Any]:
        return self(inputs)


@dataclass(frozen=True)
class _RangedBinding:
    engine: _Ranged
    inputs: Arrays
    outputs: Arrays

    def run(self) -> None:
        for name, values in self.engine(self.inputs).items():
            np.copyto(self.outputs[name], values)
