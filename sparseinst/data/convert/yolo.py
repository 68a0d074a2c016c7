"""Read `yolo`: a text file for each image, with a line for each instance: its class and a polygon in fractions of the sides.

`data.yaml` names the classes and the folders of the splits. Without it, `classes.txt` names the classes, and the images are in
`images/`, the text files in `labels/`.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from sparseinst.data.convert.source import Entry, Instance, Report, Size, Source, SourceImage, images_in
from sparseinst.errors import UserError
from sparseinst.files import read_text
from sparseinst.plain import parse_yaml

_FILES = ("data.yaml", "data.yml", "dataset.yaml")


def matches(root: Path) -> bool:
    named = _yaml(root) is not None or (root / "classes.txt").is_file()
    return named and any(any(folder.rglob("*.txt")) for folder in root.rglob("labels"))


def read(root: Path, category: str) -> Source:  # noqa: ARG001 (all readers have this signature)
    """List the images. Raises `UserError` if there is no list of classes, or a folder is missing."""
    file = _yaml(root)
    if file is None:
        if not (root / "classes.txt").is_file():
            raise UserError(f"{root}: holds neither data.yaml nor classes.txt, which name the classes")
        names = {n: line.strip() for n, line in enumerate(read_text(root / "classes.txt").splitlines()) if line.strip()}
        if not (root / "images").is_dir():
            raise UserError(f"{root / 'images'}: no such folder of images")
        return _source([(None, root / "images", images_in(root / "images", recursive=True))], names)
    content = parse_yaml(read_text(file), str(file))
    if not isinstance(content, dict) or not isinstance(content.get("names"), list | dict):
        raise UserError(f"{file}: needs `names`, a list of the classes")
    given = content["names"]
    try:
        names = {int(key): str(name) for key, name in (given.items() if isinstance(given, dict) else enumerate(given))}
    except (TypeError, ValueError):
        raise UserError(f"{file}: the keys of `names` must be the class ids") from None
    groups: list[tuple[str | None, Path, list[Path]]] = []
    for split in ("train", "val"):
        for place in _places(content.get(split) or (content.get("valid") if split == "val" else None)):
            groups.append((split, *_images(root, str(content.get("path") or ""), place, file)))
    return _source(groups, names)


def _yaml(root: Path) -> Path | None:
    return next((root / name for name in _FILES if (root / name).is_file()), None)


def _places(value: Any) -> list[str]:
    return [] if value is None else [str(place) for place in value] if isinstance(value, list) else [str(value)]


def _images(root: Path, path: str, place: str, file: Path) -> tuple[Path, list[Path]]:
    """Return the folder and the images of a split, which `data.yaml` gives as a folder or as a text file that lists images."""
    bases = [root / path, root] if path else [root]
    # Roboflow writes ../train/images for a folder beside data.yaml.
    candidates = list(dict.fromkeys(base / part for part in (place, place.removeprefix("../")) for base in bases))
    found = next((candidate for candidate in candidates if candidate.exists()), None)
    if found is None:
        raise UserError(f"{file}: {place}: no such folder or list of images ({' and '.join(map(str, candidates))} do not exist)")
    if found.is_dir():
        return found, images_in(found, recursive=True)
    lines = (line.strip() for line in read_text(found).splitlines())
    return found.parent, [_beside(found.parent, line) for line in lines if line]


def _beside(base: Path, line: str) -> Path:
    """Return a listed image: relative to the list, or to a folder above it, because tools differ."""
    return next((folder / line for folder in (base, *base.parents[:2]) if (folder / line).is_file()), base / line)


def _source(groups: list[tuple[str | None, Path, list[Path]]], names: dict[int, str]) -> Source:
    entries = []
    for split, folder, files in groups:
        for file in files:
            inside = file.relative_to(folder) if file.is_relative_to(folder) else Path(file.name)
            entries.append(Entry(inside.with_suffix("").as_posix(), partial(_load, file, names), split))
    return Source(entries, list(dict.fromkeys(names[key] for key in sorted(names))))


def _label_file(image: Path) -> Path:
    """Return the text file of an image: the last folder named `images` becomes `labels`; else it lies beside the image."""
    parts = list(image.parts)
    for index in range(len(parts) - 2, -1, -1):
        if parts[index] == "images":
            parts[index] = "labels"
            break
    return Path(*parts).with_suffix(".txt")


def _load(image: Path, names: dict[int, str], report: Report) -> SourceImage | None:
    file = _label_file(image)
    try:
        lines = read_text(file).splitlines() if file.is_file() else []  # an image without a file holds no object
    except UserError:
        report.leave_out("an image with an unreadable text file", file)
        return None
    return SourceImage(image, None, lambda size: _instances(file, lines, names, size, report))


def _instances(file: Path, lines: list[str], names: dict[int, str], size: Size, report: Report) -> Iterator[Instance]:
    for number, line in enumerate(lines, start=1):
        where = f"{file}: line {number}"
        if not line.strip():
            continue
        try:
            label, *values = (float(word) for word in line.split())
        except ValueError:
            report.leave_out("a line that is not numbers", where)
            continue
        if label not in names:
            report.leave_out("an unknown class id", f"{where}: {label:g}")
        elif len(values) == 4:
            report.leave_out("a box without a polygon", where)
        else:
            pixels = [value * size[1 - index % 2] for index, value in enumerate(values)]
            yield Instance(names[int(label)], [pixels], where)
