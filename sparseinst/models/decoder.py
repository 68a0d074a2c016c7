"""Define the IAM-based segmentation decoder, which predicts instances and their masks from features (paper section 3.4).

Shapes: B images, N instance maps, G groups, E encoder channels, D branch channels, K kernel_dim, H W height and width at 1/8.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparseinst.config import DecoderConfig
from sparseinst.models.iam import KINDS
from sparseinst.models.layers import FOCAL_PRIOR_BIAS, DeformableConv2d, conv3x3, kaiming_normal, normal
from sparseinst.models.network import Predictions


class Coordinates(nn.Module):
    """Put the coordinates x and y, each from -1 to 1 over the padded map, before the features (B, C, H, W): (B, 2 + C, H, W)."""

    def forward(self, like: Tensor) -> Tensor:
        batch, _, height, width = like.shape
        y, x = (self.line(side, like) for side in (height, width))
        both = torch.stack([x.expand(height, width), y[:, None].expand(height, width)])
        return torch.cat([both.expand(batch, -1, -1, -1), like], dim=1)

    def line(self, side: int, like: Tensor) -> Tensor:
        return torch.linspace(-1, 1, side, device=like.device, dtype=like.dtype)


def branch(config: DecoderConfig, in_channels: int) -> nn.Sequential:
    """Return `depth` pairs of 3x3 convolution and ReLU. The last convolution is deformable if the config says so."""
    layers: list[nn.Module] = []
    for index in range(config.depth):
        conv = conv3x3(in_channels if index == 0 else config.width, config.width)
        kaiming_normal(conv)
        last = index == config.depth - 1
        layers += [DeformableConv2d(conv, config.deformable_version) if last and config.deformable else conv, nn.ReLU()]
    return nn.Sequential(*layers)


class InstanceBranch(nn.Module):
    """Predict instances: the maps gather one feature per instance, and three linear heads read it.

    `forward` takes (B, E, H, W), or E + 2 channels with coordinates. It returns class logits (B, N, classes), objectness logits
    (B, N), mask kernels (B, N, K) and map responses (B, G N, H, W).
    """

    def __init__(self, config: DecoderConfig, in_channels: int, num_classes: int) -> None:
        super().__init__()
        self.convs = branch(config, in_channels)
        self.iam = KINDS[config.iam.kind](config.iam, config.width)
        self.classes = nn.Linear(self.iam.out_channels, num_classes)
        self.kernels = nn.Linear(self.iam.out_channels, config.kernel_dim)
        self.objectness = nn.Linear(self.iam.out_channels, 1)
        normal(self.classes, FOCAL_PRIOR_BIAS)
        normal(self.kernels, 0.0)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        features, responses = self.iam(self.convs(x))  # B N GD, B GN H W
        return self.classes(features), self.objectness(features).squeeze(-1), self.kernels(features), responses


class Decoder(nn.Module):
    """Combine the instance branch and the mask branch: a mask is the product of an instance's kernel and the mask features.

    `forward` takes the encoder's features (B, E, H, W) and returns `Predictions`.
    """

    def __init__(self, config: DecoderConfig, in_channels: int, num_classes: int) -> None:
        super().__init__()
        self.coordinates = Coordinates() if config.coordinates else nn.Identity()
        self.mask_scale = config.mask_scale
        channels = in_channels + (2 if config.coordinates else 0)
        self.instance_branch = InstanceBranch(config, channels, num_classes)
        self.mask_branch = branch(config, channels)
        self.projection = nn.Conv2d(config.width, config.kernel_dim, 1)
        kaiming_normal(self.projection)

    def forward(self, x: Tensor) -> Predictions:
        x = self.coordinates(x)  # B E+2 H W
        classes, objectness, kernels, responses = self.instance_branch(x)
        features = self.projection(self.mask_branch(x))  # B K H W
        masks = (kernels @ features.flatten(2)).unflatten(2, features.shape[-2:])  # B N H W
        masks = F.interpolate(masks, scale_factor=self.mask_scale, mode="bilinear", align_corners=False)  # B N sH sW
        return Predictions(classes, objectness, masks, responses)
