"""Scenes composed from cut-outs on backgrounds, in COCO format: more lifelike than shapes, with exact masks. Imports no torch.

No cut-out and no background of the training split occurs in the validation split.
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

from sparseinst.data.scenes import SPLITS, Item, Mask, Owner, Scene, leaves_enough, place, write_new, write_split
from sparseinst.errors import DataError, UserError

_log = logging.getLogger(__name__)

DESCRIPTION = "sparseinst collage"
SUFFIXES = (".png", ".webp", ".tif", ".tiff", ".gif")
"""Of images that can be transparent."""
BACKGROUND_SUFFIXES = (".jpg", ".jpeg", *SUFFIXES)

_OPAQUE = 127  # alpha above it belongs to the object
_MIN_SIDE, _MIN_PIXELS = 24, 300  # of a usable cut-out
_MAX_FILLED = 0.97  # a picture that fills its whole frame was not cut out
_VAL_SHARE = 0.2
_MIN_EXTENT, _MAX_EXTENT = 0.2, 0.75  # fractions of the side
_MAX_ANGLE = 25.0  # degrees
_MAX_OBJECTS, _TRIES = 6, 20

Cutouts = dict[str, list[Path]]


def write_collage(
    root: Path, cutouts: Path, backgrounds: Path, *, train: int = 2000, val: int = 300, side: int = 256, seed: int = 0
) -> dict[str, int]:
    """Compose a data set; `root` must be new or empty, and appears with all its images or not at all.

    Args:
        cutouts: one folder a class, with transparent images in it or below it.
        backgrounds: images, in the folder or below it.
        side: of the square images, in pixels.

    Returns:
        Cut-outs that were usable, by class.

    Raises:
        UserError: too few usable files, something else at `root`, or it cannot be written.
        DataError: a background that cannot be read.
    """
    if min(train, val) < 1 or side < 64 or seed < 0:
        raise UserError(f"collage: train={train}, val={val} (at least 1), side={side} (64), seed={seed} (0)")
    found = find_cutouts(cutouts)
    scenery = find_backgrounds(backgrounds)
    rng = Generator(PCG64(SeedSequence(seed)))
    parts: list[tuple[Cutouts, list[Path]]] = [({}, []), ({}, [])]
    for name, files in found.items():
        for part, chosen in zip(parts, _split(files, rng), strict=True):
            part[0][name] = chosen
    for part, chosen in zip(parts, _split(scenery, rng), strict=True):
        part[1].extend(chosen)
    categories = [{"id": number, "name": name, "supercategory": "cut-out"} for number, name in enumerate(found, start=1)]
    info = {"description": DESCRIPTION, "seed": seed, "side": side}
    licence = ("that of the cut-outs and backgrounds", "")

    def write(made: Path) -> None:
        for index, (split, number, part) in enumerate(zip(SPLITS, (train, val), parts, strict=True)):
            streams = (Generator(PCG64(SeedSequence((seed, index, image)))) for image in range(number))
            write_split(made, split, (_scene(stream, *part, side) for stream in streams), categories, info, licence)

    write_new(root, write, "a collage", lambda _: False)
    return {name: len(files) for name, files in found.items()}


def find_cutouts(folder: Path) -> Cutouts:
    """Usable cut-outs by class, both in order; what cannot be used is counted in a warning.

    Raises:
        UserError: not one class has two, which is the least for a training and a validation split.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    found: Cutouts = {}
    unusable = 0
    for each in sorted(path for path in folder.iterdir() if path.is_dir()):
        files = [file for file in sorted(each.rglob("*")) if file.suffix.lower() in SUFFIXES]
        usable = [file for file in files if _is_cutout(file)]
        unusable += len(files) - len(usable)
        if len(usable) >= 2:
            found[each.name] = usable
        elif files:
            _log.warning("%s: %d usable cut-outs, two are needed: the class is left out", each, len(usable))
    if unusable:
        _log.warning(
            "%s: %d images are no cut-outs (unreadable, tiny, or opaque to their edges) and were left out", folder, unusable
        )
    if not found:
        raise UserError(
            f"{folder}: no class has two usable cut-outs; one folder a class is needed, with transparent images in it"
        )
    return found


def find_backgrounds(folder: Path) -> list[Path]:
    """Images in order. Raises `UserError` where there are not two."""
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    files = [file for file in sorted(folder.rglob("*")) if file.suffix.lower() in BACKGROUND_SUFFIXES]
    if len(files) < 2:
        raise UserError(f"{folder}: {len(files)} images found, two backgrounds are needed at least")
    return files


def _is_cutout(file: Path) -> bool:
    try:
        with Image.open(file) as image:
            if min(image.size) < _MIN_SIDE or not (image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info):
                return False
            mask = np.asarray(image.convert("RGBA").getchannel("A")) > _OPAQUE
    except (OSError, UnidentifiedImageError, ValueError) as error:
        _log.warning("%s: cannot be read (%s)", file, error)
        return False
    return bool(mask.sum() >= _MIN_PIXELS and mask.mean() <= _MAX_FILLED)


def _split(files: Sequence[Path], rng: Generator) -> tuple[list[Path], list[Path]]:
    """Training and validation: no file in both, at least one in each."""
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
            mask: Mask = alpha > _OPAQUE / 255
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
    """A random square of the image, (side, side, 3)."""
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
    """A cut-out at a random size, turn and flip: colours (h, w, 3) and alpha (h, w) in [0, 1], cut to its object."""
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
