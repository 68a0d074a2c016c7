"""Find places for labels beside objects, so that they hide no small object and no other label.

Shapes: H W height and width in pixels, P candidate places of one label.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Box = tuple[float, float, float, float]
"""Left, top, right, bottom in pixels."""

_MOST_HIDDEN = 0.5
"""A label that would hide more than this share of an object or of another label is left out."""
_DISTANCE_COST = 0.02
"""A place one plate height further away is chosen if it hides at least this share of an object less."""


def place_labels(masks: NDArray[np.bool_], plates: Sequence[tuple[float, float]]) -> list[Box | None]:
    """Return a place for each object's label, or None where every place would hide too much.

    A place's cost is the sum of the shares of the objects that it hides, so hiding a small object costs more than hiding a part
    of a large one. Labels are placed in their order, and each avoids those before it.

    Args:
        masks: (K, H, W), the objects.
        plates: the width and height of each label in pixels.
    """
    height, width = masks.shape[1:]
    weight = np.zeros((height + 1, width + 1))
    boxes = [_box(mask) for mask in masks]
    for mask, box in zip(masks, boxes, strict=True):
        if box is not None:
            inside = mask[box[1] : box[3], box[0] : box[2]]
            weight[box[1] + 1 : box[3] + 1, box[0] + 1 : box[2] + 1] += inside / inside.sum()
    integral = weight.cumsum(0).cumsum(1)  # the sum over a rectangle is the number of objects that it hides
    placed: list[Box] = []
    found: list[Box | None] = []
    for mask, box, plate in zip(masks, boxes, plates, strict=True):
        best = None if box is None else _best_place(_candidates(mask, box, plate, (width, height)), integral, placed)
        found.append(best)
        placed += [best] if best is not None else []
    return found


def _box(mask: NDArray[np.bool_]) -> tuple[int, int, int, int] | None:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return (int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1) if len(rows) else None


def _candidates(
    mask: NDArray[np.bool_], box: tuple[int, int, int, int], plate: tuple[float, float], size: tuple[int, int]
) -> NDArray[np.float64]:
    """Return places for a label inside the image: their left, top, right, bottom and the cost of their distance (P, 5).

    They lie around the object, first above its topmost pixels, at three distances; the last one is inside its top.
    """
    left, top, right, bottom = box
    w, h = plate
    x = left + float(np.flatnonzero(mask[top, left:right]).mean()) - w / 2
    y = (top + bottom - h) / 2
    corners = []
    for ring in range(3):
        away = ring * h
        around = [(x, top - h - away), (x, bottom + away), (right + away, y), (left - w - away, y)]
        around += [(a, b) for b in (top - h - away, bottom + away) for a in (right, left - w)]
        corners += [(*corner, ring * _DISTANCE_COST) for corner in around]
    corners.append((x, float(top), 0.0))
    places = np.array(corners)
    places[:, 0] = places[:, 0].clip(0, max(0.0, size[0] - w))
    places[:, 1] = places[:, 1].clip(0, max(0.0, size[1] - h))
    return np.column_stack([places[:, :2], places[:, 0] + w, places[:, 1] + h, places[:, 2]])


def _best_place(places: NDArray[np.float64], integral: NDArray[np.float64], placed: Sequence[Box]) -> Box | None:
    """Return the place with the lowest cost, the first of several; None if it hides too much."""
    limit = np.array(integral.shape)[[1, 0, 1, 0]] - 1
    whole = np.concatenate([np.floor(places[:, :2]), np.ceil(places[:, 2:4])], axis=1).astype(int).clip(0, limit)
    left, top, right, bottom = whole.T
    hidden = integral[bottom, right] - integral[top, right] - integral[bottom, left] + integral[top, left]
    for other in placed:
        across = np.minimum(places[:, 2], other[2]) - np.maximum(places[:, 0], other[0])
        down = np.minimum(places[:, 3], other[3]) - np.maximum(places[:, 1], other[1])
        area = (other[2] - other[0]) * (other[3] - other[1])
        hidden = hidden + 2 * across.clip(min=0) * down.clip(min=0) / area  # hiding half a label is as bad as a whole object
    best = int((hidden + places[:, 4]).round(6).argmin())
    if hidden[best] > _MOST_HIDDEN:
        return None
    x0, y0, x1, y1 = places[best, :4].tolist()
    return x0, y0, x1, y1
