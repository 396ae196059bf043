"""Memory that the published models take: weights and activations, by model, precision and shape.

    python benchmarks/model_memory.py

Computed, not measured: parameters are those of our modules at the published sizes, activations are what
`export/estimate.py` expects of a plan with guidance, a batch of two. Prints the table of docs/models.md; the last line
is one JSON object.
"""

from __future__ import annotations

import json
import math

import torch

from tubelet.export.components import build_modules, components
from tubelet.export.estimate import footprint, weight_bytes
from tubelet.export.wan import CLIP_HEAD, FAMILIES
from tubelet.export.wan_vae_names import MULTIPLIERS, RELEASES
from tubelet.runtime import bundle
from tubelet.runtime.geometry import plan
from tubelet.runtime.profiles import Range
from tubelet.runtime.spec import (
    DenoiserSpec,
    ImageAttentionSpec,
    ImageEncoderSpec,
    ModelSpec,
    TextEncoderSpec,
    WanVaeSpec,
)

GIB = 2**30
TEXT = TextEncoderSpec(256384, 4096, 24, 64, 64, 10240, 32, 128, 512, cleaned=True)
CLIP = ImageEncoderSpec(224, 14, 1280, 31, 1280 // CLIP_HEAD, 5120)
SIZES = {"1.3B": (1536, 12, 8960, 30), "5B": (3072, 24, 14336, 30), "14B": (5120, 40, 13824, 40)}
MODELS = {  # size, route, denoisers, pictures
    "Wan2.1 T2V 1.3B": ("1.3B", "renoise", 1, 0),
    "Wan2.1 T2V 14B": ("14B", "renoise", 1, 0),
    "Wan2.1 I2V 14B": ("14B", "channels", 1, 1),
    "Wan2.1 FLF2V 14B": ("14B", "channels", 1, 2),
    "Wan2.2 T2V A14B": ("14B", "renoise", 2, 0),
    "Wan2.2 I2V A14B": ("14B", "channels", 2, 0),
    "Wan2.2 TI2V 5B": ("5B", "levels", 1, 0),
}
PRECISIONS = ("bf16", "fp8")
SHAPES = ((832, 480, 81), (1280, 704, 81))


def vae(channels: int) -> WanVaeSpec:
    release, base = RELEASES[channels], 96 if channels == 16 else 160
    widths = tuple(base * each for each in MULTIPLIERS)
    decoder = widths if channels == 16 else tuple(256 * each for each in MULTIPLIERS)
    return WanVaeSpec(
        channels, release.pixel_patch, widths, (False, True, True), 2, 3, release.mean, release.std, 1, 1024, decoder,
        release.shortcuts,
    )  # fmt: skip


def spec_of(size: str, route: str, denoisers: int, pictures: int) -> ModelSpec:
    width, heads, ffn, depth = SIZES[size]
    family, channels = FAMILIES[route, denoisers, pictures], 48 if route == "levels" else 16
    image = ImageAttentionSpec(CLIP.width, pictures * CLIP.tokens, pictures > 1) if pictures else None
    denoiser = DenoiserSpec(
        channels, (1, 2, 2), width, depth, heads, ffn, TEXT.width, 256, 10000.0, coordinates=False, pooled_text=False,
        two_levels=route == "levels", mask_channels=4 if route == "channels" else 0, image=image, channels_last=True,
    )  # fmt: skip
    return ModelSpec(
        family.name, family.fps, 10**9, TEXT, CLIP if pictures else None, denoiser, family.boundary, vae(channels),
        None, family.defaults,
    )  # fmt: skip


def main() -> None:
    rows = []
    for name, (size, route, denoisers, pictures) in MODELS.items():
        spec = spec_of(size, route, denoisers, pictures)
        with torch.device("meta"):
            parts = components(spec, build_modules(spec))
        described = {
            part.name: bundle.Component(
                "", "", "", sum(math.prod(t.shape) for t in part.module.parameters()),
                {port: each.shape for port, each in part.inputs.items()},
                {port: each.shape for port, each in part.outputs.items()},
            )
            for part in parts
        }  # fmt: skip
        row: dict[str, object] = {"model": name, "parameters": described["denoiser"].parameters}
        row["text_gib"] = weight_bytes(described["text_encoder"], "bf16") / GIB
        row["conditioning_gib"] = (
            sum(
                weight_bytes(each, "bf16")
                for part, each in described.items()
                if "conditioner" in part or "image" in part
            )
            / GIB
        )
        for precision in PRECISIONS:
            row[f"denoiser_{precision}_gib"] = weight_bytes(described["denoiser"], precision) / GIB
        for width, height, frames in SHAPES:
            tokens = plan(spec, width, height, frames).tokens
            profile = {n: Range(value, value, value) for n, value in (("B", 2), ("N", tokens), ("L", 512))}
            takes = footprint(spec, "denoiser", described["denoiser"], [profile], "bf16")
            needed = takes.buffers + takes.scratch
            row[f"tokens_{width}x{height}"], row[f"activations_{width}x{height}_gib"] = tokens, needed / GIB
        rows.append(row)
    columns = list(rows[0])
    print("| " + " | ".join(columns) + " |\n|" + "---|" * len(columns))
    for row in rows:
        print(
            "| "
            + " | ".join(
                f"{v:.1f}" if isinstance(v, float) else f"{v:,}" if isinstance(v, int) else str(v) for v in row.values()
            )
            + " |"
        )
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
