"""Trains the embedded model's captioner to name the clips of the pool.

Flows in: `latents.pt`. Flows out: `captioner.pt` (weights averaged over training). Every scene has one wording, so that
the likeliest caption is a whole one and not an average of many; a single frame's leaves out the motion, which it does
not show. Latents are lightly noised, because those of generated clips are not exact. Every step draws its clips from a
seed of its own, so a resumed training is the same as a whole one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tubelet.runtime.geometry import coordinate_columns
from tubelet.runtime.spec import ModelSpec
from tubelet.runtime.text import PromptTokenizer
from tubelet.runtime.world import TEMPLATES, say

from ..captioner import Captioner, CaptionerMemory
from .recipe import PAD, captioner_spec, tokenizer
from .train_denoiser import CUTS, pack
from .training import Checkpoint, Optimizers, averaged, save, trapezoid, unit_gain_
from .world import STILL_TEMPLATES, TRAINED, VERBS, Scene

STEPS = 1200
TOKENS_PER_BATCH = 2048
IMAGE_SHARE = 0.2
NOISE = 0.3  # most noise beside a latent, in units of its spread
LEARNING_RATE = 2.5e-3


def name(scene: Scene, image: bool) -> str:
    """The one wording of a scene, or of a single frame of it."""
    template = STILL_TEMPLATES[0] if image else TEMPLATES[0]
    return say(scene, template, VERBS[scene.motion][0])


class Model(nn.Module):
    """What is trained together."""

    def __init__(self) -> None:
        super().__init__()
        self.captioner_memory = CaptionerMemory(captioner_spec())
        self.captioner = Captioner(captioner_spec())
        unit_gain_(self)
        for embedding in (self.captioner.embed_words, self.captioner.embed_places):
            nn.init.normal_(embedding.weight, std=captioner_spec().width ** -0.5)
        with torch.no_grad():
            for parameter, weight in self.named_parameters():
                if parameter.endswith((".o.weight", "ffn.2.weight")):  # what adds to the residual stream starts small
                    weight.mul_(0.4)

    def forward(self, batch: Batch) -> Tensor:
        """Logits [B,L,vocabulary] of every word of the captions."""
        return self.captioner.whole(batch.before, *self.captioner_memory(batch.tokens))


@dataclass(frozen=True)
class Batch:
    tokens: Tensor  # [B,N,P+17]
    before: Tensor  # [B,L]: the word before each of `words`, the start before the first
    words: Tensor  # [B,L]: the captions with their ends, then PAD


class Batches:
    """Draws batches from the pool: clips of one size and length, or their first frames."""

    def __init__(self, spec: ModelSpec, folder: Path):
        self.patch = spec.denoiser.patch
        pool = torch.load(folder / "latents.pt", weights_only=True)
        self.pool = [entry for entry in pool if entry["kind"] in ("plain", "wide")]  # others need not show a motion
        self.tokenizer = PromptTokenizer(tokenizer(), captioner_spec().length)
        shape = (1, spec.vae.latent_channels, 1, 1, 1)
        self.mean, self.std = (torch.tensor(v).reshape(shape) for v in (spec.vae.latent_mean, spec.vae.latent_std))
        counts = np.array([len(entry["scenes"]) for entry in self.pool])
        self.odds = counts / counts.sum()

    def __call__(self, step: int) -> Batch:
        rng = np.random.default_rng((43, step))
        entry = self.pool[rng.choice(len(self.pool), p=self.odds)]
        image = bool(rng.random() < IMAGE_SHARE)
        frames = 1 if image else int(rng.choice(CUTS[entry["latents"].shape[2]]))
        height, width = entry["latents"].shape[3:]
        _, ph, pw = self.patch
        grid = (frames, height // ph, width // pw)
        count = min(64, max(4, TOKENS_PER_BATCH // math.prod(grid)))
        chosen = rng.integers(len(entry["scenes"]), size=count)
        latents = (entry["latents"][chosen, :, :frames].float() - self.mean) / self.std
        spread = torch.from_numpy(rng.random((count, 1, 1, 1, 1), np.float32)) * NOISE
        latents += spread * torch.from_numpy(rng.standard_normal(latents.shape, np.float32))
        places = torch.from_numpy(coordinate_columns(grid)).expand(count, -1, -1)
        words = torch.from_numpy(self.tokenizer([name(TRAINED[entry["scenes"][i]], image) for i in chosen])[0])
        before = torch.cat([torch.full((count, 1), captioner_spec().start), words[:, :-1]], dim=1)
        return Batch(torch.cat([pack(latents, self.patch), places], dim=2), before, words)


def train(spec: ModelSpec, folder: Path) -> None:
    torch.manual_seed(3)
    model = Model()
    average = averaged(model, 0.99)
    optimizers = Optimizers(model, LEARNING_RATE, LEARNING_RATE)
    batches = Batches(spec, folder)
    state = {"model": model, "average": average, "optimizers": optimizers}
    checkpoint = Checkpoint(folder / "captioner_training.pt", state, every=250)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        for step in checkpoint.steps(STEPS, {}):
            batch = batches(step)
            loss = F.cross_entropy(model(batch).flatten(0, 1), batch.words.flatten(), ignore_index=PAD)
            model.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizers.step(trapezoid(step, STEPS, flat=0.5))
            average.update_parameters(model)
            checkpoint.log(loss=loss.item())
    save(average.module.state_dict(), folder / "captioner.pt")
