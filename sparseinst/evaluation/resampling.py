"""Compute AP for many resamplings of the validation images (bootstrap), to estimate the noise of the images.

Every evaluation of the same images uses the same resamplings. In one resampling, two evaluations therefore contain the same
images, and their difference is a paired one. The same holds for the difference of two means over seeds (Efron and Tibshirani, "An
Introduction to the Bootstrap", 1993). hotcoco matches predictions with objects. AP is then computed from these matches as in
COCO's own evaluation, except that each image has a weight.
"""

from __future__ import annotations

import contextlib
import importlib
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sparseinst.data.annotations import MEDIUM, SMALL, hotcoco_truth
from sparseinst.files import state_of_file

DRAWS = 400
"""The number of resamplings. The estimated standard error is then itself uncertain by about 4 %."""
FIGURES = ("AP", "AP50", "AP75", "APs", "APm", "APl")
_RECALLS = np.linspace(0, 1, 101)


class _Class(NamedTuple):
    """The matches of one category in one range of object sizes.

    D predictions, sorted from the highest score to the lowest; T IoU thresholds; I images.
    """

    right: NDArray[np.bool_]
    """T D: whether the prediction is matched with an object."""
    wrong: NDArray[np.bool_]
    """T D: whether the prediction is matched with no object. An ignored prediction is neither right nor wrong."""
    images: NDArray[np.intp]
    """D: the index of the prediction's image."""
    objects: NDArray[np.int64]
    """I: the number of objects in each image."""


def resampled_figures(
    annotations: Path, results: list[dict[str, Any]], image_ids: Sequence[int], draws: int = DRAWS
) -> dict[str, list[float | None]]:
    """Return the AP metrics of results in each resampling of these images, in percent.

    Args:
        annotations: a file in COCO's format.
        results: instances in COCO's result format.
        image_ids: the evaluated images.
        draws: the number of resamplings.

    Returns:
        For each metric of `FIGURES`, one value per resampling; None if the resampling contains no object of the metric's size.
    """
    ids = sorted(image_ids)
    weights = np.random.default_rng(0).multinomial(len(ids), np.full(len(ids), 1 / len(ids)), size=draws)
    values = weighted_figures(matches(annotations, results, ids), weights)
    return {name: [None if np.isnan(value) else round(float(value), 3) for value in values[name]] for name in FIGURES}


def matches(annotations: Path, results: list[dict[str, Any]], ids: Sequence[int]) -> dict[str, list[_Class]]:
    """Match predictions with objects, and sort the matches by object size and category.

    Args:
        ids: the evaluated images, sorted.

    Returns:
        For objects of all sizes (`all`) and of each size (`small`, `medium`, `large`), the matches of each category.
    """
    hotcoco = importlib.import_module("hotcoco")
    with contextlib.redirect_stdout(io.StringIO()):
        truth = hotcoco_truth(annotations, state_of_file(annotations))
        evaluation = hotcoco.COCOeval(truth, truth.loadRes(results), "segm")
        evaluation.params.imgIds = list(ids)
        evaluation.evaluate()
    number = {image: index for index, image in enumerate(ids)}
    found: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for entry in evaluation.eval_imgs:
        if entry is not None:
            found.setdefault((_size(entry["aRng"]), entry["category_id"]), []).append(entry)
    sizes: dict[str, list[_Class]] = {}
    for (size, _), entries in found.items():
        sizes.setdefault(size, []).append(_gather(entries, number))
    return sizes


def _size(area: Sequence[float]) -> str:
    if area[0] == 0:
        return "small" if area[1] <= SMALL else "all"
    return "medium" if area[0] < MEDIUM else "large"


def _gather(entries: Iterable[dict[str, Any]], number: dict[int, int]) -> _Class:
    """Return the matches of one category and size in all images."""
    entries = sorted(entries, key=lambda entry: number[entry["image_id"]])
    objects = np.zeros(len(number), dtype=np.int64)
    for entry in entries:
        objects[number[entry["image_id"]]] = len(entry["gtIgnore"]) - sum(entry["gtIgnore"])
    with_results = [entry for entry in entries if len(entry["dtScores"])]
    if not with_results:
        nothing = np.zeros((1, 0), dtype=bool)
        return _Class(nothing, nothing, np.zeros(0, dtype=np.intp), objects)
    scores = np.concatenate([entry["dtScores"] for entry in with_results])
    order = np.argsort(-scores, kind="mergesort")
    matched = np.concatenate([np.asarray(entry["dtMatched"], dtype=bool) for entry in with_results], axis=1)[:, order]
    ignored = np.concatenate([np.asarray(entry["dtIgnore"], dtype=bool) for entry in with_results], axis=1)[:, order]
    images = np.concatenate([np.full(len(entry["dtScores"]), number[entry["image_id"]]) for entry in with_results])[order]
    counts = ~ignored.all(axis=0)  # a prediction that is ignored at every threshold has no effect on AP
    right, wrong = (matched & ~ignored)[:, counts], (~matched & ~ignored)[:, counts]
    return _Class(right, wrong, images[counts], objects)


def weighted_figures(sizes: dict[str, list[_Class]], weights: NDArray[np.int64]) -> dict[str, NDArray[np.float64]]:
    """Return the AP metrics in percent if each image counts as often as its weight says.

    Args:
        sizes: from `matches`.
        weights: S I, how often each of I images counts in each of S resamplings.

    Returns:
        For each metric of `FIGURES`, S values; NaN for a resampling without objects of the metric's size.
    """
    by_size = {size: _mean_precisions(sizes.get(size, []), weights) for size in ("all", "small", "medium", "large")}
    every = by_size["all"]
    columns = {"AP": every.mean(1), "AP50": every[:, 0], "AP75": every[:, 5 if every.shape[1] > 5 else 0]}
    columns |= {f"AP{size[0]}": by_size[size].mean(1) for size in ("small", "medium", "large")}
    return {name: 100 * values for name, values in columns.items()}


def _mean_precisions(classes: Sequence[_Class], weights: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return average precision, averaged over the categories that have objects in a resampling: S T."""
    thresholds = max((len(found.right) for found in classes), default=1)
    total, counted = np.zeros((len(weights), thresholds)), np.zeros((len(weights), 1))
    for found in classes:
        for draw, weight in enumerate(weights):
            objects = int(weight @ found.objects)
            if objects:
                total[draw] += _average_precision(found, weight[found.images], objects)
                counted[draw] += 1
    return np.divide(total, counted, out=np.full_like(total, np.nan), where=counted > 0)


def _average_precision(found: _Class, weight: NDArray[np.int64], objects: int) -> NDArray[np.float64]:
    """Return the average precision at each IoU threshold, as COCO's evaluation computes it: T.

    Args:
        weight: D, how often the image of each prediction counts.
        objects: the number of objects, each counted as often as its image.
    """
    kept = weight > 0
    right = np.cumsum(found.right[:, kept] * weight[kept], axis=1)  # T D
    wrong = np.cumsum(found.wrong[:, kept] * weight[kept], axis=1)
    if not right.shape[1]:
        return np.zeros(len(right))
    precision = right / np.maximum(right + wrong, 1)
    precision = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
    precision = np.concatenate([precision, np.zeros((len(precision), 1))], axis=1)  # precision 0 at recalls that are not reached
    recall = right / objects
    at = [np.searchsorted(line, _RECALLS, side="left") for line in recall]
    return np.array([line[where].mean() for line, where in zip(precision, at, strict=True)])
