"""Instance masks as COCO stores them: polygons and run lengths. Imports no torch.

P predictions, K instances of one image, H W height and width in pixels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sparseinst.data.annotations import check_segmentation

Mask = NDArray[np.uint8]
"""(H, W), 0 or 1."""


class Bounds(NamedTuple):
    """A range of rows and columns in pixels. It is empty if `bottom` equals `top`, or `right` equals `left`."""

    top: int
    left: int
    bottom: int
    right: int


def decode(segmentation: Any, height: int, width: int) -> Mask:
    """Return the mask (height, width) of polygons or run lengths, stored column by column.

    Raises:
        ValueError: as in `check_segmentation`.
    """
    from hotcoco import mask

    check_segmentation(segmentation, height, width)
    return mask.decode(_runs(segmentation, height, width))


def decode_with_bounds(segmentation: Any, height: int, width: int) -> tuple[Mask, Bounds]:
    """Return the mask and bounds that contain the instance. They may be too wide, but never too narrow. Raises `ValueError`."""
    from hotcoco import mask

    runs = _runs(segmentation, height, width)
    left, top, wide, high = map(int, mask.to_bbox(runs))
    return mask.decode(runs), Bounds(top, left, top + high, left + wide)


def bounds(segmentation: Any, height: int, width: int) -> Bounds:
    """Return bounds that contain the instance, without decoding it. They may be too wide, but never too narrow.

    Raises:
        ValueError: as in `check_segmentation`.
    """
    from hotcoco import mask

    check_segmentation(segmentation, height, width)
    if isinstance(segmentation, Mapping):
        left, top, wide, high = map(int, mask.to_bbox(_runs(segmentation, height, width)))
        return Bounds(top, left, top + high, left + wide)
    corners = np.concatenate([np.asarray(points, dtype=np.float64).reshape(-1, 2) for points in segmentation])
    (left, top), (right, bottom) = np.floor(corners.min(0)).astype(int), np.ceil(corners.max(0)).astype(int)
    return Bounds(int(top), int(left), int(bottom) + 1, int(right) + 1)


def _runs(segmentation: Any, height: int, width: int) -> Any:
    from hotcoco import mask

    if isinstance(segmentation, Mapping):
        if list(segmentation["size"]) != [height, width]:
            raise ValueError(f"run lengths have the size {segmentation['size']}, but the image has {[height, width]}")
        return mask.fr_py_objects(dict(segmentation), height, width)
    polygons = [list(map(float, polygon)) for polygon in segmentation]
    if not polygons or any(len(polygon) < 6 or len(polygon) % 2 for polygon in polygons):
        raise ValueError("a polygon needs at least three points of x and y")
    return mask.merge(mask.fr_py_objects(polygons, height, width))


def overlaps(results: Sequence[dict[str, Any]], segmentations: Sequence[Any], height: int, width: int) -> NDArray[np.float64]:
    """Return the IoU (P, K) of P results of `encode` with K segmentations of an image. Raises `ValueError`, as `decode` does."""
    from hotcoco import mask

    if not results or not segmentations:
        return np.zeros((len(results), len(segmentations)))
    truth: Any = [_runs(segmentation, height, width) for segmentation in segmentations]
    found: Any = [{**run, "counts": run["counts"].encode("ascii")} for run in results]
    return np.asarray(mask.iou(found, truth, [False] * len(truth)), dtype=np.float64).reshape(len(results), len(segmentations))


def encode(masks: NDArray[np.bool_] | Mask) -> list[dict[str, Any]]:
    """Return masks (K, H, W) as K run lengths with `counts` as text. This is fastest for masks stored column by column."""
    from hotcoco import mask

    if not len(masks):
        return []
    stack: Any = np.asfortranarray(masks.transpose(1, 2, 0).view(np.uint8))
    runs: Any = mask.encode(stack)
    return [{"size": list(run["size"]), "counts": run["counts"].decode("ascii")} for run in runs]


def encode_runs(lengths: NDArray[np.int64], size: tuple[int, int]) -> dict[str, Any]:
    """Return what `encode` returns for one mask.

    Args:
        lengths: of the runs down the columns, outside and inside the mask by turns; the first one is outside.
        size: the height and width of the mask.
    """
    from hotcoco import mask

    run: Any = mask.frPyObjects({"size": list(size), "counts": lengths.tolist()}, *size)
    return {"size": list(run["size"]), "counts": run["counts"].decode("ascii")}
