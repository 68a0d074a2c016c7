"""Read folders in COCO's format: annotation files, images, masks. Imports no torch.

K instances of one image, H W height and width in pixels.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from sparseinst.config import DataConfig
from sparseinst.errors import DataError, UserError
from sparseinst.files import read_text, state_of_file

Mask = NDArray[np.uint8]
"""(H, W), 0 or 1."""


class Bounds(NamedTuple):
    """A range of rows and columns in pixels. It is empty if `bottom` equals `top`, or `right` equals `left`."""

    top: int
    left: int
    bottom: int
    right: int


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

    def with_instances(self) -> CocoSplit:
        """Return the split with only the images that training uses: those with an instance that is no crowd."""
        kept = (image for image in self.images if any(not a.crowd for a in image.annotations))
        return CocoSplit(self.file, self.categories, tuple(kept))

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
    """Check that a split has the categories, by name, of the thing that `of` names.

    Raises:
        UserError: the categories differ.
    """
    ours, theirs = category_names(categories), category_names(split.categories)
    if ours != theirs:
        differing = next((pair for pair in zip(ours, theirs, strict=False) if pair[0] != pair[1]), ("none", "none"))
        raise UserError(
            f"{split.file}: its {len(theirs)} categories are not the {len(ours)} of {of} "
            f"(first difference: {differing[1]!r} for {differing[0]!r})"
        )


def train_split(config: DataConfig) -> CocoSplit:
    """Read the training images of a config. Raises `DataError`, as `read_split` does."""
    return read_split(train_annotations(config), _prepared_root(config) / config.train_images, config.train_limit)


def val_split(config: DataConfig) -> CocoSplit:
    """Read the validation images of a config. Raises `DataError`, as `read_split` does."""
    return read_split(val_annotations(config), _prepared_root(config) / config.val_images, config.val_limit)


def train_annotations(config: DataConfig) -> Path:
    """Return the annotation file of the training images."""
    return _prepared_root(config) / config.train_annotations


def val_annotations(config: DataConfig) -> Path:
    """Return the annotation file of the validation images."""
    return _prepared_root(config) / config.val_annotations


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
        DataError: the file or folder does not exist, the JSON is broken (with line and column), or an entry lacks something or
            refers to something that does not exist; the message names file and entry.
    """
    split = _read_whole(file, images, state_of_file(file))
    return replace(split, images=split.images[:limit])


@lru_cache(maxsize=2)
def _read_whole(file: Path, images: Path, _state: tuple[int, ...]) -> CocoSplit:
    """Return all images of an annotation file. A training and a validation file stay in memory."""
    data = _read_json(file)
    if not images.is_dir():
        raise DataError(f"{images}: no such folder of images")
    try:
        categories = tuple(sorted((Category(c["id"], c["name"]) for c in data["categories"]), key=lambda c: c.id))
        records = {entry["id"]: _record(entry, images) for entry in data["images"]}
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{file}: categories or images: {_reason(error)}") from None
    labels = {category.id: index for index, category in enumerate(categories)}
    if len(labels) != len(categories) or len(records) != len(data["images"]):
        raise DataError(f"{file}: two {'images' if len(labels) == len(categories) else 'categories'} share an id")
    for index, entry in enumerate(data.get("annotations", [])):
        try:
            annotation = Annotation(
                entry["id"], labels[entry["category_id"]], bool(entry.get("iscrowd", 0)), entry["segmentation"]
            )
            records[entry["image_id"]].annotations.append(annotation)
        except (KeyError, TypeError) as error:
            name = entry.get("id", "without id") if isinstance(entry, dict) else "no object"
            raise DataError(f"{file}: annotation {index} (id {name}): {_annotation_reason(entry, error)}") from None
    return CocoSplit(file, categories, tuple(records.values()))


def _read_json(file: Path) -> dict[str, Any]:
    text = read_text(file)
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{file}: broken JSON at line {error.lineno}, column {error.colno}: {error.msg}") from None
    if not isinstance(data, dict) or not all(isinstance(data.get(k), list) for k in ("images", "categories")):
        raise DataError(f"{file}: not a COCO annotation file: the lists `images` and `categories` are needed")
    if not data["images"] or not data["categories"]:
        raise DataError(f"{file}: holds no {'categories' if data['images'] else 'images'}")
    return data


def _record(entry: Mapping[str, Any], images: Path) -> ImageRecord:
    height, width = entry["height"], entry["width"]
    if not (isinstance(height, int) and isinstance(width, int) and height > 0 and width > 0):
        raise ValueError(f"image {entry['file_name']} has height {height!r} and width {width!r}")
    return ImageRecord(entry["id"], images / entry["file_name"], height, width)


def _reason(error: Exception) -> str:
    return f"an entry lacks {error}" if isinstance(error, KeyError) else str(error)


def _annotation_reason(entry: Any, error: Exception) -> str:
    if not isinstance(entry, dict):
        return "not an object"
    missing = [key for key in ("id", "image_id", "category_id", "segmentation") if key not in entry]
    if missing:
        return f"lacks {', '.join(missing)}" + (" (boxes alone are not enough)" if "segmentation" in missing else "")
    key = "category_id" if isinstance(error, KeyError) and error.args[0] == entry["category_id"] else "image_id"
    return f"{key} {entry[key]!r} is not among the file's {'categories' if key == 'category_id' else 'images'}"


def decode(segmentation: Any, height: int, width: int) -> Mask:
    """Return the mask (height, width) of polygons or run lengths, stored column by column.

    Raises:
        ValueError: the segmentation is neither, or has another size.
    """
    from hotcoco import mask

    return mask.decode(_runs(segmentation, height, width))


def decode_with_bounds(segmentation: Any, height: int, width: int) -> tuple[Mask, Bounds]:
    """Return the mask and bounds that contain the instance. They may be too wide, but never too narrow. Raises `ValueError`."""
    from hotcoco import mask

    runs = _runs(segmentation, height, width)
    left, top, wide, high = map(int, mask.to_bbox(runs))
    return mask.decode(runs), Bounds(top, left, top + high, left + wide)


def _runs(segmentation: Any, height: int, width: int) -> Any:
    from hotcoco import mask

    if isinstance(segmentation, Mapping):
        if list(segmentation.get("size", ())) != [height, width]:
            raise ValueError(f"run lengths of size {segmentation.get('size')} in an image of {[height, width]}")
        return mask.fr_py_objects(dict(segmentation), height, width)
    polygons = [list(map(float, polygon)) for polygon in segmentation]
    if not polygons or any(len(polygon) < 6 or len(polygon) % 2 for polygon in polygons):
        raise ValueError("a polygon needs at least three points of x and y")
    return mask.merge(mask.fr_py_objects(polygons, height, width))


def overlaps(results: Sequence[dict[str, Any]], segmentations: Sequence[Any], height: int, width: int) -> NDArray[np.float64]:
    """Return the IoU (P, K) of P results of `encode` with K segmentations of an image. Raises `ValueError`, as `decode` does."""
    from hotcoco import mask

    if not results or not segmentations:
        return np.zeros((len(results), len(segmentations)))
    truth: Any = [_runs(segmentation, height, width) for segmentation in segmentations]
    found: Any = [{**run, "counts": run["counts"].encode("ascii")} for run in results]
    return np.asarray(mask.iou(found, truth, [False] * len(truth)), dtype=np.float64).reshape(len(results), len(segmentations))


def encode(masks: NDArray[np.bool_] | Mask) -> list[dict[str, Any]]:
    """Return masks (K, H, W) as K run lengths with `counts` as text. This is fastest for masks stored column by column."""
    from hotcoco import mask

    if not len(masks):
        return []
    stack: Any = np.asfortranarray(masks.transpose(1, 2, 0).view(np.uint8))
    runs: Any = mask.encode(stack)
    return [{"size": list(run["size"]), "counts": run["counts"].decode("ascii")} for run in runs]


def read_image(path: Path, size: tuple[int, int] | None = None) -> Image.Image:
    """Read a file as an upright RGB image. Grey, 16-bit, CMYK, palette and transparent images are converted.

    Args:
        size: the (height, width) for which its annotations were made. The image is rotated as its EXIF data says, unless only the
            stored image has this size.

    Raises:
        DataError: the file is missing, truncated, not an image, or has another size; the message names the file.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # Pillow warns of metadata that we do not read.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # twice the size is an error, reported below
            with Image.open(path) as file:
                file.load()
                stored: Image.Image = file
                turned = file.getexif().get(ExifTags.Base.Orientation, 1) != 1
                upright = ImageOps.exif_transpose(file) if turned else file
    except FileNotFoundError:
        raise DataError(f"{path}: no such image") from None
    except (OSError, SyntaxError, ValueError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise DataError(f"{path}: truncated or unreadable image ({str(error).splitlines()[0][:100]})") from None
    if size is not None and upright.size != size[::-1]:
        if stored.size != size[::-1]:
            raise DataError(f"{path}: is {stored.width} x {stored.height}, its annotations say {size[1]} x {size[0]}")
        upright = stored
    return _rgb(upright)


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":  # 16 or 32 bits a pixel, which Pillow would clip at 255
        values = np.asarray(image, dtype=np.float64)
        # The scale of a 16-bit image does not depend on its values, so that all images of a folder are read alike.
        scale = 255 / 65535 if image.mode.startswith("I;16") or values.max(initial=0) > 255 else 1.0
        image = Image.fromarray((values * scale).clip(0, 255).round().astype(np.uint8))
    return image if image.mode == "RGB" else image.convert("RGB")


def category_names(categories: Sequence[Category]) -> list[str]:
    """Return the names of the categories in their order."""
    return [category.name for category in categories]
