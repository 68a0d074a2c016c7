"""Draw the scenes of the embedded data set (`shapes`). Imports no torch.

Every change of what is drawn is a new version of the data set, see `SHAPES_VERSION`.

H W height and width of an image in pixels, h w height and width of the box around one object.
"""

from __future__ import annotations

import colorsys
import math
from collections.abc import Callable

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from scipy.ndimage import binary_erosion

from sparseinst.data.scenes import Item, Mask, Owner, Scene, leaves_enough, place

Floats = NDArray[np.float64]

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
MIN_VISIBLE = 0.4  # fraction of each object that stays visible
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


SHAPES: dict[str, tuple[int, Callable[[Floats, Floats], Mask]]] = {
    "circle": (1, lambda x, y: np.hypot(x, y) <= 1),
    "square": (2, lambda x, y: np.maximum(abs(x), abs(y)) <= math.sqrt(0.5)),
    "triangle": (4, lambda x, y: np.maximum(y, math.sqrt(0.75) * abs(x) - y / 2) <= 0.5),
    "star": (7, _star),
    "ring": (11, lambda x, y: abs(np.hypot(x, y) - 0.7) <= 0.3),
    "cross": (13, lambda x, y: (np.maximum(abs(x), abs(y)) <= 0.9) & (np.minimum(abs(x), abs(y)) <= 0.4)),
}
"""For each shape its category id (with gaps, as in COCO) and a function that returns which points of the unit disc lie inside the
shape, with x to the right and y down."""


def random_scene(rng: Generator, side: int) -> Scene:
    """Return a random scene: an image, its objects from back to front, and the index of the visible object at each pixel."""
    size = (side, side)
    canvas = _background(rng, size)
    owner: Owner = np.full(size, -1)
    objects: list[Item] = []
    if rng.random() >= _EMPTY:
        names = rng.permutation(list(SHAPES))[: rng.integers(1, _MAX_CATEGORIES + 1)].tolist()
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
                item, _ = place(rng, mask, size, SHAPES[name][0], crowd=crowd, centre=centre)
                if leaves_enough(item, objects, owner, MIN_VISIBLE):
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
    own = [item for item in objects if item.category_id == SHAPES[name][0] and not item.crowd]
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
    return SHAPES[name][1](x * 2 / extent / min(1, aspect), y * 2 / extent / min(1, 1 / aspect))


def _rotated_coordinates(angle: float, shape: tuple[int, ...], centre: tuple[float, float]) -> tuple[Floats, Floats]:
    """Return x and y (h, w) in pixels from `centre` (row, column), on axes to the right and down that are rotated by an angle."""
    y, x = np.arange(shape[0])[:, None] - centre[0], np.arange(shape[1]) - centre[1]
    return x * math.cos(angle) + y * math.sin(angle), y * math.cos(angle) - x * math.sin(angle)


def _fill(rng: Generator, box: Floats, mask: Mask, name: str, hues: Floats) -> None:
    """Paint an object into `box`, its part of the canvas (3, h, w): colour, texture, shading and a dark rim along the contour."""
    names = list(SHAPES)
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
