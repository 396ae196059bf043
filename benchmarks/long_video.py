"""A minute of video: does it finish, does memory stay flat, does the object ever jump?

    python benchmarks/long_video.py [--seconds 60]

64x64, one prompt throughout, then a storyboard whose prompt changes every two seconds. Peak memory is the process's,
after a tenth of the frames and at the end. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tubelet.export.demo.score import track
from tubelet.runtime import EMBEDDED, Pipeline, Request, Scene, Studio, VideoWriter
from tubelet.runtime.resident import peak_resident_bytes
from tubelet.runtime.video import read_frames

PROMPT = "a red circle moves right on a white background"
TURNS = ("moves right", "moves down", "moves left", "moves up")


def run(studio: Studio, frames: int, scenes: Sequence[Scene]) -> dict[str, float]:
    start, early, done = time.time(), 0.0, 0
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "long.mp4"
        with VideoWriter(path, 64, 64, 24) as writer:
            for chunk in studio.generate(Request(PROMPT, width=64, height=64, frames=frames), scenes=scenes):
                writer.write(chunk)
                done += len(chunk)
                if not early and done >= frames / 10:
                    early = peak_resident_bytes() / 2**20
        seconds, late = time.time() - start, peak_resident_bytes() / 2**20
        clip, _ = read_frames(path)
    jumps = np.linalg.norm(np.diff(track(clip), axis=0), axis=1)
    return {
        "frames": len(clip),
        "seconds": seconds,
        "peak_mib_after_a_tenth": early,
        "peak_mib": late,
        "frames_without_object": int(np.isnan(jumps).sum()),
        "largest_jump_px": float(np.nanmax(jumps)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, default=EMBEDDED)
    parser.add_argument("--seconds", type=float, default=60)
    options = parser.parse_args()
    studio = Studio(Pipeline.open(options.bundle))
    frames = 1 + round(options.seconds * 24)
    board = [
        Scene(start, PROMPT.replace("moves right", TURNS[i % len(TURNS)]))
        for i, start in enumerate(range(0, frames, 48))
    ]
    result = {}
    for name, scenes in (("one prompt", []), ("storyboard", board)):
        result[name] = run(studio, frames, scenes)
        print(name, {key: round(value, 2) for key, value in result[name].items()}, flush=True)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
