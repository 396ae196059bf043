"""Reference diffusion transformer over spacetime tokens, in the architecture family of Wan 2.x and LTX-Video.

Flows in: noisy tokens, features of the noise level, rotary tables and the text's keys and values. Flows out: the
velocity (noise - clean) of every token. Knows nothing of frames, rows and columns: those live in the rotary tables
and in the tokens' conditioning columns. What does not change from step to step, of text and of pictures, is made by the
Conditioner and the ImageConditioner.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tubelet.runtime.spec import DenoiserSpec, ImageAttentionSpec, LtxDenoiserSpec

from .stack import Stack

EPSILON = 1e-6
HIDDEN = -1e4  # what padding's scores are lowered by, as in the reference; float16 holds it


@dataclass(frozen=True)
class Norms:
    """The norms of a kind of block, by width."""

    modulated: Callable[[int], nn.Module]  # before self-attention and FFN
    crossing: Callable[[int], nn.Module]  # before cross-attention
    keys: Callable[[int], nn.Module]  # of queries and keys, across all heads


NORMS: Mapping[type[DenoiserSpec], Norms] = {
    DenoiserSpec: Norms(
        modulated=lambda width: nn.LayerNorm(width, eps=EPSILON, elementwise_affine=False),
        crossing=lambda width: nn.LayerNorm(width, eps=EPSILON),
        keys=lambda width: nn.RMSNorm(width, eps=EPSILON),
    ),
    LtxDenoiserSpec: Norms(
        modulated=lambda width: nn.RMSNorm(width, eps=EPSILON, elementwise_affine=False),
        crossing=nn.Identity,
        keys=lambda width: nn.RMSNorm(width, eps=1e-5),
    ),
}


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates interleaved pairs of [B,heads,N,D] by tables [N,D/2] or [heads,N,D/2] (RoFormer, eq. 34)."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)


def split_heads(x: Tensor, heads: int) -> Tensor:
    """[B,N,heads*D] -> [B,heads,N,D]."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """Attention over [B,heads,*,D] with scores that `bias` [B,1,N,L] is added to, heads joined: [B,N,heads*D]."""
    return F.scaled_dot_product_attention(q, k, v, bias).transpose(1, 2).flatten(2)


class SelfAttention(nn.Module):
    def __init__(self, spec: DenoiserSpec):
        super().__init__()
        self.heads = spec.heads
        self.q = nn.Linear(spec.width, spec.width)
        self.k = nn.Linear(spec.width, spec.width)
        self.v = nn.Linear(spec.width, spec.width)
        self.o = nn.Linear(spec.width, spec.width)
        self.norm_q = NORMS[type(spec)].keys(spec.width)
        self.norm_k = NORMS[type(spec)].keys(spec.width)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q = rotate(split_heads(self.norm_q(self.q(x)), self.heads), cos, sin)
        k = rotate(split_heads(self.norm_k(self.k(x)), self.heads), cos, sin)
        return self.o(attend(q, k, split_heads(self.v(x), self.heads)))


Source = tuple[Tensor, Tensor, Tensor | None]  # keys and values [B,heads,L,D], and a bias on scores [B,1,N,L]


class CrossAttention(nn.Module):
    """The query side; keys and values come from the Conditioner, and those of pictures from the ImageConditioner."""

    def __init__(self, spec: DenoiserSpec):
        super().__init__()
        self.heads = spec.heads
        self.q = nn.Linear(spec.width, spec.width)
        self.o = nn.Linear(spec.width, spec.width)
        self.norm_q = NORMS[type(spec)].keys(spec.width)

    def forward(self, x: Tensor, *sources: Source) -> Tensor:
        """x [B,N,width]. What is read from the sources adds up."""
        q = split_heads(self.norm_q(self.q(x)), self.heads)
        first, *others = (attend(q, *source) for source in sources)
        return self.o(sum(others, first))


def select(modulation: Tensor, known: Tensor | None) -> Tensor:
    """Chooses for each token between the modulation of unknown tokens (level 0) and of known ones (level 1).

    modulation [B,2,width], known [B,N,1] of 0 and 1 -> [B,N,width]; [B,1,width] for a model with one level.
    """
    unknown = modulation[:, :1]
    return unknown if known is None else unknown + known * (modulation[:, 1:] - unknown)


class Block(nn.Module):
    def __init__(self, spec: DenoiserSpec):
        super().__init__()
        norms = NORMS[type(spec)]
        self.norm1 = norms.modulated(spec.width)
        self.self_attention = SelfAttention(spec)
        self.norm2 = norms.crossing(spec.width)
        self.cross_attention = CrossAttention(spec)
        self.norm3 = norms.modulated(spec.width)
        self.ffn = nn.Sequential(
            nn.Linear(spec.width, spec.ffn_width), nn.GELU(approximate="tanh"), nn.Linear(spec.ffn_width, spec.width)
        )
        self.offset = nn.Parameter(torch.randn(6, spec.width) / spec.width**0.5)

    def forward(
        self,
        x: Tensor,
        modulation: Tensor,
        known: Tensor | None,
        cos: Tensor,
        sin: Tensor,
        *sources: Source,
    ) -> Tensor:
        """x [B,N,width], modulation [B,2,6,width], known [B,N,1], tables [N,D/2] or [heads,N,D/2]."""
        parts = (modulation + self.offset).unbind(2)
        shift1, scale1, gate1, shift2, scale2, gate2 = (select(part, known) for part in parts)
        x = x + gate1 * self.self_attention(self.norm1(x) * (1 + scale1) + shift1, cos, sin)
        x = x + self.cross_attention(self.norm2(x), *sources)
        return x + gate2 * self.ffn(self.norm3(x) * (1 + scale2) + shift2)


class Denoiser(nn.Module):
    def __init__(self, spec: DenoiserSpec):
        super().__init__()
        width = spec.width
        self.embed = nn.Linear(spec.token_inputs, width)
        self.time_embedding = nn.Sequential(nn.Linear(spec.time_features, width), nn.SiLU(), nn.Linear(width, width))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        self.pooled_text = nn.Linear(width, width) if spec.pooled_text else None
        self.blocks = Stack(Block(spec) for _ in range(spec.depth))
        self.norm_out = nn.LayerNorm(width, eps=EPSILON, elementwise_affine=False)
        self.offset_out = nn.Parameter(torch.randn(2, width) / width**0.5)
        self.project_out = nn.Linear(width, spec.token_values)
        self.channels = spec.latent_channels if spec.channels_last else None

    def forward(
        self,
        tokens: Tensor,
        time_features: Tensor,
        rope_cos: Tensor,
        rope_sin: Tensor,
        cross_k: Tensor,
        cross_v: Tensor,
        known: Tensor | None = None,
        image_k: Tensor | None = None,
        image_v: Tensor | None = None,
        text_mask: Tensor | None = None,
    ) -> Tensor:
        """tokens [B,N,Pin], time_features [B,2,F], tables as `spec.rope_shape`, cross_k and cross_v
        [blocks,B,heads,L,D], known [B,N] and text_mask [B,L] of 0 and 1, image_k and image_v [blocks,B,heads,M,D]
        -> velocity [B,N,Pout]."""
        known = None if known is None else known[..., None]  # [B,N,1]
        time = self.time_embedding(time_features)  # [B,2,width]
        if self.pooled_text is not None:
            time = time + self.pooled_text(cross_v[0].mean(dim=2).flatten(1))[:, None]
        modulation = self.time_projection(time).unflatten(-1, (6, -1))  # [B,2,6,width]
        x = self.embed(tokens)
        pairs: list[Source] = [(cross_k, cross_v, None if text_mask is None else hide(text_mask, x))]
        if image_k is not None and image_v is not None:
            pairs.append((image_k, image_v, None))
        for i, block in enumerate(self.blocks):
            x = block(x, modulation, known, rope_cos, rope_sin, *((k[i], v[i], bias) for k, v, bias in pairs))
        shift, scale = (select(part, known) for part in (time[:, :, None] + self.offset_out).unbind(2))
        x = self.project_out(self.norm_out(x) * (1 + scale) + shift)
        return x if self.channels is None else x.unflatten(-1, (-1, self.channels)).transpose(-1, -2).flatten(-2)


def hide(mask: Tensor, x: Tensor) -> Tensor:
    """What hides text [B,L] where the mask is 0 from tokens [B,N,width]: [B,1,N,L]."""
    return ((1 - mask) * HIDDEN)[:, None, None].expand(-1, -1, x.shape[1], -1)


def keys_and_values(
    x: Tensor, k: nn.ModuleList, v: nn.ModuleList, norm_k: nn.ModuleList, heads: int
) -> tuple[Tensor, Tensor]:
    """What each block's cross-attention reads of x [B,L,width]: [blocks,B,heads,L,D] twice."""
    keys = [split_heads(norm(key(x)), heads) for key, norm in zip(k, norm_k, strict=True)]
    values = [split_heads(value(x), heads) for value in v]
    return torch.stack(keys), torch.stack(values)


class Conditioner(nn.Module):
    """Text embeddings -> every block's cross-attention keys and values, once a request."""

    def __init__(self, spec: DenoiserSpec):
        super().__init__()
        width = spec.width
        self.heads = spec.heads
        self.embed = nn.Sequential(
            nn.Linear(spec.text_width, width), nn.GELU(approximate="tanh"), nn.Linear(width, width)
        )
        self.k = nn.ModuleList(nn.Linear(width, width) for _ in range(spec.depth))
        self.v = nn.ModuleList(nn.Linear(width, width) for _ in range(spec.depth))
        self.norm_k = nn.ModuleList(NORMS[type(spec)].keys(width) for _ in range(spec.depth))

    def forward(self, embeddings: Tensor) -> tuple[Tensor, Tensor]:
        """[B,L,text_width] -> cross_k, cross_v [blocks,B,heads,L,D]."""
        return keys_and_values(self.embed(embeddings), self.k, self.v, self.norm_k, self.heads)


class ImageConditioner(nn.Module):
    """Tokens of pictures -> every block's cross-attention keys and values, once a request."""

    def __init__(self, spec: DenoiserSpec, image: ImageAttentionSpec):
        super().__init__()
        width = spec.width
        self.heads = spec.heads
        self.positions = nn.Parameter(torch.zeros(image.tokens, image.width)) if image.positions else None
        self.embed = nn.Sequential(
            nn.LayerNorm(image.width),
            nn.Linear(image.width, image.width),
            nn.GELU(),
            nn.Linear(image.width, width),
            nn.LayerNorm(width),
        )
        self.k = nn.ModuleList(nn.Linear(width, width) for _ in range(spec.depth))
        self.v = nn.ModuleList(nn.Linear(width, width) for _ in range(spec.depth))
        self.norm_k = nn.ModuleList(NORMS[type(spec)].keys(width) for _ in range(spec.depth))

    def forward(self, image_embeddings: Tensor) -> tuple[Tensor, Tensor]:
        """[B,M,image width] -> image_k, image_v [blocks,B,heads,M,D]."""
        x = self.embed(image_embeddings if self.positions is None else image_embeddings + self.positions)
        return keys_and_values(x, self.k, self.v, self.norm_k, self.heads)
