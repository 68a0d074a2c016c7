"""Convert a source of any kind to a COCO-format folder (`sparseinst data convert`)."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from sparseinst.data.annotations import read_content
from sparseinst.data.convert import label_maps, labelme, masks, voc, yolo
from sparseinst.data.convert.source import Kind, Report, Source
from sparseinst.data.convert.writer import write_folder
from sparseinst.errors import DataError, UserError


class _Reader(NamedTuple):
    matches: Callable[[Path], bool]
    read: Callable[[Path, str], Source]
    """Lists the images of a folder, given the category's name, which only the kinds without categories use."""


_READERS: dict[Kind, _Reader] = {
    "masks": _Reader(masks.matches, masks.read),
    "labelme": _Reader(labelme.matches, labelme.read),
    "voc": _Reader(voc.matches, voc.read),
    "cityscapes": _Reader(label_maps.cityscapes_matches, label_maps.read_cityscapes),
    "label_maps": _Reader(label_maps.label_maps_match, label_maps.read_label_maps),
    "yolo": _Reader(yolo.matches, yolo.read),
}


def convert(
    source: Path, output: Path, *, kind: Kind | None = None, category: str = "object", val: float | None = None, seed: int = 0
) -> Report:
    """Write a COCO-format folder. Return the counts and what was left out.

    Args:
        kind: the source's format; None detects it.
        output: a new folder.
        category: the name of the only category, for the kinds that name none (`masks`, `label_maps`).
        val: the share of the images in the validation split. None keeps the source's own splits; without these it is 0.2.
        seed: chooses the validation images, whatever order the file system lists the files in.

    Raises:
        UserError: the source does not exist, is of no known kind or of several, or holds too few usable images, or `output` is in
            use or cannot be written.
    """
    if not source.is_dir():
        raise UserError(f"{source}: no such folder")
    report = Report()
    write_folder(_READERS[kind or detect(source)].read(source, category), output, report, val=val, seed=seed)
    return report


def _coco_file(source: Path) -> Path | None:
    """Return an annotation file in COCO's format, or None if none of the first JSON files is one."""
    for file in islice(sorted(source.rglob("*.json")), 20):
        with suppress(UserError, DataError):
            if read_content(file)["annotations"]:
                return file
    return None


def detect(source: Path) -> Kind:
    """Return the kind of a source, by the names of its files and the keys of its JSON files.

    Raises:
        UserError: no kind fits, or several do.
    """
    if not source.is_dir():
        raise UserError(f"{source}: no such folder")
    if any((source / "annotations").glob("instances_*.json")):
        raise UserError(f"{source}: is a COCO-format folder, which needs no conversion; `data check` checks it")
    found = [kind for kind, reader in _READERS.items() if reader.matches(source)]
    if len(found) == 1:
        return found[0]
    if not found and (file := _coco_file(source)) is not None:
        raise UserError(
            f"{source}: {file.relative_to(source)} has COCO's format already: name the files of both splits with "
            f"{_names(source)} (init, train, data check)"
        )
    if not found and (folder := label_maps.likely_maps(source)) is not None:
        raise UserError(
            f"{source}: fits none of the formats; {folder.name}/ holds files with the names of the images: "
            "if they are label maps, rename it to label_maps/"
        )
    problem = "fits none of the formats" if not found else "fits several formats"
    raise UserError(f"{source}: {problem}; name the right one: {', '.join(found or _READERS)}")


def _names(source: Path) -> str:
    """Return the options that name the annotation files and images of both splits, as far as the folders' names tell them."""
    names = {"train": ("FILE", "DIR"), "val": ("FILE", "DIR")}
    for split, folders in {"train": ("train",), "val": ("valid", "val")}.items():
        for folder in folders:
            for file in sorted((source / folder).glob("*.json")):
                with suppress(UserError, KeyError, TypeError, StopIteration):
                    image = read_content(file)["images"][0]["file_name"]
                    place = next(place for place in (folder, f"{folder}/images") if (source / place / image).is_file())
                    names[split] = str(file.relative_to(source)), place
    return " ".join(
        f"-o data.{split}_annotations={file} -o data.{split}_images={folder}" for split, (file, folder) in names.items()
    )
