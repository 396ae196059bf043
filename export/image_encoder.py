"""Reference image encoder: a vision transformer as CLIP has it, up to the layer whose tokens the denoiser reads.

Flows in: a picture [B,3,size,size], normalised. Flows out: embeddings [B,1+patches,width], the class token first.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from tubelet.runtime.spec import ImageEncoderSpec

from .dit import attend, split_heads
from .stack import Stack


class Layer(nn.Module):
    def __init__(self, spec: ImageEncoderSpec):
        super().__init__()
        self.heads = spec.heads
        self.norm1 = nn.LayerNorm(spec.width)
        self.q = nn.Linear(spec.width, spec.width)
        self.k = nn.Linear(spec.width, spec.width)
        self.v = nn.Linear(spec.width, spec.width)
        self.o = nn.Linear(spec.width, spec.width)
        self.norm2 = nn.LayerNorm(spec.width)
        self.ffn = nn.Sequential(
            nn.Linear(spec.width, spec.ffn_width), nn.GELU(), nn.Linear(spec.ffn_width, spec.width)
        )

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(x)
        q, k, v = (split_heads(project(y), self.heads) for project in (self.q, self.k, self.v))
        x = x + self.o(attend(q, k, v))
        return x + self.ffn(self.norm2(x))


class ImageEncoder(nn.Module):
    def __init__(self, spec: ImageEncoderSpec):
        super().__init__()
        self.patches = nn.Conv2d(3, spec.width, spec.patch, stride=spec.patch, bias=False)
        self.first = nn.Parameter(torch.zeros(spec.width))  # the class token
        self.positions = nn.Parameter(torch.zeros(spec.tokens, spec.width))
        self.norm = nn.LayerNorm(spec.width)
        self.layers = Stack(Layer(spec) for _ in range(spec.depth))

    def forward(self, pixels: Tensor) -> Tensor:
        """[B,3,size,size] -> [B,1+patches,width]."""
        patches = self.patches(pixels).flatten(2).transpose(1, 2)  # [B,patches,width]
        x = torch.cat([self.first.expand(len(patches), 1, -1), patches], dim=1)
        x = self.norm(x + self.positions)
        for layer in self.layers:
            x = layer(x)
        return x
