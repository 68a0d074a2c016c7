"""The embedded data set: procedural scenes of geometric shapes in COCO format. Imports no torch.

For tests, examples and ablations without a download: a small model learns much of it on two CPU cores in minutes.
Most objects have their category's usual hue, the others any; texture, aspect and rotation say nothing of the category.
Objects are brighter than the background, hide each other and are cut by the border; they extend from 0.3 to 0.7 of the image.

H W height and width of an image in pixels, h w of the box around one object.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
from filelock import FileLock
from numpy.random import PCG64, Generator, SeedSequence
from numpy.typing import NDArray
from PIL import Image

from sparseinst.config import SHAPES_VERSION
from sparseinst.data.scenes import (
    SPLITS,
    Item,
    Mask,
    Owner,
    Scene,
    annotation_file,
    image_folder,
    leaves_enough,
    place,
    write_new,
    write_split,
)
from sparseinst.errors import UserError

Floats = NDArray[np.float64]

DESCRIPTION = "sparseinst shapes"
LICENCE = ("MIT License", "https://opensource.org/license/mit")

_SMALLEST_SIDE = 32
_MIN_EXTENT, _MAX_EXTENT = 0.3, 0.7  # fractions of the side
_MIN_AREA = 40  # pixels of a whole object: below, a star cannot be told from a circle
_MIN_CONTRAST = 75.0  # sum over R, G, B of the difference to what lies below, in grey levels
_USUAL, _HUE_SPREAD = 0.98, 0.03  # fraction of a category's objects that have its usual hue; how far they stray from it
_MAX_OBJECTS, _TRIES = 6, 20
_EMPTY, _CROWDED = 0.02, 0.01  # fractions of the images


def _star(x: Floats, y: Floats) -> Mask:
    """Five points at radius 1 and corners at 0.6 between them."""
    half, corner = math.pi / 5, 0.6
    angle = abs(np.arctan2(x, -y) % (2 * half) - half)  # 0 at a corner, `half` at a point
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
"""Category id (with gaps, as in COCO) and which points of the unit disc are inside, x right and y down."""


def write_shapes(root: Path, *, train: int = 800, val: int = 200, side: int = 128, seed: int = 0) -> None:
    """Write the data set to a folder that is not there yet, or is empty; all of it appears at once or nothing does.

    Args:
        root: gets `annotations/instances_{train,val}2017.json`, `train2017` and `val2017`. Two processes may write
            the same root at the same time: one set is kept.
        train: images of the training split; image i is the same whatever their number is.
        val: images of the validation split, from other random streams than those of training.
        side: of every image, which is square, in pixels.
        seed: 0 or more.

    Raises:
        UserError: something else is at `root`, it cannot be written, or a number is out of its range.
    """
    if side < _SMALLEST_SIDE or min(train, val) < 1 or seed < 0:
        raise UserError(f"shapes: side={side} (at least {_SMALLEST_SIDE}), train={train}, val={val} (1), seed={seed} (0)")
    categories = [{"id": shape[0], "name": name, "supercategory": "shape"} for name, shape in _SHAPES.items()]
    info = {"description": DESCRIPTION, "version": SHAPES_VERSION, "seed": seed, "side": side}

    def write(made: Path) -> None:
        for index, (split, number) in enumerate(zip(SPLITS, (train, val), strict=True)):
            # A stream for each image, so that it does not depend on how many there are.
            streams = (Generator(PCG64(SeedSequence((seed, index, image)))) for image in range(number))
            write_split(made, split, (_scene(stream, side) for stream in streams), categories, info, LICENCE)

    write_new(root, write, f"a shapes set of version {SHAPES_VERSION}", _is_complete)


def ensure_shapes(root: Path) -> None:
    """Write the default set to `root` unless a set of this version, of any size, is there. Safe between processes.

    Raises:
        UserError: something else is at `root`, or it cannot be written.
    """
    root = root.resolve()
    if _is_complete(root):  # first without the lock: a finished set may be on a read-only disk
        return
    try:
        root.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(root.with_name(f".{root.name}.lock")):
            if not _is_complete(root):
                write_shapes(root)
    except OSError as error:
        raise UserError(f"{root}: cannot be written ({error})") from None


def content_digest(root: Path) -> str:
    """SHA-256 in hexadecimal over decoded pixels and annotations, whatever wrote the PNG and JSON bytes.

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
    """Whether a set of this version is at `root`. Sets appear at once, so that what is there is all there."""
    try:
        info = json.loads(annotation_file(root, "val").read_text(encoding="utf-8"))["info"]
        found = (info["description"], info["version"])
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return found == (DESCRIPTION, SHAPES_VERSION)


def _scene(rng: Generator, side: int) -> Scene:
    """An image (H, W, 3), its objects from back to front, and which of them is visible where."""
    size = (side, side)
    canvas = _background(rng, size)
    owner: Owner = np.full(size, -1)
    objects: list[Item] = []
    number = 0 if rng.random() < _EMPTY else rng.integers(1, _MAX_OBJECTS + 1)
    crowded = rng.random() < _CROWDED
    for index in range(number):
        name = list(_SHAPES)[rng.integers(len(_SHAPES))]
        for _ in range(_TRIES):
            crowd = crowded and index == 0
            mask = _cluster(rng, name) if crowd else _single(rng, name, side)
            item, _ = place(rng, mask, size, _SHAPES[name][0], crowd=crowd)
            if leaves_enough(item, objects, owner):
                _fill(rng, canvas[:, *item.box], item.mask, list(_SHAPES).index(name) / len(_SHAPES))
                owner[item.box][item.mask] = len(objects)
                objects.append(item)
                break
    canvas *= 1 + _field(rng, size, 3, 0.15)  # light that varies over the scene
    canvas += (4 + 12 * rng.random()) * (rng.random(canvas.shape) - 0.5)
    return Scene(canvas.clip(0, 255).round().astype(np.uint8).transpose(1, 2, 0), objects, owner)


def _single(rng: Generator, name: str, side: int) -> Mask:
    """A shape of log-uniform extent."""
    while True:
        mask = _rasterise(rng, name, side * _MIN_EXTENT * (_MAX_EXTENT / _MIN_EXTENT) ** rng.random())
        if mask.sum() >= _MIN_AREA:
            return mask


def _cluster(rng: Generator, name: str) -> Mask:
    """A crowd: 8 to 15 shapes of 5 to 7 pixels, side by side or touching."""
    mask = np.zeros((30, 38), dtype=np.bool_)
    for _ in range(rng.integers(8, 16)):
        tiny = _rasterise(rng, name, 5 + 2 * rng.random())
        top, left = (int(rng.integers(room - length)) for room, length in zip(mask.shape, tiny.shape, strict=True))
        mask[top : top + tiny.shape[0], left : left + tiny.shape[1]] |= tiny
    return mask


def _rasterise(rng: Generator, name: str, extent: float) -> Mask:
    """The pixels (h, w) whose centre is inside the shape, `extent` pixels long, with random aspect and rotation.

    The aspect is at most 1.3.
    """
    aspect = 1.3 ** (2 * rng.random() - 1)
    length = math.ceil(extent) + 2
    x, y = _rotated(rng, (length, length))
    return _SHAPES[name][1](x * 2 / extent / min(1, aspect), y * 2 / extent / min(1, 1 / aspect))


def _rotated(rng: Generator, shape: tuple[int, ...]) -> tuple[Floats, Floats]:
    """Coordinates (h, w) in pixels along two random perpendicular directions, from a random point near the centre."""
    angle, down, right = (2 * math.pi, 1, 1) * rng.random(3)
    y, x = np.arange(shape[0])[:, None] - shape[0] / 2 + down, np.arange(shape[1]) - shape[1] / 2 + right
    return x * math.cos(angle) + y * math.sin(angle), y * math.cos(angle) - x * math.sin(angle)


def _fill(rng: Generator, box: Floats, mask: Mask, usual_hue: float) -> None:
    """Colour the object in its part of the canvas (3, h, w): unlike what lies below it, with a texture."""
    hues = usual_hue + _HUE_SPREAD * (2 * rng.random(12) - 1) if rng.random() < _USUAL else rng.random(12)
    colours = _rgb(hues, 0.85 + 0.15 * rng.random(12), 0.7 + 0.3 * rng.random(12))
    differences = abs(colours - box[:, mask].mean(axis=1)).sum(axis=1)
    colour = colours[np.argmax(differences >= _MIN_CONTRAST)]
    contrast = 25 * (2 * rng.random(3) - 1)
    box[:, mask] = colour[:, None] + contrast[:, None] * _texture(rng, mask.shape)[mask]


def _rgb(hue: Floats, saturation: Floats, value: Floats) -> Floats:
    """(n,) each, hue in turns, the others in [0, 1], to (n, 3) in [0, 255]."""
    distance = abs((6 * hue[:, None] + [0, 4, 2]) % 6 - 3)  # from the hue at which the channel is darkest
    return np.asarray(255 * value[:, None] * (1 - saturation[:, None] * (2 - distance).clip(0, 1)))


def _texture(rng: Generator, shape: tuple[int, ...]) -> Floats:
    """(h, w) in [-1, 1]: plain, a gradient, stripes or dots, each as probable as the others."""
    kind, wave = rng.integers(4), 2 * math.pi / (4 + 5 * rng.random())
    x, y = _rotated(rng, shape)
    if kind == 0:
        return np.zeros(shape)
    if kind == 1:
        return np.asarray(x / abs(x).max())
    return np.sign(np.cos(wave * x) if kind == 2 else np.cos(wave * x) * np.cos(wave * y) - 0.3)


def _background(rng: Generator, size: tuple[int, int]) -> Floats:
    """(3, H, W) in about [0, 255]: gradients, low-frequency noise, blotches, scribbles; nothing that is labelled."""
    canvas: Floats = (20 + 50 * rng.random(3))[:, None, None] + _field(rng, size, 2, 30, 3) + _field(rng, size, 5, 15, 3)
    for _ in range(rng.integers(3)):
        blotches = _field(rng, size, int(rng.integers(4, 12)), 3) - 1
        canvas += blotches.clip(0, 1) * (35 * (2 * rng.random((3, 1, 1)) - 1))
    for _ in range(rng.integers(5)):
        _scribble(rng, canvas)
    return canvas


def _field(rng: Generator, size: tuple[int, int], cells: int, strength: float, channels: int = 1) -> Floats:
    """(channels, H, W) in [-strength, strength]: random values at cells x cells grid points, smooth between them."""

    def weights(length: int) -> Floats:  # (length, cells), rows that sum to 1
        near = (1 - abs(np.linspace(0, cells - 1, length)[:, None] - np.arange(cells))).clip(0, 1)
        return np.asarray(near * near * (3 - 2 * near))

    grid = strength * (2 * rng.random((channels, cells, cells)) - 1)
    return np.asarray(weights(size[0]) @ grid @ weights(size[1]).T)


def _scribble(rng: Generator, canvas: Floats) -> None:
    """A curved line over the canvas (3, H, W), 1 or 2 pixels wide: long and thin, where bars are short and thick."""
    bottom, right = canvas.shape[1] - 1, canvas.shape[2] - 1
    t = np.linspace(0, 1, 2 * (bottom + right))
    weights = np.stack([(1 - t) ** 2, 2 * t * (1 - t), t**2])
    row, column = ((rng.random((2, 3)) * [[bottom], [right]]) @ weights).astype(np.int64)
    offsets = np.array([(0, 0), (0, 1), (1, 0)][: 1 if rng.random() < 0.5 else 3])[..., None]  # thickness, 2, 1
    row, column = np.minimum(row + offsets[:, 0], bottom), np.minimum(column + offsets[:, 1], right)
    canvas[:, row, column] = 20 + 150 * rng.random((3, 1, 1))
