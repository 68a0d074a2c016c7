"""The embedded data set: procedural scenes of geometric shapes in COCO format. Imports no torch.

Tests, examples and ablations use it without a download. A model must separate objects of one category that touch and overlap each
other, with extents from a fourteenth to nine tenths of the image. The shape determines an object's category. The texture usually
matches the category and the hue seldom does, so neither is enough alone.

H W height and width of an image in pixels, h w height and width of the box around one object.
"""

from __future__ import annotations

import colorsys
import hashlib
import itertools
import json
import math
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from numpy.random import PCG64, Generator, SeedSequence
from numpy.typing import NDArray
from PIL import Image
from scipy.ndimage import binary_erosion

from sparseinst.config import SHAPES_VERSION, ShapesConfig
from sparseinst.data.scenes import (
    SPLITS,
    Annotated,
    Item,
    Mask,
    Owner,
    Scene,
    annotation_file,
    image_folder,
    leaves_enough,
    place,
    write_annotations,
    write_images,
    write_new,
)
from sparseinst.errors import UserError
from sparseinst.files import write_error
from sparseinst.machine import usable_cores

Floats = NDArray[np.float64]

DESCRIPTION = "sparseinst shapes"
LICENCE = ("MIT License", "https://opensource.org/license/mit")

_DEFAULT = ShapesConfig()
_PART, _MIN_PARALLEL = 100, 1000  # images in one task; images of the smallest set that several processes write
_MIN_SIDE = 32
_MIN_EXTENT = 8.0  # pixels: a smaller star looks like a circle
_MIN_OBJECTS, _MAX_OBJECTS, _MAX_CATEGORIES = 3, 16, 3  # per image
# Extents are fractions of the side.
_TYPICAL = (0.1, 0.45)  # range of an image's typical extent, log-uniform
_VARIATION = (0.7, 1.4)  # range of an object's extent, as a multiple of the typical extent
_LARGE_SHARE, _LARGE = 0.85, (0.55, 0.9)  # fraction of the images with one or two large objects; range of their extents
_LARGE_CENTRE = (0.25, 0.75)  # range of a large object's centre, as fractions of the side
_COVER = 0.9  # upper limit of the sum of squared extents if no object were large, as a fraction of the image
_MAX_TURN, _MAX_ASPECT = 0.45, 1.25  # largest rotation in radians; largest ratio of the sides
_BESIDE_SHARE = 0.45  # fraction of the objects that are put beside one of their category
_BESIDE_DISTANCE = (0.7, 1.05)  # distance of their centres, as a multiple of their mean extent
_MIN_VISIBLE = 0.4  # fraction of each object that stays visible
_USUAL_TEXTURE, _USUAL_HUE, _HUE_SPREAD = 0.85, 0.38, 0.05  # fractions of objects with their category's texture and hue; turns
_WIDE_RIM_EXTENT = 24  # pixels: the rim of an object of at least this extent is 2 pixels wide
_TRIES = 12  # attempts to place an object
_EMPTY, _CROWDED = 0.02, 0.01  # fractions of the images without objects and with a crowd


def _star(x: Floats, y: Floats) -> Mask:
    """Return which points lie in a star with five tips at radius 1 and inner corners at radius 0.6."""
    half, corner = math.pi / 5, 0.6
    angle = abs(np.arctan2(x, -y) % (2 * half) - half)  # 0 at an inner corner, `half` at a tip
    along, across = np.hypot(x, y) * np.cos(angle), np.hypot(x, y) * np.sin(angle)
    return (math.cos(half) - corner) * across >= math.sin(half) * (along - corner)


_SHAPES: dict[str, tuple[int, Callable[[Floats, Floats], Mask]]] = {
    "circle": (1, lambda x, y: np.hypot(x, y) <= 1),
    "square": (2, lambda x, y: np.maximum(abs(x), abs(y)) <= math.sqrt(0.5)),
    "triangle": (4, lambda x, y: np.maximum(y, math.sqrt(0.75) * abs(x) - y / 2) <= 0.5),
    "star": (7, _star),
    "ring": (11, lambda x, y: abs(np.hypot(x, y) - 0.7) <= 0.3),
    "cross": (13, lambda x, y: (np.maximum(abs(x), abs(y)) <= 0.9) & (np.minimum(abs(x), abs(y)) <= 0.4)),
}
"""For each shape its category id (with gaps, as in COCO) and a function that returns which points of the unit disc lie inside the
shape, with x to the right and y down."""


_UNGUARDED = (
    'several processes write the set, so a script must call this below `if __name__ == "__main__":`; '
    "or write the set first with `sparseinst data shapes`"
)


def write_shapes(
    root: Path,
    *,
    train: int = _DEFAULT.train,
    val: int = _DEFAULT.val,
    side: int = _DEFAULT.side,
    seed: int = 0,
    processes: int | None = None,
) -> None:
    """Write the data set to a new or empty folder; all of it appears at once or nothing does.

    Args:
        root: receives `annotations/instances_{train,val}2017.json`, `train2017` and `val2017`. Two processes may write
            the same root at the same time; one set is kept.
        train: the number of training images. Image i does not depend on this number.
        val: the number of validation images. They use other random streams than the training images.
        side: height and width of every image, in pixels.
        seed: 0 or more.
        processes: the number of processes that share the work; None uses all cores for a large set and one for a small set. The
            set does not depend on this number.

    Raises:
        UserError: `root` is in use or cannot be written, or a number is out of its range.
    """
    if side < _MIN_SIDE or min(train, val) < 1 or seed < 0:
        raise UserError(
            f"shapes: train={train}, val={val}, side={side}, seed={seed}: these must be at least 1, 1, {_MIN_SIDE} and 0"
        )
    categories = [{"id": shape[0], "name": name, "supercategory": "shape"} for name, shape in _SHAPES.items()]
    info = {"description": DESCRIPTION, "version": SHAPES_VERSION, "seed": seed, "side": side, "train": train, "val": val}
    if processes is None:
        processes = usable_cores() if train + val >= _MIN_PARALLEL else 1

    def write(new_root: Path) -> None:
        with ExitStack() as stack:
            map_parts: Any = map
            if processes > 1:
                # Not fork, because torch's threads may be running.
                pool = ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn"))
                map_parts = stack.enter_context(pool).map
            for index, (split, number) in enumerate(zip(SPLITS, (train, val), strict=True)):
                folder = image_folder(new_root, split)
                folder.mkdir(parents=True)
                parts = [range(first, min(first + _PART, number)) for first in range(0, number, _PART)]
                written = map_parts(partial(_write_part, folder, (seed, index), side), parts)
                write_annotations(new_root, split, itertools.chain.from_iterable(written), categories, info, LICENCE)

    try:
        write_new(root, write, f"a shapes set of version {SHAPES_VERSION}", _is_complete)
    except BrokenProcessPool:
        raise UserError(f"{root}: {_UNGUARDED}") from None


def _write_part(folder: Path, stream: tuple[int, int], side: int, numbers: range) -> list[Annotated]:
    """Write some images and return their COCO entries. Each image has its own random stream, whatever their number."""
    generators = (Generator(PCG64(SeedSequence((*stream, number)))) for number in numbers)
    return write_images(folder, (_scene(generator, side) for generator in generators), numbers.start + 1)


def ensure_shapes(root: Path, config: ShapesConfig) -> None:
    """Write a set to `root` unless it is there already. Several processes may call this at the same time.

    Raises:
        UserError: `root` holds something else, such as a set of another version or size, or it cannot be written.
    """
    root = root.resolve()
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        # This process belongs to a pool and imports the main script again, which would wait for the lock of its own parent.
        raise UserError(f"{root}: {_UNGUARDED}")
    if _holds(root, config):  # Check without the lock first: a finished set may be on a read-only disk.
        return
    try:
        root.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(root.with_name(f".{root.name}.lock")):
            if not _holds(root, config):
                write_shapes(root, train=config.train, val=config.val, side=config.side)
    except OSError as error:
        raise write_error(root, error) or UserError(f"{root}: cannot be written ({error})") from None


def content_digest(root: Path) -> str:
    """Return the SHA-256 of the decoded pixels and the annotations in hexadecimal, whatever the encoding as PNG and JSON.

    Raises:
        OSError: a file is missing.
    """
    digest = hashlib.sha256()
    for split in SPLITS:
        data = json.loads(annotation_file(root, split).read_text(encoding="utf-8"))
        content = {key: data[key] for key in ("images", "annotations", "categories")}
        digest.update(json.dumps(content, sort_keys=True, separators=(",", ":")).encode())
        for entry in data["images"]:
            with Image.open(image_folder(root, split) / entry["file_name"]) as file:
                digest.update(np.asarray(file.convert("RGB")).tobytes())
    return digest.hexdigest()


def _is_complete(root: Path) -> bool:
    """Return whether a set of this version is at `root`. A set appears all at once, so it is complete."""
    info = _info(root)
    return (info.get("description"), info.get("version")) == (DESCRIPTION, SHAPES_VERSION)


def _holds(root: Path, config: ShapesConfig) -> bool:
    """Return whether the set that a config describes is at `root`. Raises `UserError` if `root` holds a set of another size."""
    if not _is_complete(root):
        return False
    info = _info(root)
    wanted = {"seed": 0, **config.content()}
    found = {name: info.get(name) for name in wanted}
    if found != wanted:
        differing = ", ".join(
            f"{name}={found[name]} instead of {value}" for name, value in wanted.items() if found[name] != value
        )
        raise UserError(f"{root}: holds another shapes set ({differing}); name another folder with data.root, or delete this one")
    return True


def _info(root: Path) -> dict[str, Any]:
    """Return the `info` entry of the set at `root`, or an empty dict if there is none."""
    try:
        info = json.loads(annotation_file(root, "val").read_text(encoding="utf-8"))["info"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return info if isinstance(info, dict) else {}


def _scene(rng: Generator, side: int) -> Scene:
    """Return a random scene: an image, its objects from back to front, and the index of the visible object at each pixel."""
    size = (side, side)
    canvas = _background(rng, size)
    owner: Owner = np.full(size, -1)
    objects: list[Item] = []
    if rng.random() >= _EMPTY:
        names = rng.permutation(list(_SHAPES))[: rng.integers(1, _MAX_CATEGORIES + 1)].tolist()
        hues = rng.random(rng.integers(2, 4))
        crowded = rng.random() < _CROWDED
        for index, extent in enumerate(_extents(rng, side)):
            name = names[rng.integers(len(names))]
            for _ in range(_TRIES):
                crowd = crowded and index == 0
                mask = _cluster(rng, name, side) if crowd else _rasterise(rng, name, extent)
                centre = None
                if extent >= _LARGE[0] * side:
                    centre = (_uniform(rng, _LARGE_CENTRE) * side, _uniform(rng, _LARGE_CENTRE) * side)
                elif rng.random() < _BESIDE_SHARE:
                    centre = _beside(rng, objects, name, extent)
                item, _ = place(rng, mask, size, _SHAPES[name][0], crowd=crowd, centre=centre)
                if leaves_enough(item, objects, owner, _MIN_VISIBLE):
                    _fill(rng, canvas[:, *item.box], item.mask, name, hues)
                    owner[item.box][item.mask] = len(objects)
                    objects.append(item)
                    break
    canvas *= 1 + _smooth_noise(rng, size, 3, 0.15)  # brightness that varies over the scene
    return Scene(canvas.clip(0, 255).round().astype(np.uint8).transpose(1, 2, 0), objects, owner)


def _extents(rng: Generator, side: int) -> list[float]:
    """Return the extents of an image's objects in pixels: one or two large ones in most images, and others near a typical one."""
    low, high = _TYPICAL
    typical = low * (high / low) ** rng.random()
    most = min(_MAX_OBJECTS, max(_MIN_OBJECTS, int(_COVER / typical**2)))
    number = rng.integers(_MIN_OBJECTS, most + 1)
    large = rng.integers(1, 3) if rng.random() < _LARGE_SHARE else 0
    extents = [_uniform(rng, _LARGE) if index < large else typical * _uniform(rng, _VARIATION) for index in range(number)]
    return [max(_MIN_EXTENT, side * extent) for extent in extents]


def _uniform(rng: Generator, bounds: tuple[float, float]) -> float:
    """Return a random number, uniform between two bounds."""
    return bounds[0] + (bounds[1] - bounds[0]) * rng.random()


def _beside(rng: Generator, objects: list[Item], name: str, extent: float) -> tuple[float, float] | None:
    """Return a centre (row, column) at which an object would touch or overlap one of its category; None if there is none."""
    own = [item for item in objects if item.category_id == _SHAPES[name][0] and not item.crowd]
    if not own:
        return None
    rows, columns = own[rng.integers(len(own))].box
    angle = 2 * math.pi * rng.random()
    distance = _uniform(rng, _BESIDE_DISTANCE) * (extent + max(rows.stop - rows.start, columns.stop - columns.start)) / 2
    middle = (rows.start + rows.stop) / 2, (columns.start + columns.stop) / 2
    return middle[0] + distance * math.sin(angle), middle[1] + distance * math.cos(angle)


def _cluster(rng: Generator, name: str, side: int) -> Mask:
    """Return the mask of a crowd: 8 to 15 small shapes, side by side or touching."""
    tiny = max(5.0, 0.05 * side)
    mask = np.zeros((round(6 * tiny), round(7.5 * tiny)), dtype=np.bool_)
    for _ in range(rng.integers(8, 16)):
        shape = _rasterise(rng, name, tiny * (1 + 0.4 * rng.random()))
        top, left = (int(rng.integers(available - length)) for available, length in zip(mask.shape, shape.shape, strict=True))
        mask[top : top + shape.shape[0], left : left + shape.shape[1]] |= shape
    return mask


def _rasterise(rng: Generator, name: str, extent: float) -> Mask:
    """Return the mask (h, w) of a shape that is `extent` pixels long, with a small random rotation and stretch."""
    aspect = _MAX_ASPECT ** (2 * rng.random() - 1)
    angle = _MAX_TURN * (2 * rng.random() - 1)
    length = math.ceil(extent) + 2
    x, y = _rotated_coordinates(angle, (length, length), (length / 2 - rng.random(), length / 2 - rng.random()))
    return _SHAPES[name][1](x * 2 / extent / min(1, aspect), y * 2 / extent / min(1, 1 / aspect))


def _rotated_coordinates(angle: float, shape: tuple[int, ...], centre: tuple[float, float]) -> tuple[Floats, Floats]:
    """Return x and y (h, w) in pixels from `centre` (row, column), on axes to the right and down that are rotated by an angle."""
    y, x = np.arange(shape[0])[:, None] - centre[0], np.arange(shape[1]) - centre[1]
    return x * math.cos(angle) + y * math.sin(angle), y * math.cos(angle) - x * math.sin(angle)


def _fill(rng: Generator, box: Floats, mask: Mask, name: str, hues: Floats) -> None:
    """Paint an object into `box`, its part of the canvas (3, h, w): colour, texture, shading and a dark rim along the contour."""
    names = list(_SHAPES)
    own = names.index(name)
    hue = own / len(names) if rng.random() < _USUAL_HUE else hues[rng.integers(len(hues))]
    colour = _rgb(hue + _HUE_SPREAD * (2 * rng.random() - 1), 0.6 + 0.4 * rng.random(), 0.65 + 0.35 * rng.random())
    kind = names[own if rng.random() < _USUAL_TEXTURE else rng.integers(len(names))]
    light = 1 + 0.28 * _texture(rng, mask.shape, kind)
    direction, strength = 2 * math.pi * rng.random(), 0.3 * rng.random()
    x, _ = _rotated_coordinates(direction, mask.shape, (mask.shape[0] / 2, mask.shape[1] / 2))
    light *= 1 + strength * x / max(mask.shape)
    rim = mask & ~binary_erosion(mask, iterations=1 if max(mask.shape) < _WIDE_RIM_EXTENT else 2)
    light[rim] *= 0.5
    box[:, mask] = colour[:, None] * light[mask]


def _rgb(hue: float, saturation: float, value: float) -> Floats:
    """Return a colour (3,) in [0, 255]. The hue is in turns; saturation and value are in [0, 1]."""
    return 255 * np.array(colorsys.hsv_to_rgb(hue % 1, saturation, value))


def _texture(rng: Generator, shape: tuple[int, ...], name: str) -> Floats:
    """Return the usual texture of a category: (h, w) in [-1, 1], with a mean of about 0."""
    wave = 2 * math.pi / (5 + 3 * rng.random())
    x, y = _rotated_coordinates(2 * math.pi * rng.random(), shape, (shape[0] * rng.random(), shape[1] * rng.random()))
    if name == "circle":  # plain
        return np.zeros(shape)
    if name == "square":  # stripes
        return np.sign(np.cos(wave * x))
    if name == "triangle":  # a chequerboard
        return np.sign(np.cos(wave * x) * np.cos(wave * y))
    if name == "star":  # dots
        return np.sign(np.cos(wave * x) + np.cos(wave * y) - 0.4)
    if name == "ring":  # waves
        return np.cos(wave / 2 * (x + 2 * np.sin(wave / 2 * y)))
    return np.sign(np.cos(wave / 2 * np.hypot(x, y)))  # circles around a point


def _background(rng: Generator, size: tuple[int, int]) -> Floats:
    """Return a background (3, H, W) in about [0, 255]: gradients, low-frequency noise, blotches and lines, all without labels."""
    canvas: Floats = (
        (30 + 60 * rng.random(3))[:, None, None] + _smooth_noise(rng, size, 2, 30, 3) + _smooth_noise(rng, size, 5, 20, 3)
    )
    for _ in range(rng.integers(3)):
        blotches = _smooth_noise(rng, size, int(rng.integers(4, 12)), 3) - 1
        canvas += blotches.clip(0, 1) * (40 * (2 * rng.random((3, 1, 1)) - 1))
    for _ in range(rng.integers(8)):
        _line(rng, canvas)
    return canvas


def _smooth_noise(rng: Generator, size: tuple[int, int], cells: int, strength: float, channels: int = 1) -> Floats:
    """Return smooth noise (channels, H, W) in [-strength, strength], interpolated between cells x cells random values."""

    def weights(length: int) -> Floats:  # (length, cells), rows that sum to 1
        near = (1 - abs(np.linspace(0, cells - 1, length)[:, None] - np.arange(cells))).clip(0, 1)
        return np.asarray(near * near * (3 - 2 * near))

    grid = strength * (2 * rng.random((channels, cells, cells)) - 1)
    return np.asarray(weights(size[0]) @ grid @ weights(size[1]).T)


def _line(rng: Generator, canvas: Floats) -> None:
    """Draw a curved line, 1 or 2 pixels wide, on the canvas (3, H, W): clutter with edges like those of objects."""
    bottom, right = canvas.shape[1] - 1, canvas.shape[2] - 1
    t = np.linspace(0, 1, 2 * (bottom + right))
    weights = np.stack([(1 - t) ** 2, 2 * t * (1 - t), t**2])
    row, column = ((rng.random((2, 3)) * [[bottom], [right]]) @ weights).astype(np.int64)
    offsets = np.array([(0, 0), (0, 1), (1, 0)][: 1 if rng.random() < 0.5 else 3])[..., None]  # (thickness, 2, 1)
    row, column = np.minimum(row + offsets[:, 0], bottom), np.minimum(column + offsets[:, 1], right)
    canvas[:, row, column] = 20 + 150 * rng.random((3, 1, 1))
