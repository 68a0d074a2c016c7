"""The form in which every reader hands its images to the writer, and the report of what was left out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sparseinst.data.images import IMAGE_SUFFIXES
from sparseinst.errors import DataError

Kind = Literal["masks", "labelme", "voc", "cityscapes", "label_maps", "yolo"]
KINDS: tuple[Kind, ...] = get_args(Kind)

Size = tuple[int, int]
"""Height and width in pixels."""
Mask = NDArray[np.bool_]
"""(H, W)"""
Labels = NDArray[np.int64]
"""(H, W): a number for each pixel."""


@dataclass
class Report:
    """The result of a conversion."""

    images: dict[str, int] = field(default_factory=dict)
    """The number of images in each split."""
    instances: dict[str, int] = field(default_factory=dict)
    """The number of instances in each split."""
    left_out: Counter[str] = field(default_factory=Counter)
    """The number of files and instances that were left out, by reason."""
    examples: dict[str, str] = field(default_factory=dict)
    """The first file or instance that was left out, by reason."""

    def leave_out(self, reason: str, where: Path | str) -> None:
        self.left_out[reason] += 1
        self.examples.setdefault(reason, str(where))


class Instance(NamedTuple):
    """An object as a source describes it. The writer checks it."""

    category: str
    shape: list[list[float]] | Mask
    """Polygons (lists of x, y, x, y, ... in pixels) or a mask."""
    where: str
    """The file, and the place in it, for the report."""
    crowd: bool = False


class SourceImage(NamedTuple):
    """An image and its objects."""

    image: Path | bytes
    """The image's file, or the content of one."""
    size: Size | None
    """The size that the annotations state. None: the source states none."""
    instances: Callable[[Size], Iterable[Instance]]
    """Returns the objects, given the image's size."""


@dataclass(frozen=True)
class Entry:
    """An image that a source lists. Its annotations are read later, so that a source of any size fits into memory."""

    name: str
    """The file's name in the new folder without its suffix, relative to the folder of the images."""
    load: Callable[[Report], SourceImage | None]
    """Reads the annotations. Returns None if the image has to be left out, and reports the reason."""
    split: str | None = None
    """`train` or `val`, if the source says so."""


class Source(NamedTuple):
    entries: list[Entry]
    categories: list[str] | None = None
    """The names in the order of their ids. None: the names that occur, sorted."""


def images_in(folder: Path, *, recursive: bool = False) -> list[Path]:
    """Return the image files of a folder, sorted; [] if there is no such folder."""
    files = folder.rglob("*") if recursive else folder.glob("*")
    return sorted(file for file in files if file.suffix.lower() in IMAGE_SUFFIXES and not file.name.startswith("."))


def image_of(folder: Path, stem: str) -> Path | None:
    """Return the image with this name without suffix, or None."""
    candidates = (folder / f"{stem}{suffix}" for lower in IMAGE_SUFFIXES for suffix in (lower, lower.upper()))
    return next((file for file in candidates if file.is_file()), None)


def read_labels(file: Path) -> tuple[Labels, bool]:
    """Return the numbers of a label map (H, W), and whether it is in colour.

    A palette image gives its indices. A colour image gives red * 65536 + green * 256 + blue.

    Raises:
        DataError: the file is missing, not an image, or holds fractions.
    """
    try:
        with Image.open(file) as image:
            image.load()
            if image.mode in ("1", "L", "P", "I") or image.mode.startswith("I;16"):
                return np.asarray(image).astype(np.int64), False
            if image.mode not in ("RGB", "RGBA"):
                raise DataError(f"{file}: a label map of Pillow's mode {image.mode} is not supported")
            pixels = np.asarray(image.convert("RGB")).astype(np.int64)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{file}: unreadable label map ({str(error).splitlines()[0][:100]})") from None
    return pixels @ np.array([65536, 256, 1]), True


def load_labels(file: Path, report: Report) -> tuple[Labels, bool] | None:
    """Return what `read_labels` returns, or None with the reason in the report."""
    if not file.is_file():
        report.leave_out("an image without a label map", file)
        return None
    try:
        return read_labels(file)
    except DataError:
        report.leave_out("an image with an unreadable label map", file)
        return None
