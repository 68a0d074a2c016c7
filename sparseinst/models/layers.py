"""Define the layers and initialisations that backbone, encoder and decoder share. The initialisations are the reference's.

Shapes: B images, C channels, H W height and width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torchvision.ops import deform_conv2d

FOCAL_PRIOR_BIAS = -math.log((1 - 0.01) / 0.01)
"""The initial bias of class scores and activation maps, for which the sigmoid is 0.01 (RetinaNet, section 4.1)."""


class DeformableConv2d(nn.Module):
    """A 3x3 convolution at learned positions: DCN v1, or v2, which also learns a modulation of each position.

    Initially it equals the plain convolution with the same weights. The offsets are zero, and so is the logit of the modulation,
    whose sigmoid is doubled. `weight` and `bias` have the names of `nn.Conv2d`, so that weights of the plain convolution load.
    """

    def __init__(self, conv: nn.Conv2d, version: int) -> None:
        super().__init__()
        height, width = conv.kernel_size
        self.positions = height * width
        self.stride, self.padding, self.dilation = map(_pair, (conv.stride, conv.padding, conv.dilation))
        self.weight = nn.Parameter(conv.weight.detach().clone())
        self.bias = nn.Parameter(conv.bias.detach().clone()) if conv.bias is not None else None
        fields = 2 * self.positions + (self.positions if version == 2 else 0)
        size = _pair(conv.kernel_size)
        self.offset = nn.Conv2d(conv.in_channels, fields, size, self.stride, self.padding, self.dilation)
        for parameter in self.offset.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        fields = self.offset(x)  # B 2P or 3P H W
        offset, modulation = fields.split([2 * self.positions, fields.shape[1] - 2 * self.positions], dim=1)
        mask = 2 * modulation.float().sigmoid() if modulation.shape[1] else None
        # The CPU operator supports only float32, and half precision is too coarse for offsets on any device.
        with torch.autocast(x.device.type, enabled=False):
            bias = self.bias.float() if self.bias is not None else None
            output = deform_conv2d(
                x.float(), offset.float(), self.weight.float(), bias, self.stride, self.padding, self.dilation, mask
            )
        return output.to(x.dtype)


def _pair(values: Sequence[int] | str) -> tuple[int, int]:
    """Return a convolution's setting as (height, width)."""
    height, width = map(int, values)
    return height, width


def conv3x3(in_channels: int, out_channels: int) -> nn.Conv2d:
    """Return a 3x3 convolution that keeps the size."""
    return nn.Conv2d(in_channels, out_channels, 3, padding=1)


def kaiming_normal(module: nn.Module) -> None:
    """Initialise convolutions with Kaiming normal (fan-out, ReLU) and zero bias: the branches, projection and fusion."""
    for conv in module.modules():
        if isinstance(conv, nn.Conv2d):
            nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
            if conv.bias is not None:
                nn.init.zeros_(conv.bias)


def kaiming_uniform(*modules: nn.Module) -> None:
    """Initialise layers with Kaiming uniform (a = 1) and zero bias: the laterals, FPN outputs and group FC."""
    for module in modules:
        assert isinstance(module, nn.Conv2d | nn.Linear)
        nn.init.kaiming_uniform_(module.weight, a=1)
        nn.init.zeros_(module.bias)  # type: ignore[arg-type]


def normal(module: nn.Conv2d | nn.Linear, bias: float) -> None:
    """Initialise a class, kernel or activation-map layer with normal weights of deviation 0.01 and a constant bias."""
    nn.init.normal_(module.weight, std=0.01)
    nn.init.constant_(module.bias, bias)  # type: ignore[arg-type]
