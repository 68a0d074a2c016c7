"""Read `label_maps` and `cityscapes`: images whose pixels hold the numbers of instances.

label_maps  Each positive number is an instance of the only category. `images/` holds the images; `masks/`, `labels/` or
            `label_maps/` holds the maps under the same names. Or a map lies beside its image as NAME_masks.png or NAME_label.png.
cityscapes  `*_instanceIds.png`. A number from 1000 on is 1000 times the class and the instance's number; a smaller number is a
            region of a class without single instances. The image is `*_leftImg8bit.png` or has the same name.
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

_FOLDERS = ("label_maps", "labels", "masks")
_ENDINGS = ("_masks", "_mask", "_labels", "_label")
_MAP_SUFFIXES = (".png", ".tif", ".tiff")

_IDS = "instanceIds"
THINGS = {24: "person", 25: "rider", 26: "car", 27: "truck", 28: "bus", 31: "train", 32: "motorcycle", 33: "bicycle"}
"""The classes of Cityscapes that its evaluation of instances uses, by their label ids."""
_NOT_EVALUATED = {29: "caravan", 30: "trailer"}


def label_maps_match(root: Path) -> bool:
    return any(_pairs(root))


def read_label_maps(root: Path, category: str) -> Source:
    """List the images that have a label map. Raises `UserError` if there is none."""
    pairs = list(_pairs(root))
    if not pairs:
        folder = likely_maps(root)
        raise UserError(
            f"{root}: no label map found; put the images into images/ and the maps into label_maps/ under the same names"
            + (f" ({folder.name}/ may hold them: rename it)" if folder is not None else "")
        )
    return Source([Entry(name, partial(_load, image, file, category)) for name, image, file in pairs], [category])


def _pairs(root: Path) -> Iterator[tuple[str, Path, Path]]:
    """Yield the name, the image and the label map of each image, sorted by name."""
    folder = next((root / name for name in _FOLDERS if (root / "images").is_dir() and _maps(root / name)), None)
    if folder is not None:
        for image in images_in(root / "images"):
            found = image_of(folder, image.stem)
            yield image.stem, image, found or folder / f"{image.stem}.png"
        return
    for file in _maps(root):
        ending = next((ending for ending in _ENDINGS if file.stem.endswith(ending)), None)
        image_file = image_of(root, file.stem.removesuffix(ending)) if ending else None
        if image_file is not None:
            yield image_file.stem, image_file, file


def likely_maps(root: Path) -> Path | None:
    """Return the only folder beside `images/` whose PNG and TIFF files all have the names of images; None if there is no such."""
    images = {image.stem for image in images_in(root / "images")} if (root / "images").is_dir() else set()
    folders = (folder for folder in sorted(root.iterdir()) if folder.is_dir() and folder.name != "images")
    likely = [folder for folder in folders if (maps := _maps(folder)) and {file.stem for file in maps} <= images]
    return likely[0] if len(likely) == 1 else None


def _maps(folder: Path) -> list[Path]:
    return [file for file in images_in(folder) if file.suffix.lower() in _MAP_SUFFIXES]


def _load(image: Path, file: Path, category: str, report: Report) -> SourceImage | None:
    labels = _numbers(file, report)
    if labels is None:
        return None
    numbers = np.unique(labels[labels > 0]).tolist()
    if numbers == [255]:
        report.leave_out("an image whose map is black and white, so that it separates no instances", file)
        return None
    size = (labels.shape[0], labels.shape[1])
    return SourceImage(image, size, lambda _: (Instance(category, labels == n, f"{file}: label {n}") for n in numbers))


def cityscapes_matches(root: Path) -> bool:
    return any(root.rglob(f"*{_IDS}.png"))


def read_cityscapes(root: Path, category: str) -> Source:  # noqa: ARG001 (all readers have this signature)
    """List the instance maps in the folder and its subfolders; `test` has none that hold objects. Raises `UserError`."""
    maps = [file for file in sorted(root.rglob(f"*{_IDS}.png")) if "test" not in file.relative_to(root).parts]
    if not maps:
        raise UserError(f"{root}: no *_{_IDS}.png found")
    images: dict[str, list[Path]] = {}
    for file in images_in(root, recursive=True):
        images.setdefault(file.stem.removesuffix("_leftImg8bit"), []).append(file)
    entries = []
    for file in maps:
        stem = file.stem.removesuffix(_IDS).rstrip("_")
        stem = stem.removesuffix("_gtFine").removesuffix("_gtCoarse")
        candidates = images.get(stem, [file.with_name(f"{stem}_leftImg8bit.png")])
        image = max(candidates, key=lambda path: len({*path.parts} & {*file.parts}))  # of the same split
        split = next((part for part in file.relative_to(root).parts if part in ("train", "val")), None)
        name = stem if split is None or file.parent.name == split else f"{file.parent.name}/{stem}"
        entries.append(Entry(name, partial(_load_ids, image, file), split))
    return Source(entries, list(THINGS.values()))


def _load_ids(image: Path, file: Path, report: Report) -> SourceImage | None:
    labels = _numbers(file, report)
    if labels is None:
        return None
    return SourceImage(image, (labels.shape[0], labels.shape[1]), lambda _: _things(labels, file, report))


def _numbers(file: Path, report: Report) -> Labels | None:
    """Return the numbers of a label map, or None with the reason in the report."""
    found = load_labels(file, report)
    if found is not None and found[1]:
        report.leave_out("an image whose label map is in colour", file)
        return None
    return found[0] if found is not None else None


def _things(labels: Labels, file: Path, report: Report) -> Iterator[Instance]:
    """Yield the objects. A region of a thing class that is not split into instances is a crowd, as in Cityscapes' own tools."""
    for number in np.unique(labels[labels > 0]).tolist():
        group = number < 1000
        label = number if group else number // 1000
        where = f"{file}: number {number}"
        if label in THINGS:
            yield Instance(THINGS[label], labels == number, where, crowd=group)
        elif label in _NOT_EVALUATED:
            report.leave_out(f"a {_NOT_EVALUATED[label]}, which Cityscapes does not evaluate", where)
        elif not group:
            report.leave_out("an object with an unknown label id", where)
