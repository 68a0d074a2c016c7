"""Compute COCO's twelve mask metrics, with hotcoco or, on request, with pycocotools. Both give the same values."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from pycocotools.coco import COCO

from sparseinst.data.coco import decode, state_of_file
from sparseinst.data.transforms import as_segment
from sparseinst.errors import DataError

FIGURES = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
"""COCO's twelve mask metrics, in percent."""

Engine = Literal["hotcoco", "pycocotools"]


def coco_figures(
    annotations: Path, results: list[dict[str, Any]], image_ids: list[int], engine: Engine = "hotcoco"
) -> dict[str, float | None]:
    """Return the twelve metrics of results over these images, in percent; None if there is no object of that size.

    Args:
        annotations: a file in COCO's format.
        results: instances in COCO's result format.
        engine: the library that computes the metrics.

    Raises:
        DataError: pycocotools is used and a segmentation of the annotations is invalid.
    """
    coco = importlib.import_module(engine if engine == "hotcoco" else "pycocotools.coco")
    evaluation = importlib.import_module(engine if engine == "hotcoco" else "pycocotools.cocoeval")
    with contextlib.redirect_stdout(io.StringIO()):  # both print their summary
        truth = _hotcoco_truth(annotations, state_of_file(annotations)) if engine == "hotcoco" else pycocotools_truth(annotations)
        found = truth.loadRes(results) if results or engine == "hotcoco" else coco.COCO()  # pycocotools fails on []
        comparison = evaluation.COCOeval(truth, found, "segm")
        comparison.params.imgIds = sorted(image_ids)
        comparison.evaluate()
        comparison.accumulate()
        comparison.summarize()
    values = [float(value) for value in comparison.stats]
    return {name: None if value < 0 else 100 * value for name, value in zip(FIGURES, values, strict=True)}


@lru_cache(maxsize=1)
def _hotcoco_truth(annotations: Path, _state: tuple[int, ...]) -> Any:
    """Return hotcoco's form of an annotation file. Trainings that are evaluated on the way use it many times."""
    return importlib.import_module("hotcoco").COCO(str(annotations))


def pycocotools_truth(annotations: Path) -> COCO:
    """Read annotations for pycocotools as hotcoco reads them.

    The annotations are numbered from 1, because pycocotools reads an id of 0 as "no match". `iscrowd` and `area` may be missing.

    Raises:
        DataError: a segmentation is invalid.
    """
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
