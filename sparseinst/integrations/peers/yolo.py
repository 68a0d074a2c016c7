"""Build the segmentation models of the package `ultralytics` as peers, such as `yolo11n-seg` and `yolo26s-seg`.

The package is licensed under AGPL-3.0. It is imported only if such a peer is asked for.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from sparseinst.data.transforms import Pixels
from sparseinst.errors import UserError
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
from sparseinst.postprocess import Instances

_SOURCE = "docs.ultralytics.com/tasks/segment, at 640 pixels"
_PUBLISHED = {"yolo26n-seg": 33.9, "yolo26s-seg": 40.0, "yolo26m-seg": 44.1, "yolo26l-seg": 45.5, "yolo26x-seg": 47.0}
"""AP of masks without NMS."""
_LOWEST_SCORE = 0.001
"""The lowest score that the package's own evaluation keeps."""
_MOST = 100
"""The largest number of instances of an image; COCO's AP counts as many."""
_NMS_IOU = 0.7


def build(name: str, device: torch.device, sides: tuple[int, int], weights: Path | None, pretrained: bool) -> Peer:
    """Build the peer; see `build_peer`. A model that can do without NMS does so."""
    try:
        from ultralytics import YOLO
        from ultralytics.data.augment import LetterBox
        from ultralytics.utils.nms import non_max_suppression
        from ultralytics.utils.ops import process_mask_native, scale_boxes
    except ImportError as error:
        raise missing(name, "ultralytics", error) from None
    torch.manual_seed(0)
    try:
        source = (str(weights) if weights is not None else f"{name}.pt") if pretrained else f"{name}.yaml"
        model: Any = YOLO(source, task="segment", verbose=False).model
    except (OSError, RuntimeError, ConnectionError) as error:
        raise (
            UserError(f"{name}: there is no such model in ultralytics") if not pretrained else no_download(name, error)
        ) from None
    model = model.float().eval()
    head = model.model[-1]
    head.end2end = end2end = getattr(head, "one2one_cv2", None) is not None
    model = model.fuse(verbose=False).to(device)
    head.export, head.format, head.dynamic = True, "onnx", True  # the outputs are two tensors, for any size of the input
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    letterbox = LetterBox(sides[1], auto=True, stride=32)

    def prepare(photo: Pixels) -> PeerInput:
        pixels = torch.from_numpy(letterbox(image=photo).copy()).permute(2, 0, 1)[None].to(device) / 255
        height, width = photo.shape[:2]
        scale = sides[1] / max(height, width)
        return PeerInput(pixels.contiguous(), (round(height * scale), round(width * scale)), (height, width))

    def finish(outputs: Any, inputs: PeerInput) -> Instances:
        boxes, prototypes = outputs
        [found] = non_max_suppression(
            boxes,
            _LOWEST_SCORE if pretrained else 0.0,
            _NMS_IOU,
            multi_label=pretrained,
            max_det=_MOST,
            nc=len(model.names),
            end2end=end2end,
        )
        corners = scale_boxes(inputs.images.shape[2:], found[:, :4], inputs.original)
        masks = process_mask_native(prototypes[0], found[:, 6:], corners, inputs.original)
        return instances(found[:, 4], found[:, 5].long(), masks.bool())

    figure = _PUBLISHED.get(name)
    return Peer(
        name,
        tuple(model.names.values()),
        prepare,
        lambda inputs: model(inputs.images),
        finish,
        count_parameters(model),
        package="ultralytics",
        exportable=Exportable(model, ("boxes", "prototypes")),
        published=Published(figure, _SOURCE) if figure is not None and sides[1] == 640 else None,
    )
