"""Check the images and objects that a reader found, and write them as a COCO-format folder."""

from __future__ import annotations

import io
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from PIL import Image

from sparseinst.data.coco_folder import SPLITS, AnnotatedImage, annotation_file, image_folder, write_annotations, write_new
from sparseinst.data.convert.source import Entry, Instance, Mask, Report, Size, Source, SourceImage
from sparseinst.data.images import read_image
from sparseinst.data.masks import decode, encode
from sparseinst.errors import DataError, UserError
from sparseinst.files import free_path
from sparseinst.words import counted

_OUTSIDE = 0.02
"""A point may lie outside the image by this fraction of its side, and is moved to the edge. Tools write such points."""


class _Written(NamedTuple):
    """An image that was copied."""

    split: str | None
    """`train` or `val`, if the source says so."""
    image: dict[str, Any]
    """Its COCO entry, without an id."""
    objects: list[tuple[str, dict[str, Any]]]
    """The category's name and the COCO entry of each object. The entries have no ids."""


def write_folder(source: Source, output: Path, report: Report, *, val: float | None = None, seed: int = 0) -> None:
    """Write a COCO-format folder. All of it appears at once; if writing fails, nothing appears.

    Args:
        val: the share of the images in the validation split. None keeps the source's own splits; without these it is 0.2.
        seed: chooses the validation images.

    Raises:
        UserError: fewer than two images or no objects are left, or `output` is in use or cannot be written.
    """

    def write(new_root: Path) -> None:
        from sparseinst.progress import progress_bar

        pool = new_root / "pool"
        with progress_bar("images") as bar:
            written = list(_write_images(pool, bar.track(source.entries, description="convert"), report))
        splits = _splits(written, val, seed, report)
        names = source.categories or sorted({category for image in written for category, _ in image.objects})
        if not names:
            raise UserError(f"no object is left: {_reasons(report)}")
        for split, images in splits.items():
            _write_split(new_root, split, pool, images, names)
            report.images[split], report.instances[split] = len(images), sum(len(image.objects) for image in images)
        shutil.rmtree(pool)

    write_new(output, write, "a converted set", lambda root: annotation_file(root, "val").exists())


def _splits(written: list[_Written], val: float | None, seed: int, report: Report) -> dict[str, list[_Written]]:
    """Return the images of each split: as the source says if it names both, else chosen at random, at least one for each."""
    named = {split: [image for image in written if image.split == split] for split in SPLITS}
    if val is None and all(named.values()):
        return named
    if len(written) < 2:
        raise UserError(
            f"{counted(len(written), 'usable image')} found, but two are needed, for training and for validation: "
            f"{_reasons(report)}"
        )
    number = min(max(1, round((0.2 if val is None else val) * len(written))), len(written) - 1)
    chosen = set(np.random.default_rng(seed).permutation(len(written))[:number].tolist())
    parts: dict[str, list[_Written]] = {split: [] for split in SPLITS}
    for index, image in enumerate(written):
        parts["val" if index in chosen else "train"].append(image)
    return parts


def _reasons(report: Report) -> str:
    most = report.left_out.most_common(3)
    return (
        "; ".join(f"{count} x {reason}, the first is {report.examples[reason]}" for reason, count in most)
        or "nothing was left out"
    )


def _write_images(folder: Path, entries: Iterable[Entry], report: Report) -> Iterator[_Written]:
    """Copy the usable images to a folder; report the others."""
    folder.mkdir(parents=True)
    for entry in entries:
        annotated = entry.load(report)
        found = None if annotated is None else _size_and_suffix(annotated, entry.name, report)
        if annotated is None or found is None:
            continue
        size, suffix = found
        file = free_path(folder / f"{entry.name}{suffix}")
        file.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(annotated.image, bytes):
            file.write_bytes(annotated.image)
        else:
            shutil.copyfile(annotated.image, file)
        image = {"file_name": file.relative_to(folder).as_posix(), "height": size[0], "width": size[1]}
        yield _Written(entry.split, image, list(_checked(annotated, size, report)))


def _size_and_suffix(annotated: SourceImage, name: str, report: Report) -> tuple[Size, str] | None:
    """Return the image's size as its annotations see it and its file's suffix; None if it is unusable, and report the reason."""
    image = annotated.image
    if isinstance(image, Path) and not image.is_file():
        report.leave_out("a missing image", image)
        return None
    reason = "an unreadable image"
    try:
        picture = read_image(_opened(image))
        if annotated.size is not None and picture.size != annotated.size[::-1]:
            reason = "an image whose size differs from its annotations"  # unless they were made for the image as it is stored
            picture = read_image(_opened(image), annotated.size)
    except DataError:
        report.leave_out(reason, image if isinstance(image, Path) else name)
        return None
    if isinstance(image, Path):
        return (picture.height, picture.width), image.suffix.lower()
    with Image.open(io.BytesIO(image)) as file:
        return (picture.height, picture.width), f".{(file.format or 'png').lower()}"


def _opened(image: Path | bytes) -> Path | BinaryIO:
    """Return what Pillow can open."""
    return image if isinstance(image, Path) else io.BytesIO(image)


def _checked(annotated: SourceImage, size: Size, report: Report) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the category's name and the COCO entry of each usable object; report the others."""
    for instance in annotated.instances(size):
        if isinstance(instance.shape, list):
            problem, polygons = _clean(instance.shape, size)
            if problem:
                report.leave_out(problem, instance.where)
                continue
            mask, segmentation = decode(polygons, *size).astype(np.bool_), polygons
        else:
            mask, segmentation = instance.shape, None
        if mask.shape != size:
            report.leave_out("a mask whose size differs from its image", instance.where)
        elif not mask.any():
            report.leave_out("an empty mask" if segmentation is None else "a polygon without a pixel", instance.where)
        else:
            yield instance.category, _content(instance, mask, segmentation)


def _clean(polygons: list[list[float]], size: Size) -> tuple[str, list[list[float]]]:
    """Return the reason why the polygons cannot be used, or "", and the polygons with all points in the image."""
    limits = np.array(size[::-1], dtype=np.float64)  # of x and y
    cleaned = []
    for polygon in polygons:
        if len(polygon) % 2:
            return "a polygon with an odd number of coordinates", []
        if len(polygon) < 6:
            return "a polygon with fewer than three points", []
        points = np.asarray(polygon, dtype=np.float64).reshape(-1, 2)
        if not np.isfinite(points).all():
            return "a polygon with a coordinate that is no number", []
        if (points < -_OUTSIDE * limits).any() or (points > (1 + _OUTSIDE) * limits).any():
            return "a polygon with coordinates outside the image", []
        cleaned.append(points.clip(0, limits).round(3).ravel().tolist())
    return ("" if cleaned else "an object without a polygon"), cleaned


def _content(instance: Instance, mask: Mask, segmentation: Any) -> dict[str, Any]:
    rows, columns = np.flatnonzero(mask.any(1)).tolist(), np.flatnonzero(mask.any(0)).tolist()
    box = [columns[0], rows[0], columns[-1] - columns[0] + 1, rows[-1] - rows[0] + 1]
    if segmentation is None:
        [segmentation] = encode(mask[None])
    return {"iscrowd": int(instance.crowd), "area": int(mask.sum()), "bbox": box, "segmentation": segmentation}


def _write_split(root: Path, split: str, pool: Path, written: list[_Written], names: list[str]) -> None:
    """Move the images of a split from the pool to its folder, and write its annotation file."""
    ids = {name: number for number, name in enumerate(names, start=1)}
    annotated = []
    for number, (_, image, objects) in enumerate(written, start=1):
        file = image_folder(root, split) / image["file_name"]
        file.parent.mkdir(parents=True, exist_ok=True)
        (pool / image["file_name"]).rename(file)
        entries = [{"category_id": ids[name], **content} for name, content in objects]
        annotated.append(AnnotatedImage({"id": number, **image}, entries))
    categories = [{"id": number, "name": name} for name, number in ids.items()]
    write_annotations(root, split, annotated, categories, {"description": "converted by sparseinst data convert"})
