"""Say why an object was missed or an instance matches none, in the manner of TIDE (Bolya et al., ECCV 2020), with mask IoUs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sparseinst.data.masks import overlaps

FOUND = 0.5
"""An object counts as found from this mask IoU on."""
NEAR = 0.1
"""From this mask IoU on, an instance and an object have to do with each other."""
INVENTED = ("duplicate", "wrong class", "poor mask", "class and mask", "background")
"""The reasons why an instance matches no object. The first one that holds is named."""
MISSED = ("wrong class", "low score", "poor mask", "class and mask", "merged", "nothing near")
"""The reasons why an object was missed. The first one that holds is named."""

Entry = dict[str, Any]
"""An annotation, or an instance in COCO's result format."""


class Cause(NamedTuple):
    """Why a mistake happened."""

    reason: str
    """One of `INVENTED` or `MISSED`."""
    nearest: Entry | None
    """The object or the instance that the reason is about; None if there is none."""
    iou: float | None
    """The mask IoU with it."""


def causes_of_invented(invented: Sequence[Entry], objects: Sequence[Entry], size: tuple[int, int]) -> list[Cause]:
    """Return the cause of each instance that matches no object.

    Args:
        invented: the instances of one image that match no object.
        objects: all objects of the image, without crowds.
        size: height and width of the image.
    """
    found = []
    for instance, ious in zip(invented, _ious(invented, objects, size), strict=True):
        category = instance["category_id"]
        same = [(iou, entry) for iou, entry in zip(ious, objects, strict=True) if entry["category_id"] == category]
        other = [(iou, entry) for iou, entry in zip(ious, objects, strict=True) if entry["category_id"] != category]
        found.append(
            _first(
                [
                    ("duplicate", same, FOUND),
                    ("wrong class", other, FOUND),
                    ("poor mask", same, NEAR),
                    ("class and mask", other, NEAR),
                ],
                "background",
            )
        )
    return found


def causes_of_missed(
    missed: Sequence[Entry],
    invented: Sequence[Entry],
    matched: Sequence[Entry],
    weak: Sequence[Entry],
    size: tuple[int, int],
) -> list[Cause]:
    """Return the cause of each missed object.

    Args:
        missed: the objects of one image that no instance matches.
        invented: its instances that match no object.
        matched: its instances that match other objects.
        weak: its instances below the score.
        size: height and width of the image.
    """
    groups = [_ious(instances, missed, size) for instances in (invented, matched, weak)]
    found = []
    for number, target in enumerate(missed):
        category = target["category_id"]
        near, used, low = (
            list(zip(ious[:, number], instances, strict=True))
            for ious, instances in zip(groups, (invented, matched, weak), strict=True)
        )
        same = [(iou, entry) for iou, entry in near if entry["category_id"] == category]
        other = [(iou, entry) for iou, entry in near if entry["category_id"] != category]
        found.append(
            _first(
                [
                    ("wrong class", other, FOUND),
                    ("low score", [(iou, entry) for iou, entry in low if entry["category_id"] == category], FOUND),
                    ("poor mask", same, NEAR),
                    ("class and mask", other, NEAR),
                    ("merged", used, NEAR),
                ],
                "nothing near",
            )
        )
    return found


def _first(reasons: Sequence[tuple[str, Sequence[tuple[float, Entry]], float]], otherwise: str) -> Cause:
    """Return the first reason with a candidate of at least its IoU, and the candidate with the highest one."""
    for reason, candidates, least in reasons:
        iou, nearest = max(candidates, key=lambda candidate: candidate[0], default=(0.0, None))
        if iou >= least:
            return Cause(reason, nearest, float(iou))
    return Cause(otherwise, None, None)


def _ious(instances: Sequence[Entry], objects: Sequence[Entry], size: tuple[int, int]) -> NDArray[np.float64]:
    return overlaps([entry["segmentation"] for entry in instances], [entry["segmentation"] for entry in objects], *size)
