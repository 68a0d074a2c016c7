"""Read the annotated instances of an image, as a whole or tile by tile. Crowds are left out. Imports no torch.

K instances of one image.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sparseinst.data.coco import CocoSplit, ImageRecord
from sparseinst.data.masks import Mask, bounds
from sparseinst.data.tiles import Tile
from sparseinst.data.transforms import Polygon, as_mask, as_segment, crop_segments
from sparseinst.errors import DataError

Segments = list[list[Polygon] | Mask]


class Part(NamedTuple):
    """The instances that may have a pixel in a tile, cut to the tile."""

    indices: NDArray[np.int64]
    """Their indices, below K."""
    labels: NDArray[np.int64]
    segments: Segments


class Objects:
    """The instances of an image. A mask is decoded when a tile that it touches is read.

    A large image with many run lengths would need gigabytes if all its masks were decoded at once.

    Raises:
        DataError: an annotation cannot be read.
    """

    def __init__(self, record: ImageRecord, split: CocoSplit) -> None:
        self._size = record.height, record.width
        annotations = [annotation for annotation in record.annotations if not annotation.crowd]
        self._segmentations: list[Any] = [annotation.segmentation for annotation in annotations]
        self.labels = np.array([annotation.label for annotation in annotations], dtype=np.int64)
        self._bounds = np.zeros((len(annotations), 4), dtype=np.int64)
        for index, annotation in enumerate(annotations):
            try:
                self._bounds[index] = bounds(annotation.segmentation, *self._size)
            except (ValueError, TypeError) as error:
                raise DataError(f"{split.file}: annotation {annotation.id}: segmentation: {error}") from None

    def inside(self, tile: Tile) -> Part:
        """Return the instances whose bounds overlap a tile."""
        corner, end = np.array([tile.top, tile.left]), np.array([tile.top + tile.height, tile.left + tile.width])
        indices = np.flatnonzero((self._bounds[:, :2] < end).all(1) & (self._bounds[:, 2:] > corner).all(1))
        segments: Segments = []
        for index in indices.tolist():
            [part] = crop_segments([as_segment(self._segmentations[index], *self._size)], *tile)
            segments.append(part if isinstance(part, list) else part.copy(order="K"))  # a view would keep the whole mask
        return Part(indices, self.labels[indices], segments)

    def masks(self) -> Iterator[Mask]:
        """Yield the mask of each instance, one after the other, in the size of the image."""
        for segmentation in self._segmentations:
            yield as_mask(as_segment(segmentation, *self._size), self._size)


def fullest_tile(objects: Objects, tiles: Sequence[Tile]) -> tuple[Tile, Part]:
    """Return the tile in which most instances have a pixel, the first of several, and these instances."""
    return max(((tile, _visible(objects.inside(tile), tile)) for tile in tiles), key=lambda found: len(found[1].indices))


def _visible(part: Part, tile: Tile) -> Part:
    """Return the instances of a tile that have a pixel in it."""
    seen = [number for number, segment in enumerate(part.segments) if as_mask(segment, tile.size).any()]
    return Part(part.indices[seen], part.labels[seen], [part.segments[number] for number in seen])


def read_segments(record: ImageRecord, split: CocoSplit) -> tuple[Segments, NDArray[np.int64]]:
    """Return an image's instances and their labels (K,), without crowds. Raises `DataError`."""
    annotations = [annotation for annotation in record.annotations if not annotation.crowd]
    segments = []
    for annotation in annotations:
        try:
            segments.append(as_segment(annotation.segmentation, record.height, record.width))
        except (ValueError, TypeError) as error:
            raise DataError(f"{split.file}: annotation {annotation.id}: segmentation: {error}") from None
    return segments, np.array([a.label for a in annotations], dtype=np.int64)
