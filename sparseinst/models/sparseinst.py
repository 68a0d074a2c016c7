"""Define SparseInst, a sequence of backbone, encoder and decoder (paper section 3.2, Figure 3)."""

from __future__ import annotations

from torch import Tensor

from sparseinst.config import ModelConfig
from sparseinst.models.backbone import Backbone
from sparseinst.models.decoder import Decoder
from sparseinst.models.encoder import Encoder
from sparseinst.models.network import InstanceNetwork, Predictions


class SparseInst(InstanceNetwork):
    """A network with its modules. Shapes are those of `InstanceNetwork`."""

    def __init__(self, backbone: Backbone, encoder: Encoder, decoder: Decoder) -> None:
        super().__init__(decoder.mask_scale)
        self.backbone = backbone
        self.encoder = encoder
        self.decoder = decoder

    def forward(self, images: Tensor) -> Predictions:
        return self.decoder(self.encoder(self.backbone(images)))


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
