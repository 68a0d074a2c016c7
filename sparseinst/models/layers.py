"""Define the layers and initialisations that backbone, encoder and decoder share. The initialisations are the reference's.

Shapes: B images, C channels, H W height and width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
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
        self.export_sampled = False
        """Whether exported graphs contain `sampled_conv2d`, for readers that lack an operator for deformable convolutions."""
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
        # On a CPU, torchvision's operator takes 5 times as long in a training step.
        sampled = x.device.type == "cpu" if not torch.compiler.is_exporting() else self.export_sampled
        convolve = sampled_conv2d if sampled else deform_conv2d
        # The sum of position and offset would be too coarse in half precision.
        with torch.autocast(x.device.type, enabled=False):
            bias = self.bias.float() if self.bias is not None else None
            output = convolve(
                x.float(), offset.float(), self.weight.float(), bias, self.stride, self.padding, self.dilation, mask
            )
        return output.to(x.dtype)


def sampled_conv2d(
    x: Tensor,
    offset: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
    mask: Tensor | None,
) -> Tensor:
    """Compute `torchvision.ops.deform_conv2d`: sample the input by `grid_sample`, and multiply the samples by the weights.

    Args:
        x: (B, C, H, W).
        offset: (B, 2P, h, w) for a kernel of P positions and an output of h x w; y comes before x.
        weight: (D, C, kernel height, kernel width).
        mask: (B, P, h, w), factors of the samples.

    Returns:
        (B, D, h, w).
    """
    (height, width), (rows, columns) = x.shape[2:], offset.shape[2:]
    kernel = [torch.arange(side, device=x.device) * step for side, step in zip(weight.shape[2:], dilation, strict=True)]
    kernel_y, kernel_x = (at.reshape(-1, 1, 1) for at in torch.meshgrid(*kernel, indexing="ij"))  # P 1 1
    offset_y, offset_x = offset.unflatten(1, (-1, 2)).unbind(2)  # B P h w
    at_y = torch.arange(rows, device=x.device)[:, None] * stride[0] - padding[0] + kernel_y + offset_y
    at_x = torch.arange(columns, device=x.device) * stride[1] - padding[1] + kernel_x + offset_x
    grid = torch.stack([(2 * at_x + 1) / width - 1, (2 * at_y + 1) / height - 1], dim=-1)  # B P h w 2
    samples = F.grid_sample(x, grid.flatten(1, 2), padding_mode="zeros", align_corners=False)  # B C Ph w
    samples = samples.unflatten(2, (-1, rows))  # B C P h w
    if mask is not None:
        samples = samples * mask[:, None]
    return F.conv2d(samples.flatten(1, 2), weight.flatten(1)[:, :, None, None], bias)


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
