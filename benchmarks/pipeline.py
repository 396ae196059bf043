"""Where the time of one request goes, and what starting costs.

    python benchmarks/pipeline.py [--repeats 7]

Measures the embedded model's default request: seconds a stage, the share that is spent outside engines and the video
encoder, the import of `tubelet.runtime`, a cold `tubelet generate` in a process of its own, and peak memory of decoding
33 and 1025 frames. Medians. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from tubelet.runtime import EMBEDDED, Pipeline, Request, VideoWriter
from tubelet.runtime.targets import HostEngines

PROMPT = "a red circle moves right on a white background"


class TimedEngine:
    """An engine that adds up the seconds spent in it."""

    def __init__(self, engine: Any, total: list[float]):
        self.engine, self.total = engine, total

    def __call__(self, inputs: Any) -> Any:
        start = time.perf_counter()
        result = self.engine(inputs)
        self.total[0] += time.perf_counter() - start
        return result

    def bind(self, inputs: Any, outputs: Any) -> TimedEngine:
        return TimedEngine(self.engine.bind(inputs, outputs), self.total)

    def run(self) -> None:
        start = time.perf_counter()
        self.engine.run()
        self.total[0] += time.perf_counter() - start


def one_request(pipeline: Pipeline, inside: list[float], path: Path) -> dict[str, float]:
    """Seconds of each stage of the default request, and the share outside engines and video encoding."""
    inside[0] = 0.0
    times = [time.perf_counter()]
    generation = pipeline.prepare(Request(PROMPT))
    times.append(time.perf_counter())
    while not generation.finished:
        pipeline.step(generation)
    times.append(time.perf_counter())
    chunks = list(pipeline.decode(generation))
    times.append(time.perf_counter())
    size = generation.geometry
    with VideoWriter(path, size.width, size.height, pipeline.spec.fps) as writer:
        for chunk in chunks:
            writer.write(chunk)
    times.append(time.perf_counter())
    prepare, denoise, decode, write = np.diff(times)
    total = times[-1] - times[0]
    outside = total - inside[0] - write
    return {
        "prepare_s": prepare,
        "denoise_s": denoise,
        "decode_s": decode,
        "write_s": write,
        "total_s": total,
        "outside_share": outside / total,
    }


def child(code: str) -> dict[str, float]:
    """Runs code in a fresh interpreter; it prints one JSON object."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    result: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


IMPORT = "import time; s = time.perf_counter(); import tubelet.runtime; print(time.perf_counter() - s)"
DECODE = """
import json, time
import numpy as np
from tubelet.runtime import EMBEDDED, Pipeline
from tubelet.runtime.resident import peak_resident_bytes
pipeline = Pipeline.open(EMBEDDED)
latent = np.random.default_rng(0).standard_normal((pipeline.spec.vae.latent_channels, {latents}, 8, 8), np.float32)
start = time.perf_counter()
frames = sum(len(chunk) for chunk in pipeline.decode_latent(latent))
seconds = time.perf_counter() - start
peak = peak_resident_bytes() / 2**20
print(json.dumps({{"frames": frames, "s": seconds, "peak_mib": peak}}))
"""


def cold_generate(path: Path) -> dict[str, float]:
    """Seconds and peak memory of the README's command in a process of its own."""
    start = time.perf_counter()
    code = (
        "import atexit, sys; from tubelet.runtime.cli import main; "
        "from tubelet.runtime.resident import peak_resident_bytes; "
        "atexit.register(lambda: print(peak_resident_bytes())); "
        f"sys.argv = ['tubelet', 'generate', {PROMPT!r}, '-o', {str(path)!r}]; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    seconds = time.perf_counter() - start
    return {"s": seconds, "peak_mib": int(done.stdout.splitlines()[-1]) / 2**20}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=7)
    repeats = parser.parse_args().repeats
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clip.mp4"
        cold = [cold_generate(path) for _ in range(3)]
        imports = [child(IMPORT) for _ in range(repeats)]
        decodes = {frames: child(DECODE.format(latents=1 + (frames - 1) // 4)) for frames in (33, 1025)}
        pipeline = Pipeline.open(EMBEDDED)
        inside = [0.0]
        engines = pipeline.engines
        pipeline.engines = HostEngines(lambda name: TimedEngine(engines[name], inside))
        one_request(pipeline, inside, path)  # warm-up
        runs = [one_request(pipeline, inside, path) for _ in range(repeats)]
    result: dict[str, Any] = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
    result["import_s"] = statistics.median(map(float, imports))
    result["cold_generate_s"] = statistics.median(run["s"] for run in cold)
    result["cold_generate_peak_mib"] = cold[-1]["peak_mib"]
    result |= {
        f"decode_{frames}_frames_{name}": run[name] for frames, run in decodes.items() for name in ("s", "peak_mib")
    }
    for name, value in result.items():
        print(f"{name:32} {value:10.4f}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
