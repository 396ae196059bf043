"""What ONNX Runtime makes of 8 bits on this CPU: queries, keys and values of one block, from inputs that they share.

    python benchmarks/int8_products.py [--width 1536] [--tokens 1280] [--runs 7]

Each way of rounding, with and without the options that `runtime/engines.py` sets, in one interleaved run on one thread.
Seconds are the process's CPU time: median and least. Errors are relative L2 against float32; one input in 97 is eight
times as large as the others. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import time

import numpy as np
import onnx
import onnxruntime as ort

from tubelet.runtime.engines import EXACT

LAYERS = "qkv"
STATIC = """
    stored = QuantizeLinear(x, scale, zero)
    restored = DequantizeLinear(stored, scale, zero)"""
PER_TOKEN = """
    size = Abs(x)
    largest = ReduceMax<keepdims = 1>(size, last)
    step = Mul(largest, unit)
    ratio = Div(x, step)
    stored = QuantizeLinear(ratio, one, zero)"""
DEQUANTIZED = """
    wide_{0} = DequantizeLinear<axis = 0>(w_{0}, scale_{0}, zero_{0})
    turned_{0} = Transpose<perm = [1, 0]>(wide_{0})
    {0} = MatMul({1}, turned_{0})"""
INTEGER = """
    sums_{0} = MatMulInteger(stored, w_{0}, zero, zero)
    wide_{0} = Cast<to = 1>(sums_{0})
    scales_{0} = Mul(step, scale_{0})
    {0} = Mul(wide_{0}, scales_{0})"""
FLOAT = "\n    {0} = MatMul(x, w_{0})"
WAYS = {
    "fp32": ("", FLOAT),
    "w8": ("", DEQUANTIZED),
    "int8, one scale": (STATIC, DEQUANTIZED),
    "int8, a scale a token": (PER_TOKEN, INTEGER),
}


def session(way: str, options: dict[str, str], width: int, weights: dict[str, np.ndarray], scale: float) -> object:
    """A graph of one way with its weights [O,I] in their form."""
    inputs, product = WAYS[way]
    source = "restored" if inputs == STATIC else "x"
    body = inputs + "".join(product.format(name, source) for name in LAYERS)
    outputs = ", ".join(f"float[B,N,{width}] {name}" for name in LAYERS)
    text = f'<ir_version: 11, opset_import: ["" : 23]> products (float[B,N,{width}] x) => ({outputs}) {{{body}\n}}'
    constants = {
        "scale": np.float32(scale),
        "zero": np.uint8(128),
        "one": np.float32(1),
        "unit": np.float32(1 / 127),
        "last": np.array([-1]),
    }
    for name, weight in weights.items():
        scales = (np.abs(weight).max(axis=1) / 127).astype(np.float32)
        values = np.rint(weight / scales[:, None]).astype(np.int8)
        constants |= {f"scale_{name}": scales, f"zero_{name}": np.zeros(width, np.int8), f"w_{name}": values}
        if product == FLOAT:
            constants[f"w_{name}"] = np.ascontiguousarray(weight.T)
        if product == INTEGER:
            constants[f"w_{name}"] = np.ascontiguousarray((values.astype(np.int16) + 128).astype(np.uint8).T)
    model = onnx.parser.parse_model(text)
    used = {name for node in model.graph.node for name in node.input}
    model.graph.initializer.extend(onnx.numpy_helper.from_array(v, n) for n, v in constants.items() if n in used)
    settings = ort.SessionOptions()
    settings.intra_op_num_threads, settings.log_severity_level = 1, 3
    for name, value in options.items():
        settings.add_session_config_entry(name, value)
    return ort.InferenceSession(model.SerializeToString(), settings, providers=["CPUExecutionProvider"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=1536)
    parser.add_argument("--tokens", type=int, default=1280)
    parser.add_argument("--runs", type=int, default=7)
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    x = rng.standard_normal((1, options.tokens, options.width)).astype(np.float32)
    x[..., ::97] *= 8
    weights = {n: (0.02 * rng.standard_normal((options.width,) * 2)).astype(np.float32) for n in LAYERS}
    expected, scale = x @ weights["q"].T, float(np.abs(x).max() / 127)
    sessions = {
        f"{way}{', without options' if not chosen else ''}": session(way, chosen, options.width, weights, scale)
        for way in WAYS
        for chosen in (EXACT, {})
    }
    seconds: dict[str, list[float]] = {name: [] for name in sessions}
    errors = {}
    for _ in range(options.runs):
        for name, each in sessions.items():
            start = time.process_time()
            found = each.run(None, {"x": x})[0]
            seconds[name].append(time.process_time() - start)
            errors[name] = float(np.linalg.norm(found - expected) / np.linalg.norm(expected))
    rows = {
        name: {"median_s": float(np.median(taken)), "least_s": min(taken), "error": errors[name]}
        for name, taken in seconds.items()
    }
    for name, row in rows.items():
        print(f"{name:40} {row['median_s']:.3f} s, least {row['least_s']:.3f} s, error {row['error']:.1e}")
    print(json.dumps({**vars(options), "onnxruntime": ort.__version__, "rows": rows}))


if __name__ == "__main__":
    main()
