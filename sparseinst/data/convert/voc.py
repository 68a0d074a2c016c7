"""Read `voc`: Pascal VOC's masks. SegmentationObject/ holds the number of each pixel's instance, SegmentationClass/ its class.

Without `labelmap.txt` (as CVAT writes it) or `class_names.txt` (as LabelMe's script writes it), the classes are those of VOC.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np

from sparseinst.data.convert.source import (
    Entry,
    Instance,
    Labels,
    Report,
    Source,
    SourceImage,
    image_of,
    images_in,
    load_labels,
)
from sparseinst.errors import UserError
from sparseinst.files import read_text

_NAMES = (
    "aeroplane bicycle bird boat bottle bus car cat chair cow "
    "diningtable dog horse motorbike person pottedplant sheep sofa train tvmonitor"
)
_VOID = 255
"""The index of the border around objects and of difficult regions."""
_BACKGROUND = ("background", "_background_", "__ignore__")

Classes = dict[int, str]
"""The names by number; the background and the border are missing."""


def matches(root: Path) -> bool:
    return (root / "SegmentationObject").is_dir() and (root / "SegmentationClass").is_dir()


def read(root: Path, category: str) -> Source:  # noqa: ARG001 (all readers have this signature)
    """List the images of ImageSets/Segmentation/, or else all that have a mask.

    Raises:
        UserError: a folder is missing, or a list of classes is broken.
    """
    for folder in ("SegmentationObject", "SegmentationClass", "JPEGImages"):
        if not (root / folder).is_dir():
            raise UserError(f"{root / folder}: no such folder; Pascal VOC's format needs it")
    classes, colours = _classes(root)
    entries = [Entry(name, partial(_load, root, name, classes, colours), split) for name, split in _listed(root).items()]
    return Source(entries, list(dict.fromkeys(classes.values())))


def _listed(root: Path) -> dict[str, str | None]:
    """Return the names of the images with their splits; None where VOC names no split."""
    lists = root / "ImageSets" / "Segmentation"
    names: dict[str, str | None] = {}
    for split in ("train", "val", "trainval", "default"):
        if (lists / f"{split}.txt").is_file():
            for line in read_text(lists / f"{split}.txt").splitlines():
                if line.strip():
                    names.setdefault(line.strip(), split if split in ("train", "val") else None)
    return names or {file.stem: None for file in images_in(root / "SegmentationObject")}


def _classes(root: Path) -> tuple[Classes, Classes]:
    """Return the names of the classes by index and by colour (red * 65536 + green * 256 + blue)."""
    if (root / "labelmap.txt").is_file():
        return _labelmap(root / "labelmap.txt")
    names = ["background", *_NAMES.split()]
    if (root / "class_names.txt").is_file():
        names = [line.strip() for line in read_text(root / "class_names.txt").splitlines() if line.strip()]
        names = names[1:] if names[:1] == ["__ignore__"] else names  # LabelMe gives it the number -1
    classes = {index: name for index, name in enumerate(names) if name not in _BACKGROUND}
    return classes, {_palette(index): name for index, name in classes.items()}


def _labelmap(file: Path) -> tuple[Classes, Classes]:
    classes, colours = {}, {}
    lines = [line for line in read_text(file).splitlines() if line.strip() and not line.startswith("#")]
    for index, line in enumerate(lines):
        name, *rest = line.split(":")
        if name in _BACKGROUND:
            continue
        classes[index] = name
        try:
            red, green, blue = (int(value) for value in rest[0].split(","))
        except (IndexError, ValueError):
            raise UserError(f"{file}: line {line!r} is not of the form name:red,green,blue:parts:actions") from None
        colours[red * 65536 + green * 256 + blue] = name
    return classes, colours


def _palette(index: int) -> int:
    """Return VOC's colour of an index: the index's bits, from the lowest on, are the highest bits of red, green, blue in turn."""
    colour = [0, 0, 0]
    for bit in range(8):
        colour[bit % 3] |= (index >> bit & 1) << (7 - bit // 3)
    return colour[0] * 65536 + colour[1] * 256 + colour[2]


def _load(root: Path, name: str, classes: Classes, colours: Classes, report: Report) -> SourceImage | None:
    found = load_labels(root / "SegmentationObject" / f"{name}.png", report)
    kinds = load_labels(root / "SegmentationClass" / f"{name}.png", report) if found is not None else None
    if found is None or kinds is None:
        return None
    (objects, coloured), (categories, category_coloured) = found, kinds
    if objects.shape != categories.shape:
        report.leave_out("an image whose two masks differ in size", root / "SegmentationObject" / f"{name}.png")
        return None
    objects = np.where(objects == (_palette(_VOID) if coloured else _VOID), 0, objects)
    where = str(root / "SegmentationObject" / f"{name}.png")
    image = image_of(root / "JPEGImages", name) or root / "JPEGImages" / f"{name}.jpg"
    names = colours if category_coloured else classes
    return SourceImage(
        image, (objects.shape[0], objects.shape[1]), lambda _: _instances(objects, categories, names, where, report)
    )


def _instances(objects: Labels, categories: Labels, names: Classes, where: str, report: Report) -> Iterator[Instance]:
    for number in np.unique(objects[objects > 0]).tolist():
        mask = objects == number
        values, counts = np.unique(categories[mask], return_counts=True)
        value = int(values[counts.argmax()])  # the class of most pixels
        if value in names:
            yield Instance(names[value], mask, f"{where}: object {number}")
        else:
            report.leave_out("an object without a known class", f"{where}: object {number} (class {value})")
