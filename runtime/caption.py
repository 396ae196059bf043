"""A clip in words: latent -> tokens -> the captioner's memory -> beam search over its next words.

Flows in: a normalised latent [C,T',h,w] (`Pipeline.encode` makes it) and the engines `captioner_memory` and
`captioner`. Flows out: text. Knows nothing of frames, files, or how an engine runs; `search` knows nothing of engines.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import kernels
from .engines import Components, Engine
from .errors import UserError
from .geometry import coordinate_columns
from .spec import CaptionerSpec, ModelSpec
from .strict import require
from .text import PromptTokenizer

MAX_BEAMS = 64
Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]
Ids = NDArray[np.int64]
# (position, the beams that go on [W], the word of each [W]) -> log-probabilities of each one's next word [W,vocabulary]
Step = Callable[[int, Ids, Ids], Float64]


class Captioner:
    """Names clips with a loaded model's engines. May be shared by threads."""

    def __init__(self, spec: ModelSpec, engines: Components, tokenizer: PromptTokenizer):
        """Raises UserError when the model has no captioner."""
        if spec.captioner is None:
            raise UserError(f"the model {spec.name} has no captioner; export one that has")
        self.spec, self._model = spec.captioner, spec
        self.engines, self.tokenizer = engines, tokenizer

    def caption(self, latent: Float32, beams: int = 1) -> str:
        """The likeliest caption that a search with this many beams finds; one beam is greedy.

        `latent` is normalised, float32 [C,T',h,w]. Raises UserError for a clip of more tokens than the model takes
        and for a number of beams that is not from 1 to MAX_BEAMS.
        """
        require(1 <= beams <= MAX_BEAMS, f"beams must be from 1 to {MAX_BEAMS}, is {beams}")
        memory = self.engines["captioner_memory"]({"tokens": self._tokens(latent)})
        step = decoder(self.spec, self.engines["captioner"], memory["cross_k"], memory["cross_v"], beams)
        ids, _ = search(step, beams, self.spec.length, self.spec.start, self.spec.end)
        return self.tokenizer.text(ids)

    def _tokens(self, latent: Float32) -> Float32:
        """[C,T',h,w] -> latent values and coordinate columns, [1,N,P+17]."""
        patch = self._model.denoiser.patch
        t, h, w = (extent // part for extent, part in zip(latent.shape[1:], patch, strict=True))
        most = self._model.max_tokens
        require(t * h * w <= most, f"the clip is {t * h * w} tokens, the model takes {most}; shorten or shrink it")
        return np.concatenate([kernels.pack(latent, patch), coordinate_columns((t, h, w))], axis=1)[None]


def decoder(spec: CaptionerSpec, engine: Engine, cross_k: Float32, cross_v: Float32, beams: int) -> Step:
    """A search's step on an engine: one bound set of arrays for all words, so every beam is run at every step.

    `cross_k` and `cross_v` [blocks,1,heads,N,D] are of one clip, which all beams read.
    """
    cache = (spec.decoder_depth, beams, spec.heads, spec.length, spec.head_size)
    inputs: dict[str, NDArray[Any]] = {
        "ids": np.zeros((beams, 1), np.int64),
        "position": np.zeros(1, np.int64),
        "cross_k": np.repeat(cross_k, beams, axis=1),
        "cross_v": np.repeat(cross_v, beams, axis=1),
        "past_k": np.zeros(cache, np.float32),
        "past_v": np.zeros(cache, np.float32),
    }
    outputs: dict[str, NDArray[Any]] = {
        "logits": np.zeros((beams, spec.vocabulary), np.float32),
        "next_k": np.zeros(cache, np.float32),
        "next_v": np.zeros(cache, np.float32),
    }
    binding = engine.bind(inputs, outputs)

    def step(position: int, parents: Ids, words: Ids) -> Float64:
        inputs["position"][0], inputs["ids"][:, 0] = position, words
        for name in ("k", "v"):
            np.take(outputs[f"next_{name}"], parents, axis=1, out=inputs[f"past_{name}"], mode="clip")
        binding.run()
        logits = outputs["logits"].astype(np.float64)
        logits -= logits.max(axis=1, keepdims=True)
        return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))

    return step


def search(step: Step, beams: int, length: int, start: int, end: int) -> tuple[list[int], float]:
    """The best caption found, without its end, and its mean log-probability a word, the end being one.

    At each position the likeliest `beams` continuations of all live beams are kept; one that ends leaves its place
    empty. After `length` words those that have not ended count as they are. The search stops when no live beam can
    become the best: probabilities are at most 1, so the mean of what it goes on to is at most its sum over `length`.
    """
    parents, words = np.zeros(beams, np.int64), np.full(beams, start)
    totals = np.full(beams, -math.inf)  # an empty place has no probability
    totals[0] = 0.0
    histories: list[list[int]] = [[] for _ in range(beams)]
    best: tuple[list[int], float] = ([], -math.inf)
    for position in range(length):
        continued = totals[:, None] + step(position, parents, words)  # [W,vocabulary]
        order = np.argsort(-continued, axis=None, kind="stable")[:beams]
        parents, words = np.divmod(order, continued.shape[1])
        totals = continued.ravel()[order]
        histories = [[*histories[parent], int(word)] for parent, word in zip(parents, words, strict=True)]
        final = np.full(beams, position + 1 == length)
        for beam in np.flatnonzero(final | (words == end)):
            mean = float(totals[beam]) / (position + 1)
            if mean > best[1]:
                ids = histories[beam]
                best = (ids[:-1] if ids[-1] == end else ids, mean)
        totals[words == end] = -math.inf
        if totals.max() / length <= best[1]:
            break
    return best
