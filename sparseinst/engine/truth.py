"""Annotation files for pycocotools."""

from __future__ import annotations

import json
from pathlib import Path

from pycocotools.coco import COCO

from sparseinst.data.coco import decode
from sparseinst.data.transforms import as_segment
from sparseinst.errors import DataError


def pycocotools_truth(annotations: Path) -> COCO:
    """As hotcoco reads them: any ids (pycocotools takes 0 for no match), crowds and areas only where they are given."""
    data = json.loads(annotations.read_text(encoding="utf-8"))
    data.setdefault("annotations", [])
    sizes = {image["id"]: (image["height"], image["width"]) for image in data["images"]}
    for number, annotation in enumerate(data["annotations"], start=1):
        try:
            as_segment(annotation["segmentation"], *sizes[annotation["image_id"]])
            if "area" not in annotation:
                annotation["area"] = int(decode(annotation["segmentation"], *sizes[annotation["image_id"]]).sum())
        except (ValueError, TypeError) as error:
            raise DataError(f"{annotations}: annotation {annotation['id']}: segmentation: {error}") from None
        annotation["id"] = number
        annotation.setdefault("iscrowd", 0)
    truth = COCO()
    truth.dataset = data
    truth.createIndex()
    return truth
