"""The VAEs of Wan 2.1 and Wan 2.2, as halves of a `vae.Vae`.

Flows in: pixels in [-1,1] or latents, not normalised, and a History. Flows out: the other one. Wan 2.2 folds pixels
into channels and leads shortcuts around its levels; both are fields of the spec.
"""

from __future__ import annotations

from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn

from tubelet.runtime.spec import WanVaeSpec

from .causal import (
    CausalConv3d,
    ChannelNorm,
    Downsample,
    History,
    NarrowCausalConv3d,
    ResidualBlock,
    Upsample,
    average,
    duplicate,
)


class Attention(nn.Module):
    """Every frame attends to itself, with one head."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = ChannelNorm(channels)
        self.qkv = nn.Conv3d(channels, 3 * channels, 1)
        self.out = nn.Conv3d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        b, c, t, h, w = x.shape
        # [B,3C,T,H,W] -> three of [B,T,H*W,C]: frames stand where heads would
        q, k, v = self.qkv(self.norm(x)).reshape(b, 3, c, t, h * w).permute(1, 0, 3, 4, 2)
        y = F.scaled_dot_product_attention(q, k, v).permute(0, 3, 1, 2)
        return x + self.out(y.reshape(b, c, t, h, w))


class Middle(nn.Module):
    """What happens at the coarsest resolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.before = ResidualBlock(channels, channels)
        self.attention = Attention(channels)
        self.after = ResidualBlock(channels, channels)

    def forward(self, x: Tensor, history: History) -> Tensor:
        return self.after(self.attention(self.before(x, history)), history)


class AverageShortcut(nn.Module):
    """Around a level that makes the picture smaller; before the first frame there is nothing."""

    def __init__(self, channels_out: int, frames: int, side: int):
        super().__init__()
        self.channels_out, self.frames, self.side = channels_out, frames, side

    def forward(self, x: Tensor, history: History) -> Tensor:
        if history.first:
            x = F.pad(x, (0, 0, 0, 0, self.frames - 1, 0))
        return average(x, self.frames, self.side, self.channels_out)


class DuplicateShortcut(nn.Module):
    """Around a level that makes the picture larger; of the first latent frame only the last frame is kept."""

    def __init__(self, channels_out: int, frames: int, side: int):
        super().__init__()
        self.channels_out, self.frames, self.side = channels_out, frames, side

    def forward(self, x: Tensor, history: History) -> Tensor:
        x = duplicate(x, self.frames, self.side, self.channels_out)
        return x[:, :, self.frames - 1 :] if history.first else x


class Level(nn.Module):
    """Residual blocks, then the way to the next resolution; a shortcut may lead around all of it."""

    def __init__(self, channels: list[int], resample: nn.Module | None, shortcut: nn.Module | None):
        """`channels` are those before, between and after the blocks."""
        super().__init__()
        self.blocks = nn.ModuleList(ResidualBlock(a, b) for a, b in pairwise(channels))
        self.resample, self.shortcut = resample, shortcut

    def forward(self, x: Tensor, history: History) -> Tensor:
        y = x
        for block in self.blocks:
            y = block(y, history)
        if self.resample is not None:
            y = self.resample(y, history)
        return y if self.shortcut is None else y + self.shortcut(x, history)


class WanEncoder(nn.Module):
    """Pixels [B,3,T,H,W] -> mean and log-variance [B,2C,T',H/s,W/s], not yet normalised."""

    def __init__(self, spec: WanVaeSpec):
        super().__init__()
        self.patch = spec.pixel_patch
        widths = spec.widths
        self.conv_in = CausalConv3d(3 * spec.pixel_patch**2, widths[0], 3)
        self.levels = nn.ModuleList()
        for before, width, temporal in zip((widths[0], *widths), widths, (*spec.temporal, None), strict=False):
            frames, side = 2 if temporal else 1, 1 if temporal is None else 2
            resample = None if temporal is None else Downsample(width, width, temporal)
            shortcut = AverageShortcut(width, frames, side) if spec.shortcuts else None
            self.levels.append(Level([before, *[width] * spec.encoder_blocks], resample, shortcut))
        self.middle = Middle(widths[-1])
        self.norm_out = ChannelNorm(widths[-1])
        self.conv_out = CausalConv3d(widths[-1], 2 * spec.latent_channels, 3)
        self.project = nn.Conv3d(2 * spec.latent_channels, 2 * spec.latent_channels, 1)

    def forward(self, pixels: Tensor, history: History) -> Tensor:
        x = self.conv_in(fold(pixels, self.patch), history)
        for level in self.levels:
            x = level(x, history)
        x = self.middle(x, history)
        return self.project(self.conv_out(F.silu(self.norm_out(x)), history))


class WanDecoder(nn.Module):
    """Latents [B,C,T',H',W'], not normalised -> pixels [B,3,T,H,W] in about [-1,1]."""

    def __init__(self, spec: WanVaeSpec):
        super().__init__()
        self.patch = spec.pixel_patch
        widths = spec.decoder_widths[::-1]
        self.project = nn.Conv3d(spec.latent_channels, spec.latent_channels, 1)
        self.conv_in = CausalConv3d(spec.latent_channels, widths[0], 3)
        self.middle = Middle(widths[0])
        self.levels = nn.ModuleList()
        before = widths[0]
        for width, temporal in zip(widths, (*spec.temporal[::-1], None), strict=True):
            after = width if spec.shortcuts or temporal is None else width // 2
            resample = None if temporal is None else Upsample(width, after, temporal)
            wanted = spec.shortcuts and temporal is not None
            shortcut = DuplicateShortcut(after, 2 if temporal else 1, 2) if wanted else None
            self.levels.append(Level([before, *[width] * spec.decoder_blocks], resample, shortcut))
            before = after
        self.norm_out = ChannelNorm(widths[-1])
        self.conv_out = NarrowCausalConv3d(widths[-1], 3 * spec.pixel_patch**2, 3)

    def forward(self, latents: Tensor, history: History) -> Tensor:
        x = self.middle(self.conv_in(self.project(latents), history), history)
        for level in self.levels:
            x = level(x, history)
        return unfold(self.conv_out(F.silu(self.norm_out(x)), history), self.patch)


def fold(pixels: Tensor, patch: int) -> Tensor:
    """[B,3,T,H,W] -> [B,3*patch*patch,T,H/patch,W/patch], with columns before rows in the channels."""
    if patch == 1:
        return pixels
    b, c, t, h, w = pixels.shape
    x = pixels.reshape(b, c, t, h // patch, patch, w // patch, patch).permute(0, 1, 6, 4, 2, 3, 5)
    return x.reshape(b, c * patch * patch, t, h // patch, w // patch)


def unfold(x: Tensor, patch: int) -> Tensor:
    """The inverse of `fold`."""
    if patch == 1:
        return x
    b, _, t, h, w = x.shape
    return x.reshape(b, 3, patch, patch, t, h, w).permute(0, 1, 4, 5, 3, 6, 2).reshape(b, 3, t, h * patch, w * patch)
