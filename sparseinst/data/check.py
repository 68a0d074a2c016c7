"""`sparseinst data check`: is a COCO-format folder fit to train on, and what is in it? Imports no torch."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from sparseinst.config import DataConfig
from sparseinst.data.coco import CocoSplit, ImageRecord, decode, read_image, train_split, val_split
from sparseinst.errors import DataError

SMALL, MEDIUM = 32**2, 96**2
"""COCO's bounds between small, medium and large objects, in pixels."""
DARK = 32
"""Grey level of 255 below which whole data sets are not meant to be."""


@dataclass
class Report:
    """What a split holds and what is wrong with it."""

    images: int = 0
    without_instances: int = 0
    instances: int = 0
    crowds: int = 0
    most_instances: int = 0
    """In one image, crowds left out."""
    over_100: int = 0
    """Images with more instances than the 100 maps of the default model."""
    sizes: dict[str, int] = field(default_factory=lambda: {"small": 0, "medium": 0, "large": 0})
    """Instances that are small, medium, large."""
    categories: dict[str, int] = field(default_factory=dict)
    """Instances by category name; zero for a category without any."""
    brightest: int | None = None
    """Grey level of 0 to 255, of all pixels of the images that were read."""
    problems: list[str] = field(default_factory=list)
    """One line each."""


def check_split(split: CocoSplit, images: Iterable[ImageRecord], *, read_images: bool = True) -> Report:
    """Go through a split: decode every mask and, unless told otherwise, every image.

    Args:
        images: those of the split, perhaps wrapped in a progress bar.
        read_images: False only looks whether the files are there.
    """
    report = Report(images=len(split.images))
    report.categories.update({category.name: 0 for category in split.categories})
    report.problems += _entry_problems(split.file)
    for image in images:
        _check_image(image, read_images, report)
        _check_instances(image, split, report)
    if report.brightest is not None and report.brightest < DARK:
        report.problems.append(
            f"{split.file}: no pixel of its images is brighter than {report.brightest} of 255: 12 bits in files of 16, say; "
            "scale them to the files' whole range"
        )
    return report


def _entry_problems(file: Path) -> list[str]:
    """What COCO evaluation needs of an annotation, and training does not: an id of its own."""
    annotations = json.loads(file.read_text(encoding="utf-8")).get("annotations", [])
    ids = Counter(entry["id"] for entry in annotations)
    problems = [f"{file}: annotation id {key} is used {n} times" for key, n in ids.items() if n > 1]
    if 0 in ids:
        problems.append(f"{file}: annotation id 0 is never counted as found by COCO evaluation: count from 1")
    return problems


def _check_image(image: ImageRecord, read: bool, report: Report) -> None:
    if not read and not image.path.is_file():
        report.problems.append(f"{image.path}: no such image")
    if read:
        try:
            photo = read_image(image.path, (image.height, image.width))
            report.brightest = max(report.brightest or 0, int(np.asarray(photo).max()))
        except DataError as error:
            report.problems.append(str(error))


def _check_instances(image: ImageRecord, split: CocoSplit, report: Report) -> None:
    own = [annotation for annotation in image.annotations if not annotation.crowd]
    report.crowds += len(image.annotations) - len(own)
    report.instances += len(own)
    report.without_instances += not own
    report.most_instances = max(report.most_instances, len(own))
    report.over_100 += len(own) > 100
    for annotation in image.annotations:
        where = f"{split.file}: annotation {annotation.id} (image {image.path.name})"
        try:
            area = int(decode(annotation.segmentation, image.height, image.width).sum())
        except (ValueError, TypeError) as error:
            report.problems.append(f"{where}: segmentation: {error}")
            continue
        if not area:
            report.problems.append(f"{where}: its mask has no pixel inside the image")
        if not annotation.crowd:
            report.sizes["small" if area < SMALL else "medium" if area < MEDIUM else "large"] += 1
            report.categories[split.categories[annotation.label].name] += 1


def check_folder(config: DataConfig, *, read_images: bool = True) -> dict[str, Report]:
    """The reports of the training and the validation split, with a progress bar on a terminal. Raises `DataError`."""
    from rich.console import Console
    from rich.progress import track

    splits = {"train": train_split(config), "val": val_split(config)}
    reports = {}
    for name, split in splits.items():
        console = Console(stderr=True)
        images = track(split.images, f"check {name}", console=console, disable=not console.is_terminal)
        reports[name] = check_split(split, images, read_images=read_images)
    return reports


def show(reports: dict[str, Report], *, as_json: bool = False) -> None:
    """Print the reports: a table of what is there, then each problem in a line."""
    from rich.console import Console
    from rich.table import Table

    if as_json:
        print(json.dumps({name: asdict(report) for name, report in reports.items()}, indent=1))
        return
    table = Table("", *reports, min_width=50)
    for label, attribute in _ROWS.items():
        table.add_row(label, *(str(getattr(report, attribute)) for report in reports.values()))
    for size in ("small", "medium", "large"):
        table.add_row(f"{size} instances", *(str(report.sizes[size]) for report in reports.values()))
    used = (f"{sum(n > 0 for n in r.categories.values())} of {len(r.categories)}" for r in reports.values())
    table.add_row("categories used", *used)
    Console().print(table)
    for name, report in reports.items():
        for problem in report.problems:
            print(f"{name}: {problem}")


_ROWS = {
    "images": "images",
    "images without instances": "without_instances",
    "instances": "instances",
    "crowds": "crowds",
    "most instances in an image": "most_instances",
    "images with over 100 instances": "over_100",
}
