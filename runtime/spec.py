"""What a model is, as frozen data: every size that the reference models, the exporter and the runtime need.

Flows in: keyword arguments or the `spec` object of a bundle's manifest. Flows out: validated dataclasses.
Knows nothing of files, tensors or engines.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, ClassVar

from .strict import read, require, require_positive


@dataclass(frozen=True)
class TextEncoderSpec:
    """T5-style encoder: a relative position bias in every layer (T5's own share one), gated GELU, RMS-norm."""

    vocabulary: int
    width: int
    depth: int
    heads: int
    head_size: int
    ffn_width: int
    buckets: int
    max_distance: int
    length: int  # tokens after padding; the cross-attention always sees this many
    cleaned: bool  # prompts are cleaned before they are cut into tokens, as those of training were: see `text.clean`

    def __post_init__(self) -> None:
        require_positive(self, "text_encoder")
        require(self.buckets % 4 == 0, f"text_encoder.buckets must be a multiple of 4, is {self.buckets}")


@dataclass(frozen=True)
class ImageEncoderSpec:
    """Vision transformer as in CLIP: a class token before the patches, norms before attention and FFN."""

    size: int  # pixels, both sides
    patch: int
    width: int
    depth: int
    heads: int
    ffn_width: int

    def __post_init__(self) -> None:
        require_positive(self, "image_encoder")
        require(
            self.size % self.patch == 0,
            f"image_encoder.size {self.size} must be a multiple of image_encoder.patch {self.patch}",
        )
        require(
            self.width % self.heads == 0,
            f"image_encoder.width {self.width} must be a multiple of image_encoder.heads {self.heads}",
        )

    @property
    def tokens(self) -> int:
        """Of one picture: its patches and the class token."""
        return 1 + (self.size // self.patch) ** 2


@dataclass(frozen=True)
class ImageAttentionSpec:
    """A second cross-attention, to the image encoder's tokens."""

    width: int  # the image encoder's
    tokens: int  # M: of all pictures that are shown
    positions: bool  # learned positions tell the pictures apart

    def __post_init__(self) -> None:
        require_positive(self, "denoiser.image")


@dataclass(frozen=True)
class DenoiserSpec:
    """Diffusion transformer over spacetime tokens, in the architecture family of Wan 2.x."""

    latent_channels: int
    patch: tuple[int, int, int]  # latent frames, rows, columns in a token
    width: int
    depth: int
    heads: int
    ffn_width: int
    text_width: int
    time_features: int  # F: sinusoidal features of the noise level
    theta: float  # base of the rotary frequencies
    coordinates: bool  # tokens carry coordinate columns after the latent values
    pooled_text: bool  # mean text value joins the time embedding
    two_levels: bool  # trained with clean known tokens beside noisy ones: the graph has a `known` input
    mask_channels: int  # 0; or tokens carry the given frames' latents after a mask, a channel for each of their frames
    image: ImageAttentionSpec | None
    channels_last: bool  # the last layer writes a token as (row, column, channel); tokens are (channel, row, column)

    text_mask: ClassVar[bool] = False  # padding is hidden from the denoiser alone; else text encoders zero it

    def __post_init__(self) -> None:
        require_positive(self, "denoiser", but=("mask_channels",))
        require(self.mask_channels >= 0, f"denoiser.mask_channels must not be below 0, is {self.mask_channels}")
        require(
            not (self.two_levels and self.mask_channels),
            "denoiser.two_levels and mask_channels are two routes",
        )
        require(
            self.width % (2 * self.heads) == 0,
            f"denoiser.width {self.width} must be a multiple of twice denoiser.heads {self.heads}",
        )
        require(self.patch[0] == 1, f"denoiser.patch must hold one latent frame in a token, holds {self.patch[0]}")
        require(self.time_features % 2 == 0, f"denoiser.time_features must be even, is {self.time_features}")

    @property
    def head_size(self) -> int:
        return self.width // self.heads

    @property
    def rope_shape(self) -> tuple[int | str, ...]:
        """Of the rotary tables: all heads turn alike."""
        return "N", self.head_size // 2

    @property
    def token_values(self) -> int:
        """P_out: latent values in one token."""
        pt, ph, pw = self.patch
        return self.latent_channels * pt * ph * pw

    @property
    def shown_channels(self) -> int:
        """Channels, packed as the latent, that say what is given: a mask and latents; 0 where there are none."""
        return self.mask_channels + self.latent_channels if self.mask_channels else 0

    @property
    def token_inputs(self) -> int:
        """P_in: latent values, what is given, and coordinate columns in one token."""
        _, ph, pw = self.patch
        return self.token_values + self.shown_channels * ph * pw + (COORDINATE_COLUMNS if self.coordinates else 0)

    @property
    def route(self) -> str:
        """How the model learns of known tokens: by their noise level, by channels beside them, or not at all.

        With "renoise" known tokens are set to the level of the others at every step.
        """
        return "levels" if self.two_levels else "channels" if self.mask_channels else "renoise"


COORDINATE_COLUMNS = 17  # see geometry.coordinate_columns


@dataclass(frozen=True)
class LtxDenoiserSpec(DenoiserSpec):
    """LTX-Video's: RMS-norms without weights, each head turned by tables of its own, and a mask over the text."""

    extent: tuple[float, float, float]  # seconds, rows and columns of pixels: a token's place is a fraction of them

    text_mask: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.width >= 12, f"denoiser.width must be at least 12, for two frequencies an axis, is {self.width}")

    @property
    def rope_shape(self) -> tuple[int | str, ...]:
        """Of the rotary tables, which run through the whole width."""
        return self.heads, "N", self.head_size // 2


SMALLEST_TILE = 4  # latent pixels a side, see tiles.py


@dataclass(frozen=True)
class VaeSpec:
    """Causal 3D-convolution VAE: 1 + temporal_factor * k frames are 1 + k latent frames."""

    latent_channels: int
    pixel_patch: int  # pixels are folded into channels by this factor before the first convolution
    widths: tuple[int, ...]  # channels of each resolution, finest first
    temporal: tuple[bool, ...]  # whether each downsampling between two resolutions also halves time
    encoder_blocks: int  # residual blocks per resolution
    decoder_blocks: int
    latent_mean: tuple[float, ...]
    latent_std: tuple[float, ...]
    chunk: int  # most latent frames that the graphs see at a time
    tile: int  # longest side, in pixels, that they see at a time; a larger picture is cut into tiles

    streams: ClassVar[bool] = True  # decodes chunk by chunk; else a clip whole, in a tile

    def __post_init__(self) -> None:
        require_positive(self, "vae", but=("latent_mean",))
        require(
            self.tile >= SMALLEST_TILE * self.spatial_factor,
            f"vae.tile must be at least {SMALLEST_TILE * self.spatial_factor} pixels, "
            f"{SMALLEST_TILE} latent ones, is {self.tile}",
        )
        require(
            len(self.temporal) == len(self.widths) - 1,
            f"vae.temporal needs {len(self.widths) - 1} entries, one less than vae.widths, has {len(self.temporal)}",
        )
        for a, b in zip(self.widths, self.widths[1:], strict=False):
            require(
                4 * a % b == 0 and 4 * b % a == 0,
                f"vae.widths {a} and {b} are neighbours: four times either must be a multiple of the other",
            )
        for name in ("latent_mean", "latent_std"):
            count = len(getattr(self, name))
            require(
                count == self.latent_channels,
                f"vae.{name} needs {self.latent_channels} entries, one a latent channel, has {count}",
            )

    @property
    def spatial_factor(self) -> int:
        return self.pixel_patch * 2 ** len(self.temporal)

    @property
    def temporal_factor(self) -> int:
        return 2 ** sum(self.temporal)

    @property
    def encoder_depth(self) -> int:
        """Residual blocks of all resolutions."""
        return len(self.widths) * self.encoder_blocks

    @property
    def decoder_depth(self) -> int:
        return len(self.widths) * self.decoder_blocks


@dataclass(frozen=True)
class WanVaeSpec(VaeSpec):
    """Wan's VAEs: attention at the coarsest resolution, and channels that change in residual blocks."""

    decoder_widths: tuple[int, ...]  # as widths, which are the encoder's
    shortcuts: bool  # averaging and duplicating ways around each resolution; without, upsampling halves channels

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            len(self.decoder_widths) == len(self.widths),
            f"vae.decoder_widths needs {len(self.widths)} entries, as vae.widths, has {len(self.decoder_widths)}",
        )
        require(
            not self.shortcuts or self.widths[-2:-1] in ((), self.widths[-1:]),
            f"vae.widths must end with the same number twice where there are shortcuts, ends with {self.widths[-2:]}",
        )


@dataclass(frozen=True)
class LtxVaeSpec(VaeSpec):
    """LTX-Video's VAE: its encoder is causal, its decoder sees the frames after a frame too.

    Blocks are counted for each resolution, finest first, and then for the middle, which comes after the coarsest.
    """

    encoder_blocks: tuple[int, ...]  # type: ignore[assignment]
    decoder_blocks: tuple[int, ...]  # type: ignore[assignment]
    decoder_widths: tuple[int, ...]  # as widths, which are the encoder's

    streams: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, entries in (("decoder_widths", 0), ("encoder_blocks", 1), ("decoder_blocks", 1)):
            count, wanted = len(getattr(self, name)), len(self.widths) + entries
            require(count == wanted, f"vae.{name} needs {wanted} entries for {len(self.widths)} widths, has {count}")

    @property
    def encoder_depth(self) -> int:
        return sum(self.encoder_blocks)

    @property
    def decoder_depth(self) -> int:
        return sum(self.decoder_blocks)


@dataclass(frozen=True)
class CaptionerSpec:
    """Latents to words: an encoder of spacetime tokens with coordinate columns, and a causal decoder that reads it."""

    token_values: int  # latent values in one token, packed as the denoiser's
    vocabulary: int  # the text encoder's, whose tokenizer it shares
    width: int
    encoder_depth: int
    decoder_depth: int
    heads: int
    ffn_width: int
    length: int  # most words of a caption, its end among them
    start: int  # id that stands before the first word
    end: int  # id that ends a caption

    def __post_init__(self) -> None:
        require_positive(self, "captioner", but=("start", "end"))
        require(
            self.width % self.heads == 0,
            f"captioner.width {self.width} must be a multiple of captioner.heads {self.heads}",
        )
        for name in ("start", "end"):
            value = getattr(self, name)
            require(
                0 <= value < self.vocabulary,
                f"captioner.{name} must be from 0 to {self.vocabulary - 1}, below captioner.vocabulary, is {value}",
            )

    @property
    def head_size(self) -> int:
        return self.width // self.heads

    @property
    def token_inputs(self) -> int:
        """Latent values and coordinate columns in one token."""
        return self.token_values + COORDINATE_COLUMNS


@dataclass(frozen=True, repr=False)
class ShiftByTokens:
    """A shift that grows with the clip: the exponential of a line through two points (Esser et al. 2024, 5.3.2)."""

    tokens: tuple[int, int]
    exponents: tuple[float, float]

    def __post_init__(self) -> None:
        require(
            self.tokens[0] < self.tokens[1], f"defaults.shift.tokens must be two that rise, are {list(self.tokens)}"
        )

    def __repr__(self) -> str:
        return " to ".join(f"{self.at(tokens):.3g} at {tokens} tokens" for tokens in self.tokens)

    def at(self, tokens: int) -> float:
        slope = (self.exponents[1] - self.exponents[0]) / (self.tokens[1] - self.tokens[0])
        return math.exp(tokens * slope + (self.exponents[0] - slope * self.tokens[0]))


@dataclass(frozen=True)
class Defaults:
    """What a request means where it is silent."""

    width: int
    height: int
    frames: int
    steps: int
    guidance: float
    guidance_low: float | None  # of the expert for low noise; None: as `guidance`
    sampler: str
    shift: float | ShiftByTokens
    negative_prompt: str

    def shift_at(self, tokens: int) -> float:
        """The shift of a clip of so many tokens."""
        return self.shift.at(tokens) if isinstance(self.shift, ShiftByTokens) else self.shift


@dataclass(frozen=True)
class ModelSpec:
    """A whole text-to-video model, and the captioner of the same latents and words where it has one."""

    name: str
    fps: int
    max_tokens: int  # largest N the denoiser accepts
    text_encoder: TextEncoderSpec
    image_encoder: ImageEncoderSpec | None
    denoiser: DenoiserSpec | LtxDenoiserSpec
    boundary: float | None  # noise level, 0 to 1, below which another denoiser of the same spec takes over
    vae: VaeSpec | WanVaeSpec | LtxVaeSpec
    captioner: CaptionerSpec | None
    defaults: Defaults

    def __post_init__(self) -> None:
        require_positive(self, "spec")
        require(
            self.denoiser.latent_channels == self.vae.latent_channels,
            f"denoiser.latent_channels {self.denoiser.latent_channels} differs from "
            f"vae.latent_channels {self.vae.latent_channels}",
        )
        require(
            self.denoiser.text_width == self.text_encoder.width,
            f"denoiser.text_width {self.denoiser.text_width} differs from text_encoder.width {self.text_encoder.width}",
        )
        require(
            self.boundary is None or self.boundary < 1, f"boundary must be a noise level below 1, is {self.boundary}"
        )
        if self.denoiser.mask_channels:
            require(
                self.denoiser.mask_channels == self.vae.temporal_factor,
                f"denoiser.mask_channels {self.denoiser.mask_channels} differs from the VAE's "
                f"{self.vae.temporal_factor} frames of a latent frame",
            )
        require(
            (self.image_encoder is None) == (self.denoiser.image is None),
            "image_encoder and denoiser.image must both be there, or neither",
        )
        if self.image_encoder is not None and self.denoiser.image is not None:
            image, encoder = self.denoiser.image, self.image_encoder
            require(
                image.width == encoder.width and image.tokens % encoder.tokens == 0,
                f"denoiser.image reads {image.tokens} tokens of width {image.width}, the image encoder writes "
                f"{encoder.tokens} a picture, of width {encoder.width}",
            )
        if self.captioner is not None:
            require(
                self.captioner.token_values == self.denoiser.token_values,
                f"captioner.token_values {self.captioner.token_values} differs from "
                f"the denoiser's {self.denoiser.token_values}",
            )
            require(
                self.captioner.vocabulary == self.text_encoder.vocabulary,
                f"captioner.vocabulary {self.captioner.vocabulary} differs from "
                f"text_encoder.vocabulary {self.text_encoder.vocabulary}",
            )

    @property
    def experts(self) -> tuple[str, ...]:
        """What is added to the names of a denoiser and its conditioners, from high noise to low."""
        return ("", "_low") if self.boundary is not None else ("",)

    @property
    def pictures(self) -> int:
        """How many pictures the image encoder shows to the denoiser."""
        if self.image_encoder is None or self.denoiser.image is None:
            return 0
        return self.denoiser.image.tokens // self.image_encoder.tokens

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, value: Any) -> ModelSpec:
        """Reads what `to_json` wrote. Raises UserError that names a missing, unknown or ill-typed field."""
        return read(cls, value, "spec")
