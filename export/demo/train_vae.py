"""Trains the embedded model's VAE on rendered clips, sharpens it, and in the end refines its decoder.

Flows in: the world and a folder for checkpoints. Flows out: `vae_sampled.pt`, then `vae.pt` with the latents' mean and
spread, and `vae_refined.pt` with the same encoder, there; weights are averaged over training. Resumes where it stopped;
every step draws from a seed of its own, so an interrupted run and a whole one see the same data.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from tubelet.runtime.spec import VaeSpec

from ..causal import ChannelNorm, Downsample, ResidualBlock, Upsample
from ..vae import Vae, stream, whole
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
SHARPEN_STEPS, SHARPEN_NOISE = 2900, 0.1
GHOST_WEIGHT = 10.0
REFINE_STEPS, REFINE_NOISE, REFINE_GHOST_WEIGHT = 2400, 0.3, 3.0
SETTLE_STEPS, SETTLE_RATE = 1400, 0.5
ADAPT_STEPS, ADAPT_RATE = 1400, 0.5
CHANNELS_LAST = torch.channels_last_3d
REFINE_SIZES = ((64, 64), (64, 48), (48, 64), (80, 48), (48, 80))
FAST_SHARE = 0.55  # of sharpening on what moves most between two frames: wide pictures, short clips
STILL_SHARE, BATCH_STILL = 0.15, 6  # of sharpening on pictures: a clip's first frame has no history to lean on
FAST_SIZES = (
    *((96, 64), (64, 96), (96, 96), (96, 48), (48, 96), (80, 64), (64, 80), (80, 80), (80, 48), (48, 80)),
    *((128, 64), (64, 128), (112, 112), (32, 32)),
)

Batch = Callable[[int], tuple[Tensor, int]]  # step -> clips, and how many of their frames are history


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


def sharpening_batch(step: int) -> tuple[Tensor, int]:
    """The clips and history of one step of `sharpen`: one that moves fast, several pictures, or as `train_batch`."""
    rng = np.random.default_rng((13, step))
    kind = rng.choice(("fast", "still", "as before"), p=(FAST_SHARE, STILL_SHARE, 1 - FAST_SHARE - STILL_SHARE))
    if kind == "as before":
        return train_batch(STEPS + step)
    sizes = FAST_SIZES if kind == "fast" else FAST_SIZES + SIZES
    width, height = sizes[rng.integers(len(sizes))]
    if kind == "still":
        scenes = (TRAINED[rng.integers(len(TRAINED))] for _ in range(BATCH_STILL))
        return to_pixels(np.stack([render(scene, width, height, 17, rng)[:1] for scene in scenes])), 0
    clip = render(TRAINED[rng.integers(len(TRAINED))], width, height, int(rng.choice((17, 33), p=(0.75, 0.25))), rng)
    history = 4 * int(rng.integers((len(clip) - 9) // 4 + 1)) + 1 if rng.random() < 0.75 else 0
    return to_pixels(clip[None, : history + (8 if history else 9)]), history


def refining_batch(step: int) -> tuple[Tensor, int]:
    """The clips and history of one step of `refine_decoder`: a whole motion in 9 or 13 frames of a small picture.

    That is up to 6 pixels a frame, as fast as anything in pictures twice as wide, at a fraction of the cost.
    """
    rng = np.random.default_rng((17, step))
    width, height = REFINE_SIZES[rng.integers(len(REFINE_SIZES))]
    frames = int(rng.choice((9, 13)))
    clips = [render(TRAINED[rng.integers(len(TRAINED))], width, height, frames, rng) for _ in range(BATCH)]
    history = int(rng.choice((0, 1) if frames == 9 else (1, 5)))
    return to_pixels(np.stack(clips)[:, : history + (8 if history else 9)]), history


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
        pixels = pixels.contiguous(memory_format=CHANNELS_LAST)
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
    save(average.module.state_dict(), folder / "vae_sampled.pt")


def sharpen(spec: VaeSpec, folder: Path) -> None:
    """Trains both halves on, with much less noise on the latents than the posterior's and on faster motion: `vae.pt`.

    The pipeline and the denoiser use the posterior's mean alone, and its noise (0.2-0.5 of the latents' spread) hides
    what fast motion needs: before, 58 % of true clips of 96x64 and 17 frames passed the scorer, of others 92-100 %.
    """
    vae = Vae(spec)
    vae.load_state_dict(torch.load(folder / "vae_sampled.pt", weights_only=True))
    _measure_latents(vae)

    def loss(step: int) -> Tensor:
        statistics, pixels, error = _reconstruct(vae, *sharpening_batch(step), SHARPEN_NOISE)
        scale = statistics.chunk(2, dim=1)[0].square().mean()
        parts = 0.3 * error.abs().mean() + error.square().mean() + KL_WEIGHT * 0.5 * scale
        return parts + GHOST_WEIGHT * ghosts(pixels, error.square())

    trained = _descend(vae, vae, folder / "vae_sharpening.pt", SHARPEN_STEPS, 500_000, loss)
    _measure_latents(trained)
    save(trained.state_dict(), folder / "vae.pt")


def refine_decoder(spec: VaeSpec, folder: Path) -> None:
    """Trains the decoder alone on, with a frozen encoder, on the fastest motion and noisy latents: `vae_refined.pt`.

    The noise stands for the denoiser's error. Absolute errors alone: where the decoder must guess, a squared error
    asks for the mean, which is a ghost, an absolute one for the likelier of object and background.
    """
    batches = (sharpening_batch, refining_batch)
    refined = _refine(spec, folder / "vae.pt", folder / "decoder_refining.pt", REFINE_STEPS, batches, 1.0)
    save(refined.state_dict(), folder / "vae_refined.pt")


def settle_decoder(spec: VaeSpec, folder: Path) -> None:
    """The same once more, from a lower rate and half of it on clips with a long history: `vae_settled.pt`.

    Fast and short clips alone made the decoder forget how to stay steady: of slow clips 92 % passed the scorer, 97 %
    before.
    """

    def with_history(step: int) -> tuple[Tensor, int]:
        return train_batch(STEPS + SHARPEN_STEPS + step)

    batches = (refining_batch, with_history, sharpening_batch, with_history)
    source, path = folder / "vae_refined.pt", folder / "decoder_settling.pt"
    settled = _refine(spec, source, path, SETTLE_STEPS, batches, SETTLE_RATE)
    save(settled.state_dict(), folder / "vae_settled.pt")


def adapt_decoder(spec: VaeSpec, folder: Path) -> None:
    """Trains the decoder alone on latents as the denoiser makes them, from `remade.pt`, and rescales: `vae_adapted.pt`.

    Before, such latents were decoded 1 to 3 dB worse than the encoder's, and where they were wrong showed ghosts.
    """
    remade = torch.load(folder / "remade.pt", weights_only=True)
    vae = Vae(spec)
    vae.load_state_dict(torch.load(folder / "vae_settled.pt", weights_only=True))
    vae.encoder.requires_grad_(False)

    def loss(step: int) -> Tensor:
        if step % 3 == 0:  # so that it does not forget the encoder's
            batch = train_batch(STEPS + SHARPEN_STEPS + step) if step % 2 else refining_batch(step)
            _, pixels, error = _reconstruct(vae, *batch, REFINE_NOISE * torch.rand(()).item())
        else:
            pixels, error = _decode_remade(vae, remade, step)
        return error.abs().mean() + REFINE_GHOST_WEIGHT * ghosts(pixels, error.abs())

    adapted = _descend(vae, vae.decoder, folder / "decoder_adapting.pt", ADAPT_STEPS, 900_000, loss, ADAPT_RATE)
    rescale(adapted, [clip for _, clip in held_out_clips(16)])
    save(adapted.state_dict(), folder / "vae_adapted.pt")


def _decode_remade(vae: Vae, remade: Sequence[dict[str, Tensor]], step: int) -> tuple[Tensor, Tensor]:
    """Pixels [B,3,T,H,W] of a window of some clips, and the error of its decoding from remade latents."""
    rng = np.random.default_rng((19, step))
    entry = remade[int(rng.integers(len(remade)))]
    chosen = rng.integers(len(entry["latents"]), size=BATCH)
    latents, clips = entry["latents"][chosen].float(), to_pixels(entry["pixels"].numpy()[chosen])
    history = int(rng.integers(latents.shape[2] - 1)) if rng.random() < 0.75 else 0
    end = history + (2 if history else 3)
    caches = None
    if history:
        with torch.no_grad():
            _, caches = stream(vae.decoder, latents[:, :, :history])
    pixels = clips[:, :, max(0, 4 * history - 3) : 4 * end - 3]
    decoded, _ = stream(vae.decoder, latents[:, :, history:end].contiguous(memory_format=CHANNELS_LAST), caches)
    return pixels, decoded - pixels


def _refine(spec: VaeSpec, source: Path, path: Path, steps: int, batches: Sequence[Batch], rate: float) -> Vae:
    """A descent of the decoder from the weights `source`, which takes its batches from each of `batches` in turn."""
    vae = Vae(spec)
    vae.load_state_dict(torch.load(source, weights_only=True))
    vae.encoder.requires_grad_(False)

    def loss(step: int) -> Tensor:
        batch = batches[step % len(batches)](step)
        _, pixels, error = _reconstruct(vae, *batch, REFINE_NOISE * torch.rand(()).item())
        return error.abs().mean() + REFINE_GHOST_WEIGHT * ghosts(pixels, error.abs())

    return _descend(vae, vae.decoder, path, steps, 700_000, loss, rate)


@torch.no_grad()
def rescale(vae: Vae, clips: Sequence[np.ndarray], most: float = 1024.0) -> None:
    """Scales what each norm reads by a power of two, so that on these clips it stays within `most`.

    Float16 ends at 65504. A norm's output does not depend on its input's scale, and the stream between blocks is read
    by norms and linear layers alone, so the VAE computes the same. Training cannot go on from it: Muon's steps have one
    size, whatever the weights' is.
    """
    peaks: dict[nn.Module, float] = {}

    def watch(norm: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        peaks[norm] = max(peaks.get(norm, 0.0), inputs[0].abs().max().item())

    hooks = [m.register_forward_pre_hook(watch) for m in vae.modules() if isinstance(m, ChannelNorm)]
    for clip in clips:
        reconstruct(vae, clip)
    for hook in hooks:
        hook.remove()
    for half in (vae.encoder, vae.decoder):
        blocks = [m for m in half.modules() if isinstance(m, ResidualBlock)]
        changes = [m for m in half.modules() if isinstance(m, Downsample | Upsample)]
        stream = _power_of_two(most / max(peaks[norm] for norm in (*(b.norm1 for b in blocks), half.norm_out)))
        for layer in (half.conv_in, *(block.conv2 for block in blocks)):
            _scale(stream, layer.weight, layer.bias)
        for change in changes:
            _scale(stream, change.spatial.bias, change.time.bias if change.time is not None else None)
        for block in blocks:
            _scale(_power_of_two(most / peaks[block.norm2]), block.conv1.weight, block.conv1.bias)


def _power_of_two(factor: float) -> float:
    """The greatest power of two that is at most this factor and 1."""
    return 2.0 ** min(0, math.floor(math.log2(factor)))


def _scale(factor: float, *parameters: Tensor | None) -> None:
    for parameter in parameters:
        if parameter is not None:
            parameter.mul_(factor)


def _reconstruct(vae: Vae, pixels: Tensor, history: int, noise: float) -> tuple[Tensor, Tensor, Tensor]:
    """The encoder's statistics, the pixels [B,3,T,H,W] behind the history, and the error there.

    Latents are the posterior's mean and this share of their spread of noise.
    """

    def draw(statistics: Tensor) -> Tensor:
        mean = statistics.chunk(2, dim=1)[0]
        return mean + noise * vae.latent_std * torch.randn_like(mean)

    statistics, decoded = autoencode(vae, pixels.contiguous(memory_format=CHANNELS_LAST), history, draw)
    return statistics, pixels[:, :, history:], decoded - pixels[:, :, history:]


def ghosts(pixels: Tensor, cost: Tensor) -> Tensor:
    """Mean cost [] of what is plain background, more than 3 pixels from the object; clips and costs [B,3,T,H,W].

    A ghost of a fast object weighs little beside its edges, but is what one sees.
    """
    background = pixels[..., :1, :1]  # objects never touch a corner
    objects = (pixels - background).abs().amax(dim=1, keepdim=True) > 0.02
    near = nn.functional.max_pool3d(objects.float(), (1, 7, 7), stride=1, padding=(0, 3, 3))
    return (cost * (1 - near)).mean()


def _descend(
    vae: Vae,
    part: nn.Module,
    path: Path,
    steps: int,
    seed: int,
    loss_of: Callable[[int], Tensor],
    rate: float = 1.0,
) -> Vae:
    """Trains `part` of a VAE down one descent, from `rate` times half the peak; returns it with averaged weights."""
    average = averaged(vae, 0.995)
    optimizers = Optimizers(part, MUON_RATE / 2, ADAMW_RATE / 2)
    checkpoint = Checkpoint(path, {"vae": vae, "average": average, "optimizers": optimizers}, every=400)
    for step in checkpoint.steps(steps, {"held_out_psnr": lambda: _held_out_psnr(cast(Vae, average.module))}):
        torch.manual_seed(seed + step)
        loss = loss_of(step)
        part.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(part.parameters(), 1.0)
        optimizers.step(rate * trapezoid(step, steps, flat=0.3))
        average.update_parameters(vae)
        checkpoint.log(loss=loss.item())
    return cast(Vae, average.module)


def _held_out_psnr(vae: Vae) -> float:
    return float(np.mean([psnr(clip, reconstruct(vae, clip)) for _, clip in held_out_clips(16)]))


@torch.no_grad()
def _measure_latents(vae: Vae) -> None:
    """Sets `latent_mean` and `latent_std`: of each channel of the posterior's mean, over 200 clips."""
    rng = np.random.default_rng(17)
    values = []
    for _ in range(200):
        clip = render(TRAINED[rng.integers(len(TRAINED))], 64, 64, 17, rng)
        values.append(whole(vae.encoder, to_pixels(clip[None])).chunk(2, dim=1)[0].transpose(0, 1).flatten(1))
    latents = torch.cat(values, dim=1)
    vae.latent_mean.copy_(latents.mean(dim=1).reshape(vae.latent_mean.shape))
    vae.latent_std.copy_(latents.std(dim=1).reshape(vae.latent_std.shape))
