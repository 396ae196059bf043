"""How close does each CUDA kernel come to the GPU's copy bandwidth?

Sizes and steps are those of `kernels.py`. A kernel's bandwidth counts the bytes it must read and write, once. Launches
are replayed as one graph, so that Python's time is not counted; medians over rounds. The last line is one JSON object.

Run on a machine with a GPU: python benchmarks/kernels_cuda.py [--rounds 15]
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable

import ml_dtypes
import numpy as np
from kernels import CHANNELS, EULER, GRID, PATCH, UNIPC, N, P

from tubelet.runtime import kernels
from tubelet.runtime.cuda import CudaDevice
from tubelet.runtime.memory import DeviceArray, Graph, Stream

LAUNCHES = 20  # a graph
Case = tuple[int, Callable[[], object]]  # bytes moved, and what moves them


def copying(stream: Stream) -> Case:
    to, source = (DeviceArray.empty(stream.device, (N * P,), np.float32) for _ in range(2))
    return 2 * to.nbytes, lambda: to.copy_from(source, stream)


def tables(stream: Stream) -> Case:
    out = kernels.rope3d(GRID, 2 * P, stream=stream)
    return 2 * out[0].nbytes, lambda: kernels.rope3d(GRID, 2 * P, out=out, stream=stream)


def packing(stream: Stream, dtype: type, inverse: bool) -> Case:
    latent = DeviceArray.empty(stream.device, (CHANNELS, *np.multiply(GRID, PATCH)), dtype)
    tokens = kernels.pack(latent, PATCH, stream=stream)
    if inverse:
        return 2 * latent.nbytes, lambda: kernels.unpack(tokens, CHANNELS, GRID, PATCH, out=latent, stream=stream)
    return 2 * latent.nbytes, lambda: kernels.pack(latent, PATCH, out=tokens, stream=stream)


def stepping(stream: Stream, rows: np.ndarray, batch: int, dtype: type, extra: int = 0) -> Case:
    matrix = rows.astype(np.float32)
    state = [DeviceArray.from_host(np.zeros((N, P), np.float32), stream) for _ in rows]
    velocity = DeviceArray.from_host(np.zeros((batch, N, P), dtype), stream)
    tokens = DeviceArray.empty(stream.device, (batch, N, P + extra), dtype)
    written = [row for row, values in enumerate(matrix) if (values != np.eye(1, matrix.shape[1], row)).any()]
    used = int(matrix[written, :-1].any(axis=0).sum())
    return (used + len(written)) * state[0].nbytes + 2 * velocity.nbytes, lambda: kernels.guided_step(
        state, velocity, tokens, matrix, guidance=5.0, stream=stream
    )


def seconds(stream: Stream, graph: Graph) -> float:
    start = time.perf_counter()
    graph.launch(stream)
    stream.synchronize()
    return (time.perf_counter() - start) / LAUNCHES


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    with CudaDevice() as device, device.stream() as stream:
        cases = {
            "copy": copying(stream),
            "rope3d": tables(stream),
            "pack float32": packing(stream, np.float32, inverse=False),
            "pack float16": packing(stream, np.float16, inverse=False),
            "unpack float32": packing(stream, np.float32, inverse=True),
            "unpack float16": packing(stream, np.float16, inverse=True),
            "euler float32": stepping(stream, EULER, 1, np.float32),
            "euler float16": stepping(stream, EULER, 1, np.float16),
            "unipc guided float32": stepping(stream, UNIPC, 2, np.float32),
            "unipc guided bfloat16": stepping(stream, UNIPC, 2, ml_dtypes.bfloat16),
            "unipc guided float32, 17 more columns": stepping(stream, UNIPC, 2, np.float32, extra=17),
        }
        graphs = {}
        for name, (_, call) in cases.items():
            call()  # loads the kernel
            graphs[name] = stream.capture(lambda call=call: [call() for _ in range(LAUNCHES)])
        taken: dict[str, list[float]] = {name: [] for name in cases}
        for turn in range(rounds + 1):
            for name, graph in graphs.items():
                took = seconds(stream, graph)
                if turn:  # the first round warms up
                    taken[name].append(took)
        result: dict[str, object] = {"gpu": device.name, "architecture": device.architecture}
    rates = {name: moved / statistics.median(taken[name]) / 1e9 for name, (moved, _) in cases.items()}
    for name, rate in rates.items():
        result[name] = {"GB_per_s": round(rate, 1), "of_copy": round(rate / rates["copy"], 2)}
        print(f"{name:40s} {result[name]}", file=sys.stderr)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
