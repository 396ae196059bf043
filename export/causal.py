"""The layers that causal VAEs share: convolutions over time whose history is explicit.

Flows in: a chunk of video [B,C,T,H,W] and a History. Flows out: the result, and in the History what the chunk after
needs. No layer loops over frames, and chunks are the same arithmetic as the whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class History:
    """Threads the causal caches through one pass, in the order in which the layers run.

    `first` is a pass without a past; its caches are zeros, which is causal padding, or copies of the first frame.
    """

    def __init__(self, past: Sequence[Tensor] | None):
        self.first = past is None
        self._past: Iterator[Tensor] = iter(past or ())
        self.next: list[Tensor] = []

    def extend(self, x: Tensor, frames: int) -> Tensor:
        """Prepends the last `frames` frames of the past to `x` and remembers the last ones of the result."""
        b, c, _, h, w = x.shape
        return self._extend(x, frames, lambda: x.new_zeros(b, c, frames, h, w))

    def repeat(self, x: Tensor, frames: int) -> Tensor:
        """The same, where copies of the first frame stand before a clip; a pass without a past is of that frame."""
        return self._extend(x, frames, lambda: torch.cat([x] * frames, dim=2))

    def _extend(self, x: Tensor, frames: int, before: Callable[[], Tensor]) -> Tensor:
        x = torch.cat([before() if self.first else next(self._past), x], dim=2)
        self.next.append(x[:, :, -frames:])
        return x

    def overlap(self, x: Tensor, frames: int, bias: Tensor) -> Tensor:
        """Adds what the past has begun to `x`; keeps the last `frames` frames of that, without bias, for the next."""
        b, c, t, h, w = x.shape
        if not self.first:
            x = x + torch.cat([next(self._past), x.new_zeros(b, c, t - frames, h, w)], dim=2)
        self.next.append(x[:, :, -frames:] - bias)
        return x[:, :, :-frames]


class CausalConv3d(nn.Conv3d):
    """3D convolution that sees the present and the past; time is padded by History."""

    def __init__(self, channels_in: int, channels_out: int, kernel: int):
        super().__init__(channels_in, channels_out, kernel, padding=(0, kernel // 2, kernel // 2))

    def forward(self, x: Tensor, history: History) -> Tensor:  # type: ignore[override]
        return super().forward(history.extend(x, self.kernel_size[0] - 1))


class NarrowCausalConv3d(CausalConv3d):
    """The same where few channels go out: it remembers what the past adds to the next frames, not the past."""

    def forward(self, x: Tensor, history: History) -> Tensor:  # type: ignore[override]
        assert self.bias is not None
        frames = self.kernel_size[0] - 1
        # [B,C,T,H,W] -> [B,channels_out,T+frames,H,W]: the last frames are begun, the next chunk ends them
        sums = F.conv3d(x, self.weight, self.bias, padding=(frames, *self.padding[1:]))
        return history.overlap(sums, frames, self.bias.reshape(-1, 1, 1, 1))


class ChannelNorm(nn.Module):
    """RMS-norm over channels."""

    def __init__(self, channels: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(channels, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.square().mean(dim=1, keepdim=True) + 1e-12) * self.gamma


class ResidualBlock(nn.Module):
    def __init__(self, channels_in: int, channels_out: int):
        super().__init__()
        self.norm1 = ChannelNorm(channels_in)
        self.conv1 = CausalConv3d(channels_in, channels_out, 3)
        self.norm2 = ChannelNorm(channels_out)
        self.conv2 = CausalConv3d(channels_out, channels_out, 3)
        self.shortcut = nn.Identity() if channels_in == channels_out else nn.Conv3d(channels_in, channels_out, 1)

    def forward(self, x: Tensor, history: History) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x)), history)
        y = self.conv2(F.silu(self.norm2(y)), history)
        return self.shortcut(x) + y


class Downsample(nn.Module):
    """Halves rows and columns, and time where asked."""

    def __init__(self, channels_in: int, channels_out: int, temporal: bool):
        super().__init__()
        self.spatial = nn.Conv3d(channels_in, channels_out, (1, 3, 3), stride=(1, 2, 2))
        self.time = nn.Conv3d(channels_out, channels_out, (3, 1, 1), stride=(2, 1, 1)) if temporal else None

    def forward(self, x: Tensor, history: History) -> Tensor:
        x = self.spatial(F.pad(x, (0, 1, 0, 1)))
        if self.time is not None:
            past = history.extend(x, 1)
            x = x if history.first else self.time(past)
        return x


class Upsample(nn.Module):
    """Doubles rows and columns, and time where asked."""

    def __init__(self, channels_in: int, channels_out: int, temporal: bool):
        super().__init__()
        self.time = nn.Conv3d(channels_in, 2 * channels_in, (3, 1, 1)) if temporal else None
        self.spatial = nn.Conv3d(channels_in, channels_out, (1, 3, 3), padding=(0, 1, 1))

    def forward(self, x: Tensor, history: History) -> Tensor:
        b, c, t, h, w = x.shape
        if self.time is not None:
            # the first frame leaves no past behind: frame 0 passes, frame 1 starts from zeros
            past = history.extend(torch.zeros_like(x) if history.first else x, 2)
            if not history.first:
                # [B,2C,T,H,W] -> [B,C,2T,H,W], the pair interleaved in time
                x = self.time(past).reshape(b, 2, c, t, h, w).permute(0, 2, 3, 1, 4, 5).reshape(b, c, 2 * t, h, w)
        return self.spatial(F.interpolate(x, scale_factor=(1.0, 2.0, 2.0), mode="nearest"))


def average(x: Tensor, frames: int, side: int, channels_out: int) -> Tensor:
    """[B,C,T,H,W] -> [B,channels_out,T/frames,H/side,W/side] by averaging groups of the values folded into channels."""
    b, c, t, h, w = x.shape
    x = x.reshape(b, c, t // frames, frames, h // side, side, w // side, side).permute(0, 1, 3, 5, 7, 2, 4, 6)
    group = (c * frames * side * side) // channels_out
    return x.reshape(b, channels_out, group, t // frames, h // side, w // side).mean(dim=2)


def duplicate(x: Tensor, frames: int, side: int, channels_out: int) -> Tensor:
    """[B,C,T,H,W] -> [B,channels_out,T*frames,side*H,side*W]: repeated channels, unfolded into space and time."""
    b, c, t, h, w = x.shape
    x = x.repeat_interleave((channels_out * frames * side * side) // c, dim=1)
    x = x.reshape(b, channels_out, frames, side, side, t, h, w).permute(0, 1, 5, 2, 6, 3, 7, 4)
    return x.reshape(b, channels_out, t * frames, side * h, side * w)
