"""Define the instance context encoder, which merges C3, C4 and C5 into one feature map at 1/8 (paper section 3.3).

Shapes: B images, C backbone channels, E encoder channels, H W height and width at 1/8.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparseinst.config import EncoderConfig
from sparseinst.models.layers import conv3x3, kaiming_normal, kaiming_uniform

PPM_BINS = (1, 2, 3, 6)


def resize(x: Tensor, size: torch.Size | tuple[int, int]) -> Tensor:
    """Resize a feature map bilinearly to (height, width)."""
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=False)


class PyramidPooling(nn.Module):
    """Pool as PSPNet does, but without norms: pool to each grid of bins, reduce to E/4 channels, resize to the input's size."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        reduced = max(1, channels // len(PPM_BINS))
        self.stages = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(bins), nn.Conv2d(channels, reduced, 1), nn.ReLU()) for bins in PPM_BINS
        )
        self.bottleneck = nn.Conv2d(channels + reduced * len(PPM_BINS), channels, 1)

    def forward(self, x: Tensor) -> Tensor:  # B E h w
        pooled = [resize(stage(x), x.shape[-2:]) for stage in self.stages]  # 4 x B E/4 h w
        return self.bottleneck(torch.cat([*pooled, x], dim=1)).relu()  # B E h w


class Encoder(nn.Module):
    """Combine FPN laterals, pyramid pooling after C5, and the fusion of all levels at 1/8.

    `forward` takes [C3, C4, C5] of (B, C, H, W), (B, C, H/2, W/2), (B, C, H/4, W/4) and returns (B, E, H, W).

    Args:
        in_channels: the channels of C3, C4 and C5.
    """

    def __init__(self, config: EncoderConfig, in_channels: Sequence[int]) -> None:
        super().__init__()
        channels = config.channels
        levels = len(in_channels) if config.fusion else 1
        # The deepest level comes first, as in the reference's state dict: C5, C4, C3.
        self.laterals = nn.ModuleList(nn.Conv2d(c, channels, 1) for c in reversed(in_channels))
        self.outputs = nn.ModuleList(conv3x3(channels, channels) for _ in range(levels))
        self.ppm = PyramidPooling(channels) if config.ppm else nn.Identity()
        self.fusion = nn.Conv2d(channels * levels, channels, 1) if config.fusion else None
        kaiming_uniform(*self.laterals, *self.outputs)
        if self.fusion is not None:
            kaiming_normal(self.fusion)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        merged = self.top_down(features)
        if self.fusion is None:
            return self.outputs[0](merged[-1])  # B E H W, from P3 alone
        pyramid = [output(level) for output, level in zip(self.outputs, merged, strict=True)]  # P5, P4, P3
        size = pyramid[-1].shape[-2:]
        return self.fusion(torch.cat([resize(level, size) for level in reversed(pyramid)], dim=1))  # B E H W

    def top_down(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Return each level's lateral plus the deeper levels: (B, E, H/4, W/4), (B, E, H/2, W/2), (B, E, H, W)."""
        deepest, *rest = reversed(features)
        merged = [self.ppm(self.laterals[0](deepest))]
        for lateral, feature in zip(list(self.laterals)[1:], rest, strict=True):
            side = lateral(feature)
            # Resizing to the lateral's size supports inputs of any size. For multiples of 32 it doubles the size.
            merged.append(side + F.interpolate(merged[-1], size=side.shape[-2:], mode="nearest"))
        return merged
