"""Build other instance segmentation models, so that they are timed and evaluated as ours are.

These *peers* are torchvision's Mask R-CNN, the models of detectron2's model zoo, the YOLO models of the package `ultralytics`
and the RF-DETR models of the package `rfdetr`. The last three need their packages, which nothing else imports.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from sparseinst.errors import UserError
from sparseinst.files import check_is_file
from sparseinst.nested import nearest

if TYPE_CHECKING:
    import torch

    from sparseinst.integrations.peers.peer import Peer

MASK_RCNN = "mask-rcnn-r50-fpn"
"""The name of torchvision's Mask R-CNN with a ResNet-50."""
DETECTRON2 = "detectron2:"
"""The start of the name of a model of detectron2; a config of its model zoo, or the path of a config, follows."""
RFDETR = "rfdetr-seg-"
"""The start of the name of a model of rfdetr; its size follows."""


def is_yolo(name: str) -> bool:
    """Tell whether this is the name of a model of ultralytics, such as `yolo11n-seg`."""
    return name.startswith("yolo") and name.endswith("-seg")


def is_peer(name: str) -> bool:
    return name == MASK_RCNN or name.startswith((DETECTRON2, RFDETR)) or is_yolo(name)


def is_quantised(name: str) -> bool:
    """Tell whether a peer can run in int8. NNCF 3.4 fails on the graph of Mask R-CNN, and detectron2's are not exported."""
    return is_yolo(name) or name.startswith(RFDETR)


def default_sides(name: str) -> tuple[int, int]:
    """Return the shorter side of the network's input, and the limit of the longer side, in pixels, that a peer is meant for.

    Raises:
        UserError: there is no such peer.
    """
    if is_yolo(name):
        return 480, 640  # the published evaluations scale the longer side to 640
    if name.startswith(RFDETR):
        from sparseinst.integrations.peers.rfdetr_seg import default_side

        return default_side(name), default_side(name)
    if is_peer(name):
        return 800, 1333
    raise UserError(
        f"no peer is called {name!r}; give {MASK_RCNN}, yolo26n-seg, {RFDETR}nano, or {DETECTRON2} and a config"
        f"{nearest(name, [MASK_RCNN])}"
    )


def build_peer(
    name: str,
    *,
    device: torch.device,
    sides: tuple[int, int] | None = None,
    weights: Path | None = None,
    pretrained: bool = True,
) -> Peer:
    """Build a peer.

    Args:
        name: `MASK_RCNN`, a name such as `yolo26n-seg` or `rfdetr-seg-nano`, or `detectron2:` with a config.
        sides: the shorter side of the network's input, and the limit of the longer side, in pixels; None takes
            `default_sides`. The input of RF-DETR is a square with sides as long as the first.
        weights: a file; None takes the published weights, which are downloaded unless they are in the cache.
        pretrained: False gives random weights and keeps all detections, so that timing includes the largest amount of work.

    Raises:
        UserError: there is no such peer, its package is missing, or the weights cannot be downloaded or do not fit.
    """
    sides = sides or default_sides(name)
    if weights is not None:
        check_is_file(weights)
    if name == MASK_RCNN:
        from sparseinst.integrations.peers.mask_rcnn import build
    elif is_yolo(name):
        from sparseinst.integrations.peers.yolo import build
    elif name.startswith(RFDETR):
        from sparseinst.integrations.peers.rfdetr_seg import build
    elif name.startswith(DETECTRON2):
        from sparseinst.integrations.peers.detectron2_zoo import build
    else:
        default_sides(name)  # raises the error
        raise AssertionError(name)
    return build(name, device, sides, weights, pretrained)
