"""Reference text encoder: T5-style as UMT5 has it (a relative position bias in every layer, gated GELU, RMS-norm).

Flows in: token ids and mask [B,L]. Flows out: embeddings [B,L,width], zero where the mask is zero.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tubelet.runtime.spec import TextEncoderSpec

from .stack import Stack


class RelativeBias(nn.Module):
    """A learned bias for each head and bucket of distance, exact nearby and logarithmic far away (T5, section 2.1)."""

    def __init__(self, spec: TextEncoderSpec):
        super().__init__()
        self.buckets, self.max_distance = spec.buckets, spec.max_distance
        self.weight = nn.Embedding(spec.buckets, spec.heads)

    def forward(self, length: Tensor) -> Tensor:
        """Positions [L] -> bias [heads,L,L]."""
        distance = length[None, :] - length[:, None]
        half = self.buckets // 2
        exact = half // 2
        magnitude = distance.abs()
        ratio = torch.log(magnitude.clamp(min=1).float() / exact) / math.log(self.max_distance / exact)
        far = (exact + (ratio * (half - exact)).long()).clamp(max=half - 1)
        bucket = torch.where(magnitude < exact, magnitude, far) + half * (distance > 0)
        return self.weight(bucket).permute(2, 0, 1)


class Layer(nn.Module):
    def __init__(self, spec: TextEncoderSpec):
        super().__init__()
        inner = spec.heads * spec.head_size
        self.heads = spec.heads
        self.norm1 = nn.RMSNorm(spec.width, eps=1e-6)
        self.q = nn.Linear(spec.width, inner, bias=False)
        self.k = nn.Linear(spec.width, inner, bias=False)
        self.v = nn.Linear(spec.width, inner, bias=False)
        self.o = nn.Linear(inner, spec.width, bias=False)
        self.bias = RelativeBias(spec)
        self.norm2 = nn.RMSNorm(spec.width, eps=1e-6)
        self.gate = nn.Linear(spec.width, spec.ffn_width, bias=False)
        self.up = nn.Linear(spec.width, spec.ffn_width, bias=False)
        self.down = nn.Linear(spec.ffn_width, spec.width, bias=False)

    def forward(self, x: Tensor, positions: Tensor, padding: Tensor) -> Tensor:
        y = self.norm1(x)
        # [B,L,heads*D] -> [B,heads,L,D]
        q, k, v = (p(y).unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=self.bias(positions) + padding, scale=1.0)
        x = x + self.o(y.transpose(1, 2).flatten(2))
        y = self.norm2(x)
        return x + self.down(F.gelu(self.gate(y), approximate="tanh") * self.up(y))


class TextEncoder(nn.Module):
    def __init__(self, spec: TextEncoderSpec):
        super().__init__()
        self.embedding = nn.Embedding(spec.vocabulary, spec.width)
        self.layers = Stack(Layer(spec) for _ in range(spec.depth))
        self.norm = nn.RMSNorm(spec.width, eps=1e-6)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """ids, mask int64 [B,L] -> [B,L,width]."""
        x = self.embedding(ids)
        positions = torch.arange(ids.shape[1], device=ids.device)
        visible = mask.to(x.dtype)
        padding = ((1 - visible) * -1e4)[:, None, None, :]
        for layer in self.layers:
            x = layer(x, positions, padding)
        return self.norm(x) * visible[..., None]
