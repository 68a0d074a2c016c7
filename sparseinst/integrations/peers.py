"""Build other instance segmentation models, so that they are timed and evaluated as ours are.

These *peers* are torchvision's Mask R-CNN and the models of detectron2's model zoo.

Shapes: H W height and width of an image in pixels.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torchvision.ops import FrozenBatchNorm2d

from sparseinst.data.coco import CocoSplit, category_names
from sparseinst.data.images import read_image
from sparseinst.data.transforms import resize_image, short_side_size
from sparseinst.errors import UserError
from sparseinst.evaluation.coco_metrics import Evaluator, coco_figures, figures_by_limit
from sparseinst.evaluation.evaluate import Evaluation
from sparseinst.evaluation.predictions import in_coco_format, write_predictions
from sparseinst.models.backbone import read_tensors
from sparseinst.nested import nearest
from sparseinst.postprocess import Instances
from sparseinst.progress import progress_bar

MASK_RCNN = "mask-rcnn-r50-fpn"
"""The name of torchvision's Mask R-CNN with a ResNet-50."""
DETECTRON2 = "detectron2:"
"""The prefix of a peer's name; a config of detectron2's model zoo, or the path of a config, follows it."""
SIDES = (800, 1333)
"""Shorter and longer side, in pixels, for which both kinds of peers were trained."""
_MASK_THRESHOLD = 0.5


@dataclass(frozen=True)
class Peer:
    """An instance segmentation model of another kind, in evaluation mode."""

    name: str
    categories: tuple[str, ...]
    """Category names, indexed by label."""
    prepare: Callable[[NDArray[np.uint8]], Any]
    """Turn an (H, W, 3) RGB photo into the network's input on its device: resized and, unless the network does that itself,
    padded and normalised."""
    segment: Callable[[Any], Instances]
    """Turn that input into the instances at the photo's own size. This part is timed."""
    parameters: int
    """Number of parameters."""


def is_peer(name: str) -> bool:
    return name == MASK_RCNN or name.startswith(DETECTRON2)


def build_peer(
    name: str, *, device: torch.device, sides: tuple[int, int] = SIDES, weights: Path | None = None, pretrained: bool = True
) -> Peer:
    """Build a peer.

    Args:
        name: `MASK_RCNN`, or `detectron2:` followed by a config of its model zoo or by a file.
        sides: the shorter side of the network's input, and the limit of the longer side, in pixels.
        weights: a file; None takes the published weights, which are downloaded unless they are in the cache.
        pretrained: False gives random weights and keeps all detections, so that timing includes the largest amount of work.

    Raises:
        UserError: there is no such peer, detectron2 is missing, or the weights cannot be downloaded or do not fit.
    """
    if name == MASK_RCNN:
        return _torchvision(device, sides, weights, pretrained)
    if name.startswith(DETECTRON2):
        return _detectron2(name.removeprefix(DETECTRON2), device, sides, weights, pretrained)
    raise UserError(f"no peer is called {name!r}; give {MASK_RCNN}, or {DETECTRON2} and a config{nearest(name, [MASK_RCNN])}")


def _torchvision(device: torch.device, sides: tuple[int, int], weights: Path | None, pretrained: bool) -> Peer:
    from torchvision.models.detection import MaskRCNN, MaskRCNN_ResNet50_FPN_Weights
    from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

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
        try:
            model.load_state_dict(read_tensors(weights) if weights is not None else published.get_state_dict(check_hash=True))
        except OSError as error:
            raise UserError(f"{MASK_RCNN}: the weights cannot be downloaded ({error}); name a file with --weights") from None
        except RuntimeError as error:
            raise UserError(f"{weights or MASK_RCNN} does not fit {MASK_RCNN}: {str(error).splitlines()[1].strip()}") from None
    model = model.to(device).eval()

    def prepare(photo: NDArray[np.uint8]) -> Any:
        image = torch.from_numpy(photo).permute(2, 0, 1).to(device) / 255
        return model.transform([image])[0], photo.shape[:2]

    def segment(inputs: Any) -> Instances:
        # This is GeneralizedRCNN.forward without the transform, which resizes and normalises.
        images, size = inputs
        features = model.backbone(images.tensors)
        proposals, _ = model.rpn(images, features)
        detections, _ = model.roi_heads(features, proposals, images.image_sizes)
        [found] = model.transform.postprocess(detections, images.image_sizes, [size])
        return _instances(found["scores"], found["labels"], found["masks"][:, 0] > _MASK_THRESHOLD)

    return Peer(MASK_RCNN, tuple(categories), prepare, segment, _parameters(model))


def _detectron2(config: str, device: torch.device, sides: tuple[int, int], weights: Path | None, pretrained: bool) -> Peer:
    try:
        from detectron2 import model_zoo
        from detectron2.checkpoint import DetectionCheckpointer
        from detectron2.config import get_cfg
        from detectron2.data import MetadataCatalog
        from detectron2.modeling import build_model
    except ImportError as error:
        if error.name == "pkg_resources":  # detectron2's model zoo imports it
            raise UserError(
                f"{DETECTRON2}{config}: detectron2's model zoo needs pkg_resources, which newer versions of setuptools lack: "
                "pip install 'setuptools<81'"
            ) from None
        raise UserError(f"{DETECTRON2}{config} needs detectron2 ({error}); see 'In detectron2' in docs/weights.md") from None

    cfg = get_cfg()
    try:
        cfg.merge_from_file(config if Path(config).exists() else model_zoo.get_config_file(config))
    except (RuntimeError, OSError, KeyError, ValueError) as error:
        raise UserError(
            f"{DETECTRON2}{config}: {config} is no config of detectron2's model zoo and no config file ({error})"
        ) from None
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
            raise UserError(f"{DETECTRON2}{config}: the weights cannot be loaded ({error}); name a file with --weights") from None
    names = MetadataCatalog.get(cfg.DATASETS.TEST[0]).get("thing_classes") if cfg.DATASETS.TEST else None
    order = slice(None, None, -1 if cfg.INPUT.FORMAT == "BGR" else 1)

    def prepare(photo: NDArray[np.uint8]) -> Any:
        height, width = photo.shape[:2]
        resized = resize_image(Image.fromarray(photo), short_side_size(height, width, *sides))
        pixels = np.ascontiguousarray(np.asarray(resized)[:, :, order].transpose(2, 0, 1))
        return [{"image": torch.from_numpy(pixels).to(device), "height": height, "width": width}]

    def segment(inputs: Any) -> Instances:
        found = model(inputs)[0]["instances"]  # the model normalises its input itself
        return _instances(found.scores, found.pred_classes, found.pred_masks)

    return Peer(f"{DETECTRON2}{config}", tuple(names or ()), prepare, segment, _parameters(model))


def _instances(scores: Tensor, labels: Tensor, masks: Tensor) -> Instances:
    return Instances(scores, labels, masks, torch.arange(len(scores), device=scores.device))


def _parameters(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@torch.inference_mode()
def evaluate_peer(
    peer: Peer, split: CocoSplit, *, predictions: Path | None = None, evaluator: Evaluator = "hotcoco", progress: bool = True
) -> Evaluation:
    """Segment every image of the split and compute the metrics, as `evaluate` does for our models.

    Categories are matched by name. Instances of categories that the split lacks are left out.

    Raises:
        UserError: the split has none of the peer's categories, or the peer's categories are unknown.
        DataError: an image cannot be read.
    """
    began = time.perf_counter()
    ids = category_ids(peer.categories, split)
    results = []
    with progress_bar("images", visible=progress) as bar:
        for record in bar.track(split.images, total=len(split.images), description="evaluate"):
            photo = np.asarray(read_image(record.path, (record.height, record.width)))
            found = peer.segment(peer.prepare(photo))
            results += in_coco_format(record.id, found, ids)
    if predictions is not None:
        write_predictions(predictions, results)
    images = [image.id for image in split.images]
    figures, by_limit = coco_figures(split.file, results, images, evaluator), figures_by_limit(split, results, images, evaluator)
    return Evaluation(figures, len(images), seconds=round(time.perf_counter() - began, 2), by_limit=by_limit)


def category_ids(names: Sequence[str], split: CocoSplit) -> list[int | None]:
    """Return the split's category id for each name, or None if the split lacks it. Raises `UserError` if it lacks all of them."""
    known = {category.name: category.id for category in split.categories}
    ids = [known.get(name) for name in names]
    if not any(identifier is not None for identifier in ids):
        some = ", ".join(category_names(split.categories)[:3])
        raise UserError(
            f"{split.file}: the peer knows none of the categories ({some}, ...), because it was trained on other data"
        )
    return ids
