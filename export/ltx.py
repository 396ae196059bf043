"""LTX-Video as a checkpoint: a diffusers folder -> the spec, and where each of our parameters lies.

Flows in: a published folder. Flows out: a Checkpoint whose tensors stay in the folder's files. Sizes come from the
tensors and, where these are silent, from the configs; the normalisation of latents is in the VAE's file, the shift in
the scheduler's. What a request means where it is silent is that of diffusers' pipeline.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tubelet.runtime.spec import Defaults, LtxDenoiserSpec, LtxVaeSpec, ModelSpec, ShiftByTokens
from tubelet.runtime.strict import require

from .checkpoint import Checkpoint, parameters
from .ltx_names import TEXT_ENCODER, TRANSFORMER, vae_sources
from .names import Layout
from .placed import Placed, Source, assemble, placed, text_encoder_spec
from .published import Part, Release, read_fields, read_json, read_release
from .storage import read_values

LAYOUT = Layout.DIFFUSERS
FPS, TEXT_LENGTH = 25, 128
LARGEST = 33 * 22 * 40  # tokens of 1280x704 with 257 frames
EXTENT = (20.0, 2048.0, 2048.0)  # latent seconds, rows, columns: where places reach 1
CHUNK, TILE = 1, 1024  # encoded one latent frame at a time; pictures up to this side whole, as in the reference
NEGATIVE = "worst quality, inconsistent motion, blurry, jittery, distorted"  # of the reference's examples
SCHEDULER = "scheduler_config.json"

# What the reference models leave fixed, as the configs of 0.9.0 have it.
TRANSFORMER_FIXED = {
    "patch_size": 1,
    "patch_size_t": 1,
    "activation_fn": "gelu-approximate",
    "qk_norm": "rms_norm_across_heads",
    "norm_elementwise_affine": False,
    "norm_eps": 1e-6,
    "attention_bias": True,
    "attention_out_bias": True,
}
VAE_FIXED = {
    "in_channels": 3,
    "out_channels": 3,
    "patch_size_t": 1,
    "resnet_norm_eps": 1e-6,
    "scaling_factor": 1.0,
    "encoder_causal": True,
    "decoder_causal": False,
}
SCHEDULER_FIXED = {
    "num_train_timesteps": 1000,
    "use_dynamic_shifting": True,
    "shift_terminal": 0.1,
    "time_shift_type": "exponential",
    "invert_sigmas": False,
    "stochastic_sampling": False,
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
}


def open_ltx(folder: Path) -> Checkpoint:
    """Reads a published folder.

    Raises UserError when a file is missing or unreadable, a config asks for what the reference models do not have, or
    parameters are missing, unknown or of another shape: then it lists them.
    """
    release = read_release(folder)
    spec = model_spec(release)
    return assemble(release, spec, _parts(release, spec))


def _parts(release: Release, spec: ModelSpec) -> Iterator[Placed]:
    (transformer,) = release.transformers
    yield placed(spec, transformer, TRANSFORMER, LAYOUT, spec.denoiser.depth, "denoiser", "conditioner")
    yield placed(spec, release.text_encoder, TEXT_ENCODER, LAYOUT, spec.text_encoder.depth, "text_encoder")
    yield Placed(release.vae, vae_sources(name for name in parameters(spec) if name.startswith("vae.")))


def model_spec(release: Release) -> ModelSpec:
    return ModelSpec(
        name="ltx-video",
        fps=FPS,
        max_tokens=LARGEST,
        text_encoder=text_encoder_spec(release.text_encoder, TEXT_ENCODER, LAYOUT, TEXT_LENGTH, cleaned=False),
        image_encoder=None,
        denoiser=denoiser_spec(release.transformers[0]),
        boundary=None,
        vae=vae_spec(release.vae),
        captioner=None,
        defaults=Defaults(704, 512, 161, 50, 3.0, None, "stretched", shift(release.folder / "scheduler"), NEGATIVE),
    )


def denoiser_spec(part: Part) -> LtxDenoiserSpec:
    part.expect(**TRANSFORMER_FIXED)
    source = Source(part, TRANSFORMER, LAYOUT)
    width, channels = source.shape("denoiser.embed.weight")
    return LtxDenoiserSpec(
        latent_channels=channels,
        patch=(1, 1, 1),
        width=width,
        depth=source.depth("denoiser.blocks.{i}.self_attention.q.weight"),
        heads=read_fields(Heads, part.config, str(part.folder)).num_attention_heads,
        ffn_width=source.shape("denoiser.blocks.{i}.ffn.0.weight")[0],
        text_width=source.shape("conditioner.embed.0.weight")[1],
        time_features=source.shape("denoiser.time_embedding.0.weight")[1],
        theta=10000.0,
        coordinates=False,
        pooled_text=False,
        two_levels=True,
        mask_channels=0,
        image=None,
        channels_last=False,
        extent=EXTENT,
    )


def vae_spec(part: Part) -> LtxVaeSpec:
    """Raises UserError for the VAEs of later releases, whose decoders are other networks."""
    require(
        not part.config.get("timestep_conditioning", False),
        f"{part.folder} has a decoder that is conditioned on a noise level, as LTX-Video 0.9.1 and later; only the VAE "
        "of 0.9.0 is supported",
    )
    sizes = read_fields(VaeSizes, part.config, str(part.folder))
    levels = len(sizes.block_out_channels)
    scales = [True] * (levels - 1) + [False]
    part.expect(
        **VAE_FIXED,
        down_block_types=["LTXVideoDownBlock3D"] * levels,
        downsample_type=["conv"] * levels,
        spatio_temporal_scaling=scales,
        decoder_spatio_temporal_scaling=scales,
        decoder_inject_noise=[False] * (levels + 1),
        upsample_residual=[False] * levels,
        upsample_factor=[1] * levels,
    )
    mean, std = (_values(part, name) for name in ("latents_mean", "latents_std"))
    return LtxVaeSpec(
        latent_channels=len(mean),
        pixel_patch=sizes.patch_size,
        widths=sizes.block_out_channels,
        temporal=(True,) * (levels - 1),
        encoder_blocks=sizes.layers_per_block,
        decoder_blocks=sizes.decoder_layers_per_block,
        latent_mean=mean,
        latent_std=std,
        chunk=CHUNK,
        tile=TILE,
        decoder_widths=sizes.decoder_block_out_channels,
    )


def shift(folder: Path) -> ShiftByTokens:
    """What the scheduler's config says of the shift."""
    path = folder / SCHEDULER
    part = Part(path, {"use_dynamic_shifting": False, "shift_terminal": None} | read_json(path), {}, {})
    part.expect(**SCHEDULER_FIXED)
    line = read_fields(ShiftLine, part.config, str(path))
    return ShiftByTokens((line.base_image_seq_len, line.max_image_seq_len), (line.base_shift, line.max_shift))


@dataclass(frozen=True)
class Heads:
    """Of the transformer's config.json."""

    num_attention_heads: int


@dataclass(frozen=True)
class VaeSizes:
    """Of the VAE's config.json; the decoder's have defaults, which the first releases do not write."""

    block_out_channels: tuple[int, ...]
    layers_per_block: tuple[int, ...]
    patch_size: int
    decoder_block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    decoder_layers_per_block: tuple[int, ...] = (4, 3, 3, 3, 4)


@dataclass(frozen=True)
class ShiftLine:
    """Of scheduler_config.json."""

    base_shift: float
    max_shift: float
    base_image_seq_len: int
    max_image_seq_len: int


def _values(part: Part, name: str) -> tuple[float, ...]:
    """A vector's values; it is small."""
    part.shape(name, 1)
    stored = part.found[name]
    return tuple(read_values(part.files[stored.file], stored).double().flatten().tolist())
