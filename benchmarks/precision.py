"""What lower precision costs the embedded model: how often its clips show what their prompts say.

    python benchmarks/precision.py BUNDLE... [--count 100] [--threads N] [--ranges]

The same prompts, sizes and noise for every bundle and for the embedded one; the scorer sees the frames alone. Prints
what each bundle's record says beside it. With --ranges also the greatest values of a whole generation in 16 bits,
beside what those hold. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import time
from pathlib import Path

import numpy as np
from demo_model import SEED, TRAINED

from tubelet.export.demo.score import evaluation_set, score
from tubelet.export.overflow import examine
from tubelet.runtime import EMBEDDED, Bundle, Pipeline, Request
from tubelet.runtime.precision import read_precision


def scores(bundle: Bundle, count: int, threads: int | None) -> dict[str, float]:
    """The share of clips that show each attribute, and all of them."""
    pipeline, found = Pipeline.open(bundle, "cpu", threads), []
    for number, ((prompt, scene), (width, height, frames)) in enumerate(
        zip(evaluation_set(count, SEED), itertools.cycle(TRAINED), strict=False)
    ):
        found.append(score(pipeline.generate(Request(prompt, None, width, height, frames, seed=number)), scene))
    return {key: float(np.mean([each[key] for each in found])) for key in found[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundles", nargs="*", type=Path)
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--ranges", action="store_true")
    options = parser.parse_args()
    ranges = {}
    for precision in ("bf16", "fp16") if options.ranges else ():
        prompt, _ = evaluation_set(1, SEED)[0]
        found = examine(Bundle.open(EMBEDDED), precision, Request(prompt))
        ranges[precision] = {name: {**vars(each), "holds": each.holds} for name, each in found.items()}
        print(precision, ranges[precision], flush=True)
    rows = []
    for folder in (EMBEDDED, *options.bundles) if options.count else ():
        bundle = Bundle.open(folder)
        known, start = read_precision(bundle), time.monotonic()
        row = {
            "precision": known.precision if known else "fp32",
            "score": scores(bundle, options.count, options.threads),
        }
        if known:
            row |= dataclasses.asdict(known.damage) | {"weights_bytes": known.weights_bytes}
        rows.append({**row, "seconds": time.monotonic() - start})
        print(rows[-1], flush=True)
    print(json.dumps({"count": options.count, "rows": rows, "ranges": ranges}))


if __name__ == "__main__":
    main()
