"""The VAE of LTX-Video, as halves of a `vae.Vae`.

Flows in: pixels in [-1,1] or latents, not normalised, and a History. Flows out: the other one. The encoder is causal;
before a clip stand copies of its first frame. The decoder sees the frame after each frame too, through all of its
layers, so it takes a clip whole and leaves no history.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tubelet.runtime.spec import LtxVaeSpec

from .causal import History
from .wan_vae import fold, unfold


class Conv(nn.Conv3d):
    """3x3x3; how time is padded is the kind's."""

    def __init__(self, channels_in: int, channels_out: int, stride: int = 1):
        super().__init__(channels_in, channels_out, 3, stride, padding=(0, 1, 1))


class CausalConv(Conv):
    def forward(self, x: Tensor, history: History) -> Tensor:  # type: ignore[override]
        return super().forward(history.repeat(x, 2))


class HalvingConv(Conv):
    """Halves time, rows and columns: a frame is made of two and of the last one before them, the first of itself."""

    def __init__(self, channels: int):
        super().__init__(channels, channels, stride=2)

    def forward(self, x: Tensor, history: History) -> Tensor:  # type: ignore[override]
        past = history.repeat(x, 1)
        return super().forward(torch.cat([x, past], dim=2) if history.first else past)


class CentredConv(Conv):
    """Sees one frame before and one after; a clip's ends are repeated."""

    def forward(self, x: Tensor, history: History) -> Tensor:  # type: ignore[override]
        return super().forward(torch.cat([x[:, :, :1], x, x[:, :, -1:]], dim=2))


class Norm(nn.Module):
    """RMS-norm over channels, without weights."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(dim=1, keepdim=True) + 1e-8)


class ChannelLayerNorm(nn.LayerNorm):
    """Over channels."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


class Block(nn.Module):
    """A residual block."""

    def __init__(self, conv: type[Conv], channels_in: int, channels_out: int):
        super().__init__()
        self.norm = Norm()
        self.conv1 = conv(channels_in, channels_out)
        self.conv2 = conv(channels_out, channels_out)
        self.shortcut: nn.Module = nn.Identity()
        if channels_in != channels_out:
            normed = ChannelLayerNorm(channels_in, eps=1e-6)
            self.shortcut = nn.Sequential(normed, nn.Conv3d(channels_in, channels_out, 1))

    def forward(self, x: Tensor, history: History) -> Tensor:
        y = self.conv1(F.silu(self.norm(x)), history)
        return self.shortcut(x) + self.conv2(F.silu(self.norm(y)), history)


class Upsample(nn.Module):
    """Doubles time, rows and columns with channels that are unfolded; the first frame is not doubled."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = CentredConv(channels, 8 * channels)

    def forward(self, x: Tensor, history: History) -> Tensor:
        x = self.conv(x, history)
        b, c, t, h, w = x.shape
        x = x.reshape(b, c // 8, 2, 2, 2, t, h, w).permute(0, 1, 5, 2, 6, 3, 7, 4)
        return x.reshape(b, c // 8, 2 * t, 2 * h, 2 * w)[:, :, 1:]


class Chain(nn.ModuleList):
    """Layers that take a History, one after the other."""

    def forward(self, x: Tensor, history: History) -> Tensor:
        for layer in self:
            x = layer(x, history)
        return x


class Level(nn.ModuleDict):
    """The layers of a resolution and of the way to it or from it, one after the other."""

    def forward(self, x: Tensor, history: History) -> Tensor:
        for layer in self.values():
            x = layer(x, history)
        return x


def blocks(conv: type[Conv], width: int, count: int) -> Chain:
    return Chain(Block(conv, width, width) for _ in range(count))


def change(conv: type[Conv], before: int, after: int) -> dict[str, nn.Module]:
    """The block between two resolutions whose channels differ."""
    return {} if before == after else {"change": Block(conv, before, after)}


class LtxEncoder(nn.Module):
    """Pixels [B,3,T,H,W] -> mean and log-variance [B,2C,T',H/s,W/s], not yet normalised."""

    def __init__(self, spec: LtxVaeSpec):
        super().__init__()
        self.patch, self.channels = spec.pixel_patch, spec.latent_channels
        *counts, middle = spec.encoder_blocks
        *finer, coarsest = zip(spec.widths, counts, strict=True)
        self.conv_in = CausalConv(3 * spec.pixel_patch**2, spec.widths[0])
        self.levels = nn.ModuleList(
            Level({"blocks": blocks(CausalConv, a, count), "down": HalvingConv(a), **change(CausalConv, a, b)})
            for (a, count), b in zip(finer, spec.widths[1:], strict=True)
        )
        self.levels.append(Level({"blocks": blocks(CausalConv, *coarsest)}))
        self.middle = blocks(CausalConv, spec.widths[-1], middle)
        self.norm_out = Norm()
        self.conv_out = CausalConv(spec.widths[-1], spec.latent_channels + 1)

    def forward(self, pixels: Tensor, history: History) -> Tensor:
        x = self.conv_in(fold(pixels, self.patch), history)
        for level in self.levels:
            x = level(x, history)
        x = self.conv_out(F.silu(self.norm_out(self.middle(x, history))), history)
        log_variance = x[:, -1:].expand(-1, self.channels - 1, -1, -1, -1)  # one for all channels
        return torch.cat([x, log_variance], dim=1)


class LtxDecoder(nn.Module):
    """Latents [B,C,T',H',W'], not normalised -> pixels [B,3,T,H,W] in about [-1,1], of a whole clip."""

    def __init__(self, spec: LtxVaeSpec):
        super().__init__()
        self.patch = spec.pixel_patch
        middle, *counts = spec.decoder_blocks[::-1]
        widths = spec.decoder_widths[::-1]
        coarsest, *finer = zip(widths, counts, strict=True)
        self.conv_in = CentredConv(spec.latent_channels, widths[0])
        self.middle = blocks(CentredConv, widths[0], middle)
        self.levels = nn.ModuleList([Level({"blocks": blocks(CentredConv, *coarsest)})])
        self.levels.extend(
            Level({**change(CentredConv, a, b), "up": Upsample(b), "blocks": blocks(CentredConv, b, count)})
            for a, (b, count) in zip(widths, finer, strict=False)
        )
        self.norm_out = Norm()
        self.conv_out = CentredConv(widths[-1], 3 * spec.pixel_patch**2)

    def forward(self, latents: Tensor, history: History) -> Tensor:
        x = self.middle(self.conv_in(latents, history), history)
        for level in self.levels:
            x = level(x, history)
        return unfold(self.conv_out(F.silu(self.norm_out(x)), history), self.patch)
