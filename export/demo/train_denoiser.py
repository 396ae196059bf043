"""Trains the embedded model's text encoder and denoiser together, by flow matching on cached latents.

Flows in: `vae.pt`. Flows out: `latents.pt` (a pool of encoded clips), for each descent of the learning rate its end
(weights averaged over training), and `denoiser.pt`, the mean of the last two. Every step draws a size, a duration,
noise levels and known tokens from a seed of its own, so a resumed training sees what a whole one would have; the
compiled denoiser may round differently after a restart.

Known tokens (clean, at noise level 0) are what later tasks are made of: first frames, last frames, both ends, all but
a box in space and time, or single frames anywhere.
"""

from __future__ import annotations

import bisect
import dataclasses
import itertools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import Tensor, nn

from tubelet.runtime import kernels
from tubelet.runtime.geometry import coordinate_columns
from tubelet.runtime.schedule import make_schedule, time_features
from tubelet.runtime.spec import ModelSpec
from tubelet.runtime.text import PromptTokenizer

from ..dit import Conditioner, Denoiser
from ..text_encoder import TextEncoder
from ..vae import Vae, whole
from .recipe import tokenizer
from .train_vae import to_pixels
from .training import Checkpoint, Optimizers, averaged, mixed, save, trapezoid, unit_gain_
from .world import OPPOSITE, TRAINED, Scene, caption, render

# Kinds of clips; of each: width, height, frames that the motion is drawn for, clips in the pool.
POOLS: dict[str, tuple[tuple[int, int, int, int], ...]] = {
    "plain": (
        *((w, h, f, n) for w, h in ((48, 48), (64, 48), (48, 64), (64, 64)) for f, n in ((17, 220), (33, 220))),
        *((w, h, f, n) for w, h in ((80, 48), (48, 80), (80, 64), (64, 80)) for f, n in ((17, 80), (33, 80))),
        *((w, h, f, n) for w, h in ((96, 48), (48, 96), (96, 64), (64, 96), (80, 80)) for f, n in ((17, 40), (33, 40))),
        *((w, h, f, n) for w, h in ((96, 96), (96, 80), (80, 96)) for f, n in ((17, 30), (33, 30))),
        *((w, h, 49, 50) for w, h in ((48, 48), (64, 48), (48, 64))),
    ),
    # Without these a picture wider than any trained one shows two objects.
    "wide": (
        *((w, h, f, n) for w, h in ((32, 32), (48, 32), (32, 48)) for f, n in ((17, 40), (33, 40))),
        *((w, h, f, n) for w, h in ((112, 48), (48, 112), (128, 48), (48, 128)) for f, n in ((17, 20), (33, 24))),
        *((w, h, f, n) for w, h in ((128, 64), (64, 128), (112, 80), (80, 112)) for f, n in ((17, 20), (33, 24))),
        *((w, h, f, n) for w, h in ((112, 96), (96, 112), (112, 112)) for f, n in ((17, 16), (33, 20))),
        *((w, h, f, n) for w, h in ((128, 96), (96, 128), (128, 128)) for f, n in ((17, 12), (33, 16))),
        *((w, h, 49, 30) for w, h in ((64, 64), (80, 64), (64, 80), (96, 64), (64, 96), (96, 96))),
        *((w, h, 65, 30) for w, h in ((48, 48), (64, 64))),
    ),
    # Many tokens, or fast motion in a large picture. Without more of these a large object has a second one beside it.
    "large": (
        *((w, h, f, n) for w, h in ((96, 64), (64, 96)) for f, n in ((17, 80), (33, 34))),
        *((w, h, f, n) for w, h in ((80, 80), (96, 80), (80, 96)) for f, n in ((17, 17), (33, 27))),
        *((w, h, f, n) for w, h in ((112, 96), (96, 112)) for f, n in ((17, 7), (33, 14))),
        *((96, 96, f, n) for f, n in ((17, 27), (33, 80), (49, 10))),
        (112, 112, 33, 8),
    ),
    # Clips that end where there is no room left, with known first frames: long videos are made of such. Without these
    # an object that reaches the border appears somewhere else in the next window.
    "stopping": (
        *((64, 64, f, n) for f, n in ((17, 60), (33, 180))),
        *((w, h, 33, 50) for w, h in ((48, 48), (64, 48), (48, 64), (80, 64), (64, 80), (96, 64), (64, 96))),
    ),
    # The same backwards, with known last frames: what was before a clip that starts at the border.
    "starting": tuple(
        (w, h, 33, 40) for w, h in ((48, 48), (64, 48), (48, 64), (64, 64), (80, 64), (64, 80), (96, 64), (96, 96))
    ),
    # A window of a clip of 65 frames, mostly with known ends: a given clip may move half as fast as anything above.
    "slow": tuple(
        (w, h, 33, 50) for w, h in ((48, 48), (64, 48), (48, 64), (64, 64), (80, 64), (64, 80), (96, 64), (96, 96))
    ),
    # Whole motions in few frames.
    "fast": (
        *((w, h, 9, 30) for w, h in ((32, 32), (48, 32), (32, 48), (48, 48), (64, 48), (48, 64), (64, 64))),
        *((w, h, 17, 50) for w, h in ((80, 48), (48, 80), (96, 64), (64, 96))),
    ),
}
SLOW_LENGTH = 65
# Other clips of the same numbers each time. With one round the loss of fresh clips was up to 1.4 times the pool's.
ROUNDS = 3
CLIPS = [(kind, *clips) for _ in range(ROUNDS) for kind, pool in POOLS.items() for clips in pool]
# how often each kind is seen: at first, from WIDE_FROM, and in each descent after the first
SHARES = (
    {"plain": 1.0},
    {"plain": 0.6, "wide": 0.4},
    {"plain": 0.5, "wide": 0.35, "stopping": 0.15},
    {"plain": 0.38, "wide": 0.27, "stopping": 0.07, "starting": 0.07, "slow": 0.09, "fast": 0.12},
    {"plain": 0.34, "wide": 0.22, "stopping": 0.06, "starting": 0.09, "slow": 0.16, "fast": 0.13},
    {"plain": 0.24, "large": 0.3, "wide": 0.15, "stopping": 0.05, "starting": 0.08, "slow": 0.12, "fast": 0.06},
)
# latent frames of a batch, by latent frames of the pool's clips; 11 (41 frames) is never trained
CUTS = {3: (3, 2), 5: (5, 5, 3), 9: (9, 9, 7, 5), 13: (13, 9, 7), 17: (17, 15, 13)}
WIDE_FROM = 5500
DESCENTS = (10000, 2200, 2600, 2200, 2200)  # steps of each descent of the learning rate
PEAKS = (1.0, 0.5, 0.45, 0.45, 0.45)  # of the learning rate
STEPS = sum(DESCENTS)
MIXED = 2  # the last descents, whose weights' mean is kept
IMAGE_SHARES = (0.06, 0.12, 0.12, 0.12, 0.12)  # of each descent
TOKENS_PER_BATCH = 2048
REFERENCE_TOKENS = 144  # of 64x64 and 33 frames
LEARNING_RATE = 2.5e-3
CAPTION_DROP = 0.1
REMADE_CLIPS, REMADE_STRENGTH = 24, 0.25  # of each size and length; share of the sampler's steps
# how often a clip has which pattern of known tokens, in each descent and in kinds of their own
PATTERNS = ("none", "first", "last", "both", "box", "keyframes")
PATTERN_ODDS = (
    (0.7, 0.12, 0.045, 0.06, 0.075, 0.0),
    (0.6, 0.12, 0.06, 0.06, 0.08, 0.08),
    (0.57, 0.12, 0.08, 0.07, 0.08, 0.08),
    (0.57, 0.12, 0.08, 0.07, 0.08, 0.08),
    (0.62, 0.1, 0.08, 0.06, 0.07, 0.07),
)
KIND_ODDS = {
    "stopping": (0.0, 1.0, 0.0, 0.0, 0.0, 0.0),
    "starting": (0.0, 0.0, 1.0, 0.0, 0.0, 0.0),
    "slow": (0.0, 0.4, 0.4, 0.1, 0.1, 0.0),
}


def draw_clip(kind: str, scene: Scene, width: int, height: int, frames: int, rng: np.random.Generator) -> np.ndarray:
    """A clip of one of the kinds, uint8 [frames, height, width, 3]."""
    if kind == "starting":
        back = dataclasses.replace(scene, motion=OPPOSITE.get(scene.motion, scene.motion))
        return render(back, width, height, frames, rng, stops=True)[::-1].copy()
    if kind == "slow":
        clip = render(scene, width, height, SLOW_LENGTH, rng)
        start = rng.integers(SLOW_LENGTH - frames + 1)
        return clip[start : start + frames]
    return render(scene, width, height, frames, rng, stops=kind == "stopping")


def encode_pool(spec: ModelSpec, folder: Path) -> None:
    """Renders and encodes what the pool lacks: per size and length, latents fp16 [n,C,T',h,w] and scenes' numbers."""
    vae, file = _vae(spec, folder), folder / "latents.pt"
    pool = torch.load(file, weights_only=True) if file.exists() else []
    order = np.random.default_rng(31).permutation(len(TRAINED))
    drawn = sum(len(entry["scenes"]) for entry in pool)
    for number in range(len(pool), len(CLIPS)):
        kind, width, height, frames, count = CLIPS[number]
        rng = np.random.default_rng((37, number))
        scenes = [int(order[i % len(TRAINED)]) for i in range(drawn, drawn + count)]
        drawn += count
        clips = np.stack([draw_clip(kind, TRAINED[scene], width, height, frames, rng) for scene in scenes])
        with torch.no_grad():
            latents = [
                whole(vae.encoder, to_pixels(some).contiguous(memory_format=torch.channels_last_3d)).chunk(2, dim=1)[0]
                for some in np.array_split(clips, math.ceil(count / 4))
            ]
        pool.append({"kind": kind, "latents": torch.cat(latents).half(), "scenes": scenes})
        print(f"encoded {kind} {width}x{height}x{frames}: {count} clips", flush=True)
        if len(pool) % (len(CLIPS) // ROUNDS) == 0:
            save(pool, file)


def _vae(spec: ModelSpec, folder: Path) -> Vae:
    vae = Vae(spec.vae)
    vae.load_state_dict(torch.load(folder / "vae.pt", weights_only=True))
    return vae.eval()


class Model(nn.Module):
    """What is trained together; the unconditional branch is the empty prompt."""

    def __init__(self, spec: ModelSpec):
        super().__init__()
        self.text_encoder = TextEncoder(spec.text_encoder)
        self.conditioner = Conditioner(spec.denoiser)
        self.denoiser = Denoiser(spec.denoiser)
        unit_gain_(self)
        nn.init.zeros_(self.denoiser.project_out.weight)
        with torch.no_grad():
            for name, parameter in self.denoiser.named_parameters():
                if name.endswith((".o.weight", "ffn.2.weight")):  # what adds to the residual stream starts small
                    parameter.mul_(0.4)

    def forward(self, batch: Batch, noisy: Tensor, features: Tensor) -> Tensor:
        cross_k, cross_v = self.conditioner(self.text_encoder(batch.ids, batch.mask))
        tokens = torch.cat([noisy, batch.coordinates.expand(len(noisy), -1, -1)], dim=2)
        return self.denoiser(tokens, features, batch.rope[0], batch.rope[1], cross_k, cross_v, batch.known)


@dataclasses.dataclass(frozen=True)
class Batch:
    clean: Tensor  # [B,N,P]
    known: Tensor  # [B,N]
    ids: Tensor  # [B,L]
    mask: Tensor
    coordinates: Tensor  # [N,17]
    rope: tuple[Tensor, Tensor]  # [N,D/2] each


def pack(latents: Tensor, patch: tuple[int, int, int]) -> Tensor:
    """[B,C,T,H,W] -> tokens [B,N,C*pt*ph*pw]: the batched torch twin of `runtime.kernels.pack`."""
    b, c, t, h, w = latents.shape
    pt, ph, pw = patch
    x = latents.reshape(b, c, t // pt, pt, h // ph, ph, w // pw, pw)
    return x.permute(0, 2, 4, 6, 1, 3, 5, 7).reshape(b, -1, c * pt * ph * pw)


def rate(step: int) -> float:
    """Share of the peak learning rate: down to zero in every descent."""
    number = descent(step)
    flat = 0.2 if number else 0.5
    return PEAKS[number] * trapezoid(step - sum(DESCENTS[:number]), DESCENTS[number], flat=flat)


def descent(step: int) -> int:
    """Which descent of the learning rate the step belongs to, from 0."""
    return bisect.bisect(list(itertools.accumulate(DESCENTS[:-1])), step)


def draw_known(grid: tuple[int, int, int], rng: np.random.Generator, odds: tuple[float, ...]) -> np.ndarray:
    """A random pattern of known tokens [T,H,W], of PATTERNS with these odds."""
    t = grid[0]
    known = np.zeros(grid, np.float32)
    kind = rng.choice(PATTERNS, p=odds)
    for side, kinds in ((slice(None), ("first", "both")), (slice(None, None, -1), ("last", "both"))):
        if kind in kinds:
            known[side][: 1 if rng.random() < 0.35 else rng.integers(1, max(2, t // 2 + 1))] = 1
    if kind == "box":
        low = [rng.integers(n) for n in grid]
        high = [rng.integers(a + 1, n + 1) for a, n in zip(low, grid, strict=True)]
        known[:] = 1
        known[tuple(slice(a, b) for a, b in zip(low, high, strict=True))] = 0
    if kind == "keyframes":
        known[rng.integers(t, size=rng.integers(1, 4))] = 1
    return known if not known.all() else np.zeros_like(known)


class Batches:
    """Draws the batch of a step from the pool: same size and length, about TOKENS_PER_BATCH tokens."""

    def __init__(self, spec: ModelSpec, folder: Path):
        self.spec = spec
        self.pool = torch.load(folder / "latents.pt", weights_only=True)
        self.tokenizer = PromptTokenizer(tokenizer(), spec.text_encoder.length)
        vae = spec.vae
        self.mean = torch.tensor(vae.latent_mean)[None, :, None, None, None]
        self.std = torch.tensor(vae.latent_std)[None, :, None, None, None]
        kinds, counts = np.array([kind for kind, *_ in CLIPS]), np.array([count for *_, count in CLIPS], np.float64)
        self.odds = [
            sum(share * (kinds == kind) * counts / counts[kinds == kind].sum() for kind, share in shares.items())
            for shares in SHARES
        ]

    def __call__(self, step: int) -> Batch:
        rng = np.random.default_rng((41, step))
        entry = self.pool[rng.choice(len(self.pool), p=self.odds[(step >= WIDE_FROM) + descent(step)])]
        odds = KIND_ODDS.get(entry["kind"], PATTERN_ODDS[descent(step)])
        image = rng.random() < IMAGE_SHARES[descent(step)] and entry["kind"] not in KIND_ODDS
        frames = 1 if image else int(rng.choice(CUTS[entry["latents"].shape[2]]))
        height, width = entry["latents"].shape[3:]
        _, ph, pw = self.spec.denoiser.patch
        grid = (frames, height // ph, width // pw)
        count = min(64, max(4, TOKENS_PER_BATCH // math.prod(grid)))
        chosen = rng.integers(len(entry["scenes"]), size=count)
        scenes: Iterator[Scene] = (TRAINED[entry["scenes"][i]] for i in chosen)
        captions = ["" if rng.random() < CAPTION_DROP else caption(scene, rng, image) for scene in scenes]
        known = np.stack([draw_known(grid, rng, odds).ravel() for _ in range(count)])
        return self.make(entry["latents"][chosen, :, :frames], captions, known)

    def make(self, latents: Tensor, captions: list[str], known: np.ndarray | None = None) -> Batch:
        """A batch of these clips: latents as the VAE gives them [B,C,T,H,W], known tokens float32 [B,N] or none."""
        denoiser = self.spec.denoiser
        grid = cast(tuple[int, int, int], tuple(n // p for n, p in zip(latents.shape[2:], denoiser.patch, strict=True)))
        ids, mask = self.tokenizer(captions)
        rope = kernels.rope3d(grid, denoiser.head_size, theta=denoiser.theta)
        clean = pack((latents.float() - self.mean) / self.std, denoiser.patch)
        return Batch(
            clean=clean,
            known=torch.zeros(clean.shape[:2]) if known is None else torch.from_numpy(known),
            ids=torch.from_numpy(ids),
            mask=torch.from_numpy(mask),
            coordinates=torch.from_numpy(coordinate_columns(grid)),
            rope=(torch.from_numpy(rope[0]), torch.from_numpy(rope[1])),
        )


def noise_shift(step: int, tokens: int) -> float:
    """How far noise levels are shifted towards noise, where motion is decided.

    In the last descent further where there are more tokens (as Esser et al. 2024, arXiv:2403.03206, section 5.3.2):
    at one level of noise they tell more of the clip than few do.
    """
    if descent(step) < len(DESCENTS) - 1:
        return 3.0
    return 4.0 * math.sqrt(max(1.0, tokens / REFERENCE_TOKENS))


def draw_sigmas(count: int, shift: float) -> Tensor:
    """Noise levels [count]: logit-normal, shifted."""
    sigma = torch.sigmoid(torch.randn(count))
    return shift * sigma / (1 + (shift - 1) * sigma)


def flow_loss(model: Model, batch: Batch, sigma: Tensor, noise: Tensor, features: int) -> Tensor:
    """Mean squared error of the velocity [B] over unknown tokens."""
    noisy = (1 - sigma)[:, None, None] * batch.clean + sigma[:, None, None] * noise
    noisy = torch.where(batch.known[..., None] > 0, batch.clean, noisy)
    levels = np.stack([1000 * sigma.double().numpy(), np.zeros(len(sigma))], axis=1)
    velocity = model(batch, noisy, torch.from_numpy(time_features(levels, features)))
    error = (velocity - (noise - batch.clean)).square().mean(dim=2) * (1 - batch.known)
    return error.sum(dim=1) / (1 - batch.known).sum(dim=1)


def train(spec: ModelSpec, folder: Path) -> None:
    torch.manual_seed(2)
    model = Model(spec)
    average = averaged(model, 0.998)
    model.denoiser.compile(dynamic=True)  # fused element-wise work: a fifth of the time of forward and backward
    optimizers = Optimizers(model, LEARNING_RATE, LEARNING_RATE)
    batches = Batches(spec, folder)
    state = {"model": model, "average": average, "optimizers": optimizers}
    checkpoint = Checkpoint(folder / "denoiser_training.pt", state, every=250)
    gaps = {
        name: lambda pair=pair: word_gap(cast(Model, average.module), batches, *pair) for name, pair in GAPS.items()
    }
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        for step in checkpoint.steps(STEPS, gaps):
            torch.manual_seed(1_000_000 + step)
            batch = batches(step)
            sigma = draw_sigmas(len(batch.clean), noise_shift(step, batch.clean.shape[1]))
            loss = flow_loss(model, batch, sigma, torch.randn_like(batch.clean), spec.denoiser.time_features).mean()
            model.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizers.step(rate(step))
            average.update_parameters(model)
            if descent(step + 1) > descent(step) or step + 1 == STEPS:
                save(average.module.state_dict(), _end(folder, descent(step)))
            checkpoint.log(loss=loss.item(), tokens=batch.clean.shape[0] * batch.clean.shape[1])
    ends = [_end(folder, number) for number in range(len(DESCENTS) - MIXED, len(DESCENTS))]
    save(mixed([torch.load(end, weights_only=True) for end in ends]), folder / "denoiser.pt")


def _end(folder: Path, number: int) -> Path:
    """The weights at the end of a descent."""
    return folder / f"denoiser_{number}.pt"


@torch.no_grad()
def remake(spec: ModelSpec, folder: Path) -> None:
    """Small clips of the pool and their latents as a sampler ends on them, for the decoder to learn from: `remade.pt`.

    The latents are noised as they are some steps before the end of sampling, where all motion is decided, and denoised
    again with the default settings: pixels uint8 [n,T,H,W,3] and latents fp16 [n,C,T',h,w] by size and length.
    """
    model, batches, remade = Model(spec), Batches(spec, folder), []
    model.load_state_dict(torch.load(folder / "denoiser.pt", weights_only=True))
    default, size = spec.defaults, spec.denoiser.time_features
    sigmas = make_schedule("euler", default.steps, default.shift_at(spec.max_tokens), REMADE_STRENGTH).sigmas
    for number in range(len(CLIPS) - len(CLIPS) // ROUNDS, len(CLIPS)):  # the last round
        (kind, width, height, frames, count), entry = CLIPS[number], batches.pool[number]
        if kind not in ("plain", "fast") or width * height > 96 * 64 or frames > 33:
            continue
        rng, torch_rng = np.random.default_rng((37, number)), torch.Generator().manual_seed(number)
        some = slice(min(count, REMADE_CLIPS))
        scenes = [TRAINED[scene] for scene in entry["scenes"][some]]
        pixels = np.stack([draw_clip(kind, scene, width, height, frames, rng) for scene in scenes])
        latents = entry["latents"][some]
        shown, unshown = (
            batches.make(latents, captions) for captions in ([caption(s, rng) for s in scenes], [""] * len(scenes))
        )
        noise = torch.randn(shown.clean.shape, generator=torch_rng)
        x = (1 - sigmas[0]) * shown.clean + sigmas[0] * noise
        for sigma, lower in itertools.pairwise(sigmas):
            features = torch.from_numpy(time_features(np.tile([1000 * sigma, 0.0], (len(x), 1)), size))
            guided, free = (model(batch, x.float(), features) for batch in (shown, unshown))
            x = x + (lower - sigma) * (free + default.guidance * (guided - free))
        channels, *extents = latents.shape[1:]
        grid = tuple(n // p for n, p in zip(extents, spec.denoiser.patch, strict=True))
        unpacked = [kernels.unpack(tokens, channels, grid, spec.denoiser.patch) for tokens in x.float().numpy()]
        made = torch.from_numpy(np.stack(unpacked)) * batches.std + batches.mean
        remade.append({"pixels": torch.from_numpy(pixels), "latents": made.half()})
        print(f"remade {kind} {width}x{height}x{frames}: {(made - latents).square().mean().sqrt():.3f}", flush=True)
    save(remade, folder / "remade.pt")


GAPS = {
    "gap_left_right": ("left", "right"),
    "gap_up_down": ("up", "down"),
    "gap_grow_shrink": ("grows", "shrinks"),
    "gap_shape": ("circle", "square"),
    "gap_colour": ("red", "purple"),
}


@torch.no_grad()
def word_gap(model: Model, batches: Batches, word: str, other: str) -> float:
    """How much the loss rises at high noise when one word of the caption is swapped: near 0 means not learnt."""
    entry = batches.pool[0]  # 48x48x17
    named = {"up": "rises up", "down": "falls down", "left": "moves left", "right": "moves right"}
    chosen = [
        i for i, s in enumerate(entry["scenes"]) if word in (TRAINED[s].motion, TRAINED[s].shape, TRAINED[s].colour)
    ][:32]
    latents, losses = entry["latents"][chosen], []
    for swap in (False, True):
        captions = []
        for i in chosen:
            scene = TRAINED[entry["scenes"][i]]
            verb = named.get(scene.motion, scene.motion)
            text = f"a {scene.colour} {scene.shape} {verb} on a {scene.background} background"
            text = text.replace(named.get(word, word), named.get(other, other)) if swap else text
            captions.append(text.replace("a orange", "an orange"))
        batch = batches.make(latents, captions)
        torch.manual_seed(3)
        noise = torch.randn_like(batch.clean)
        sigma = torch.full((len(chosen),), 0.9)
        losses.append(flow_loss(model, batch, sigma, noise, batches.spec.denoiser.time_features).mean().item())
    return losses[1] - losses[0]
