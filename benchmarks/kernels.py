"""How close does each kernel come to this machine's copy bandwidth, and to NumPy and torch?

Every buffer of N*P values is 64 MiB in float32. A kernel's bandwidth counts the bytes it must read and write, once.
Copy is the fastest of np.copyto, np.copyto split over threads, and torch's copy_. Medians over interleaved rounds, so
that a busy machine slows all alike: trust the ratios. The last line is one JSON object.

Run: python benchmarks/kernels.py [--rounds 15]
On a machine whose cores are taken: OMP_NUM_THREADS=1 python benchmarks/kernels.py --clock cpu
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import ml_dtypes
import numpy as np
import torch

from tubelet.runtime import kernels, kernels_numpy
from tubelet.runtime.schedule import make_schedule

MIB = 1 << 20
GRID, PATCH, CHANNELS = (64, 64, 64), (1, 2, 2), 16
N, P = 64**3, 64
EULER, UNIPC = (make_schedule(sampler, 20, 3.0).matrices[10] for sampler in ("euler", "unipc"))  # a step in the middle

Call = Callable[[], object]
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def copies(source: np.ndarray) -> dict[str, Call]:
    target, threads = np.empty_like(source), os.cpu_count() or 1
    pool = ThreadPoolExecutor(threads)
    parts = list(zip(np.array_split(target, threads), np.array_split(source, threads), strict=True))
    to, at = torch.from_numpy(target), torch.from_numpy(source)
    return {
        "copy numpy": lambda: np.copyto(target, source),
        "copy threads": lambda: list(pool.map(lambda part: np.copyto(*part), parts)),
        "copy torch": lambda: to.copy_(at),
    }


def tables() -> tuple[int, dict[str, Call]]:
    grid = (64, 64, 64)
    out = kernels.rope3d(grid, 2 * P)
    return 2 * out[0].nbytes, {
        "tubelet": lambda: kernels.rope3d(grid, 2 * P, out=out),
        "numpy": lambda: kernels_numpy.rope3d(*out, grid, 2 * P, 1e4, (0, 0, 0), (1, 1, 1)),
    }


def packing(dtype: type, inverse: bool) -> tuple[int, dict[str, Call]]:
    latent = kernels.empty((CHANNELS, 64, 128, 128), dtype)
    latent[...] = np.random.default_rng(0).standard_normal(latent.shape, np.float32)
    tokens = kernels.pack(latent, PATCH)
    latent_t = torch.from_numpy(latent).view(CHANNELS, 64, 1, 64, 2, 64, 2)
    tokens_t = torch.from_numpy(tokens).view(64, 64, 64, CHANNELS, 1, 2, 2)
    bytes_moved = latent.nbytes + tokens.nbytes
    if inverse:
        return bytes_moved, {
            "tubelet": lambda: kernels.unpack(tokens, CHANNELS, GRID, PATCH, out=latent),
            "numpy": lambda: kernels_numpy.unpack(latent, tokens, PATCH),
            "torch": lambda: latent_t.copy_(tokens_t.permute(3, 0, 4, 1, 5, 2, 6)),
        }
    return bytes_moved, {
        "tubelet": lambda: kernels.pack(latent, PATCH, out=tokens),
        "numpy": lambda: kernels_numpy.pack(tokens, latent, PATCH),
        "torch": lambda: tokens_t.copy_(latent_t.permute(1, 3, 5, 0, 2, 4, 6)),
    }


def stepping(rows: np.ndarray, batch: int, dtype: type, extra: int = 0) -> tuple[int, dict[str, Call]]:
    rng, matrix = np.random.default_rng(0), rows.astype(np.float32)
    state = [rng.standard_normal((N, P), np.float32) for _ in rows]
    velocity = rng.standard_normal((batch, N, P), np.float32).astype(dtype)
    tokens = kernels.empty((batch, N, P + extra), dtype)
    tokens[...] = 0
    written = [row for row, values in enumerate(matrix) if (values != np.eye(1, matrix.shape[1], row)).any()]
    used = int(matrix[written, :-1].any(axis=0).sum())
    bits = np.uint16 if dtype is ml_dtypes.bfloat16 else dtype
    arguments = (matrix, 5.0, None, None, None, 1.0, 0.0)
    calls: dict[str, Call] = {
        "tubelet": lambda: kernels.guided_step(state, velocity, tokens, matrix, guidance=5.0),
        "numpy": lambda: kernels_numpy.guided_step(state, velocity.view(bits), tokens.view(bits), *arguments),
    }
    if dtype is not ml_dtypes.bfloat16:
        x, v, t = [torch.from_numpy(b) for b in state], torch.from_numpy(velocity), torch.from_numpy(tokens)

        def eager() -> None:
            guided = v[0].float() if batch == 1 else torch.lerp(v[1].float(), v[0].float(), 5.0)
            terms = [*x, guided]
            new = {row: sum(float(f) * term for f, term in zip(rows[row], terms, strict=True) if f) for row in written}
            for row, values in new.items():
                x[row].copy_(values)
            t[:, :, :P] = x[0]

        calls["torch"] = eager
    return (used + len(written)) * state[0].nbytes + 2 * velocity.nbytes, calls


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: one core's time, others' work left out")
    options = parser.parse_args()
    rounds, clock = options.rounds, CLOCKS[options.clock]
    cases = {
        "rope3d": tables(),
        "pack float32": packing(np.float32, inverse=False),
        "pack float16": packing(np.float16, inverse=False),
        "unpack float32": packing(np.float32, inverse=True),
        "unpack float16": packing(np.float16, inverse=True),
        "euler float32": stepping(EULER, 1, np.float32),
        "euler float16": stepping(EULER, 1, np.float16),
        "unipc guided float32": stepping(UNIPC, 2, np.float32),
        "unipc guided bfloat16": stepping(UNIPC, 2, ml_dtypes.bfloat16),
        "unipc guided float32, 16 more columns": stepping(UNIPC, 2, np.float32, extra=16),
    }
    copy = copies(np.ones(64 * MIB // 4, np.float32))
    calls = copy | {f"{case} | {name}": call for case, (_, each) in cases.items() for name, call in each.items()}
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + 1):
        for name, call in calls.items():
            if turn > 2 and name.endswith(("numpy", "torch")) and name not in copy:
                continue  # slow, and needed roughly
            start = clock()
            call()
            if turn:  # the first round warms up
                seconds[name].append(clock() - start)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    best = max(2 * 64 * MIB / median[name] for name in copy) / 1e9
    result: dict[str, object] = {
        "clock": options.clock,
        "copy_GB_per_s": round(best, 2),
        "implementation": kernels.IMPLEMENTATION,
    }
    for case, (moved, each) in cases.items():
        took = median[f"{case} | tubelet"]
        row = {"GB_per_s": round(moved / took / 1e9, 2), "of_copy": round(moved / took / 1e9 / best, 2)}
        row |= {
            f"faster_than_{name}": round(median[f"{case} | {name}"] / took, 1) for name in each if name != "tubelet"
        }
        result[case] = row
        print(f"{case:40s} {row}", file=sys.stderr)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
