"""Wan 2.1 and 2.2 as checkpoints: a published Release -> the spec, and where each of our parameters lies.

Flows in: a Release in either layout. Flows out: a Checkpoint whose tensors stay in the release's files. The same
weights give the same spec from both layouts: sizes come from the tensors and, where these are silent, from the
transformer's config, which both have; what a request means where it is silent comes from `FAMILIES`.
"""
# ruff: noqa: RUF001  negative prompts are Chinese

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from tubelet.runtime.errors import UserError
from tubelet.runtime.spec import (
    Defaults,
    DenoiserSpec,
    ImageAttentionSpec,
    ImageEncoderSpec,
    ModelSpec,
    WanVaeSpec,
)
from tubelet.runtime.strict import require

from . import wan_vae_names
from .checkpoint import Checkpoint, Made
from .names import Layout
from .placed import Placed, Source, assemble, placed, text_encoder_spec
from .published import Part, Release, read_release
from .wan_names import IMAGE_ENCODER, TEXT_ENCODER, TRANSFORMER

TEXT_LENGTH = 512  # tokens
CLIP_HEAD = 80  # values of a head of ViT-H
CLIP_PREFIX = "vision_model."  # of every name in files that older transformers wrote; newer ones have none
VAE_LAYOUTS = {Layout.DIFFUSERS: "diffusers", Layout.ORIGINAL: "release"}
NEGATIVE = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，"
    "丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，"
    "杂乱的背景，三条腿，背景人很多，倒着走"
)  # of the reference's configuration
SHAKING = "镜头晃动，" + NEGATIVE
CUTTING = "镜头切换，" + SHAKING


@dataclass(frozen=True)
class Family:
    """What tensors do not say, as the reference's configurations have it."""

    name: str
    fps: int
    max_tokens: int  # of the largest clip that the model was made for
    boundary: float | None
    defaults: Defaults


def _defaults(
    size: tuple[int, int],
    frames: int,
    steps: int,
    guidance: float,
    low: float | None,
    shift: float,
    negative: str = NEGATIVE,
) -> Defaults:
    return Defaults(*size, frames, steps, guidance, low, "unipc", shift, negative)


SD, HD = (832, 480), (1280, 720)
LARGEST = 21 * 45 * 80  # tokens of 1280x720 with 81 frames
FAMILIES: Mapping[tuple[str, int, int], Family] = {  # by route, denoisers, and pictures that the image encoder shows
    ("renoise", 1, 0): Family("wan2.1-t2v", 16, LARGEST, None, _defaults(SD, 81, 50, 5.0, None, 5.0)),
    ("channels", 1, 1): Family("wan2.1-i2v", 16, LARGEST, None, _defaults(SD, 81, 40, 5.0, None, 3.0, SHAKING)),
    ("channels", 1, 2): Family("wan2.1-flf2v", 16, LARGEST, None, _defaults(HD, 81, 50, 5.0, None, 16.0, CUTTING)),
    ("renoise", 2, 0): Family("wan2.2-t2v-a14b", 16, LARGEST, 0.875, _defaults(HD, 81, 40, 4.0, 3.0, 12.0)),
    ("channels", 2, 0): Family("wan2.2-i2v-a14b", 16, LARGEST, 0.9, _defaults(HD, 81, 40, 3.5, 3.5, 5.0)),
    ("levels", 1, 0): Family("wan2.2-ti2v", 24, 31 * 22 * 40, None, _defaults((1280, 704), 121, 50, 5.0, None, 5.0)),
}


def open_wan(folder: Path) -> Checkpoint:
    """Reads a published folder in either layout.

    Raises UserError when a file is missing or unreadable, the model is not one of FAMILIES, or parameters are missing,
    unknown or of another shape: then it lists them.
    """
    release = read_release(folder)
    if release.image_encoder is not None:
        release = replace(release, image_encoder=release.image_encoder.without(CLIP_PREFIX))
    spec = model_spec(release)
    return assemble(release, spec, _parts(release, spec), normalisation(spec))


def normalisation(spec: ModelSpec) -> dict[str, Made]:
    """The VAE's normalisation of latents, which is in the spec and in no file."""

    def made(values: tuple[float, ...]) -> Made:
        shape = (len(values), 1, 1, 1)
        return Made("F32", shape, lambda: torch.tensor(values).reshape(shape))

    return {"vae.latent_mean": made(spec.vae.latent_mean), "vae.latent_std": made(spec.vae.latent_std)}


def _parts(release: Release, spec: ModelSpec) -> Iterator[Placed]:
    """Each part of a release, and what of ours it holds."""
    layout = release.layout
    for expert, part in zip(spec.experts, release.transformers, strict=True):
        owners = ("denoiser", "conditioner", "image_conditioner")
        yield placed(spec, part, TRANSFORMER, layout, spec.denoiser.depth, *owners, expert=expert)
    yield placed(spec, release.text_encoder, TEXT_ENCODER, layout, spec.text_encoder.depth, "text_encoder")
    if spec.image_encoder is not None and release.image_encoder is not None:
        yield placed(spec, release.image_encoder, IMAGE_ENCODER, layout, spec.image_encoder.depth, "image_encoder")
    assert isinstance(spec.vae, WanVaeSpec)
    vae = wan_vae_names.published(spec.vae, VAE_LAYOUTS[layout])
    yield Placed(release.vae, {f"vae.{name}": theirs.name for name, theirs in vae.items()})


def model_spec(release: Release) -> ModelSpec:
    """Raises UserError for a model that is none of FAMILIES."""
    first, *others = [denoiser_spec(part, release) for part in release.transformers]
    require(all(other == first for other in others), f"the two transformers of {release.folder} differ in shape")
    text = text_encoder_spec(release.text_encoder, TEXT_ENCODER, release.layout, TEXT_LENGTH, cleaned=True)
    image = image_encoder_spec(release) if first.image is not None else None
    pictures = first.image.tokens // image.tokens if first.image is not None and image is not None else 0
    kind = (first.route, 1 + len(others), pictures)
    require(kind in FAMILIES, f"{release.folder} is no model that is known: route, denoisers, pictures are {kind}")
    family = FAMILIES[kind]
    boundary = family.boundary if release.boundary is None or not others else release.boundary
    return ModelSpec(
        name=family.name,
        fps=family.fps,
        max_tokens=family.max_tokens,
        text_encoder=text,
        image_encoder=image,
        denoiser=first,
        boundary=boundary,
        vae=vae_spec(release),
        captioner=None,
        defaults=family.defaults,
    )


def denoiser_spec(part: Part, release: Release) -> DenoiserSpec:
    part.expect(
        cross_attn_norm=True, qk_norm="rms_norm_across_heads" if release.layout == Layout.DIFFUSERS else True, eps=1e-6
    )
    source = Source(part, TRANSFORMER, release.layout)
    width, inputs, *patch = source.shape("denoiser.embed.weight", 5)
    outputs = source.shape("denoiser.project_out.weight")[0] // math.prod(patch)
    heads = part.config.get("num_attention_heads", part.config.get("num_heads"))
    require(type(heads) is int, f"{part.folder / 'config.json'} must say num_attention_heads or num_heads")
    require(
        inputs == outputs or inputs > 2 * outputs,
        f"{part.folder} has {inputs} input channels and {outputs} of output, which no known model has",
    )
    image = None
    if source.has("image_conditioner.embed.1.weight"):
        image_width = source.shape("image_conditioner.embed.1.weight")[0]
        positions = source.has("image_conditioner.positions")
        tokens = source.shape("image_conditioner.positions", 3)[1] if positions else _clip_tokens(release)
        image = ImageAttentionSpec(image_width, tokens, positions)
    return DenoiserSpec(
        latent_channels=outputs,
        patch=(patch[0], patch[1], patch[2]),
        width=width,
        depth=source.depth("denoiser.blocks.{i}.self_attention.q.weight"),
        heads=int(heads or 0),
        ffn_width=source.shape("denoiser.blocks.{i}.ffn.0.weight")[0],
        text_width=source.shape("conditioner.embed.0.weight")[1],
        time_features=source.shape("denoiser.time_embedding.0.weight")[1],
        theta=10000.0,
        coordinates=False,
        pooled_text=False,
        two_levels=release.per_token,
        mask_channels=inputs - 2 * outputs if inputs > outputs else 0,
        image=image,
        channels_last=True,
    )


def vae_spec(release: Release) -> WanVaeSpec:
    if release.layout == Layout.DIFFUSERS:
        return wan_vae_names.vae_spec(release.vae.config)
    shapes = {name: stored.shape for name, stored in release.vae.found.items()}
    return wan_vae_names.release_spec(shapes, str(release.vae.folder))


def image_encoder_spec(release: Release) -> ImageEncoderSpec:
    part = release.image_encoder
    if part is None:
        raise UserError(f"{release.folder} has no image encoder, which its denoiser needs; download the whole release")
    source = Source(part, IMAGE_ENCODER, release.layout)
    width, _, patch, _ = source.shape("image_encoder.patches.weight", 4)
    side = math.isqrt(_clip_tokens(release) - 1)
    part.expect(hidden_act="gelu", layer_norm_eps=1e-5, num_attention_heads=width // CLIP_HEAD)
    return ImageEncoderSpec(
        size=side * patch,
        patch=patch,
        width=width,
        depth=source.depth("image_encoder.layers.{i}.norm1.weight") - 1,  # the last one is not read
        heads=width // CLIP_HEAD,
        ffn_width=source.shape("image_encoder.layers.{i}.ffn.0.weight")[0],
    )


def _clip_tokens(release: Release) -> int:
    """Of one picture."""
    if release.image_encoder is None:
        raise UserError(f"{release.folder} has no image encoder, which its denoiser needs; download the whole release")
    source = Source(release.image_encoder, IMAGE_ENCODER, release.layout)
    return source.shape("image_encoder.positions", 2 if release.layout == Layout.DIFFUSERS else 3)[-2]
