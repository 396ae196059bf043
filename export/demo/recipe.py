"""The embedded model's sizes and default request: the one place that says what is trained."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from tubelet.runtime.spec import CaptionerSpec, Defaults, DenoiserSpec, ModelSpec, TextEncoderSpec, VaeSpec

from .world import vocabulary

LATENT_CHANNELS = 8
PAD, END = 0, 1  # ids


def vae_spec(
    mean: Sequence[float] = (0.0,) * LATENT_CHANNELS, std: Sequence[float] = (1.0,) * LATENT_CHANNELS
) -> VaeSpec:
    return VaeSpec(
        latent_channels=LATENT_CHANNELS,
        pixel_patch=2,
        widths=(32, 64, 64),
        temporal=(True, True),
        encoder_blocks=1,
        decoder_blocks=2,
        latent_mean=tuple(mean),
        latent_std=tuple(std),
        chunk=4,
        tile=4096,
    )


def text_encoder_spec() -> TextEncoderSpec:
    return TextEncoderSpec(
        vocabulary=64,
        width=128,
        depth=2,
        heads=4,
        head_size=32,
        ffn_width=256,
        buckets=16,
        max_distance=32,
        length=16,
        cleaned=False,
    )


def denoiser_spec() -> DenoiserSpec:
    return DenoiserSpec(
        latent_channels=LATENT_CHANNELS,
        patch=(1, 2, 2),
        width=192,
        depth=6,
        heads=4,
        ffn_width=768,
        text_width=128,
        time_features=128,
        theta=10000.0,
        coordinates=True,
        pooled_text=True,
        two_levels=True,
        mask_channels=0,
        image=None,
        channels_last=False,
    )


def captioner_spec() -> CaptionerSpec:
    return CaptionerSpec(
        token_values=denoiser_spec().token_values,
        vocabulary=64,
        width=128,
        encoder_depth=2,
        decoder_depth=2,
        heads=4,
        ffn_width=512,
        length=16,
        start=PAD,
        end=END,
    )


def model_spec(mean: Sequence[float], std: Sequence[float]) -> ModelSpec:
    return ModelSpec(
        name="tubelet-demo",
        fps=24,
        max_tokens=4096,
        text_encoder=text_encoder_spec(),
        image_encoder=None,
        denoiser=denoiser_spec(),
        boundary=None,
        vae=vae_spec(mean, std),
        captioner=captioner_spec(),
        defaults=Defaults(
            width=64,
            height=64,
            frames=33,
            steps=20,
            guidance=2.0,
            guidance_low=None,
            sampler="unipc",
            shift=5.0,
            negative_prompt="",
        ),
    )


def tokenizer() -> Tokenizer:
    """Word-level over the world's words: lower case, punctuation apart, an end token; unknown words share one id."""
    words = {"<pad>": PAD, "<end>": END, "<unknown>": 2}
    words |= {word: i for i, word in enumerate(vocabulary(), start=len(words))}
    result = Tokenizer(models.WordLevel(words, unk_token="<unknown>"))
    result.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    result.pre_tokenizer = pre_tokenizers.Whitespace()
    result.post_processor = processors.TemplateProcessing(single="$A <end>", special_tokens=[("<end>", END)])
    return result
