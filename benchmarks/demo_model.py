"""How often the embedded model draws what the prompt says.

    python benchmarks/demo_model.py [--count 200] [--steps N] [--guidance G] [--sheet sheet.png]

Prompts are drawn with a fixed seed from all scenes, held-out ones included, and sampled with the default settings. The
scorer sees the frames alone. Two sets: sizes and durations that were trained, and 64x112 with 41 frames, which were
not. Also what the VAE alone keeps of true clips of held-out scenes, the fastest ones apart. The last line is one JSON
object.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from tubelet.export.demo.score import evaluation_set, score
from tubelet.export.demo.train_vae import held_out_clips, psnr
from tubelet.export.demo.world import HELD_OUT, Scene, render
from tubelet.runtime import EMBEDDED, Pipeline, Request, VideoWriter
from tubelet.runtime.sheet import contact_sheet

TRAINED = (
    (64, 64, 33),
    (48, 48, 17),
    (64, 48, 33),
    (48, 64, 33),
    (80, 48, 17),
    (64, 80, 33),
    (96, 64, 17),
    (96, 96, 33),
)
FAST = ((96, 64, 17), (96, 96, 33))  # objects move up to 3.6 pixels a frame
UNSEEN = ((64, 112, 41), (112, 64, 41))
SEED = 2026


def reconstructions(pipeline: Pipeline, clips: Iterable[tuple[Scene, np.ndarray]]) -> dict[str, float]:
    """Mean PSNR in dB, and the share that the scorer accepts, of true clips through both halves of the VAE."""
    values, accepted = [], []
    for scene, clip in clips:
        decoded = np.concatenate(list(pipeline.decode_latent(pipeline.encode(clip))))
        values.append(psnr(clip, decoded))
        accepted.append(score(decoded, scene)["all"])
    return {"psnr_db": float(np.mean(values)), "all": float(np.mean(accepted))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, default=EMBEDDED)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--guidance", type=float)
    parser.add_argument("--shift", type=float)
    parser.add_argument("--sheet", type=Path)
    options = parser.parse_args()
    pipeline = Pipeline.open(options.bundle)
    result: dict[str, object] = {"reconstruction": reconstructions(pipeline, held_out_clips(32))}
    print("reconstruction", result["reconstruction"], flush=True)
    for width, height, frames in FAST:
        rng = np.random.default_rng(SEED)
        fast = ((scene, render(scene, width, height, frames, rng)) for scene in HELD_OUT)
        name = f"reconstruction {width}x{height}x{frames}"
        result[name] = reconstructions(pipeline, fast)
        print(name, result[name], flush=True)
    rows = []
    for name, shapes in (("trained", TRAINED), ("unseen", UNSEEN)):
        scores = []
        for number, ((prompt, scene), (width, height, frames)) in enumerate(
            zip(evaluation_set(options.count, SEED), itertools.cycle(shapes), strict=False)
        ):
            request = Request(
                prompt,
                width=width,
                height=height,
                frames=frames,
                steps=options.steps,
                guidance=options.guidance,
                shift=options.shift,
                seed=number,
            )
            clip = pipeline.generate(request)
            scores.append(score(clip, scene))
            if number < 12 and name == "trained":
                rows.append((clip, f"{prompt} {'' if scores[-1]['all'] else 'WRONG'}"))
        result[name] = {key: float(np.mean([s[key] for s in scores])) for key in scores[0]}
        print(name, result[name], flush=True)
    if options.sheet:
        image = contact_sheet([clip for clip, _ in rows], [label for _, label in rows])
        with VideoWriter(options.sheet, image.shape[1], image.shape[0], 1) as writer:
            writer.write(image[None])
    print(json.dumps(result))


if __name__ == "__main__":
    main()
