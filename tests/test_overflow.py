"""What `export/overflow.py` promises: whole generations in 16 bits are watched, and what does not fit is seen.

pytest tests/test_overflow.py
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from tubelet.export.emulate import emulate
from tubelet.export.overflow import Range, _Ranged, _report_largest, examine
from tubelet.export.precision import lower
from tubelet.runtime import EMBEDDED, Bundle, Request
from tubelet.runtime.bundle import TO_GENERATE
from tubelet.runtime.engines import OnnxRuntimeEngine


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_the_embedded_model_fits_into_16_bits(precision: str) -> None:
    """Both branches, every step, and the frames."""
    ranges = examine(Bundle.open(EMBEDDED), precision, Request("a red circle grows", None, 32, 32, 9, 4))
    assert set(ranges) == set(TO_GENERATE)
    assert all(found.holds and found.largest > 1 for found in ranges.values()), ranges


@pytest.mark.parametrize(("value", "holds"), [(100.0, True), (300.0, False), (math.inf, False), (math.nan, False)])
def test_what_does_not_fit_is_seen(value: float, holds: bool, tmp_path: Path) -> None:
    """A product of x with itself, in float16."""
    x = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([1]))
    square = ir.node("Mul", [x, x])
    square.outputs[0].name, square.outputs[0].type = "y", ir.TensorType(ir.DataType.FLOAT)
    graph = ir.Graph([x], square.outputs, nodes=[square], opset_imports={"": 23}, name="square")
    model = emulate(lower(ir.Model(graph, ir_version=10), "fp16").model, "fp16")
    _report_largest(model, "fp16")
    ir.save(model, tmp_path / "graph.onnx")

    found = Range(65504.0)
    engine = _Ranged(OnnxRuntimeEngine(tmp_path / "graph.onnx", 1), found)
    for each in (value, 1.0):  # what was seen is not forgotten
        engine({"x": np.array([each], np.float32)})
    assert found.holds == holds
