"""Build the segmentation models of the package `rfdetr` as peers: `rfdetr-seg-nano` to `rfdetr-seg-2xlarge`."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Any

import torch
from torchvision.transforms import functional as F

from sparseinst.data.transforms import Pixels
from sparseinst.errors import UserError
from sparseinst.integrations.peers import RFDETR
from sparseinst.integrations.peers.peer import (
    Exportable,
    Peer,
    PeerInput,
    Published,
    count_parameters,
    instances,
    missing,
    no_download,
)
from sparseinst.nested import nearest
from sparseinst.postprocess import Instances

_SOURCE = "rfdetr.roboflow.com, benchmarks"
_SIZES: dict[str, tuple[str, int, float]] = {
    "nano": ("RFDETRSegNano", 312, 40.3),
    "small": ("RFDETRSegSmall", 384, 43.1),
    "medium": ("RFDETRSegMedium", 432, 45.3),
    "large": ("RFDETRSegLarge", 504, 47.1),
    "xlarge": ("RFDETRSegXLarge", 624, 48.8),
    "2xlarge": ("RFDETRSeg2XLarge", 768, 49.9),
}
"""The package's class, both sides of the network's input in pixels, and the published AP of masks."""


def default_side(name: str) -> int:
    """Return both sides of the input for which the published weights were trained. Raises `UserError` for an unknown name."""
    return _known(name)[1]


def _known(name: str) -> tuple[str, int, float]:
    size = name.removeprefix(RFDETR)
    if size not in _SIZES:
        raise UserError(f"{name}: there is no such model; the sizes are {', '.join(_SIZES)}{nearest(size, list(_SIZES))}")
    return _SIZES[size]


def build(name: str, device: torch.device, sides: tuple[int, int], weights: Path | None, pretrained: bool) -> Peer:
    """Build the peer; see `build_peer`. The input is a square, with sides as long as the shorter one of `sides`."""
    try:
        import rfdetr
        from rfdetr.assets.coco_classes import COCO_CLASSES
    except ImportError as error:
        raise missing(name, "rfdetr", error) from None
    kind, _, figure = _known(name)
    side = sides[0]
    source = {"pretrain_weights": str(weights)} if weights is not None else {} if pretrained else {"pretrain_weights": None}
    logging.getLogger("rf-detr").setLevel(logging.ERROR)
    torch.manual_seed(0)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it warns that random weights are random
            whole: Any = getattr(rfdetr, kind)(resolution=side, device=str(device), **source)
    except (OSError, RuntimeError) as error:
        raise no_download(name, error) from None
    step = whole.model_config.patch_size * whole.model_config.num_windows
    if side % step:
        raise UserError(
            f"{name}: its input's sides must be multiples of {step} pixels, and {side} is none; use {side // step * step or step}"
        )
    network = whole.model.model.eval()
    network.export()  # its outputs are tensors from now on
    for parameter in network.parameters():
        parameter.requires_grad_(False)

    def prepare(photo: Pixels) -> PeerInput:
        image = torch.from_numpy(photo).permute(2, 0, 1).to(device) / 255
        image = F.normalize(F.resize(image, [side, side], antialias=False), whole.means, whole.stds)
        return PeerInput(image[None].contiguous(), (side, side), photo.shape[:2])

    def finish(outputs: Any, inputs: PeerInput) -> Instances:
        boxes, logits, masks = outputs
        raw = {"pred_boxes": boxes, "pred_logits": logits, "pred_masks": masks}
        [found] = whole.model.postprocess(raw, torch.tensor([inputs.original], device=logits.device))
        return instances(found["scores"], found["labels"], found["masks"][:, 0])

    return Peer(
        name,
        tuple(COCO_CLASSES.get(label, "") for label in range(max(COCO_CLASSES) + 1)),
        prepare,
        lambda inputs: network(inputs.images),
        finish,
        count_parameters(network),
        package="rfdetr",
        exportable=Exportable(network, ("boxes", "logits", "masks"), any_size=False, transformer=True),
        published=Published(figure, _SOURCE) if side == _known(name)[1] else None,
    )
