"""Define what every network has, whether its own modules or an engine run it: inputs, raw outputs and their sizes.

This file imports none of the model's modules, because an engine needs none of them. Shapes: B images, H W padded height and width
in pixels.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sparseinst.config import SIZE_DIVISOR, STRIDES

PIXEL_MEAN = (123.675, 116.280, 103.530)
PIXEL_STD = (58.395, 57.120, 57.375)


class Predictions(NamedTuple):
    """The raw output of a network, for B images with N instance maps in G groups. Losses and scoring live outside the model."""

    class_logits: Tensor
    """(B, N, classes)."""
    objectness_logits: Tensor
    """(B, N): the predicted mask IoU before the sigmoid."""
    mask_logits: Tensor
    """(B, N, s H / 8, s W / 8) with s = `mask_scale`: by default, 1/4 of the padded input."""
    responses: Tensor
    """(B, G N, H / 8, W / 8): the instance activation maps before their normalisation; they are not negative."""


class InstanceNetwork(nn.Module):
    """Compute raw `Predictions` from padded, normalised images (B, 3, H, W); H and W are multiples of `SIZE_DIVISOR`.

    Args:
        mask_scale: the setting of the decoder: the factor by which it enlarges the masks.
        pixel_mean: the mean of each channel of the training images.
        pixel_std: the standard deviation, likewise.
    """

    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(
        self, mask_scale: float, pixel_mean: tuple[float, ...] = PIXEL_MEAN, pixel_std: tuple[float, ...] = PIXEL_STD
    ) -> None:
        super().__init__()
        self.mask_scale = mask_scale
        self.register_buffer("pixel_mean", torch.tensor(pixel_mean)[:, None, None], persistent=False)
        self.register_buffer("pixel_std", torch.tensor(pixel_std)[:, None, None], persistent=False)

    def forward(self, images: Tensor) -> Predictions:
        raise NotImplementedError

    def mask_size(self, padded: tuple[int, int]) -> tuple[int, int]:
        """Return the height and width of the predicted masks for a padded input of (height, width)."""
        height, width = (math.floor(side // STRIDES[0] * self.mask_scale) for side in padded)
        return height, width

    def mask_stride(self) -> int:
        """Return the stride of the training masks, as the function `mask_stride` does."""
        return mask_stride(self.mask_scale)

    def normalise(self, images: Tensor, sizes: list[tuple[int, int]]) -> Tensor:
        """Return the network's input for RGB images, as the function `normalise` does with the network's mean and deviation."""
        return normalise(images, sizes, self.pixel_mean, self.pixel_std)


def normalise(images: Tensor, sizes: list[tuple[int, int]], mean: Tensor | None = None, std: Tensor | None = None) -> Tensor:
    """Return the input of a network (B, 3, H, W) for RGB images of the same shape, of any type, with values from 0 to 255.

    Args:
        sizes: the height and width of each image. The padding outside becomes zero.
        mean: the mean of each channel (3, 1, 1) on the images' device; by default, ImageNet's.
        std: the standard deviation of each channel, likewise.
    """
    mean = images.new_tensor(PIXEL_MEAN, dtype=torch.float32)[:, None, None] if mean is None else mean
    std = images.new_tensor(PIXEL_STD, dtype=torch.float32)[:, None, None] if std is None else std
    normalised = (images.to(mean.dtype) - mean) / std
    for image, (height, width) in zip(normalised, sizes, strict=True):
        image[:, height:].zero_()
        image[:, :, width:].zero_()
    return normalised


def mask_stride(mask_scale: float) -> int:
    """Return the input pixels per side of a mask pixel if they are an even divisor of `SIZE_DIVISOR`; 1 otherwise.

    Args:
        mask_scale: the setting of the decoder: the factor by which it enlarges the masks.
    """
    stride = STRIDES[0] / mask_scale
    return int(stride) if stride % 2 == 0 and SIZE_DIVISOR % stride == 0 else 1
