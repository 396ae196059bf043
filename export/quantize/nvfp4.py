"""NVFP4 as ONNX functions of operators that every runtime has: what a tensor core does, as a reference.

    RoundInputs    x [B,N,I], scale -> x as E2M1 in blocks of 16 holds it
    RestoreWeight  codes [O,I] (E2M1's bits in uint4), scales [O,I/16] (E4M3), scale -> float32 [O,I]

Flows in: nothing. Flows out: the functions. `export/explicit.py` puts TensorRT's own operators in their places. Source:
OCP microscaling formats 1.0 for E2M1; blocks and their two scales as in NVIDIA's description of NVFP4.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx import parser

from .formats import BLOCK, E2M1

DOMAIN = "tubelet"

ROUND_INPUTS = """
<domain: "tubelet", opset_import: ["" : 23]>
RoundInputs (x, scale) => (y) {{
  split = Constant <value_ints: ints = [0, 0, -1, {block}]> ()
  blocks = Reshape (x, split)
  last = Constant <value_ints: ints = [-1]> ()
  sizes = Abs (blocks)
  largest = ReduceMax (sizes, last)
  six = Constant <value_float: float = 6.0> ()
  wanted = Div (largest, six)
  stored = QuantizeLinear <output_dtype: int = 17> (wanted, scale)
  step = DequantizeLinear (stored, scale)
  zero = Constant <value_float: float = 0.0> ()
  one = Constant <value_float: float = 1.0> ()
  none = Equal (step, zero)
  divisor = Where (none, one, step)
  ratio = Div (blocks, divisor)
  minus_six = Constant <value_float: float = -6.0> ()
  clipped = Clip (ratio, minus_six, six)
  size = Abs (clipped)
  two = Constant <value_float: float = 2.0> ()
  four = Constant <value_float: float = 4.0> ()
  half = Constant <value_float: float = 0.5> ()
  below_four = Less (size, four)
  below_two = Less (size, two)
  coarse = Where (below_four, one, two)
  spacing = Where (below_two, half, coarse)
  count = Div (clipped, spacing)
  whole = Round (count)
  value = Mul (whole, spacing)
  restored = Mul (value, step)
  shape = Shape (x)
  y = Reshape (restored, shape)
}}
"""
RESTORE_WEIGHT = """
<domain: "tubelet", opset_import: ["" : 23]>
RestoreWeight (codes, scales, scale) => (y) {{
  table = Constant <value_floats: floats = [{values}]> ()
  index = Cast <to: int = 6> (codes)
  values = Gather (table, index)
  split = Constant <value_ints: ints = [0, -1, {block}]> ()
  blocks = Reshape (values, split)
  steps = DequantizeLinear (scales, scale)
  last = Constant <value_ints: ints = [-1]> ()
  step = Unsqueeze (steps, last)
  restored = Mul (blocks, step)
  shape = Shape (values)
  y = Reshape (restored, shape)
}}
"""


def functions() -> list[ir.Function]:
    """Both functions, fresh: a model owns what it is given."""
    values = np.arange(16, dtype=np.uint8).view(E2M1).astype(np.float32)
    table = ", ".join(f"{value:.1f}" for value in values)
    texts = (text.format(block=BLOCK, values=table) for text in (ROUND_INPUTS, RESTORE_WEIGHT))
    return [ir.serde.deserialize_function(parser.parse_function(text)) for text in texts]
