"""Build the models of detectron2's model zoo as peers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from sparseinst.data.transforms import Pixels, resize_image, short_side_size
from sparseinst.errors import UserError
from sparseinst.integrations.peers import DETECTRON2
from sparseinst.integrations.peers.peer import Peer, PeerInput, count_parameters, instances
from sparseinst.postprocess import Instances


def build(name: str, device: torch.device, sides: tuple[int, int], weights: Path | None, pretrained: bool) -> Peer:
    """Build the peer; see `build_peer`."""
    try:
        from detectron2 import model_zoo
        from detectron2.checkpoint import DetectionCheckpointer
        from detectron2.config import get_cfg
        from detectron2.data import MetadataCatalog
        from detectron2.modeling import build_model
    except ImportError as error:
        if error.name == "pkg_resources":  # detectron2's model zoo imports it
            raise UserError(
                f"{name}: detectron2's model zoo needs pkg_resources, which newer versions of setuptools lack: "
                "pip install 'setuptools<81'"
            ) from None
        raise UserError(f"{name} needs detectron2 ({error}); see 'In detectron2' in docs/weights.md") from None

    config, cfg = name.removeprefix(DETECTRON2), get_cfg()
    try:
        cfg.merge_from_file(config if Path(config).exists() else model_zoo.get_config_file(config))
    except (RuntimeError, OSError, KeyError, ValueError) as error:
        raise UserError(f"{name}: {config} is no config of detectron2's model zoo and no config file ({error})") from None
    cfg.MODEL.DEVICE = str(device)
    if not pretrained:
        cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = 0.0
    torch.manual_seed(0)
    model: Any = build_model(cfg).eval()
    if pretrained:
        try:
            source = str(weights) if weights is not None else model_zoo.get_checkpoint_url(config)
            DetectionCheckpointer(model).load(source)
        except (RuntimeError, OSError, AssertionError) as error:
            raise UserError(f"{name}: the weights cannot be loaded ({error}); name a file with --weights") from None
    names = MetadataCatalog.get(cfg.DATASETS.TEST[0]).get("thing_classes") if cfg.DATASETS.TEST else None
    order = slice(None, None, -1 if cfg.INPUT.FORMAT == "BGR" else 1)

    def prepare(photo: Pixels) -> PeerInput:
        height, width = photo.shape[:2]
        resized = resize_image(Image.fromarray(photo), short_side_size(height, width, *sides))
        pixels = np.ascontiguousarray(np.asarray(resized)[:, :, order].transpose(2, 0, 1))
        # The model normalises and pads its input itself.
        images = [{"image": torch.from_numpy(pixels).to(device), "height": height, "width": width}]
        return PeerInput(images, (resized.height, resized.width), (height, width))

    def finish(outputs: Any, _inputs: PeerInput) -> Instances:
        found = outputs[0]["instances"]
        return instances(found.scores, found.pred_classes, found.pred_masks)

    return Peer(
        name, tuple(names or ()), prepare, lambda inputs: model(inputs.images), finish, count_parameters(model), "detectron2"
    )
