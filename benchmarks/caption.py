"""How often the embedded model's captioner names what a clip shows.

    python benchmarks/caption.py [--count 200]

True clips of scenes that were never trained, drawn with a fixed seed: of trained sizes and durations, of 64x112 and
112x64 with 41 frames, which were not, and single frames, whose motion does not show. Each goes through the VAE's
encoder and is named greedily and with four beams; a parser that knows the world's words, not its templates, reads the
attributes back. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from pathlib import Path

import numpy as np

from tubelet.export.demo.world import HELD_OUT, render
from tubelet.runtime import EMBEDDED, Captioner, Pipeline

# width, height, frames drawn, frames kept
TRAINED = (
    (64, 64, 33, 33),
    (48, 48, 17, 17),
    (64, 48, 33, 33),
    (48, 64, 33, 33),
    (80, 48, 17, 17),
    (64, 80, 33, 33),
    (96, 64, 17, 17),
    (96, 96, 33, 33),
)
SETS = {
    "trained": TRAINED,
    "unseen": ((64, 112, 41, 41), (112, 64, 41, 41)),
    "images": tuple((width, height, drawn, 1) for width, height, drawn, _ in TRAINED),
}
BEAMS = {"greedy": 1, "beam 4": 4}
SEED = 2027
WORDS = {
    "shape": {name: (name,) for name in ("circle", "square", "triangle")},
    "colour": {name: (name,) for name in ("red", "green", "blue", "yellow", "purple", "orange")},
    "background": {name: (name,) for name in ("white", "black", "gray", "cyan")},
    "motion": {
        "left": ("left",),
        "right": ("right",),
        "up": ("up", "top"),
        "down": ("down", "bottom"),
        "still": ("still", "rests", "not"),
        "grows": ("grows", "growing", "bigger", "larger"),
        "shrinks": ("shrinks", "shrinking", "smaller"),
    },
}


def parse(text: str) -> dict[str, str | None]:
    """The attributes that a caption names; None for one that it leaves out or names twice."""
    words = set(text.split())
    found = {
        attribute: [name for name, signs in names.items() if words & set(signs)] for attribute, names in WORDS.items()
    }
    return {attribute: names[0] if len(names) == 1 else None for attribute, names in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, default=EMBEDDED)
    parser.add_argument("--count", type=int, default=200)
    options = parser.parse_args()
    pipeline = Pipeline.open(options.bundle)
    captioner = Captioner(pipeline.spec, pipeline.engines, pipeline.tokenizer)
    result: dict[str, dict[str, float]] = {}
    print(f"{'':16}" + "".join(f"{name:>12}" for name in (*WORDS, "attributes", "all", "ms a clip")))
    for group, sizes in SETS.items():
        rng = np.random.default_rng(SEED)
        right: dict[str, list[list[bool]]] = {search: [] for search in BEAMS}
        seconds = dict.fromkeys(BEAMS, 0.0)
        for _, scene, (width, height, drawn, kept) in zip(
            range(options.count), itertools.cycle(HELD_OUT), itertools.cycle(sizes), strict=False
        ):
            latent = pipeline.encode(render(scene, width, height, drawn, rng)[:kept])
            truth = {**vars(scene), "motion": scene.motion if kept > 1 else None}
            for search, beams in BEAMS.items():
                start = time.perf_counter()
                text = captioner.caption(latent, beams)
                seconds[search] += time.perf_counter() - start
                read = parse(text)
                right[search].append([read[attribute] == truth[attribute] for attribute in WORDS])
        for search, rows in right.items():
            table = np.array(rows)
            shares = dict(zip(WORDS, table.mean(axis=0).tolist(), strict=True))
            shares |= {"attributes": float(table.mean()), "all": float(table.all(axis=1).mean())}
            shares["ms a clip"] = 1000 * seconds[search] / len(rows)
            result[f"{group}, {search}"] = shares
            values = "".join(f"{v:12.1f}" if name == "ms a clip" else f"{v:12.3f}" for name, v in shares.items())
            print(f"{group + ', ' + search:16}{values}", flush=True)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
