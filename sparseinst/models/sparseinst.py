"""Define SparseInst, a sequence of backbone, encoder and decoder (paper section 3.2, Figure 3).

Shapes: B images, H W padded height and width in pixels.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from sparseinst.config import SIZE_DIVISOR, STRIDES, ModelConfig
from sparseinst.models.backbone import Backbone
from sparseinst.models.decoder import Decoder, Predictions
from sparseinst.models.encoder import Encoder

PIXEL_MEAN = (123.675, 116.280, 103.530)
PIXEL_STD = (58.395, 57.120, 57.375)


class SparseInst(nn.Module):
    """Compute raw `Predictions` from padded, normalised images (B, 3, H, W); H and W are multiples of `SIZE_DIVISOR`."""

    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(self, backbone: Backbone, encoder: Encoder, decoder: Decoder) -> None:
        super().__init__()
        self.backbone = backbone
        self.encoder = encoder
        self.decoder = decoder
        self.register_buffer("pixel_mean", torch.tensor(PIXEL_MEAN)[:, None, None], persistent=False)
        self.register_buffer("pixel_std", torch.tensor(PIXEL_STD)[:, None, None], persistent=False)

    def forward(self, images: Tensor) -> Predictions:
        return self.decoder(self.encoder(self.backbone(images)))

    def mask_size(self, padded: tuple[int, int]) -> tuple[int, int]:
        """Return the height and width of the predicted masks for a padded input of (height, width)."""
        return mask_size(padded, self.decoder.mask_scale)

    def mask_stride(self) -> int:
        """Return the stride of the training masks, as the function `mask_stride` does."""
        return mask_stride(self.decoder.mask_scale)

    def normalise(self, images: Tensor, sizes: list[tuple[int, int]]) -> Tensor:
        """Return the model's input for RGB images, as the function `normalise` does with the model's mean and deviation."""
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


def mask_size(padded: tuple[int, int], mask_scale: float) -> tuple[int, int]:
    """Return the height and width of the predicted masks, for a padded input and the decoder's setting `mask_scale`."""
    height, width = (math.floor(side // STRIDES[0] * mask_scale) for side in padded)
    return height, width


def mask_stride(mask_scale: float) -> int:
    """Return the input pixels per side of a mask pixel if they are an even divisor of `SIZE_DIVISOR`; 1 otherwise.

    Args:
        mask_scale: the setting of the decoder: the factor by which it enlarges the masks.
    """
    stride = STRIDES[0] / mask_scale
    return int(stride) if stride % 2 == 0 and SIZE_DIVISOR % stride == 0 else 1


def build_model(config: ModelConfig, *, load_pretrained: bool = True) -> SparseInst:
    """Return the model that a config describes, with newly initialised encoder and decoder.

    Args:
        load_pretrained: load the backbone's pretrained weights, if the config has any. False is for a model whose weights the
            caller loads next.

    Raises:
        UserError: the backbone is unknown, it lacks features at 1/8, 1/16 or 1/32, or its pretrained weights cannot be loaded.
    """
    config = config.scaled()
    backbone = Backbone(config.backbone, load_pretrained=load_pretrained)
    encoder = Encoder(config.encoder, backbone.channels)
    decoder = Decoder(config.decoder, config.encoder.channels, config.num_classes)
    return SparseInst(backbone, encoder, decoder)
