"""Read `labelme`: one JSON file for each image, with polygons, rectangles, circles and masks (the program LabelMe).

Shapes with the same label and the same `group_id` are parts of one instance. An image may lie inside its JSON file (`imageData`).
"""

from __future__ import annotations

import base64
import binascii
import io
import json
import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from sparseinst.data.convert.source import Entry, Instance, Mask, Report, Size, Source, SourceImage
from sparseinst.data.masks import decode
from sparseinst.errors import DataError, UserError
from sparseinst.files import read_text

_CORNERS_OF_CIRCLE = 64
_AREAS = ("polygon", "rectangle", "circle", "mask")
"""The kinds of shape that cover an area."""


def matches(root: Path) -> bool:
    return any(_is_labelme(file) for file in _files(root)[:20])


def read(root: Path, category: str) -> Source:  # noqa: ARG001 (all readers have this signature)
    """List the JSON files in the folder and its subfolders. Raises `UserError` if there is none."""
    files = _files(root)
    if not files:
        raise UserError(f"{root}: holds no JSON file")
    return Source([Entry(file.relative_to(root).with_suffix("").as_posix(), partial(_load, file)) for file in files])


def _files(root: Path) -> list[Path]:
    return sorted(file for file in root.rglob("*.json") if not file.name.startswith("."))


def _is_labelme(file: Path) -> bool:
    try:
        content = json.loads(read_text(file))
    except (UserError, ValueError):
        return False
    return isinstance(content, dict) and "shapes" in content and "imagePath" in content


def _load(file: Path, report: Report) -> SourceImage | None:
    try:
        content = json.loads(read_text(file))
    except (UserError, ValueError):
        report.leave_out("a broken JSON file", file)
        return None
    if not isinstance(content, dict) or not isinstance(content.get("shapes"), list):
        report.leave_out("a JSON file without a list of shapes", file)
        return None
    sides = content.get("imageHeight"), content.get("imageWidth")
    size = (sides[0], sides[1]) if isinstance(sides[0], int) and isinstance(sides[1], int) else None
    shapes = content["shapes"]
    return SourceImage(_image(file, content), size, lambda actual: _instances(file, shapes, actual, report))


def _image(file: Path, content: dict[str, Any]) -> Path | bytes:
    """Return the image that the JSON file names, or else the image that it holds."""
    named = file.parent / str(content.get("imagePath") or "").replace("\\", "/")
    if not named.is_file() and content.get("imageData"):
        try:
            return base64.b64decode(content["imageData"], validate=True)
        except (binascii.Error, TypeError, ValueError):
            return named
    return named


def _instances(file: Path, shapes: list[Any], size: Size, report: Report) -> Iterator[Instance]:
    """Yield the instances of an image: the shapes of a group together, each other shape for itself."""
    groups: dict[Any, list[tuple[str, list[list[float]] | Mask]]] = {}
    names: dict[Any, str] = {}
    for index, shape in enumerate(shapes):
        where = f"{file}: shape {index + 1}"
        if not isinstance(shape, dict) or not isinstance(shape.get("label"), str):
            report.leave_out("a shape without a label", where)
            continue
        kind = shape.get("shape_type") or "polygon"
        if kind not in _AREAS:
            report.leave_out(f"a {kind}, which covers no area", where)
            continue
        try:
            part = _mask(shape, size) if kind == "mask" else [_polygon(kind, shape["points"])]
        except (KeyError, TypeError, ValueError, DataError):
            report.leave_out(f"a {kind} that cannot be read", where)
            continue
        number = shape.get("group_id")
        key = (shape["label"], index, None) if number is None else (shape["label"], None, str(number))
        groups.setdefault(key, []).append((where, part))
        names[key] = shape["label"]
    for key, parts in groups.items():
        yield Instance(names[key], _together([part for _, part in parts], size), parts[0][0])


def _polygon(kind: str, points: Any) -> list[float]:
    """Return a shape's corners as x, y, x, y, ... Raises `ValueError` or `TypeError` if the points have another form."""
    corners = [(float(x), float(y)) for x, y in points]
    if kind == "polygon" or (kind == "rectangle" and len(corners) == 4):
        return [value for corner in corners for value in corner]
    (x, y), (u, v) = corners  # two corners of a rectangle, or the centre of a circle and a point on it
    if kind == "rectangle":
        return [x, y, u, y, u, v, x, v]
    radius = math.hypot(u - x, v - y)
    angles = (2 * math.pi * index / _CORNERS_OF_CIRCLE for index in range(_CORNERS_OF_CIRCLE))
    return [value for angle in angles for value in (x + radius * math.cos(angle), y + radius * math.sin(angle))]


def _mask(shape: dict[str, Any], size: Size) -> Mask:
    """Return a shape's mask (H, W): LabelMe stores the part inside the box that the two points span. Raises `ValueError`."""
    try:
        with Image.open(io.BytesIO(base64.b64decode(shape["mask"], validate=True))) as picture:
            part = np.asarray(picture.convert("L")) > 0
    except (OSError, SyntaxError) as error:
        raise ValueError(f"mask: {error}") from None
    left, top = (round(float(value)) for value in shape["points"][0])
    rows, columns = part.shape
    if left < 0 or top < 0 or top + rows > size[0] or left + columns > size[1]:
        raise ValueError("the mask leaves the image")
    mask = np.zeros(size, np.bool_)
    mask[top : top + rows, left : left + columns] = part
    return mask


def _together(parts: list[list[list[float]] | Mask], size: Size) -> list[list[float]] | Mask:
    """Return the parts of an instance as one: polygons stay polygons unless a part is a mask."""
    if all(isinstance(part, list) for part in parts):
        return [polygon for part in parts if isinstance(part, list) for polygon in part]
    masks = [decode(part, *size).astype(np.bool_) if isinstance(part, list) else part for part in parts]
    return np.asarray(np.any(masks, axis=0))
