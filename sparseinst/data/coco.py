"""Read folders in COCO's format: annotation files, images, masks. Imports no torch.

K instances of one image, H W height and width in pixels.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

from sparseinst.config import DataConfig
from sparseinst.data.annotations import (
    check_annotation,
    check_category,
    check_image,
    check_segmentation,
    hotcoco_truth,
    read_content,
)
from sparseinst.errors import AnnotationsRefused, DataError, UserError
from sparseinst.files import state_of_file
from sparseinst.words import shorten

Checked = TypeVar("Checked")


@dataclass(frozen=True)
class Category:
    id: int
    """The number in the file. There may be gaps (COCO: 1 to 90)."""
    name: str


@dataclass(frozen=True)
class Annotation:
    id: int
    label: int
    """Index into `CocoSplit.categories`."""
    crowd: bool
    segmentation: Any
    """Polygons (lists of x, y, x, y, ...) or run lengths (`size`, `counts`)."""


@dataclass(frozen=True)
class ImageRecord:
    id: int
    path: Path
    height: int
    width: int
    annotations: list[Annotation] = field(default_factory=list)


@dataclass(frozen=True)
class CocoSplit:
    """One annotation file: its categories in the order of their ids, and its images in the order of the file."""

    file: Path
    categories: tuple[Category, ...]
    images: tuple[ImageRecord, ...]
    problems: tuple[str, ...] = ()
    """One line for each annotation of the whole file whose segmentation is invalid."""
    invalid: frozenset[int] = frozenset()
    """The ids of the images that have such an annotation."""

    def with_instances(self) -> CocoSplit:
        """Return the split with only the images that training uses: those with an instance that is no crowd."""
        kept = (image for image in self.images if any(not a.crowd for a in image.annotations))
        return replace(self, images=tuple(kept))

    def without_invalid(self) -> CocoSplit:
        """Return the split without the images that have an annotation whose segmentation is invalid."""
        return replace(self, images=tuple(image for image in self.images if image.id not in self.invalid))

    def instances_per_tile(self, side: int | None) -> list[int]:
        """Return for each image the mean number of instances in a tile, rounded up, without crowds.

        Args:
            side: of the square tiles in pixels. An image that is no larger is one tile, and with None every image is.
        """
        if side is None:
            return self.instances_per_image()
        shares = (min(1.0, side / image.height) * min(1.0, side / image.width) for image in self.images)
        return [math.ceil(count * share) for count, share in zip(self.instances_per_image(), shares, strict=True)]

    def instances_per_image(self) -> list[int]:
        """Return the number of instances of each image without crowds."""
        return [sum(not annotation.crowd for annotation in image.annotations) for image in self.images]


def images_digest(split: CocoSplit, most: int = 5000) -> str:
    """Return 16 hexadecimal digits of the SHA-256 of a split's images: the names and sizes of all files, and their content.

    Args:
        most: if there are more images than this, only this many, evenly spread, are read. The names and sizes of all still count.
    """
    digest = hashlib.sha256()
    step = max(1, -(-len(split.images) // most))
    for number, image in enumerate(split.images):
        try:
            digest.update(f"{image.path.name} {image.path.stat().st_size}\n".encode())
            if number % step == 0:
                digest.update(image.path.read_bytes())
        except OSError:  # `data.on_bad_image` may allow it
            digest.update(f"{image.path.name} cannot be read\n".encode())
    return digest.hexdigest()[:16]


def check_categories(split: CocoSplit, categories: Sequence[Category], of: str) -> None:
    """Check that a split has these categories, by name. `of` names their owner in the error message.

    Raises:
        UserError: the categories differ.
    """
    ours, theirs = category_names(categories), category_names(split.categories)
    if ours != theirs:
        expected, found = next(pair for pair in itertools.zip_longest(ours, theirs) if pair[0] != pair[1])
        if expected is None:
            first = f"it also has {found!r}"
        elif found is None:
            first = f"it lacks {expected!r}"
        else:
            first = f"{found!r} for {expected!r}"
        raise UserError(
            f"{split.file}: its {len(theirs)} categories are not the {len(ours)} of {of} (first difference: {first}): "
            "`categories` must hold the same names in both, in the order of their ids, also those without an annotation"
        )


def train_split(config: DataConfig, *, refuse: bool = True) -> CocoSplit:
    """Read the training images of a config.

    Args:
        refuse: raise an error for an invalid segmentation, unless `data.on_bad_image` allows it.

    Raises:
        DataError: as in `read_split`.
    """
    split = read_split(train_annotations(config), _prepared_root(config) / config.train_images, config.train_limit)
    return _usable(split, config) if refuse else split


def val_split(config: DataConfig, *, refuse: bool = True) -> CocoSplit:
    """Read the validation images of a config, like `train_split`. Also check that the library for the metrics can read them."""
    split = read_split(val_annotations(config), _prepared_root(config) / config.val_images, config.val_limit)
    if refuse:
        split = _usable(split, config)
        hotcoco_truth(split.file, state_of_file(split.file))
    return split


def _usable(split: CocoSplit, config: DataConfig) -> CocoSplit:
    """Return a split. Raises `DataError` if a segmentation is invalid and `data.on_bad_image` does not allow it."""
    if split.problems and config.on_bad_image == "error":
        more = f" (and {len(split.problems) - 1} more, which `sparseinst data check` lists)" if len(split.problems) > 1 else ""
        raise DataError(f"{split.problems[0]}{more}; data.on_bad_image=skip leaves such images out of the training")
    return split


def annotation_files(config: DataConfig) -> tuple[Path, Path]:
    """Return the annotation files of the training and of the validation images, which need not exist."""
    root = _prepared_root(config)
    return root / config.train_annotations, root / config.val_annotations


def train_annotations(config: DataConfig) -> Path:
    """Return the annotation file of the training images. Raises `DataError` if there is none."""
    return _existing(annotation_files(config)[0], "train")


def val_annotations(config: DataConfig) -> Path:
    """Return the annotation file of the validation images. Raises `DataError` if there is none."""
    return _existing(annotation_files(config)[1], "val")


def _existing(file: Path, split: str) -> Path:
    if not file.exists():
        raise DataError(
            f"{file}: no such file; if yours have other names, set data.{split}_annotations and data.{split}_images, and if they "
            "have another format, `sparseinst data convert` them"
        )
    return file


def _prepared_root(config: DataConfig) -> Path:
    """Return the data folder. The embedded set is written there if it is missing."""
    root = Path(config.root)
    if config.source == "shapes":
        from sparseinst.data.shapes import ensure_shapes

        ensure_shapes(root, config.shapes)
    return root


def read_split(file: Path, images: Path, limit: int | None = None) -> CocoSplit:
    """Read and check an annotation file. A process reads it once, unless it changes.

    Args:
        file: the JSON file.
        images: the folder that its `file_name`s are relative to.
        limit: keep only so many images, from the first on.

    Raises:
        DataError: the file or folder does not exist, or the JSON is broken (with line and column).
        AnnotationsRefused: entries lack something or refer to something that does not exist.
    """
    split = _read_whole(file, images, state_of_file(file))
    return replace(split, images=split.images[:limit])


@lru_cache(maxsize=2)
def _read_whole(file: Path, images: Path, _state: tuple[int, ...]) -> CocoSplit:
    """Return all images of an annotation file. A training and a validation file stay in memory."""
    data = read_content(file)
    if not images.is_dir():
        raise DataError(f"{images}: no such folder of images")
    refused: list[str] = []
    checked = [Category(*category) for category in _checked(file, data, "categories", check_category, refused)]
    categories = tuple(sorted(checked, key=lambda category: category.id))
    entries = [
        ImageRecord(number, images / name, height, width)
        for number, name, height, width in _checked(file, data, "images", check_image, refused)
    ]
    if refused:  # every annotation of such an image or category would be reported as well
        raise AnnotationsRefused(refused)
    records = {record.id: record for record in entries}
    labels = {category.id: index for index, category in enumerate(categories)}
    for kind, ids in (("categories", [c.id for c in categories]), ("images", [r.id for r in entries])):
        refused += [f"{file}: {count} {kind} share the id {number}" for number, count in Counter(ids).items() if count > 1]
    problems, invalid = [], set()
    for index, entry in enumerate(data["annotations"]):
        try:
            number, image, category, crowd, segmentation = check_annotation(entry)
            for key, value, known in (("category_id", category, labels), ("image_id", image, records)):
                if value not in known:
                    raise ValueError(f"{key} {value} is not among the file's {'images' if known is records else 'categories'}")
        except ValueError as error:
            name = shorten(repr(entry.get("id", "without id"))) if isinstance(entry, dict) else "no object"
            refused.append(f"{file}: annotation {index} (id {name}): {error}")
            continue
        record = records[image]
        record.annotations.append(Annotation(number, labels[category], crowd, segmentation))
        try:
            check_segmentation(segmentation, record.height, record.width)
        except ValueError as error:
            problems.append(f"{file}: annotation {number} (image {shorten(record.path.name)}): segmentation: {error}")
            invalid.add(image)
    if refused:
        raise AnnotationsRefused(refused + problems)
    return CocoSplit(file, categories, tuple(entries), tuple(problems), frozenset(invalid))


def _checked(
    file: Path, data: Mapping[str, Any], kind: str, check: Callable[[Any], Checked], refused: list[str]
) -> list[Checked]:
    """Return the checked entries of a list in an annotation file. The function adds a line to `refused` for each other entry."""
    found = []
    for index, entry in enumerate(data[kind]):
        try:
            found.append(check(entry))
        except ValueError as error:
            refused.append(f"{file}: {kind} {index}: {error}")
    return found


def read_categories(entries: Any) -> tuple[Category, ...]:
    """Return the categories that a weights file holds as plain data. Raises `ValueError` if they are no categories."""
    if not isinstance(entries, list):
        raise ValueError(f"categories: a list was expected, got {shorten(repr(entries))}")
    found = tuple(Category(*check_category(entry)) for entry in entries)
    if len({category.id for category in found}) != len(found):
        raise ValueError("categories: two share an id")
    return found


def category_names(categories: Sequence[Category]) -> list[str]:
    """Return the names of the categories in their order."""
    return [category.name for category in categories]
