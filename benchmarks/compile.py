"""How long, how much memory and how large: a video model of real size becomes a TensorRT-RTX plan.

    python benchmarks/compile.py [--size 1.3B | 5B] [--folder DIR] [--jobs 1]

A denoiser and a conditioner of Wan's sizes with random weights, bfloat16, for three architectures, in three profiles up
to 1280x720 with 81 frames: 75,600 tokens. No GPU is needed. Peaks are resident memory of the process that did it. A
folder that is named keeps what was made, and a second run goes on with it. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import resource
import shutil
import struct
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from tubelet.export.build import write_graphs
from tubelet.export.checkpoint import SPEC, Checkpoint
from tubelet.export.components import build_modules
from tubelet.export.engines import build_engines
from tubelet.export.hashes import Hashes
from tubelet.export.profiles import choose
from tubelet.export.traffic import Shape
from tubelet.runtime import EMBEDDED, Bundle
from tubelet.runtime.bundle import MANIFEST, SCHEMA, TOKENIZER, WEIGHTS, Manifest, content_key, record, write_manifest
from tubelet.runtime.plans import PlanRecord, Target
from tubelet.runtime.resident import peak_resident_bytes
from tubelet.runtime.spec import Defaults, DenoiserSpec, ModelSpec, TextEncoderSpec, VaeSpec

SIZES = {
    "1.3B": {"width": 1536, "heads": 12, "ffn_width": 8960},
    "5B": {"width": 3072, "heads": 24, "ffn_width": 14336},
}
TARGET = Target("rtx", ("sm86", "sm89", "sm120"), "bf16")
TRAFFIC = tuple(Shape(*shape, 1 / 3) for shape in ((832, 480, 81), (1280, 720, 49), (1280, 720, 81)))
BUILT = ("conditioner", "denoiser")
GIB = 2**30


def spec_of(size: str) -> ModelSpec:
    """Denoiser and text of real size; a small text encoder and a small VAE, which are not built."""
    return ModelSpec(
        name=f"random-{size}",
        fps=16,
        max_tokens=75_600,
        text_encoder=TextEncoderSpec(
            vocabulary=64,
            width=4096,
            depth=1,
            heads=4,
            head_size=64,
            ffn_width=256,
            buckets=32,
            max_distance=128,
            length=512,
            cleaned=False,
        ),
        image_encoder=None,
        denoiser=DenoiserSpec(
            latent_channels=16,
            patch=(1, 2, 2),
            depth=30,
            text_width=4096,
            time_features=256,
            theta=10000.0,
            coordinates=False,
            pooled_text=False,
            two_levels=False,
            mask_channels=0,
            image=None,
            channels_last=True,
            **SIZES[size],
        ),
        boundary=None,
        vae=VaeSpec(
            latent_channels=16,
            pixel_patch=2,
            widths=(32, 32, 32),
            temporal=(True, True),
            encoder_blocks=1,
            decoder_blocks=1,
            latent_mean=(0.0,) * 16,
            latent_std=(1.0,) * 16,
            chunk=4,
            tile=1024,
        ),
        captioner=None,
        defaults=Defaults(832, 480, 81, 50, 5.0, guidance_low=None, sampler="unipc", shift=5.0, negative_prompt=""),
    )


def write_checkpoint(spec: ModelSpec, folder: Path) -> None:
    """A checkpoint of bfloat16 weights, normal over the square root of their fan-in, one tensor in memory at a time."""
    with torch.device("meta"):
        modules = build_modules(spec)
    shapes = {f"{m}.{name}": t.shape for m, module in modules.items() for name, t in module.state_dict().items()}
    header, end = {}, 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * shape.numel()
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    torch.manual_seed(0)
    with (folder / WEIGHTS).open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, shape in shapes.items():
            values = torch.randn(shape) / math.sqrt(shape[1:].numel())
            if name in ("vae.latent_mean", "vae.latent_std"):  # which the spec holds too
                values = torch.full(shape, float(name == "vae.latent_std"))
            file.write(values.bfloat16().view(torch.uint16).numpy().tobytes())
    shutil.copyfile(EMBEDDED / TOKENIZER, folder / TOKENIZER)
    (folder / SPEC).write_text(json.dumps(dataclasses.asdict(spec)))


def write_bundle(folder: Path) -> None:
    """Makes a checkpoint's folder a bundle too: its weights are not copied, and nothing is run."""
    checkpoint = Checkpoint.open(folder)
    with Hashes() as hashes:
        components = write_graphs(checkpoint, folder, hashes)
    names = sorted({WEIGHTS, TOKENIZER, *(component.graph for component in components.values())})
    files = {name: record(folder / name) for name in names}
    key = content_key(checkpoint.spec, components, files[TOKENIZER])
    write_manifest(folder, Manifest(SCHEMA, key, {}, ("cpu",), checkpoint.spec, components, (WEIGHTS,), files, ()))


def cpu_seconds() -> float:
    """Of this process and of those that it started and that have ended."""
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(each.ru_utime + each.ru_stime for each in used)


class Stages:
    """Seconds by stage, of the clock and of all cores, and this process's peak memory after each."""

    def __init__(self) -> None:
        self.found: dict[str, dict[str, float]] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start, cpu = time.monotonic(), cpu_seconds()
        yield
        self.found[name] = {
            "seconds": round(time.monotonic() - start, 1),
            "cpu_seconds": round(cpu_seconds() - cpu, 1),
            "peak_gib": round(peak_resident_bytes() / GIB, 2),
        }
        print(name, self.found[name], flush=True)


def told(record: PlanRecord) -> dict[str, object]:
    measured = record.measured
    return {
        "seconds": measured.seconds,
        "peak_gib": round(measured.peak_bytes / GIB, 2),
        "plan_bytes": record.file.bytes,
        "weights_bytes": measured.weights_bytes,
        "activation_gib": [round(n / GIB, 2) for n in measured.activation_bytes],
        "fused_attentions": measured.fused_attentions,
        "kernels": measured.kernels,
    }


def run(size: str, folder: Path, jobs: int) -> dict[str, object]:
    stages = Stages()
    if not (folder / MANIFEST).exists():
        with stages("checkpoint"):
            write_checkpoint(spec_of(size), folder)
        with stages("export"):
            write_bundle(folder)
    bundle = Bundle.open(folder)
    profiles = choose(bundle.spec, TRAFFIC, 3).profiles
    with stages("build"):
        records = build_engines(bundle, TARGET, {name: profiles[name] for name in BUILT}, jobs)
    built = {record.component: told(record) for record in records}
    for name, row in built.items():
        print(name, row)
    weights = (folder / WEIGHTS).stat().st_size
    return {"size": size, "target": TARGET.name, "weights_bytes": weights, "stages": stages.found, "plans": built}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="1.3B")
    parser.add_argument("--folder", type=Path, help="where to make and keep the bundle; a temporary one if not given")
    parser.add_argument("--jobs", type=int, default=1)
    options = parser.parse_args()
    if options.folder is not None:
        options.folder.mkdir(parents=True, exist_ok=True)
        print(json.dumps(run(options.size, options.folder, options.jobs)))
        return
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(run(options.size, Path(folder), options.jobs)))


if __name__ == "__main__":
    main()
