"""A small LTX-Video as diffusers has it, with random weights, and one request of both pipelines."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from published import TEXTS, randomise, tokenizer

from tubelet.runtime import Pipeline, Request
from tubelet.runtime.canvas import Canvas
from tubelet.runtime.geometry import plan
from tubelet.runtime.kernels import pack
from tubelet.runtime.spec import ModelSpec

Latent = NDArray[np.float32]
STEPS = 8
HEADS, HEAD, DEPTH, TEXT, CHANNELS = 4, 10, 2, 32, 8  # the width is no multiple of 6, as the published one
WIDTHS, LAYERS = (4, 8, 16, 16), (2, 1, 1, 1, 2)
SCHEDULER = {
    "use_dynamic_shifting": True, "base_shift": 0.95, "max_shift": 2.05, "base_image_seq_len": 1024,
    "max_image_seq_len": 4096, "shift_terminal": 0.1,
}  # fmt: skip


def vae(encoder_widths: tuple[int, ...], widths: tuple[int, ...], layers: tuple[int, ...]) -> Any:
    from diffusers import AutoencoderKLLTXVideo

    scales = (True,) * (len(widths) - 1) + (False,)
    made = AutoencoderKLLTXVideo(
        latent_channels=CHANNELS,
        down_block_types=("LTXVideoDownBlock3D",) * len(widths),
        downsample_type=("conv",) * len(widths),
        upsample_residual=(False,) * len(widths),
        upsample_factor=(1,) * len(widths),
        decoder_inject_noise=(False,) * (len(widths) + 1),
        block_out_channels=encoder_widths,
        layers_per_block=layers,
        spatio_temporal_scaling=scales,
        decoder_block_out_channels=widths,
        decoder_layers_per_block=layers,
        decoder_spatio_temporal_scaling=scales,
    )
    generator = torch.Generator().manual_seed(6)
    made.latents_mean.normal_(generator=generator)
    made.latents_std.uniform_(0.5, 2.0, generator=generator)
    return randomise(made, 2)


def pipeline(
    encoder_widths: tuple[int, ...] = WIDTHS,
    widths: tuple[int, ...] = WIDTHS,
    layers: tuple[int, ...] = LAYERS,
    depth: int = DEPTH,
) -> Any:
    """A pipeline of diffusers' with random weights, and a VAE of these resolutions and blocks."""
    from diffusers import FlowMatchEulerDiscreteScheduler, LTXPipeline, LTXVideoTransformer3DModel
    from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

    words = tokenizer()
    text_encoder = T5EncoderModel(
        T5Config(
            vocab_size=words.get_vocab_size(), d_model=TEXT, d_kv=8, d_ff=64, num_layers=depth, num_heads=4,
            feed_forward_proj="gated-gelu",
        )
    )  # fmt: skip
    transformer = LTXVideoTransformer3DModel(
        in_channels=CHANNELS, out_channels=CHANNELS, num_attention_heads=HEADS, attention_head_dim=HEAD,
        cross_attention_dim=HEADS * HEAD, num_layers=depth, caption_channels=TEXT,
    )  # fmt: skip
    made = LTXPipeline(
        tokenizer=PreTrainedTokenizerFast(
            tokenizer_object=words, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
        ),
        text_encoder=randomise(text_encoder, 1),
        vae=vae(encoder_widths, widths, layers),
        scheduler=FlowMatchEulerDiscreteScheduler(**SCHEDULER),
        transformer=randomise(transformer, 3),
    )
    made.set_progress_bar_config(disable=True)
    return made


def request(width: int, height: int, frames: int) -> Request:
    return Request(
        TEXTS[1], negative_prompt="blurry", width=width, height=height, frames=frames, steps=STEPS, guidance=3.0
    )


def arguments(width: int, height: int, frames: int, latents: Latent) -> dict[str, Any]:
    return {
        "prompt": TEXTS[1], "negative_prompt": "blurry", "width": width, "height": height, "num_frames": frames,
        "num_inference_steps": STEPS, "guidance_scale": 3.0, "output_type": "latent",
        "latents": torch.from_numpy(pack(latents, (1, 1, 1)))[None],
    }  # fmt: skip


def noise_of(spec: ModelSpec, width: int, height: int, frames: int) -> Latent:
    shape = plan(spec, width, height, frames).latent
    return np.random.default_rng(0).standard_normal((spec.vae.latent_channels, *shape), np.float32)


def finished(ours: Pipeline, request: Request, canvas: Canvas) -> Latent:
    generation = ours.prepare(request, canvas)
    ours.finish(generation)
    return ours.latent(generation)
