"""Reference captioner: a small encoder over a clip's tokens, and a causal decoder that names what it reads there.

Flows in: spacetime tokens with coordinate columns, then one word at a time. Flows out: the decoder's cross-attention
keys and values, once a clip, and the logits of each next word. The words before are explicit: every block's keys and
values go in and come out in a cache of fixed length, so that no extent grows from word to word. A whole caption in one
pass, each word seeing those before it, is the same arithmetic and what training uses. Knows nothing of search, frames
or spelling.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tubelet.runtime.spec import CaptionerSpec

from .dit import EPSILON, attend, split_heads


class Words:
    """Threads the keys and values of the words so far through one pass, block by block.

    A pass with a cache is one word at `position`; a pass without one is a whole caption from position 0 on.
    """

    def __init__(self, position: Tensor, past: tuple[Tensor, Tensor] | None):
        self._past = past
        self._next: list[tuple[Tensor, Tensor]] = []
        if past is None:
            self.visible = position[:, None] >= position[None, :]  # [L,L]
        else:
            places = torch.arange(past[0].shape[3], device=position.device)
            self._here = (places == position)[:, None]  # [length,1]
            self.visible = (places <= position)[None, :]  # [1,length]

    def extend(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """The next block's keys and values [B,heads,*,D], joined with those of the words before."""
        if self._past is not None:
            block = len(self._next)
            k, v = (torch.where(self._here, new, old[block]) for new, old in zip((k, v), self._past, strict=True))
        self._next.append((k, v))
        return k, v

    def next(self) -> tuple[Tensor, Tensor]:
        """Keys and values [blocks,B,heads,*,D] for the word after."""
        k, v = zip(*self._next, strict=True)
        return torch.stack(k), torch.stack(v)


def feed_forward(spec: CaptionerSpec) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(spec.width, spec.ffn_width), nn.GELU(approximate="tanh"), nn.Linear(spec.ffn_width, spec.width)
    )


class SelfAttention(nn.Module):
    def __init__(self, spec: CaptionerSpec):
        super().__init__()
        self.heads = spec.heads
        self.q = nn.Linear(spec.width, spec.width)
        self.k = nn.Linear(spec.width, spec.width)
        self.v = nn.Linear(spec.width, spec.width)
        self.o = nn.Linear(spec.width, spec.width)

    def forward(self, x: Tensor, words: Words | None = None) -> Tensor:
        """x [B,N,width], of which each sees all, or of a caption's words [B,L,width] each sees those before."""
        q, k, v = (split_heads(project(x), self.heads) for project in (self.q, self.k, self.v))
        if words is None:
            return self.o(attend(q, k, v))
        k, v = words.extend(k, v)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=words.visible)
        return self.o(y.transpose(1, 2).flatten(2))


class EncoderBlock(nn.Module):
    def __init__(self, spec: CaptionerSpec):
        super().__init__()
        self.norm1 = nn.LayerNorm(spec.width, eps=EPSILON)
        self.self_attention = SelfAttention(spec)
        self.norm2 = nn.LayerNorm(spec.width, eps=EPSILON)
        self.ffn = feed_forward(spec)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attention(self.norm1(x))
        return x + self.ffn(self.norm2(x))


class CaptionerMemory(nn.Module):
    """Tokens -> every decoder block's cross-attention keys and values, once a clip."""

    def __init__(self, spec: CaptionerSpec):
        super().__init__()
        self.heads = spec.heads
        self.embed = nn.Linear(spec.token_inputs, spec.width)
        self.blocks = nn.ModuleList(EncoderBlock(spec) for _ in range(spec.encoder_depth))
        self.norm = nn.LayerNorm(spec.width, eps=EPSILON)
        self.k = nn.ModuleList(nn.Linear(spec.width, spec.width) for _ in range(spec.decoder_depth))
        self.v = nn.ModuleList(nn.Linear(spec.width, spec.width) for _ in range(spec.decoder_depth))

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """[B,N,values + coordinates] -> cross_k, cross_v [blocks,B,heads,N,D]."""
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        k, v = ([split_heads(project(x), self.heads) for project in projections] for projections in (self.k, self.v))
        return torch.stack(k), torch.stack(v)


class DecoderBlock(nn.Module):
    def __init__(self, spec: CaptionerSpec):
        super().__init__()
        self.heads = spec.heads
        self.norm1 = nn.LayerNorm(spec.width, eps=EPSILON)
        self.self_attention = SelfAttention(spec)
        self.norm2 = nn.LayerNorm(spec.width, eps=EPSILON)
        self.q = nn.Linear(spec.width, spec.width)
        self.o = nn.Linear(spec.width, spec.width)
        self.norm3 = nn.LayerNorm(spec.width, eps=EPSILON)
        self.ffn = feed_forward(spec)

    def forward(self, x: Tensor, words: Words, cross_k: Tensor, cross_v: Tensor) -> Tensor:
        """x [B,L,width], cross_k and cross_v [B,heads,N,D]."""
        x = x + self.self_attention(self.norm1(x), words)
        x = x + self.o(attend(split_heads(self.q(self.norm2(x)), self.heads), cross_k, cross_v))
        return x + self.ffn(self.norm3(x))


class Captioner(nn.Module):
    """The decoder; its keys and values of the clip come from the CaptionerMemory."""

    def __init__(self, spec: CaptionerSpec):
        super().__init__()
        self.embed_words = nn.Embedding(spec.vocabulary, spec.width)
        self.embed_places = nn.Embedding(spec.length, spec.width)
        self.blocks = nn.ModuleList(DecoderBlock(spec) for _ in range(spec.decoder_depth))
        self.norm_out = nn.LayerNorm(spec.width, eps=EPSILON)
        self.project_out = nn.Linear(spec.width, spec.vocabulary)

    def forward(
        self, ids: Tensor, position: Tensor, cross_k: Tensor, cross_v: Tensor, past_k: Tensor, past_v: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One word: ids int64 [B,1], position int64 [1], cross_k and cross_v [blocks,B,heads,N,D], past_k and past_v
        [blocks,B,heads,length,D], read up to `position` -> logits [B,vocabulary], next_k, next_v."""
        words = Words(position, (past_k, past_v))
        return self._logits(ids, position, words, cross_k, cross_v)[:, 0], *words.next()

    def whole(self, ids: Tensor, cross_k: Tensor, cross_v: Tensor) -> Tensor:
        """A caption in one pass: ids [B,L], the start first -> logits [B,L,vocabulary] of the word after each."""
        position = torch.arange(ids.shape[1], device=ids.device)
        return self._logits(ids, position, Words(position, None), cross_k, cross_v)

    def _logits(self, ids: Tensor, position: Tensor, words: Words, cross_k: Tensor, cross_v: Tensor) -> Tensor:
        x = self.embed_words(ids) + self.embed_places(position)
        for i, block in enumerate(self.blocks):
            x = block(x, words, cross_k[i], cross_v[i])
        return self.project_out(self.norm_out(x))
