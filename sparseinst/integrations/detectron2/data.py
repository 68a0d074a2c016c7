"""Augment training images as the reference does, and compute COCO's mask metrics of instances without boxes."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

from detectron2.config import CfgNode
from detectron2.data import DatasetMapper
from detectron2.data import transforms as T
from detectron2.data.detection_utils import build_augmentation
from detectron2.evaluation import COCOEvaluator
from detectron2.structures import Instances

from sparseinst.data.masks import encode
from sparseinst.errors import UserError
from sparseinst.integrations.detectron2.settings import CROP_CHANCE

CROP_SHORT_SIDES = (400, 500, 600)
"""The lengths in pixels from which the shorter side is drawn before a crop. The longer side has no maximum there."""


class SparseInstDatasetMapper(DatasetMapper):  # type: ignore[misc] # detectron2 has no types
    """detectron2's mapper with the reference's augmentation: with `INPUT.CROP`, half of the images are resized and cropped first.

    Raises:
        UserError: polygons are to be cropped, but shapely is not installed.
    """

    @classmethod
    def from_config(cls, cfg: CfgNode, is_train: bool = True) -> dict[str, Any]:
        augmentations = build_augmentation(cfg, is_train)
        if is_train and cfg.INPUT.CROP.ENABLED:
            if cfg.INPUT.MASK_FORMAT == "polygon" and find_spec("shapely") is None:
                raise UserError(
                    "INPUT.CROP: detectron2 crops polygons with shapely, which is not installed: pip install shapely, or set "
                    "INPUT.MASK_FORMAT to bitmask"
                )
            smaller = T.ResizeShortestEdge(CROP_SHORT_SIDES, sample_style="choice")
            part = T.AugmentationList([smaller, T.RandomCrop(cfg.INPUT.CROP.TYPE, cfg.INPUT.CROP.SIZE)])
            augmentations.insert(0, T.RandomApply(part, CROP_CHANCE))
        return {**super().from_config(cfg, is_train), "augmentations": augmentations}


class MaskEvaluator(COCOEvaluator):  # type: ignore[misc]
    """detectron2's COCO evaluator for instances with masks but without boxes. It computes the metrics of masks."""

    def __init__(self, dataset_name: str, output_dir: str, **settings: Any) -> None:
        super().__init__(dataset_name, ("segm",), output_dir=output_dir, **settings)

    def process(self, inputs: Sequence[dict[str, Any]], outputs: Sequence[dict[str, Instances]]) -> None:
        for image, output in zip(inputs, outputs, strict=True):
            results = _coco_results(output["instances"], image["image_id"])
            self._predictions.append({"image_id": image["image_id"], "instances": results})


def _coco_results(found: Instances, image_id: int) -> list[dict[str, Any]]:
    """Return an image's instances in COCO's result format, with detectron2's contiguous numbers of classes."""
    runs = encode(found.pred_masks.cpu().numpy())
    entries = zip(found.pred_classes.tolist(), found.scores.tolist(), runs, strict=True)
    return [
        {"image_id": image_id, "category_id": label, "score": score, "segmentation": segmentation}
        for label, score, segmentation in entries
    ]
