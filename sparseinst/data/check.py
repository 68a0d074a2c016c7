"""Check a COCO-format folder for problems, and count what it holds (`sparseinst data check`). Imports no torch."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from sparseinst.config import DataConfig
from sparseinst.data.annotations import MEDIUM, SMALL, hotcoco_truth
from sparseinst.data.coco import CocoSplit, ImageRecord, check_categories, train_split, val_split
from sparseinst.data.images import read_image
from sparseinst.data.masks import decode
from sparseinst.errors import AnnotationsRefused, DataError, UserError
from sparseinst.files import state_of_file

MIRRORED = "a horizontal flip turns {} into {}, which keeps the wrong label"
"""Explains `mirrored_categories`, given a pair of names."""
_LISTED = 50  # problems of a split that are printed
ABSENT = "no such image"
DARK = 32
"""A split is reported if none of its pixels reaches this grey level (0 to 255)."""


@dataclass
class Report:
    """The counts of a split, and the problems that were found in it."""

    readable: bool = True
    """False if entries of the annotation file are such that nothing was counted."""
    images: int = 0
    without_instances: int = 0
    instances: int = 0
    crowds: int = 0
    most_instances: int = 0
    """The largest number of instances in one image, without crowds."""
    over_100: int = 0
    """The number of images with more instances than the 100 maps of the default model."""
    sizes: dict[str, int] = field(default_factory=lambda: {"small": 0, "medium": 0, "large": 0})
    """The number of small, medium and large instances, without crowds."""
    categories: dict[str, int] = field(default_factory=dict)
    """The number of instances of each category, by name; zero for a category without instances."""
    brightest: int | None = None
    """The highest grey level (0 to 255) in the images that were read; None if no image was read."""
    wrong_areas: int = 0
    """The number of instances whose `area` is far from that of their mask."""
    problems: list[str] = field(default_factory=list)
    """One line for each problem."""


def check_split(split: CocoSplit, images: Iterable[ImageRecord], *, read_images: bool = True) -> Report:
    """Decode every mask and, by default, every image of a split. Return the counts and the problems.

    Args:
        images: the split's images; a caller can wrap them in a progress bar.
        read_images: False only checks that the image files exist.
    """
    report = Report(images=len(split.images))
    report.categories.update({category.name: 0 for category in split.categories})
    report.problems += _id_problems(split)
    names = repeated_names([category.name for category in split.categories])
    report.problems += [f"{split.file}: several categories have the name {name!r}: give each its own" for name in names]
    areas = _given_areas(split)
    for image in images:
        _check_image(image, read_images, report)
        _check_instances(image, split, areas, report)
    absent = [image for image in split.images if not image_exists(image)]
    if len(absent) == len(split.images) > 1:  # the folder is wrong, and one line says so
        gone = {f"{image.path}: {ABSENT}" for image in absent}
        report.problems = [problem for problem in report.problems if problem not in gone]
        report.problems.append(
            f"{split.file}: none of its {len(absent)} images exists, the first is {absent[0].path}: set data.train_images or "
            "data.val_images to the folder that each `file_name` starts from"
        )
    if report.brightest is not None and report.brightest < DARK:
        report.problems.append(
            f"{split.file}: no pixel of its images is brighter than {report.brightest} of 255; "
            "if 16-bit files hold 12-bit values, scale the values to 16 bits"
        )
    return report


def mirrored_categories(names: Sequence[str]) -> list[tuple[str, str]]:
    """Return the pairs of categories whose names differ only in `left` and `right`.

    A horizontal flip turns one into the other, but the object keeps its label.
    """
    pairs = ((name, re.sub("left", lambda match: _RIGHT.get(match[0], "right"), name, flags=re.IGNORECASE)) for name in names)
    return [(left, right) for left, right in pairs if left != right and right in names]


def repeated_names(names: Sequence[str]) -> list[str]:
    """Return the names that several categories have."""
    return [name for name, count in Counter(names).items() if count > 1]


def image_exists(image: ImageRecord) -> bool:
    return os.path.isfile(image.path)  # noqa: PTH113 (Path.is_file raises an error for a name that is too long)


_RIGHT = {"left": "right", "Left": "Right", "LEFT": "RIGHT"}


def _id_problems(split: CocoSplit) -> list[str]:
    """Return the problems with annotation ids. COCO evaluation needs unique ids; training does not."""
    ids = Counter(annotation.id for image in split.images for annotation in image.annotations)
    return [f"{split.file}: annotation id {key} is used {n} times" for key, n in ids.items() if n > 1]


def _given_areas(split: CocoSplit) -> dict[int, Any]:
    """Return the `area` of each annotation that has one, by the annotation's id."""
    annotations = json.loads(split.file.read_text(encoding="utf-8")).get("annotations") or []
    return {entry["id"]: entry["area"] for entry in annotations if isinstance(entry.get("area"), int | float)}


def _check_image(image: ImageRecord, read: bool, report: Report) -> None:
    if not read and not image_exists(image):
        report.problems.append(f"{image.path}: {ABSENT}")
    if read:
        try:
            photo = read_image(image.path, (image.height, image.width))
            report.brightest = max(report.brightest or 0, int(np.asarray(photo).max()))
        except DataError as error:
            report.problems.append(str(error))


def _check_instances(image: ImageRecord, split: CocoSplit, areas: dict[int, Any], report: Report) -> None:
    instances = [annotation for annotation in image.annotations if not annotation.crowd]
    report.crowds += len(image.annotations) - len(instances)
    report.instances += len(instances)
    report.without_instances += not instances
    report.most_instances = max(report.most_instances, len(instances))
    report.over_100 += len(instances) > 100
    for annotation in image.annotations:
        where = f"{split.file}: annotation {annotation.id} (image {image.path.name})"
        try:
            area = int(decode(annotation.segmentation, image.height, image.width).sum())
        except (ValueError, TypeError) as error:
            report.problems.append(f"{where}: segmentation: {error}")
            continue
        if not area:
            report.problems.append(f"{where}: the mask has no pixel inside the image")
        if not annotation.crowd:
            # Polygons are rasterised in several ways, which differ by less than their outline.
            report.wrong_areas += abs(areas.get(annotation.id, area) - area) > max(0.25 * area, 4 * area**0.5)
            report.sizes["small" if area < SMALL else "medium" if area < MEDIUM else "large"] += 1
            report.categories[split.categories[annotation.label].name] += 1


def check_folder(config: DataConfig, *, read_images: bool = True) -> dict[str, Report]:
    """Check the training and validation splits and return their reports; a terminal shows a progress bar. Raises `DataError`."""
    from sparseinst.progress import progress_bar

    splits: dict[str, CocoSplit] = {}
    reports: dict[str, Report] = {}
    for name, read in (("train", train_split), ("val", val_split)):
        try:
            splits[name] = read(config, refuse=False)
        except AnnotationsRefused as error:
            reports[name] = Report(readable=False, problems=error.problems)
    for name, split in splits.items():
        with progress_bar("images") as bar:
            images = bar.track(split.images, description=f"check {name}")
            reports[name] = check_split(split, images, read_images=read_images)
        if not split.problems:  # otherwise it would only say the same in other words
            hotcoco_truth(split.file, state_of_file(split.file))
    if len(splits) == 2:
        try:
            check_categories(splits["val"], splits["train"].categories, f"{splits['train'].file}")
        except UserError as error:
            reports["val"].problems.append(str(error))
    return {name: reports[name] for name in ("train", "val")}


def show(reports: dict[str, Report], *, as_json: bool = False) -> None:
    """Print the reports: a table of the counts, then one line for each problem."""
    from rich.console import Console
    from rich.table import Table

    if as_json:
        print(json.dumps({name: asdict(report) for name, report in reports.items()}, indent=1))
        return
    if counted := {name: report for name, report in reports.items() if report.readable}:
        table = Table("", *counted, min_width=50)
        for label, attribute in _ROWS.items():
            table.add_row(label, *(str(getattr(report, attribute)) for report in counted.values()))
        for size in ("small", "medium", "large"):
            table.add_row(f"{size} instances", *(str(report.sizes[size]) for report in counted.values()))
        used = (f"{sum(n > 0 for n in r.categories.values())} of {len(r.categories)}" for r in counted.values())
        table.add_row("categories used", *used)
        Console().print(table)
    for name, report in reports.items():
        for problem in report.problems[:_LISTED]:
            print(f"{name}: {problem}")
        if len(report.problems) > _LISTED:
            print(f"{name}: and {len(report.problems) - _LISTED:,} more problems; --json lists all of them")
        if report.wrong_areas:
            print(
                f"note: {name}: {report.wrong_areas} of {report.instances} instances have an `area` that is not their mask's, "
                "but perhaps their box's. COCO's metrics take an object's size from it: AP is right, but APs, APm and APl are not"
            )
    if not any(report.problems for report in reports.values()):
        print("no problem found")
    for padded in (name for name in reports["train"].categories if name != name.strip()):
        print(f"note: the category {padded!r} begins or ends with a space")
    if reports["val"].images and not reports["val"].instances:
        print("note: val: no image has an instance, so there will be no AP")
    if mirrored := mirrored_categories(list(reports["train"].categories)):
        print(f"note: {MIRRORED.format(*mirrored[0])}: train with data.flip=0, as `sparseinst init` writes")


_ROWS = {
    "images": "images",
    "images without instances": "without_instances",
    "instances": "instances",
    "crowds": "crowds",
    "most instances in an image": "most_instances",
    "images with over 100 instances": "over_100",
}
