"""Validate the content of annotation files in COCO's format, before anything is computed from it. Imports no torch.

The evaluation reads the same files, perhaps days later. Everything that it cannot read must therefore be found here.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from sparseinst.errors import DataError
from sparseinst.files import read_text
from sparseinst.words import has_half_surrogate, shorten

SMALL, MEDIUM = 32**2, 96**2
"""COCO's area limits between small, medium and large objects, in pixels."""
FARTHEST = 100_000
"""The largest coordinate, in pixels. Drawing takes time and memory in proportion to it."""
MOST_PIXELS = 2 * (Image.MAX_IMAGE_PIXELS or 89_478_485)
"""The most pixels of an image. Pillow refuses to read a larger one."""
_MOST = 2**63
_USED = {
    "images": ("id", "file_name", "height", "width"),
    "categories": ("id", "name"),
    "annotations": ("id", "image_id", "category_id", "segmentation", "area", "bbox", "iscrowd"),
}
"""What the metrics need of the entries of an annotation file."""


class AnnotationEntry(NamedTuple):
    """The checked values of an entry of `annotations`; see COCO's format."""

    id: int
    image_id: int
    category_id: int
    crowd: bool
    segmentation: Any


def read_content(file: Path) -> dict[str, Any]:
    """Return the content of an annotation file, in which `images`, `categories` and `annotations` are lists.

    Raises:
        DataError: the file is not JSON (with line and column), or lacks one of the first two lists.
        UserError: the file cannot be read.
    """
    text = read_text(file)
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{file}: broken JSON at line {error.lineno}, column {error.colno}: {error.msg}") from None
    except RecursionError:
        raise DataError(f"{file}: is nested too deeply to be a COCO annotation file") from None
    except ValueError:
        raise DataError(f"{file}: holds a number of thousands of digits: correct it") from None
    if not isinstance(data, dict) or not all(isinstance(data.get(k), list) for k in ("images", "categories")):
        raise DataError(f"{file}: not a COCO annotation file: the lists `images` and `categories` are needed")
    if not data["images"] or not data["categories"]:
        raise DataError(f"{file}: holds no {'categories' if data['images'] else 'images'}")
    annotations = data.setdefault("annotations", [])
    if not isinstance(annotations, list):
        raise DataError(f"{file}: annotations: a list was expected, got {shorten(repr(annotations))}; without objects, write []")
    return data


def check_category(entry: Any) -> tuple[int, str]:
    """Return the id and the name of an entry of `categories`. Raises `ValueError`."""
    _check_object(entry, "id", "name")
    return _whole(entry, "id"), _text(entry, "name")


def check_image(entry: Any) -> tuple[int, str, int, int]:
    """Return the id, file name, height and width of an entry of `images`. Raises `ValueError`."""
    _check_object(entry, "id", "file_name", "height", "width")
    name, height, width = _text(entry, "file_name"), entry["height"], entry["width"]
    if not (type(height) is int and type(width) is int and height > 0 and width > 0):
        raise ValueError(f"image {shorten(name)} has height {shorten(repr(height))} and width {shorten(repr(width))}")
    if height * width > MOST_PIXELS:
        raise ValueError(f"image {shorten(name)} has {width:.6g} x {height:.6g} pixels: at most {MOST_PIXELS} can be read")
    if "\0" in name:
        raise ValueError(f"file_name {shorten(ascii(name))} holds a NUL, which no file name can hold")
    return _whole(entry, "id"), name, height, width


def check_annotation(entry: Any) -> AnnotationEntry:
    """Return the values of an entry of `annotations` that are used. Raises `ValueError`."""
    if not isinstance(entry, dict):
        raise ValueError("not an object")
    missing = [key for key in ("id", "image_id", "category_id", "segmentation") if key not in entry]
    if missing:
        boxes = " (boxes alone are not enough)" if "segmentation" in missing else ""
        raise ValueError(f"lacks {', '.join(missing)}{boxes}")
    crowd = entry.get("iscrowd", 0)
    if type(crowd) not in (int, bool) or crowd not in (0, 1):
        raise ValueError(f"iscrowd is {shorten(json.dumps(crowd))}: write 0 or 1")
    _check_measures(entry)
    number, image, category = (_whole(entry, key) for key in ("id", "image_id", "category_id"))
    return AnnotationEntry(number, image, category, bool(crowd), entry["segmentation"])


def _check_measures(entry: Mapping[str, Any]) -> None:
    """Check the values that only the evaluation reads. Raises `ValueError`."""
    area, box = entry.get("area"), entry.get("bbox")
    if area is not None and not (_is_number(area) and area >= 0):
        raise ValueError(f"area is {shorten(json.dumps(area))}: write the number of pixels, or leave it out")
    if box is not None and not (isinstance(box, list) and len(box) == 4 and all(map(_is_number, box))):
        raise ValueError(f"bbox is {shorten(json.dumps(box))}: write [x, y, width, height], or leave it out")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and -_MOST < value < _MOST


def _check_object(entry: Any, *keys: str) -> None:
    if not isinstance(entry, dict):
        raise ValueError(f"an object was expected, got {shorten(repr(entry))}")
    for key in keys:
        if key not in entry:
            raise ValueError(f"an entry lacks {key!r}")


def _whole(entry: Mapping[str, Any], key: str) -> int:
    value = entry[key]
    if type(value) is not int or not 0 <= value < _MOST:
        raise ValueError(f"{key} is {shorten(json.dumps(value))}: write a whole number from 0 to 2^63 - 1")
    return value


def _text(entry: Mapping[str, Any], key: str) -> str:
    value = entry[key]
    if not isinstance(value, str):
        raise ValueError(f"{key} is {shorten(json.dumps(value))}: write a text, in quotes")
    if has_half_surrogate(value):
        raise ValueError(f"{key} is {shorten(ascii(value))}: it holds half a surrogate pair, which no file can hold; correct it")
    return value


def check_segmentation(segmentation: Any, height: int, width: int) -> None:
    """Check polygons or run lengths of an image of this size.

    Raises:
        ValueError: they are neither, a coordinate is no finite number, or the run lengths do not fill the image.
    """
    if isinstance(segmentation, Mapping):
        _check_runs(segmentation, height, width)
    elif isinstance(segmentation, list | tuple):
        if not segmentation:
            raise ValueError("a polygon needs at least three points of x and y")
        for polygon in segmentation:
            _check_polygon(polygon)
    else:
        hint = " (`sparseinst data convert` reads folders of mask images)" if isinstance(segmentation, str) else ""
        raise ValueError(f"polygons or run lengths were expected, got {shorten(repr(segmentation))}{hint}")


def _check_polygon(polygon: Any) -> None:
    if not isinstance(polygon, list | tuple):
        raise ValueError(f"a polygon is a list of numbers x, y, x, y, ...; got {shorten(repr(polygon))}")
    if len(polygon) < 6 or len(polygon) % 2:
        raise ValueError("a polygon needs at least three points of x and y")
    if not set(map(type, polygon)) <= {int, float}:
        for value in polygon:
            if not isinstance(value, int | float | np.number) or isinstance(value, bool):
                raise ValueError(f"the coordinate {shorten(repr(value))} is not a number")
    if not (min(polygon) >= -FARTHEST and max(polygon) <= FARTHEST and math.isfinite(sum(polygon))):
        wrong = next(value for value in polygon if not -FARTHEST <= value <= FARTHEST)
        raise ValueError(f"the coordinate {shorten(repr(wrong))} is not between -{FARTHEST} and {FARTHEST} pixels")


def _check_runs(segmentation: Mapping[str, Any], height: int, width: int) -> None:
    size, counts = segmentation.get("size"), segmentation.get("counts")
    if not isinstance(size, list | tuple) or list(size) != [height, width] or not set(map(type, size)) <= {int}:
        raise ValueError(f"run lengths have the size {shorten(repr(size))}, but the image has {[height, width]}")
    if isinstance(counts, str | bytes):
        lowest, total = _extent(counts)
    elif isinstance(counts, list) and counts and set(map(type, counts)) <= {int}:
        lowest, total = min(counts), sum(counts)
    else:
        raise ValueError(f"run lengths are a text or a list of whole numbers; got {shorten(repr(counts))}")
    if lowest < 0 or total != height * width:
        problem = "one is negative" if lowest < 0 else f"they add up to {total:.12g} pixels"
        raise ValueError(f"run lengths do not fill the image of {height * width} pixels: {problem}")


def _extent(counts: str | bytes) -> tuple[int, int]:
    """Return the lowest and the sum of compressed run lengths. Raises `ValueError` if they are damaged.

    Each length is written in digits of 5 bits, the lowest first, with 32 for "more digits follow", plus 48. From the fourth on,
    the difference from the length two before is written.

    Source:
        `rleFrString` of COCO's maskApi.c.
    """
    text = counts.encode("utf-8", "surrogatepass") if isinstance(counts, str) else counts
    digits = np.frombuffer(text, np.uint8).astype(np.int64) - 48
    if not len(digits) or digits.min() < 0 or digits.max() > 63 or digits[-1] & 32:
        raise ValueError("the compressed run lengths are damaged or cut off")
    last = (digits & 32) == 0
    starts = np.flatnonzero(np.concatenate([[True], last[:-1]]))
    place = np.arange(len(digits)) - np.repeat(starts, np.diff(np.append(starts, len(digits))))
    if place.max() > 7:
        raise ValueError("the compressed run lengths are damaged: one has too many digits")
    lengths = np.add.reduceat((digits & 31) << 5 * place, starts)
    lengths -= np.where(digits[last] & 16, 1, 0) << 5 * (place[last] + 1)
    lengths[1::2], lengths[2::2] = np.cumsum(lengths[1::2]), np.cumsum(lengths[2::2])
    return int(lengths.min()), int(lengths.sum())


def metrics_content(file: Path) -> dict[str, list[dict[str, Any]]]:
    """Return the parts of a checked annotation file that the metrics need.

    hotcoco refuses a whole file for values that nothing reads, such as the year as a text, which Roboflow writes. The annotations
    are numbered anew from 1: COCO's evaluation reads the id 0, with which Roboflow begins, as "no match", and hotcoco takes
    annotations with one id for one another.
    """
    data = read_content(file)
    parts = {part: [{key: entry[key] for key in keys if key in entry} for entry in data[part]] for part, keys in _USED.items()}
    parts["annotations"] = [{**entry, "id": number} for number, entry in enumerate(parts["annotations"], start=1)]
    return parts


@lru_cache(maxsize=2)
def hotcoco_truth(file: Path, _state: tuple[int, ...]) -> Any:
    """Return hotcoco's form of an annotation file. The checks, the metrics and their resamplings share it.

    Args:
        _state: changes when the file is written again, so that each content is read once.

    Raises:
        DataError: hotcoco cannot read the file.
    """
    from hotcoco import COCO

    with contextlib.redirect_stdout(io.StringIO()):
        try:
            return COCO(metrics_content(file))
        except (ValueError, OSError, TypeError) as error:
            raise DataError(f"{file}: hotcoco, which computes the metrics, cannot read it: {shorten(str(error))}") from None
