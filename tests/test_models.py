"""The reference models against implementations that we did not write, and the VAE's chunks against the whole.

    pytest tests/test_models.py

Tolerances: float32 with another order of summation; values are of order 1, so 1e-5 absolute is some 100 roundings.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tubelet.export.dit import Conditioner, Denoiser
from tubelet.export.text_encoder import TextEncoder
from tubelet.export.vae import Vae, whole
from tubelet.runtime.kernels import rope3d
from tubelet.runtime.schedule import time_features
from tubelet.runtime.spec import DenoiserSpec, TextEncoderSpec, VaeSpec

WAN = DenoiserSpec(
    latent_channels=4,
    patch=(1, 2, 2),
    width=48,
    depth=2,
    heads=2,
    ffn_width=96,
    text_width=20,
    time_features=256,
    theta=10000.0,
    coordinates=False,
    pooled_text=False,
    two_levels=False,
    mask_channels=0,
    image=None,
    channels_last=True,
)
TEXT = TextEncoderSpec(
    vocabulary=50,
    width=32,
    depth=3,
    heads=4,
    head_size=8,
    ffn_width=64,
    buckets=8,
    max_distance=20,
    length=12,
    cleaned=False,
)
VAE = VaeSpec(4, 2, (8, 16, 16), (True, True), 1, 2, (0.1, 0.0, -0.2, 0.0), (1.0, 1.5, 0.5, 2.0), 4, 256)


def randomise(module: nn.Module) -> None:
    """Every parameter random, so that none hides behind a zero or a one."""
    torch.manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3 if parameter.ndim < 2 else parameter[0].numel() ** -0.5)


def copy_linear(target: nn.Module, source: nn.Module) -> None:
    target.load_state_dict(source.state_dict())


@pytest.mark.parametrize("grid", [(1, 2, 2), (3, 2, 4), (2, 5, 3)])
@torch.no_grad()
def test_denoiser_equals_diffusers_wan(grid: tuple[int, int, int]) -> None:
    from diffusers import WanTransformer3DModel

    theirs = WanTransformer3DModel(
        patch_size=WAN.patch, num_attention_heads=WAN.heads, attention_head_dim=WAN.head_size, in_channels=4,
        out_channels=4, text_dim=WAN.text_width, freq_dim=WAN.time_features, ffn_dim=WAN.ffn_width,
        num_layers=WAN.depth, cross_attn_norm=True, rope_max_seq_len=32,
    ).eval()  # fmt: skip
    randomise(theirs)
    denoiser, conditioner = wan_to_ours(theirs)
    t, h, w = grid
    latents, text = torch.randn(2, 4, t, 2 * h, 2 * w), torch.randn(2, 7, WAN.text_width)
    steps = torch.tensor([700.0, 31.0])

    expected = theirs(latents, steps, text, return_dict=False)[0]
    cross_k, cross_v = conditioner(text)
    features = torch.from_numpy(time_features(np.stack([steps.numpy(), np.zeros(2)], axis=1), WAN.time_features))
    cos, sin = map(torch.from_numpy, rope3d(grid, WAN.head_size))
    velocity = denoiser(tokens(latents), features, cos, sin, cross_k, cross_v)

    torch.testing.assert_close(velocity, tokens(expected), atol=1e-5, rtol=1e-5)


def tokens(latents: Tensor) -> Tensor:
    """[B,C,T,H,W] -> [B,N,C*1*2*2]."""
    b, c, t, h, w = latents.shape
    x = latents.reshape(b, c, t, 1, h // 2, 2, w // 2, 2).permute(0, 2, 4, 6, 1, 3, 5, 7)
    return x.reshape(b, t * h * w // 4, c * 4)


def wan_to_ours(theirs: nn.Module) -> tuple[Denoiser, Conditioner]:
    denoiser, conditioner = Denoiser(WAN).eval(), Conditioner(WAN).eval()
    denoiser.embed.weight.copy_(theirs.patch_embedding.weight.flatten(1))
    denoiser.embed.bias.copy_(theirs.patch_embedding.bias)
    embedder = theirs.condition_embedder
    pairs = [
        (denoiser.time_embedding[0], embedder.time_embedder.linear_1),
        (denoiser.time_embedding[2], embedder.time_embedder.linear_2),
        (denoiser.time_projection[1], embedder.time_proj),
        (conditioner.embed[0], embedder.text_embedder.linear_1),
        (conditioner.embed[2], embedder.text_embedder.linear_2),
    ]
    for i, (block, other) in enumerate(zip(denoiser.blocks, theirs.blocks, strict=True)):
        block.offset.copy_(other.scale_shift_table[0])
        own, cross = block.self_attention, block.cross_attention
        pairs += [
            (own.q, other.attn1.to_q), (own.k, other.attn1.to_k), (own.v, other.attn1.to_v),
            (own.o, other.attn1.to_out[0]),
            (own.norm_q, other.attn1.norm_q), (own.norm_k, other.attn1.norm_k), (block.norm2, other.norm2),
            (cross.q, other.attn2.to_q), (cross.o, other.attn2.to_out[0]), (cross.norm_q, other.attn2.norm_q),
            (conditioner.k[i], other.attn2.to_k), (conditioner.v[i], other.attn2.to_v),
            (conditioner.norm_k[i], other.attn2.norm_k),
            (block.ffn[0], other.ffn.net[0].proj), (block.ffn[2], other.ffn.net[2]),
        ]  # fmt: skip
    for ours, other in pairs:
        copy_linear(ours, other)
    denoiser.offset_out.copy_(theirs.scale_shift_table[0])
    copy_linear(denoiser.project_out, theirs.proj_out)
    return denoiser, conditioner


@torch.no_grad()
def test_known_tokens_take_the_second_noise_level() -> None:
    two = dataclasses.replace(WAN, two_levels=True, pooled_text=True, coordinates=True)
    denoiser = Denoiser(two).eval()
    randomise(denoiser)
    n = 6
    x, cross = torch.randn(1, n, two.token_inputs), torch.randn(2, 1, 2, 5, two.head_size)
    cos, sin = map(torch.from_numpy, rope3d((1, 2, 3), two.head_size))
    high, low = (torch.from_numpy(time_features(np.array([[t, 0.0]]), 256)) for t in (900.0, 0.0))

    none = denoiser(x, high, cos, sin, cross, cross, torch.zeros(1, n))
    every = denoiser(x, high, cos, sin, cross, cross, torch.ones(1, n))
    low_none = denoiser(x, low, cos, sin, cross, cross, torch.zeros(1, n))

    torch.testing.assert_close(every, low_none, atol=1e-5, rtol=1e-5)  # all known = all at the second level
    assert (every - none).abs().max() > 1e-2


@torch.no_grad()
def test_text_encoder_equals_transformers_umt5() -> None:
    from transformers import UMT5Config, UMT5EncoderModel

    theirs = UMT5EncoderModel(
        UMT5Config(
            vocab_size=TEXT.vocabulary, d_model=TEXT.width, d_kv=TEXT.head_size, d_ff=TEXT.ffn_width,
            num_layers=TEXT.depth, num_heads=TEXT.heads, relative_attention_num_buckets=TEXT.buckets,
            relative_attention_max_distance=TEXT.max_distance,
        )
    ).eval()  # fmt: skip
    randomise(theirs)
    ours = TextEncoder(TEXT).eval()
    copy_linear(ours.embedding, theirs.shared)
    ours.norm.weight.copy_(theirs.encoder.final_layer_norm.weight)
    for layer, other in zip(ours.layers, theirs.encoder.block, strict=True):
        attention, ffn = other.layer[0].SelfAttention, other.layer[1].DenseReluDense
        for linear, source in (
            (layer.q, attention.q), (layer.k, attention.k), (layer.v, attention.v), (layer.o, attention.o),
            (layer.bias.weight, attention.relative_attention_bias), (layer.gate, ffn.wi_0), (layer.up, ffn.wi_1),
            (layer.down, ffn.wo),
        ):  # fmt: skip
            copy_linear(linear, source)
        layer.norm1.weight.copy_(other.layer[0].layer_norm.weight)
        layer.norm2.weight.copy_(other.layer[1].layer_norm.weight)
    ids = torch.randint(0, TEXT.vocabulary, (2, 30))  # longer than max_distance: the far bucket too
    mask = torch.ones_like(ids)
    mask[1, 19:] = 0

    expected = theirs(ids, attention_mask=mask).last_hidden_state * mask[..., None]

    torch.testing.assert_close(ours(ids, mask), expected, atol=2e-5, rtol=1e-5)


@settings(max_examples=15, deadline=None)
@given(groups=st.lists(st.integers(1, 3), max_size=3), h=st.integers(1, 3), w=st.integers(1, 3))
@torch.no_grad()
def test_vae_chunks_equal_the_whole(groups: list[int], h: int, w: int) -> None:
    vae = Vae(VAE).eval()
    randomise(vae)
    k = sum(groups)
    pixels, latents = torch.randn(1, 3, 1 + 4 * k, 8 * h, 8 * w), torch.randn(1, 4, 1 + k, h, w)
    mean, std = vae.latent_mean, vae.latent_std

    encoded = (whole(vae.encoder, pixels).chunk(2, dim=1)[0] - mean) / std
    decoded = whole(vae.decoder, latents * std + mean)

    assert encoded.shape == latents.shape and decoded.shape == pixels.shape
    torch.testing.assert_close(in_chunks(vae.encode, pixels, [4 * n for n in groups]), encoded, atol=1e-5, rtol=0)
    torch.testing.assert_close(in_chunks(vae.decode, latents, groups), decoded, atol=1e-5, rtol=0)


def in_chunks(half, x: Tensor, groups: list[int]) -> Tensor:
    y, caches = half(x[:, :, :1])
    results = [y]
    for chunk in x[:, :, 1:].split(groups, dim=2) if groups else ():
        y, caches = half(chunk, caches)
        results.append(y)
    return torch.cat(results, dim=2)


@torch.no_grad()
def test_vae_never_looks_ahead() -> None:
    vae = Vae(VAE).eval()
    randomise(vae)
    latents = torch.randn(1, 4, 4, 2, 2)
    changed = latents.clone()
    changed[:, :, 3] += 1

    before, after = whole(vae.decoder, latents), whole(vae.decoder, changed)

    assert torch.equal(before[:, :, :9], after[:, :, :9])
    assert not torch.equal(before[:, :, 9:], after[:, :, 9:])
