"""Build torchvision's Mask R-CNN with a ResNet-50 and a feature pyramid as a peer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection import MaskRCNN, MaskRCNN_ResNet50_FPN_Weights
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.models.detection.image_list import ImageList
from torchvision.ops import FrozenBatchNorm2d, clip_boxes_to_image

from sparseinst.data.transforms import Pixels
from sparseinst.errors import UserError
from sparseinst.integrations.peers import default_sides
from sparseinst.integrations.peers.peer import (
    Exportable,
    Peer,
    PeerInput,
    Published,
    count_parameters,
    instances,
    no_download,
)
from sparseinst.models.backbone import read_tensors
from sparseinst.postprocess import Instances

_MASK_THRESHOLD = 0.5
_SOURCE = "torchvision, MaskRCNN_ResNet50_FPN_Weights.COCO_V1"


class _Network(nn.Module):
    """`GeneralizedRCNN` without its transform, which resizes and normalises images and enlarges masks."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor, size: tuple[int, int] | None = None) -> tuple[Tensor, ...]:
        """Return boxes (N, 4) in pixels of the input, labels (N), scores (N) and masks (N, 1, 28, 28) of one image.

        Args:
            images: (1, 3, H, W).
            size: height and width without the padding, at which boxes end. The exported network clips them at H and W instead.
        """
        sizes = [size or (images.shape[-2], images.shape[-1])]
        features = self.model.backbone(images)
        proposals, _ = self.model.rpn(ImageList(images, sizes), features)
        [found], _ = self.model.roi_heads(features, proposals, sizes)
        return found["boxes"], found["labels"], found["scores"], found["masks"]


def build(name: str, device: torch.device, sides: tuple[int, int], weights: Path | None, pretrained: bool) -> Peer:
    """Build the peer; see `build_peer`."""
    torch.manual_seed(0)
    published = MaskRCNN_ResNet50_FPN_Weights.COCO_V1
    # torchvision sets the epsilon of frozen norms to 0 for its published weights only; here it is always 0.
    backbone = resnet_fpn_backbone(backbone_name="resnet50", weights=None)
    for module in backbone.modules():
        if isinstance(module, FrozenBatchNorm2d):
            module.eps = 0.0
    categories = published.meta["categories"]
    threshold = {} if pretrained else {"box_score_thresh": 0.0}
    model: Any = MaskRCNN(backbone, len(categories), min_size=sides[0], max_size=sides[1], **threshold)
    if pretrained:
        _load(model, name, weights, published)
    model = model.to(device).eval()
    network = _Network(model).eval()

    def prepare(photo: Pixels) -> PeerInput:
        image = torch.from_numpy(photo).permute(2, 0, 1).to(device) / 255
        images, _ = model.transform([image])
        return PeerInput(images.tensors, images.image_sizes[0], photo.shape[:2])

    def finish(outputs: Any, inputs: PeerInput) -> Instances:
        boxes, labels, scores, masks = outputs
        found = {"boxes": clip_boxes_to_image(boxes, inputs.resized), "labels": labels, "scores": scores, "masks": masks}
        [found] = model.transform.postprocess([found], [inputs.resized], [inputs.original])
        return instances(scores, labels, found["masks"][:, 0] > _MASK_THRESHOLD)

    figures = published.meta["_metrics"]["COCO-val2017"]
    return Peer(
        name,
        tuple(categories),
        prepare,
        lambda inputs: network(inputs.images, inputs.resized),
        finish,
        count_parameters(model),
        exportable=Exportable(network, ("boxes", "labels", "scores", "masks"), traced=True),
        published=Published(figures["mask_map"], _SOURCE) if sides == default_sides(name) else None,
    )


def _load(model: nn.Module, name: str, weights: Path | None, published: Any) -> None:
    try:
        model.load_state_dict(read_tensors(weights) if weights is not None else published.get_state_dict(check_hash=True))
    except OSError as error:
        raise no_download(name, error) from None
    except RuntimeError as error:
        raise UserError(f"{weights or name} does not fit {name}: {str(error).strip().splitlines()[:2][-1].strip()}") from None
