"""Trains the embedded model's VAE on rendered clips; then measures the latents' mean and spread.

Flows in: the world and a folder for checkpoints. Flows out: `vae.pt` there (weights averaged over training) with
`latent_mean` and `latent_std`. Resumes where it stopped; every step draws from a seed of its own, so an interrupted
run and a whole one see the same data.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from tubelet.runtime.spec import VaeSpec

from ..vae import ResidualBlock, Vae, stream, whole
from .training import Checkpoint, Optimizers, averaged, save, trapezoid, unit_gain_
from .world import HELD_OUT, TRAINED, Scene, render

FIRST, SECOND, THIRD = 3800, 4600, 1400  # steps of three descents of the learning rate
STEPS = FIRST + SECOND + THIRD
BATCH = 2
SIZES = ((48, 48), (64, 48), (48, 64), (64, 64), (80, 48), (48, 80), (96, 64), (64, 96))  # width, height
SIZE_ODDS = np.array([8, 3, 3, 2, 1, 1, 0.5, 0.5]) / 19
LENGTHS, LENGTH_ODDS = (1, 5, 9, 17), (0.05, 0.45, 0.4, 0.1)
MUON_RATE, ADAMW_RATE = 8e-3, 1e-3
KL_WEIGHT = 5e-4
REFINE_STEPS, REFINE_NOISE = 1600, 0.05
FAST_STEPS = 1200  # of refinement on what moves most between two frames: wide pictures, short clips
FAST_SIZES = ((96, 64), (64, 96), (96, 96), (96, 48), (48, 96), (80, 64), (64, 80), (80, 80), (80, 48), (48, 80))


def rate(step: int) -> float:
    """Share of the peak learning rate: down to zero three times, from lower every time."""
    if step < FIRST:
        return trapezoid(step, FIRST, flat=0.4)
    if step < FIRST + SECOND:
        return 0.75 * trapezoid(step - FIRST, SECOND, flat=0.25)
    return 0.4 * trapezoid(step - FIRST - SECOND, THIRD, flat=0.2)


def to_pixels(clips: np.ndarray) -> Tensor:
    """uint8 [B,T,H,W,3] -> float [B,3,T,H,W] in [-1,1]."""
    return torch.from_numpy(clips).permute(0, 4, 1, 2, 3).float() / 127.5 - 1


def train_batch(step: int) -> tuple[Tensor, int]:
    """The clips of one step, and how many of their frames are history that only fills the causal caches.

    The first two descents see short clips from their start, which is cheap. In the third most batches have history, of
    up to the longest that a layer looks back: without it quality falls from the eighteenth frame on.
    """
    rng = np.random.default_rng((11, step))
    width, height = SIZES[rng.choice(len(SIZES), p=SIZE_ODDS)]
    frames, history = int(rng.choice(LENGTHS, p=LENGTH_ODDS)), 0
    if step >= FIRST + SECOND and rng.random() < 0.75:
        frames, history = 8, 1 + 4 * int(rng.integers(11))
    clips = []
    for _ in range(BATCH):
        scene = TRAINED[rng.integers(len(TRAINED))]
        clip = render(scene, width, height, max(frames + history, int(rng.choice((17, 33, 49)))), rng)
        start = rng.integers(len(clip) - frames - history + 1)
        clips.append(clip[start : start + frames + history])
    return to_pixels(np.stack(clips)), history


def fast_batch(step: int) -> tuple[Tensor, int]:
    """One clip and its history, as `train_batch`, of the second part of the decoder's refinement."""
    rng = np.random.default_rng((11, step))
    width, height = FAST_SIZES[rng.integers(len(FAST_SIZES))]
    clip = render(TRAINED[rng.integers(len(TRAINED))], width, height, int(rng.choice((17, 33), p=(0.75, 0.25))), rng)
    history = 4 * int(rng.integers((len(clip) - 9) // 4 + 1)) + 1
    return to_pixels(clip[None, : history + 8]), history


def autoencode(vae: Vae, pixels: Tensor, history: int, draw: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
    """Encodes, draws latents and decodes; no gradient flows into the first `history` frames.

    Returns what the encoder says of the other frames [B,2C,T',h,w] and their reconstruction [B,3,T,H,W].
    """
    encoder_caches = decoder_caches = None
    if history:
        with torch.no_grad():
            statistics, encoder_caches = stream(vae.encoder, pixels[:, :, :history])
            _, decoder_caches = stream(vae.decoder, statistics.chunk(2, dim=1)[0])
    statistics, _ = stream(vae.encoder, pixels[:, :, history:], encoder_caches)
    return statistics, stream(vae.decoder, draw(statistics), decoder_caches)[0]


def sample(statistics: Tensor) -> Tensor:
    """Latents from the posterior whose mean and log-variance these are."""
    mean, log_variance = statistics.chunk(2, dim=1)
    return mean + torch.randn_like(mean) * (0.5 * log_variance.clamp(-20, 4)).exp()


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Peak signal to noise of two uint8 clips in dB."""
    return 10 * math.log10(255.0**2 / np.mean((a.astype(np.float64) - b) ** 2))


@torch.no_grad()
def reconstruct(vae: Vae, clip: np.ndarray) -> np.ndarray:
    """uint8 [T,H,W,3] -> the same through both halves of the VAE."""
    mean = whole(vae.encoder, to_pixels(clip[None])).chunk(2, dim=1)[0]
    pixels = whole(vae.decoder, mean)[0].permute(1, 2, 3, 0)
    return ((pixels.clamp(-1, 1) + 1) * 127.5).round().byte().numpy()


def held_out_clips(count: int, seed: int = 5) -> list[tuple[Scene, np.ndarray]]:
    """Clips of scenes that no training sees, over all sizes."""
    rng = np.random.default_rng(seed)
    sizes = itertools.cycle(SIZES)
    scenes = itertools.islice(itertools.cycle(HELD_OUT), count)
    return [(scene, render(scene, *next(sizes), 33, rng)) for scene in scenes]


def train(spec: VaeSpec, folder: Path) -> None:
    torch.manual_seed(1)
    vae = Vae(spec)
    unit_gain_(vae)
    with torch.no_grad():  # blocks start as identities and the posterior narrow, so that places get through early
        for module in vae.modules():
            if isinstance(module, ResidualBlock):
                module.conv2.weight.zero_()
        narrow = slice(spec.latent_channels, None)
        vae.encoder.conv_out.weight[narrow] *= 0.1
        nn.init.constant_(vae.encoder.conv_out.get_parameter("bias")[narrow], -5.0)
    average = averaged(vae, 0.995)
    optimizers = Optimizers(vae, MUON_RATE, ADAMW_RATE)
    state = {"vae": vae, "average": average, "optimizers": optimizers}
    checkpoint = Checkpoint(folder / "vae_training.pt", state, every=400)
    for step in checkpoint.steps(STEPS, {"held_out_psnr": lambda: _held_out_psnr(cast(Vae, average.module))}):
        torch.manual_seed(step)
        pixels, history = train_batch(step)
        pixels = pixels.contiguous(memory_format=torch.channels_last_3d)
        statistics, decoded = autoencode(vae, pixels, history, sample)
        error = decoded - pixels[:, :, history:]
        mean, log_variance = statistics.chunk(2, dim=1)
        log_variance = log_variance.clamp(-20, 4)
        kl = 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance).mean()
        loss = error.abs().mean() + error.square().mean() + KL_WEIGHT * kl
        vae.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizers.step(rate(step))
        average.update_parameters(vae)
        checkpoint.log(loss=loss.item(), kl=kl.item(), mse=error.square().mean().item())
    trained = cast(Vae, average.module)
    mean, std = _latent_statistics(trained)
    trained.latent_mean.copy_(mean.reshape(trained.latent_mean.shape))
    trained.latent_std.copy_(std.reshape(trained.latent_std.shape))
    save(trained.state_dict(), folder / "vae.pt")


def blur(vae: Vae, statistics: Tensor) -> Tensor:
    """The posterior's mean with a little noise, and no gradient to the encoder."""
    mean = statistics.detach().chunk(2, dim=1)[0]
    return mean + REFINE_NOISE * vae.latent_std * torch.randn_like(mean)


def refine_decoder(spec: VaeSpec, folder: Path) -> None:
    """Trains the decoder alone on slightly noised latents of the frozen encoder: `vae_refined.pt`.

    The denoiser's latents are never exact, and the encoder must not move once they are cached. The second part sees
    fast motion: after the first one 58 % of true clips of 96x64 and 17 frames passed the scorer, of others 92-100 %.
    """
    vae = Vae(spec)
    vae.load_state_dict(torch.load(folder / "vae.pt", weights_only=True))
    decoder = vae.decoder
    average = averaged(vae, 0.995)
    optimizers = Optimizers(decoder, MUON_RATE / 2, ADAMW_RATE / 2)
    state = {"vae": vae, "average": average, "optimizers": optimizers}
    checkpoint = Checkpoint(folder / "decoder_training.pt", state, every=400)
    for step in checkpoint.steps(
        REFINE_STEPS + FAST_STEPS, {"held_out_psnr": lambda: _held_out_psnr(cast(Vae, average.module))}
    ):
        torch.manual_seed(500_000 + step)
        fast = step >= REFINE_STEPS
        pixels, history = (fast_batch if fast else train_batch)(STEPS + step)
        pixels = pixels.contiguous(memory_format=torch.channels_last_3d)
        _, decoded = autoencode(vae, pixels, history, lambda statistics: blur(vae, statistics))
        error = decoded - pixels[:, :, history:]
        loss = 0.3 * error.abs().mean() + error.square().mean()
        decoder.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(decoder.parameters(), 1.0)
        first, second = trapezoid(step, REFINE_STEPS, 0.3), 0.5 * trapezoid(step - REFINE_STEPS, FAST_STEPS, 0.3)
        optimizers.step(second if fast else first)
        average.update_parameters(vae)
        checkpoint.log(loss=loss.item(), mse=error.square().mean().item())
    save(average.module.state_dict(), folder / "vae_refined.pt")


def _held_out_psnr(vae: Vae) -> float:
    return float(np.mean([psnr(clip, reconstruct(vae, clip)) for _, clip in held_out_clips(16)]))


@torch.no_grad()
def _latent_statistics(vae: Vae) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each latent channel over 200 clips."""
    rng = np.random.default_rng(17)
    values = []
    for _ in range(200):
        clip = render(TRAINED[rng.integers(len(TRAINED))], 64, 64, 17, rng)
        values.append(whole(vae.encoder, to_pixels(clip[None])).chunk(2, dim=1)[0].transpose(0, 1).flatten(1))
    latents = torch.cat(values, dim=1)
    return latents.mean(dim=1), latents.std(dim=1)
