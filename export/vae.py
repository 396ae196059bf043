"""Reference VAE: causal 3D convolutions whose history is explicit, in the architecture family of Wan's.

Flows in: pixels [B,3,T,H,W] in [-1,1] or normalised latents [B,C,T',H',W'], and the caches of the chunk before. Flows
out: the other one and the caches for the chunk after. A clip's first frame is one latent frame; every later latent
frame is `temporal_factor` frames. So each half has two forms that share weights: the *first* (one frame, no history)
and the *next* (whole groups of frames, history from caches). There is no loop over frames, and decoding in chunks is
the same arithmetic as decoding whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tubelet.runtime.spec import LtxVaeSpec, VaeSpec, WanVaeSpec

from .causal import CausalConv3d, ChannelNorm, Downsample, History, ResidualBlock, Upsample, average, duplicate
from .ltx_vae import LtxDecoder, LtxEncoder
from .wan_vae import WanDecoder, WanEncoder


class Stage(nn.ModuleList):
    """The residual blocks of one resolution."""

    def __init__(self, width: int, blocks: int):
        super().__init__(ResidualBlock(width, width) for _ in range(blocks))

    def forward(self, x: Tensor, history: History) -> Tensor:
        for block in self:
            x = block(x, history)
        return x


class AverageDownsample(Downsample):
    """Beside the convolution an averaging shortcut."""

    def forward(self, x: Tensor, history: History) -> Tensor:
        frames = 2 if self.time is not None and not history.first else 1
        return super().forward(x, history) + average(x, frames, 2, self.spatial.out_channels)


class DuplicateUpsample(Upsample):
    """Beside the convolution a duplicating shortcut."""

    def forward(self, x: Tensor, history: History) -> Tensor:
        frames = 2 if self.time is not None and not history.first else 1
        return super().forward(x, history) + duplicate(x, frames, 2, self.spatial.out_channels)


class Encoder(nn.Module):
    """Pixels [B,3,T,H,W] -> mean and log-variance [B,2C,T',H/s,W/s], not yet normalised."""

    def __init__(self, spec: VaeSpec):
        super().__init__()
        self.patch = spec.pixel_patch
        widths = spec.widths
        self.conv_in = CausalConv3d(3 * spec.pixel_patch**2, widths[0], 3)
        self.stages = nn.ModuleList(Stage(width, spec.encoder_blocks) for width in widths)
        self.downs = nn.ModuleList(
            AverageDownsample(a, b, temporal) for a, b, temporal in zip(widths, widths[1:], spec.temporal, strict=False)
        )
        self.norm_out = ChannelNorm(widths[-1])
        self.conv_out = CausalConv3d(widths[-1], 2 * spec.latent_channels, 3)

    def forward(self, pixels: Tensor, history: History) -> Tensor:
        b, c, t, h, w = pixels.shape
        p = self.patch
        x = pixels.reshape(b, c, t, h // p, p, w // p, p).permute(0, 1, 4, 6, 2, 3, 5)
        x = self.conv_in(x.reshape(b, c * p * p, t, h // p, w // p), history)
        for level, blocks in enumerate(self.stages):
            x = blocks(x, history)
            if level < len(self.downs):
                x = self.downs[level](x, history)
        return self.conv_out(F.silu(self.norm_out(x)), history)


class Decoder(nn.Module):
    """Latents [B,C,T',H',W'], not normalised -> pixels [B,3,T,H,W] in about [-1,1]."""

    def __init__(self, spec: VaeSpec):
        super().__init__()
        self.patch = spec.pixel_patch
        widths = spec.widths[::-1]
        self.conv_in = CausalConv3d(spec.latent_channels, widths[0], 3)
        self.stages = nn.ModuleList(Stage(width, spec.decoder_blocks) for width in widths)
        self.ups = nn.ModuleList(
            DuplicateUpsample(a, b, temporal)
            for a, b, temporal in zip(widths, widths[1:], spec.temporal[::-1], strict=False)
        )
        self.norm_out = ChannelNorm(widths[-1])
        self.conv_out = CausalConv3d(widths[-1], 3 * spec.pixel_patch**2, 3)

    def forward(self, latents: Tensor, history: History) -> Tensor:
        x = self.conv_in(latents, history)
        for level, blocks in enumerate(self.stages):
            x = blocks(x, history)
            if level < len(self.ups):
                x = self.ups[level](x, history)
        x = self.conv_out(F.silu(self.norm_out(x)), history)
        p = self.patch
        b, _, t, h, w = x.shape
        return x.reshape(b, 3, p, p, t, h, w).permute(0, 1, 4, 5, 2, 6, 3).reshape(b, 3, t, h * p, w * p)


HALVES: dict[type[VaeSpec], tuple[Any, Any]] = {
    VaeSpec: (Encoder, Decoder),
    WanVaeSpec: (WanEncoder, WanDecoder),
    LtxVaeSpec: (LtxEncoder, LtxDecoder),
}


class Vae(nn.Module):
    """Both halves, and the normalisation of latents that the denoiser sees: (mean - latent_mean) / latent_std."""

    encoder: Encoder | WanEncoder | LtxEncoder
    decoder: Decoder | WanDecoder | LtxDecoder
    latent_mean: Tensor
    latent_std: Tensor

    def __init__(self, spec: VaeSpec):
        super().__init__()
        encoder, decoder = HALVES[type(spec)]
        self.encoder, self.decoder = encoder(spec), decoder(spec)
        shape = (spec.latent_channels, 1, 1, 1)
        self.register_buffer("latent_mean", torch.tensor(spec.latent_mean).reshape(shape))
        self.register_buffer("latent_std", torch.tensor(spec.latent_std).reshape(shape))

    def encode(self, pixels: Tensor, caches: Sequence[Tensor] | None = None) -> tuple[Tensor, list[Tensor]]:
        """One chunk: pixels -> normalised latents and the caches for the chunk after.

        Without caches the chunk is a clip's first frame, else `temporal_factor` frames or a multiple.
        """
        history = History(caches)
        mean = self.encoder(pixels, history).chunk(2, dim=1)[0]
        return (mean - self.latent_mean) / self.latent_std, history.next

    def decode(self, latents: Tensor, caches: Sequence[Tensor] | None = None) -> tuple[Tensor, list[Tensor]]:
        """One chunk: normalised latents -> pixels and the next caches; without caches the first frame.

        Of a VAE that does not stream, a whole clip, and no caches.
        """
        history = History(caches)
        return self.decoder(latents * self.latent_std + self.latent_mean, history), history.next


def stream(half: nn.Module, x: Tensor, caches: Sequence[Tensor] | None = None) -> tuple[Tensor, list[Tensor]]:
    """Runs an Encoder or Decoder over a clip, or over what follows `caches`; returns the next caches too."""
    parts = []
    for chunk in (x[:, :, :1], x[:, :, 1:]) if caches is None else (x,):
        if chunk.shape[2]:
            history = History(caches)
            parts.append(half(chunk, history))
            caches = history.next
    assert caches is not None
    return torch.cat(parts, dim=2), list(caches)


def whole(half: nn.Module, x: Tensor) -> Tensor:
    """Runs an Encoder or Decoder over a whole clip: the first frame, then all others at once."""
    return stream(half, x)[0]
