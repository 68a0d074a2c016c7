"""Cut large images into overlapping tiles, which are trained on and segmented like images. Imports no torch."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

Size = tuple[int, int]
"""Height and width in pixels."""


class Tile(NamedTuple):
    """A rectangle of an image, in pixels of the original image."""

    top: int
    left: int
    height: int
    width: int

    @property
    def size(self) -> Size:
        return self.height, self.width

    def overlap(self, other: Tile) -> Tile | None:
        """Return the rectangle that both tiles cover; None if there is none."""
        top, left = max(self.top, other.top), max(self.left, other.left)
        height = min(self.top + self.height, other.top + other.height) - top
        width = min(self.left + self.width, other.left + other.width) - left
        return Tile(top, left, height, width) if height > 0 and width > 0 else None


def tiles_of(image: Size, side: int | None, overlap: float = 0.0) -> list[Tile]:
    """Return the tiles of an image, from left to right and from the top down.

    The tiles cover the image, lie inside it and are spread evenly. An image whose sides are at most `side` is a single tile.

    Args:
        side: the side of the square tiles in pixels; along a shorter side of the image a tile is as long as the image. None
            returns the whole image as one tile.
        overlap: the least overlap of two neighbours, as a fraction of `side`, below 1.
    """
    if side is None:
        return [Tile(0, 0, *image)]
    height, width = (min(side, length) for length in image)
    tops, lefts = (_starts(length, side, overlap) for length in image)
    return [Tile(top, left, height, width) for top in tops for left in lefts]


def _starts(length: int, side: int, overlap: float) -> list[int]:
    """Return where the tiles begin along one axis."""
    room = length - side
    if room <= 0:
        return [0]
    count = math.ceil(room / max(1.0, side * (1 - overlap))) + 1
    return [round(room * index / (count - 1)) for index in range(count)]


def random_tile(image: Size, side: int, random: np.random.Generator) -> Tile:
    """Return a tile at a random place of an image. Along a shorter side of the image, it is as long as the image."""
    height, width = (min(side, length) for length in image)
    top, left = int(random.integers(image[0] - height + 1)), int(random.integers(image[1] - width + 1))
    return Tile(top, left, height, width)


def tile_size(tile: Size, side: int, resized_side: int) -> Size:
    """Return the height and width of a tile in the network, where the full side `side` becomes `resized_side`.

    All tiles have the same scale, also those that are smaller because their image is.
    """
    height, width = (max(1, round(length * resized_side / side)) for length in tile)
    return height, width
