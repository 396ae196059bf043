"""Where published files hold the parameters of Wan's VAEs, and what they say of its sizes.

    diffusers   `vae/`: config.json, and safetensors named as AutoencoderKLWan's parameters
    release     Wan2.1_VAE.pth or Wan2.2_VAE.pth; without a config, sizes come from shapes

Flows in: a config, or the shapes of a file's tensors. Flows out: a WanVaeSpec, and for every parameter of `vae.Vae` the
name and the shape that the file has. Shapes differ from the module's by an axis of length 1, so bytes stay as they are.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from tubelet.runtime.spec import WanVaeSpec
from tubelet.runtime.strict import read, require

from .vae import Vae

Shape = tuple[int, ...]

CHUNK, TILE = 1, 1024  # one latent frame at a time; pictures of 832x480 whole, as in the reference


@dataclass(frozen=True)
class Published:
    """A parameter as a file has it."""

    name: str
    shape: Shape


def published(spec: WanVaeSpec, layout: str) -> dict[str, Published]:
    """By the name of every parameter of `vae.Vae`, what a file of this layout has; the normalisation is in the spec."""
    rows = LAYOUTS[layout]
    levels = rows.levels[spec.shortcuts]
    with torch.device("meta"):
        parameters = dict(Vae(spec).named_parameters())
    blocks = {"encoder": spec.encoder_blocks, "decoder": spec.decoder_blocks}
    return {
        name: Published(_rename(name, blocks, levels, rows.parts), _shape(name, parameter.shape))
        for name, parameter in parameters.items()
    }


def _rename(name: str, blocks: Mapping[str, int], levels: Mapping[str, str], parts: Mapping[str, str]) -> str:
    found = re.fullmatch(r"(encoder|decoder)\.levels\.(\d+)\.(?:blocks\.(\d+)|resample)(\..+)", name)
    if found:
        half, level, block, rest = found.groups()
        index = blocks[half] if block is None else int(block)
        pattern = levels[f"{half} {'resample' if block is None else 'block'}"]
        name = pattern.format(level=level, index=index, flat=int(level) * (blocks[half] + 1) + index) + rest
    for part, theirs in parts.items():
        name = name.replace(part, theirs)
    return name


def _shape(name: str, shape: Iterable[int]) -> Shape:
    """The layers that work picture by picture have no axis of time, which is the last but two."""
    shape = tuple(shape)
    pictures = ".attention." in name or ".spatial." in name
    return shape[:-3] + shape[-2:] if pictures and len(shape) > 3 else shape


@dataclass(frozen=True)
class Layout:
    """The names of one layout."""

    # of what stands in a level, without and with shortcuts; {flat} counts blocks and resamplings through all levels
    levels: Mapping[bool, Mapping[str, str]]
    parts: Mapping[str, str]  # replaced in this order


LAYOUTS = {
    "diffusers": Layout(
        levels={
            False: {
                "encoder block": "encoder.down_blocks.{flat}",
                "encoder resample": "encoder.down_blocks.{flat}",
                "decoder block": "decoder.up_blocks.{level}.resnets.{index}",
                "decoder resample": "decoder.up_blocks.{level}.upsamplers.0",
            },
            True: {
                "encoder block": "encoder.down_blocks.{level}.resnets.{index}",
                "encoder resample": "encoder.down_blocks.{level}.downsampler",
                "decoder block": "decoder.up_blocks.{level}.resnets.{index}",
                "decoder resample": "decoder.up_blocks.{level}.upsampler",
            },
        },
        parts={
            "encoder.project.": "quant_conv.",
            "decoder.project.": "post_quant_conv.",
            ".middle.before.": ".mid_block.resnets.0.",
            ".middle.attention.": ".mid_block.attentions.0.",
            ".middle.after.": ".mid_block.resnets.1.",
            ".qkv.": ".to_qkv.",
            ".out.": ".proj.",
            ".shortcut.": ".conv_shortcut.",
            ".spatial.": ".resample.1.",
            ".time.": ".time_conv.",
        },
    ),
    "release": Layout(
        levels={
            False: {
                "encoder block": "encoder.downsamples.{flat}",
                "encoder resample": "encoder.downsamples.{flat}",
                "decoder block": "decoder.upsamples.{flat}",
                "decoder resample": "decoder.upsamples.{flat}",
            },
            True: {
                "encoder block": "encoder.downsamples.{level}.downsamples.{index}",
                "encoder resample": "encoder.downsamples.{level}.downsamples.{index}",
                "decoder block": "decoder.upsamples.{level}.upsamples.{index}",
                "decoder resample": "decoder.upsamples.{level}.upsamples.{index}",
            },
        },
        parts={
            ".norm1.": ".residual.0.",
            ".conv1.": ".residual.2.",
            ".norm2.": ".residual.3.",
            ".conv2.": ".residual.6.",
            ".conv_in.": ".conv1.",
            ".norm_out.": ".head.0.",
            ".conv_out.": ".head.2.",
            "encoder.project.": "conv1.",
            "decoder.project.": "conv2.",
            ".middle.before.": ".middle.0.",
            ".middle.attention.": ".middle.1.",
            ".middle.after.": ".middle.2.",
            ".qkv.": ".to_qkv.",
            ".out.": ".proj.",
            ".spatial.": ".resample.1.",
            ".time.": ".time_conv.",
        },
    ),
}


@dataclass(frozen=True)
class DiffusersConfig:
    """AutoencoderKLWan's config.json."""

    base_dim: int
    decoder_base_dim: int | None
    z_dim: int
    dim_mult: tuple[int, ...]
    num_res_blocks: int
    attn_scales: tuple[float, ...]
    temperal_downsample: tuple[bool, ...]  # theirs
    dropout: float
    latents_mean: tuple[float, ...]
    latents_std: tuple[float, ...]
    is_residual: bool
    in_channels: int
    out_channels: int
    patch_size: int | None
    scale_factor_temporal: int
    scale_factor_spatial: int
    clip_output: bool

    def __post_init__(self) -> None:
        require(not self.attn_scales, f"attn_scales must be empty, is {list(self.attn_scales)}")
        require(self.dim_mult[:1] == (1,), f"dim_mult must begin with 1, is {list(self.dim_mult)}")


LATER = {  # what files of the first releases do not say
    "decoder_base_dim": None,
    "is_residual": False,
    "in_channels": 3,
    "out_channels": 3,
    "patch_size": None,
    "scale_factor_temporal": 4,
    "scale_factor_spatial": 8,
    "clip_output": True,
}


def vae_spec(config: Mapping[str, Any]) -> WanVaeSpec:
    """What a `vae/config.json` describes. Raises UserError where it is no VAE of this family."""
    where = "vae/config.json"
    require(
        config.get("_class_name", "AutoencoderKLWan") == "AutoencoderKLWan",
        f"{where} is of {config.get('_class_name')}, must be of AutoencoderKLWan",
    )
    given = {name: value for name, value in config.items() if not name.startswith("_")}
    theirs = read(DiffusersConfig, LATER | given, where)
    spec = WanVaeSpec(
        latent_channels=theirs.z_dim,
        pixel_patch=theirs.patch_size or 1,
        widths=_widths(theirs.base_dim, theirs.dim_mult),
        temporal=theirs.temperal_downsample,
        encoder_blocks=theirs.num_res_blocks,
        decoder_blocks=theirs.num_res_blocks + 1,
        latent_mean=theirs.latents_mean,
        latent_std=theirs.latents_std,
        chunk=CHUNK,
        tile=TILE,
        decoder_widths=_widths(theirs.decoder_base_dim or theirs.base_dim, theirs.dim_mult),
        shortcuts=theirs.is_residual,
    )
    folded = 3 * spec.pixel_patch**2
    for name, found, wanted in (
        ("in_channels", theirs.in_channels, folded),
        ("out_channels", theirs.out_channels, folded),
        ("scale_factor_temporal", theirs.scale_factor_temporal, spec.temporal_factor),
        ("scale_factor_spatial", theirs.scale_factor_spatial, spec.spatial_factor),
    ):
        require(found == wanted, f"{where}.{name} is {found}, the rest of it makes {wanted}")
    return spec


@dataclass(frozen=True)
class Release:
    """What the code of a release says beside its file."""

    pixel_patch: int
    shortcuts: bool
    mean: tuple[float, ...]
    std: tuple[float, ...]


MULTIPLIERS, BLOCKS, TEMPORAL = (1, 2, 4, 4), 2, (False, True, True)  # of both releases
RELEASES = {  # by latent channels
    16: Release(
        pixel_patch=1,
        shortcuts=False,
        mean=(
            -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
            0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
        ),
        std=(
            2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
            3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
        ),
    ),
    48: Release(
        pixel_patch=2,
        shortcuts=True,
        mean=(
            -0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557,
            -0.1382, 0.0542, 0.2813, 0.0891, 0.1570, -0.0098, 0.0375, -0.1825,
            -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502,
            -0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230,
            -0.0313, -0.1649, 0.0117, 0.0723, -0.2839, -0.2083, -0.0520, 0.3748,
            0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667,
        ),
        std=(
            0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013,
            0.8158, 1.0344, 0.5894, 1.0901, 0.6885, 0.6165, 0.8454, 0.4978,
            0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659,
            0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093,
            0.5709, 0.6065, 0.6415, 0.4944, 0.5726, 1.2042, 0.5458, 1.6887,
            0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744,
        ),
    ),
}  # fmt: skip


def release_spec(shapes: Mapping[str, Shape], where: str) -> WanVaeSpec:
    """What the file of an original release, `where`, describes. Raises UserError where it is no VAE of this family."""
    telling = ("encoder.conv1.bias", "decoder.head.0.gamma", "conv2.bias")
    missing = [name for name in telling if not shapes.get(name)]
    require(not missing, f"{where} is not a VAE of Wan: it lacks {', '.join(missing)}")
    width, decoder_width, channels = (shapes[name][0] for name in telling)
    require(
        channels in RELEASES,
        f"{where} has {channels} latent channels, known are {', '.join(map(str, RELEASES))}; use the diffusers folder",
    )
    release = RELEASES[channels]
    return WanVaeSpec(
        latent_channels=channels,
        pixel_patch=release.pixel_patch,
        widths=_widths(width, MULTIPLIERS),
        temporal=TEMPORAL,
        encoder_blocks=BLOCKS,
        decoder_blocks=BLOCKS + 1,
        latent_mean=release.mean,
        latent_std=release.std,
        chunk=CHUNK,
        tile=TILE,
        decoder_widths=_widths(decoder_width, MULTIPLIERS),
        shortcuts=release.shortcuts,
    )


def _widths(base: int, multipliers: Iterable[int]) -> tuple[int, ...]:
    return tuple(base * multiplier for multiplier in multipliers)
