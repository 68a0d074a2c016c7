"""Measure what a data set holds: the facts from which `recipe` chooses settings. Imports no torch."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from sparseinst.config import DataConfig
from sparseinst.data.check import image_exists, mirrored_categories, repeated_names
from sparseinst.data.coco import (
    Category,
    CocoSplit,
    ImageRecord,
    category_names,
    check_categories,
    train_split,
    val_split,
)
from sparseinst.data.masks import decode_with_bounds
from sparseinst.errors import DataError, UserError

_MOST_MASKS = 5000  # masks whose area is measured; a random sample of a larger set


@dataclass(frozen=True)
class DataFacts:
    """What the training and validation splits hold. Sizes are in pixels of the original images."""

    train_images: int
    val_images: int
    shared_images: int
    """The number of validation images with the name of a training image, apart from the file type and Roboflow's ending."""
    classes: int
    rare: tuple[str, ...]
    """The categories with fewer than 20 training instances."""
    short_side: float
    """The median of the images' shorter sides."""
    aspect: float
    """The 95th percentile of longer side / shorter side."""
    instances: float
    """The mean number of instances of an image."""
    most_instances: int
    usual_instances: int
    """The 99th percentile of the number of instances of an image."""
    small_object: float
    """The 10th percentile of the square roots of the objects' areas."""
    median_object: float
    large_object: float
    """The 95th percentile of the longer sides of the objects' boxes."""
    spacing: float
    """The median of the square root of image area / instances: the side of the square that an instance has for itself."""
    densest: float
    """The 99th percentile of instances / image area."""
    unit: Literal["image", "tile"] = "image"
    """What the numbers of instances, the side and the aspect describe."""
    tiles: float = 1.0
    """The number of tiles, side by side, that make up an image."""
    missing: tuple[str, ...] = ()
    """The paths of the images of both splits that do not exist."""
    repeated_names: tuple[str, ...] = ()
    """The names that several categories have."""
    val_instances: int = 1
    """The number of instances in the validation images."""
    other_categories: str | None = None
    """How the categories of the validation images differ from those of the training images, if they do."""
    left_out: int = 0
    """The number of training images that are left out because an annotation's segmentation is invalid."""
    mirrored: tuple[str, str] | None = None
    """Two categories that differ only in `left` and `right` by name, if there are any."""


def measure_splits(config: DataConfig) -> DataFacts:
    """Read both splits and measure them.

    Raises:
        DataError: an annotation file cannot be read, a mask is not valid, or the training split has no instance with a pixel.
    """
    whole, val = train_split(config), val_split(config)
    train = whole.without_invalid()  # `train_split` refuses such images, unless the settings leave them out
    used = train.with_instances()
    if not used.images:
        raise DataError(f"{train.file}: no image has an instance, so there is nothing to learn")
    counts = np.array(used.instances_per_image())
    labels = [annotation.label for image in used.images for annotation in image.annotations if not annotation.crowd]
    by_class = np.bincount(labels, minlength=len(train.categories))
    sides = np.array([(min(image.height, image.width), max(image.height, image.width)) for image in used.images])
    measured = np.array(list(_measure(used)), dtype=float).reshape(-1, 2)
    measured = measured[measured[:, 0] > 0]
    roots = np.sqrt(measured[:, 0])
    if not len(roots):
        raise DataError(f"{train.file}: no instance has a pixel in its image, so there is nothing to learn")
    return DataFacts(
        train_images=len(used.images),
        val_images=len(val.images),
        shared_images=len({_source(image) for image in train.images} & {_source(image) for image in val.images}),
        classes=len(train.categories),
        rare=tuple(_called(train.categories, index, number) for index, number in enumerate(by_class.tolist()) if number < 20),
        short_side=float(np.median(sides[:, 0])),
        aspect=float(np.percentile(sides[:, 1] / sides[:, 0], 95)),
        instances=float(counts.mean()),
        most_instances=int(counts.max()),
        usual_instances=math.ceil(np.percentile(counts, 99)),
        small_object=float(np.percentile(roots, 10)),
        median_object=float(np.median(roots)),
        large_object=float(np.percentile(measured[:, 1], 95)),
        spacing=float(np.median(np.sqrt(sides.prod(1) / counts))),
        densest=float(np.percentile(counts / sides.prod(1), 99)),
        missing=tuple(str(image.path) for image in (*train.images, *val.images) if not image_exists(image)),
        repeated_names=tuple(repeated_names(category_names(train.categories))),
        val_instances=sum(val.instances_per_image()),
        other_categories=_difference(train, val),
        left_out=len(whole.images) - len(train.images),
        mirrored=next(iter(mirrored_categories(category_names(train.categories))), None),
    )


def _difference(train: CocoSplit, val: CocoSplit) -> str | None:
    try:
        check_categories(val, train.categories, f"{train.file}")
    except UserError as error:
        return str(error)
    return None


def _source(image: ImageRecord) -> str:
    """Return the name of the file that an image was made from: Roboflow names an exported image `photo_jpg.rf.<digest>.jpg`."""
    return re.sub(r"\.rf\.[0-9A-Za-z]{8,}$", "", image.path.stem)


def _called(categories: Sequence[Category], index: int, instances: int) -> str:
    """Return a category's name, with its id if another one has the same name, and the remark that it has no instance."""
    names = category_names(categories)
    remarks = [f"id {categories[index].id}"] * (names.count(names[index]) > 1) + ["no instance"] * (not instances)
    return names[index] + (f" ({', '.join(remarks)})" if remarks else "")


def _measure(split: CocoSplit) -> Iterator[tuple[int, int]]:
    """Yield the area of each mask and the longer side of its box, for all masks or a random sample of them."""
    all_masks = [(image, annotation) for image in split.images for annotation in image.annotations if not annotation.crowd]
    chosen = np.random.default_rng(0).permutation(len(all_masks))[:_MOST_MASKS]
    for index in chosen.tolist():
        image, annotation = all_masks[index]
        try:
            mask, box = decode_with_bounds(annotation.segmentation, image.height, image.width)
        except (ValueError, TypeError) as error:
            raise DataError(f"{split.file}: annotation {annotation.id}: segmentation: {error}") from None
        yield int(mask.sum()), max(box.bottom - box.top, box.right - box.left)
