"""Compose scenes from cut-outs on backgrounds and write them in COCO format. Imports no torch.

The scenes are more lifelike than the embedded shapes, and their masks are exact. The splits share no cut-out and no background.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.random import PCG64, Generator, SeedSequence
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from sparseinst.data.coco_folder import SPLITS, write_new
from sparseinst.data.scenes import Item, Mask, Owner, Scene, leaves_enough, place, write_split
from sparseinst.errors import DataError, UserError

_log = logging.getLogger(__name__)

DESCRIPTION = "sparseinst collage"
SUFFIXES = (".png", ".webp", ".tif", ".tiff", ".gif")
"""The file types that can hold transparent images."""
BACKGROUND_SUFFIXES = (".jpg", ".jpeg", *SUFFIXES)

_ALPHA_THRESHOLD = 127  # a pixel with a higher alpha value belongs to the object
_MIN_SIDE, _MIN_PIXELS = 24, 300  # in pixels: the smallest side and area of a usable cut-out
_MAX_FILLED = 0.97  # fraction of the image; an object that fills more was not cut out
_VAL_SHARE = 0.2
_MIN_EXTENT, _MAX_EXTENT = 0.2, 0.75  # an object's size, as fractions of the scene's side
_MAX_ANGLE = 25.0  # degrees
_MAX_OBJECTS, _TRIES = 6, 20  # objects in a scene; attempts to place one object

Cutouts = dict[str, list[Path]]


def write_collage(
    root: Path, cutouts: Path, backgrounds: Path, *, train: int = 2000, val: int = 300, side: int = 256, seed: int = 0
) -> dict[str, int]:
    """Write a data set of composed scenes to `root`, a new or empty folder. Return the number of usable cut-outs of each class.

    All of the data set appears at once; if writing fails, nothing appears.

    Args:
        cutouts: holds one folder for each class, with transparent images in it or in its subfolders.
        backgrounds: holds images, in the folder or in its subfolders.
        side: height and width of the scenes, in pixels.

    Raises:
        UserError: there are too few usable files, `root` is in use or cannot be written, or a number is out of range.
        DataError: a background cannot be read.
    """
    if min(train, val) < 1 or side < 64 or seed < 0:
        raise UserError(f"collage: train={train}, val={val}, side={side}, seed={seed}: these must be at least 1, 1, 64 and 0")
    classes = find_cutouts(cutouts)
    background_files = find_backgrounds(backgrounds)
    rng = Generator(PCG64(SeedSequence(seed)))
    parts: list[tuple[Cutouts, list[Path]]] = [({}, []), ({}, [])]  # cut-outs and backgrounds of train and of val
    for name, files in classes.items():
        for part, chosen in zip(parts, _split(files, rng), strict=True):
            part[0][name] = chosen
    for part, chosen in zip(parts, _split(background_files, rng), strict=True):
        part[1].extend(chosen)
    categories = [{"id": number, "name": name, "supercategory": "cut-out"} for number, name in enumerate(classes, start=1)]
    info = {"description": DESCRIPTION, "seed": seed, "side": side}
    licence = ("that of the cut-outs and backgrounds", "")

    def write(new_root: Path) -> None:
        for index, (split, number, part) in enumerate(zip(SPLITS, (train, val), parts, strict=True)):
            streams = (Generator(PCG64(SeedSequence((seed, index, image)))) for image in range(number))
            write_split(new_root, split, (_scene(stream, *part, side) for stream in streams), categories, info, licence)

    write_new(root, write, "a collage", lambda _: False)
    return {name: len(files) for name, files in classes.items()}


def find_cutouts(folder: Path) -> Cutouts:
    """Return the usable cut-outs of each class; classes and files are sorted. A warning counts the unusable images.

    Raises:
        UserError: no class has two usable cut-outs, one for each split.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    classes: Cutouts = {}
    unusable = 0
    for class_folder in sorted(path for path in folder.iterdir() if path.is_dir()):
        files = [file for file in sorted(class_folder.rglob("*")) if file.suffix.lower() in SUFFIXES and file.is_file()]
        usable = [file for file in files if _is_cutout(file)]
        unusable += len(files) - len(usable)
        if len(usable) >= 2:
            classes[class_folder.name] = usable
        elif files:
            _log.warning("%s: left out, because the class has %d usable cut-outs and needs two", class_folder, len(usable))
    if unusable:
        _log.warning("%s: left out %d images that are unreadable, too small, or opaque up to their edges", folder, unusable)
    if not classes:
        raise UserError(
            f"{folder}: no class has two usable cut-outs; make one folder for each class, with transparent images in it"
        )
    return classes


def find_backgrounds(folder: Path) -> list[Path]:
    """Return the images in a folder and its subfolders, sorted. Raises `UserError` if there are fewer than two."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    files = [file for file in sorted(folder.rglob("*")) if file.suffix.lower() in BACKGROUND_SUFFIXES and file.is_file()]
    if len(files) < 2:
        raise UserError(f"{folder}: {len(files)} images found, but at least two backgrounds are needed")
    return files


def _is_cutout(file: Path) -> bool:
    try:
        with Image.open(file) as image:
            if min(image.size) < _MIN_SIDE or not (image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info):
                return False
            mask = np.asarray(image.convert("RGBA").getchannel("A")) > _ALPHA_THRESHOLD
    except (OSError, UnidentifiedImageError, ValueError) as error:
        _log.warning("%s: cannot be read (%s)", file, error)
        return False
    return bool(mask.sum() >= _MIN_PIXELS and mask.mean() <= _MAX_FILLED)


def _split(files: Sequence[Path], rng: Generator) -> tuple[list[Path], list[Path]]:
    """Return the files of the training split and of the validation split. Each split has at least one file."""
    order = [files[index] for index in rng.permutation(len(files))]
    number = min(len(files) - 1, max(1, round(_VAL_SHARE * len(files))))
    return order[number:], order[:number]


def _scene(rng: Generator, cutouts: Cutouts, backgrounds: list[Path], side: int) -> Scene:
    canvas = _background(rng, backgrounds[rng.integers(len(backgrounds))], side)
    owner: Owner = np.full((side, side), -1)
    objects: list[Item] = []
    names = list(cutouts)
    for _ in range(rng.integers(1, _MAX_OBJECTS + 1)):
        number = int(rng.integers(len(names)))
        files = cutouts[names[number]]
        file = files[rng.integers(len(files))]
        for _ in range(_TRIES):
            colours, alpha = _cutout(rng, file, side)
            mask: Mask = alpha > _ALPHA_THRESHOLD / 255
            item, part = place(rng, mask, (side, side), number + 1)
            if leaves_enough(item, objects, owner):
                weight = alpha[part][..., None]
                region = canvas[item.box]
                canvas[item.box] = region * (1 - weight) + colours[part] * weight
                owner[item.box][item.mask] = len(objects)
                objects.append(item)
                break
    return Scene(canvas.clip(0, 255).round().astype(np.uint8), objects, owner)


def _background(rng: Generator, file: Path, side: int) -> NDArray[np.float64]:
    """Return a random square of the image as (side, side, 3), with random flip and brightness."""
    try:
        with Image.open(file) as opened:
            image = opened.convert("RGB")
    except (OSError, UnidentifiedImageError, ValueError) as error:
        raise DataError(f"{file}: cannot be read ({error})") from None
    extent = round(min(image.size) * (0.5 + 0.5 * rng.random()))
    left, top = (int(rng.integers(length - extent + 1)) for length in image.size)
    crop = image.crop((left, top, left + extent, top + extent)).resize((side, side), Image.Resampling.BILINEAR)
    if rng.random() < 0.5:
        crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return np.asarray(crop, dtype=np.float64) * (0.7 + 0.5 * rng.random())


def _cutout(rng: Generator, file: Path, side: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the object of a cut-out at random size, rotation and flip: colours (h, w, 3), and alpha (h, w) in [0, 1]."""
    with Image.open(file) as opened:
        image: Any = opened.convert("RGBA")
    image = image.crop(image.getchannel("A").getbbox())
    extent = side * _MIN_EXTENT * (_MAX_EXTENT / _MIN_EXTENT) ** rng.random()
    scale = extent / max(image.size)
    image = image.resize([max(2, round(length * scale)) for length in image.size], Image.Resampling.BILINEAR)
    if rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    image = image.rotate(_MAX_ANGLE * (2 * rng.random() - 1), Image.Resampling.BILINEAR, expand=True)
    pixels = np.asarray(image, dtype=np.float64)
    return pixels[..., :3] * (0.85 + 0.3 * rng.random()), pixels[..., 3] / 255
