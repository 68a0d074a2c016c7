"""Compute COCO's twelve mask metrics, with hotcoco or, on request, with pycocotools. Both give the same values.

COCO counts the 100 best predictions of an image and category at most. For data with more objects, AP is computed at more, too.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
from collections import Counter
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from pycocotools.coco import COCO

from sparseinst.data.annotations import hotcoco_truth
from sparseinst.data.coco import CocoSplit
from sparseinst.data.masks import decode
from sparseinst.data.transforms import as_segment
from sparseinst.errors import DataError
from sparseinst.files import state_of_file

FIGURES = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
"""COCO's twelve mask metrics, in percent."""

Evaluator = Literal["hotcoco", "pycocotools"]
COCO_LIMIT = 100
"""The number of predictions that COCO's metrics count in an image for one category, at most."""


class Metrics(NamedTuple):
    """The metrics of results over some images, in percent."""

    figures: dict[str, float | None]
    """The twelve metrics of `FIGURES`; None if there is no object of that size."""
    by_category: dict[int, float | None]
    """The AP of each category, by its id in the annotations; None for a category without objects."""


def coco_figures(
    annotations: Path, results: list[dict[str, Any]], image_ids: list[int], evaluator: Evaluator = "hotcoco"
) -> dict[str, float | None]:
    """Return the twelve metrics of `coco_metrics`."""
    return coco_metrics(annotations, results, image_ids, evaluator).figures


def coco_metrics(
    annotations: Path, results: list[dict[str, Any]], image_ids: list[int], evaluator: Evaluator = "hotcoco"
) -> Metrics:
    """Return the metrics of results over these images.

    Args:
        annotations: a file in COCO's format.
        results: instances in COCO's result format.
        evaluator: the library that computes the metrics.

    Raises:
        DataError: pycocotools is used and a segmentation of the annotations is invalid.
    """
    comparison = _compared(annotations, results, image_ids, evaluator)
    with contextlib.redirect_stdout(io.StringIO()):
        comparison.summarize()
    values = [float(value) for value in comparison.stats]
    figures = {name: None if value < 0 else 100 * value for name, value in zip(FIGURES, values, strict=True)}
    precision = np.asarray(comparison.eval["precision"])[:, :, :, 0, -1]  # thresholds, recalls, categories
    categories = [int(category) for category in comparison.params.catIds]
    return Metrics(figures, {category: _mean_percent(precision[:, :, n]) for n, category in enumerate(categories)})


def most_objects(split: CocoSplit) -> int:
    """Return the largest number of objects that an image has of one category. Crowds do not count."""
    counts = Counter(
        (image.id, annotation.label) for image in split.images for annotation in image.annotations if not annotation.crowd
    )
    return max(counts.values(), default=0)


def figures_by_limit(
    split: CocoSplit, results: list[dict[str, Any]], image_ids: list[int], evaluator: Evaluator = "hotcoco"
) -> dict[str, float | None]:
    """Return AP in percent with limits on the predictions of an image and category: `AP@1`, `AP@10`, `AP@100`, `AP@most`.

    `most` is the largest number of objects that an image of the split has of one category. The recall with this limit, `AR@most`,
    comes with them. The result is empty if `most` is at most 100, because COCO's metrics are then complete.
    """
    most = most_objects(split)
    if most <= COCO_LIMIT:
        return {}
    limits = [1, 10, COCO_LIMIT, most]
    comparison = _compared(split.file, results, image_ids, evaluator, limits)
    precision = np.asarray(comparison.eval["precision"])[:, :, :, 0]  # thresholds, recalls, categories, limits; all object sizes
    recall = np.asarray(comparison.eval["recall"])[:, :, 0, -1]  # thresholds, categories
    figures = {f"AP@{limit}": _mean_percent(precision[..., number]) for number, limit in enumerate(limits)}
    return {**figures, f"AR@{limits[-1]}": _mean_percent(recall)}


def _mean_percent(values: np.ndarray) -> float | None:
    """Return the mean in percent of the values that are not negative, which stand for categories without objects."""
    known = values[values >= 0]
    return float(100 * known.mean()) if known.size else None


def _compared(
    annotations: Path, results: list[dict[str, Any]], image_ids: list[int], evaluator: Evaluator, limits: list[int] | None = None
) -> Any:
    """Return the library's comparison of results with annotations, accumulated but not summarised."""
    coco = importlib.import_module(evaluator if evaluator == "hotcoco" else "pycocotools.coco")
    evaluation = importlib.import_module(evaluator if evaluator == "hotcoco" else "pycocotools.cocoeval")
    with contextlib.redirect_stdout(io.StringIO()):  # both print their progress
        truth = (
            hotcoco_truth(annotations, state_of_file(annotations)) if evaluator == "hotcoco" else pycocotools_truth(annotations)
        )
        copies = [dict(result) for result in results]  # pycocotools adds fields
        found = truth.loadRes(copies) if results or evaluator == "hotcoco" else coco.COCO()  # pycocotools fails on []
        comparison = evaluation.COCOeval(truth, found, "segm")
        comparison.params.imgIds = sorted(image_ids)
        if limits is not None:
            comparison.params.maxDets = limits
        comparison.evaluate()
        comparison.accumulate()
    return comparison


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
            if annotation.get("area") is None:
                annotation["area"] = int(decode(annotation["segmentation"], *sizes[annotation["image_id"]]).sum())
        except (ValueError, TypeError) as error:
            raise DataError(f"{annotations}: annotation {annotation['id']}: segmentation: {error}") from None
        annotation["id"] = number
        annotation.setdefault("iscrowd", 0)
    truth = COCO()
    truth.dataset = data
    truth.createIndex()
    return truth
