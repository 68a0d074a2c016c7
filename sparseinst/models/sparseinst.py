"""SparseInst: backbone, encoder and decoder in a row (paper section 3.2, Figure 3).

B images, H W padded height and width in pixels.
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
    """Padded, normalised images (B, 3, H, W) to raw `Predictions`; H and W are multiples of `SIZE_DIVISOR`."""

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
        """Height and width of the predicted masks for a padded input of (height, width)."""
        height, width = (math.floor(side // STRIDES[0] * self.decoder.mask_scale) for side in padded)
        return height, width

    def mask_stride(self) -> int:
        """Input pixels a pixel of the predicted masks, where that is an even number; 1 where it is not."""
        stride = STRIDES[0] / self.decoder.mask_scale
        return int(stride) if stride % 2 == 0 and SIZE_DIVISOR % stride == 0 else 1

    def normalise(self, images: Tensor, sizes: list[tuple[int, int]]) -> Tensor:
        """RGB of 0-255, (B, 3, H, W) of any type, to the network's input; all outside each image's (h, w) becomes zero."""
        normalised = (images.to(self.pixel_mean.dtype) - self.pixel_mean) / self.pixel_std
        for image, (height, width) in zip(normalised, sizes, strict=True):
            image[:, height:].zero_()
            image[:, :, width:].zero_()
        return normalised


def build_model(config: ModelConfig, *, load_pretrained: bool = True) -> SparseInst:
    """The model a config describes, with fresh heads.

    Args:
        load_pretrained: False leaves out the ImageNet weights, for a model whose weights are about to be loaded.

    Raises:
        UserError: an unknown backbone, one without features at 1/8, 1/16, 1/32, or pretrained weights that cannot be had.
    """
    config = config.scaled()
    backbone = Backbone(config.backbone, load_pretrained=load_pretrained)
    encoder = Encoder(config.encoder, backbone.channels)
    decoder = Decoder(config.decoder, config.encoder.channels, config.num_classes)
    return SparseInst(backbone, encoder, decoder)
