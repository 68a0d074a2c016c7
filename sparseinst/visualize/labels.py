"""Find places for labels beside objects, so that they hide no small object and no other label.

Shapes: H W height and width in pixels, P candidate places of one label.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from sparseinst.inference.compact import CompactMasks, strip_rows

Box = tuple[float, float, float, float]
"""Left, top, right, bottom in pixels."""

_MOST_HIDDEN = 0.5
"""A label that would hide more than this share of an object or of another label is left out."""
_DISTANCE_COST = 0.02
"""A place one plate height further away is chosen if it hides at least this share of an object less."""


PixelBox = tuple[int, int, int, int]
"""Left, top, right and bottom in whole pixels; the last two are exclusive."""


def place_labels(masks: NDArray[np.bool_] | CompactMasks, plates: Sequence[tuple[float, float]]) -> list[Box | None]:
    """Return a place for each object's label, or None where every place would hide too much.

    A place's cost is the sum of the shares of the objects that it hides, so hiding a small object costs more than hiding a part
    of a large one. Labels are placed in their order, and each avoids those before it.

    Args:
        masks: (K, H, W), the objects.
        plates: the width and height of each label in pixels.
    """
    masks = CompactMasks.of(masks)
    height, width = masks.shape[1:]
    boxes = [masks.box(index) for index in range(len(masks))]
    places = {
        index: _candidates(masks.rows(index, box[1], box[1] + 1)[0], box, plate, (width, height))
        for index, (box, plate) in enumerate(zip(boxes, plates, strict=True))
        if box is not None
    }
    hidden = dict(zip(places, _hidden_shares(masks, boxes, list(places.values())), strict=True))
    placed: list[Box] = []
    found: list[Box | None] = []
    for index in range(len(masks)):
        best = _best_place(places[index], hidden[index], placed) if index in places else None
        found.append(best)
        placed += [best] if best is not None else []
    return found


def _candidates(
    topmost: NDArray[np.bool_], box: PixelBox, plate: tuple[float, float], size: tuple[int, int]
) -> NDArray[np.float64]:
    """Return places for a label inside the image: their left, top, right, bottom and the cost of their distance (P, 5).

    They lie around the object, first above its topmost pixels, at three distances; the last one is inside its top.

    Args:
        topmost: the first row (W,) of the object's mask that has a pixel.
        size: the width and height of the image.
    """
    left, top, right, bottom = box
    w, h = plate
    x = left + float(np.flatnonzero(topmost[left:right]).mean()) - w / 2
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


def _hidden_shares(
    masks: CompactMasks, boxes: Sequence[PixelBox | None], places: Sequence[NDArray[np.float64]]
) -> list[NDArray[np.float64]]:
    """Return for each place of each group (P, 5) the sum of the shares of the objects that it hides, (P,)."""
    height, width = masks.shape[1:]
    if not places:
        return []
    every = np.concatenate(places)
    limit = (width, height, width, height)
    whole = np.concatenate([np.floor(every[:, :2]), np.ceil(every[:, 2:4])], axis=1).astype(int).clip(0, limit)
    left, top, right, bottom = whole.T
    rows, columns = np.concatenate([bottom, top, bottom, top]), np.concatenate([right, right, left, left])
    both, to_right, below, neither = _integral(masks, boxes, rows, columns).reshape(4, -1)
    hidden = both - to_right - below + neither
    return np.split(hidden, np.cumsum([len(group) for group in places])[:-1])


def _integral(
    masks: CompactMasks,
    boxes: Sequence[PixelBox | None],
    rows: NDArray[np.int64],
    columns: NDArray[np.int64],
) -> NDArray[np.float64]:
    """Return the sums over all pixels above `rows` and left of `columns`; a pixel's value is its share of its object's area.

    The whole image of such sums would need 24 bytes a pixel, so it is computed strip by strip and only these points are kept.
    """
    height, width = masks.shape[1:]
    found = np.zeros(len(rows))
    order = np.argsort(rows, kind="stable")
    ordered = rows[order]
    sums = np.zeros((1, width + 1))  # of each column, above the row
    step = strip_rows(width)
    areas = [masks.area(index) for index in range(len(masks))]
    for start in range(0, int(rows.max(initial=0)), step):
        end = min(height, start + step)
        shares = np.zeros((end - start + 1, width + 1))
        shares[0] = sums[-1]
        for index, box in enumerate(boxes):
            if box is not None and box[1] < end and box[3] > start:
                first, last = max(box[1], start), min(box[3], end)
                inside = masks.window(index, (box[0], first, box[2], last))
                shares[first - start + 1 : last - start + 1, box[0] + 1 : box[2] + 1] += inside / areas[index]
        sums = np.cumsum(shares, axis=0, out=shares)
        for row in np.unique(ordered[(ordered > start) & (ordered <= end)]):
            at = order[ordered == row]
            found[at] = sums[row - start].cumsum()[columns[at]]
    return found


def _best_place(places: NDArray[np.float64], hidden: NDArray[np.float64], placed: Sequence[Box]) -> Box | None:
    """Return the place with the lowest cost, the first of several; None if it hides too much.

    Args:
        hidden: the sum of the shares of the objects that each place hides, (P,).
    """
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
