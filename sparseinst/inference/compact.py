"""Keep many masks of a large image in little memory. Imports no torch.

K masks of one image, H W height and width in pixels.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

STRIP_PIXELS = 2**21
"""Large images are processed in strips of rows with about this many pixels."""


class Runs(NamedTuple):
    """The runs of one mask, row by row and from left to right. A run is a longest sequence of a row's pixels in the mask."""

    rows: NDArray[np.int64]
    lefts: NDArray[np.int64]
    """The first column of each run."""
    rights: NDArray[np.int64]
    """The column after the last one of each run."""


class Strip(NamedTuple):
    """Some rows of K masks."""

    start: int
    """The first row."""
    parts: Sequence[NDArray[np.bool_]]
    """Each mask's part, (rows, W). The next strip may overwrite it."""


class CompactMasks:
    """K boolean masks (H, W), kept as the bounds of their runs. One mask, or some of its rows, is expanded when it is read.

    Attributes:
        shape: (K, H, W).
    """

    def __init__(self, shape: tuple[int, int, int], bounds: list[NDArray[np.signedinteger]]) -> None:
        self.shape = shape
        self._bounds = bounds
        """For each mask, in rising order: row * (W + 1) + column of each run's first column and of the column after its last."""

    @classmethod
    def of(cls, masks: NDArray[np.bool_] | CompactMasks) -> CompactMasks:
        """Return masks (K, H, W) of either form as compact ones."""
        if isinstance(masks, CompactMasks):
            return masks
        count, height, width = masks.shape
        step = strip_rows(width)
        strips = (Strip(start, list(masks[:, start : start + step])) for start in range(0, height if count else 0, step))
        return cls.from_strips(strips, (count, height, width))

    @classmethod
    def from_strips(cls, strips: Iterable[Strip], shape: tuple[int, int, int]) -> Self:
        """Return the masks of this shape (K, H, W) from their strips, which come from the top to the bottom."""
        count, height, width = shape
        small = height * (width + 1) < 2**31
        bounds: list[list[NDArray[np.signedinteger]]] = [[] for _ in range(count)]
        changes = np.zeros((0, width + 1), dtype=np.bool_)
        for start, parts in strips:
            for mask, found in zip(parts, bounds, strict=True):
                if mask.any():
                    if len(changes) != len(mask):
                        changes = np.zeros((len(mask), width + 1), dtype=np.bool_)
                    changes[:, 0], changes[:, width] = mask[:, 0], mask[:, -1]
                    np.not_equal(mask[:, 1:], mask[:, :-1], out=changes[:, 1:width])
                    at = np.flatnonzero(changes) + start * (width + 1)
                    found.append(at.astype(np.int32) if small else at)
        return cls(shape, [np.concatenate(found) if found else np.zeros(0, dtype=np.int32) for found in bounds])

    @classmethod
    def from_parts(cls, parts: Iterable[tuple[int, int, NDArray[np.bool_]]], shape: tuple[int, int, int]) -> Self:
        """Return the masks of this shape (K, H, W).

        Args:
            parts: of each mask, the top, the left and the pixels (h, w) of a part that holds the whole object.
        """
        line = shape[2] + 1
        kind = np.int32 if shape[1] * line < 2**31 else np.int64
        bounds: list[NDArray[np.signedinteger]] = []
        for top, left, part in parts:
            bordered = np.pad(part, ((0, 0), (1, 1)))
            rows, columns = np.nonzero(bordered[:, 1:] != bordered[:, :-1])
            bounds.append(((rows + top) * line + columns + left).astype(kind))
        return cls(shape, bounds)

    def expand(self) -> NDArray[np.bool_]:
        """Return all the masks as an array (K, H, W)."""
        masks = np.zeros(self.shape, dtype=np.bool_)
        for index in range(len(self)):
            masks[index] = self[index]
        return masks

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: int) -> NDArray[np.bool_]:
        """Return one mask (H, W)."""
        return self.rows(index, 0, self.shape[1])

    def rows(self, index: int, start: int, end: int) -> NDArray[np.bool_]:
        """Return the rows from `start` to `end` of one mask, (end - start, W)."""
        line = self.shape[2] + 1
        bounds = self._bounds[index]
        first, last = np.searchsorted(bounds, (start * line, end * line))
        changes = np.zeros((end - start) * line, dtype=np.uint8)
        changes[bounds[first:last] - start * line] = 1
        if last > first:
            np.bitwise_xor.accumulate(changes, out=changes)  # from each run's first column to its last
        return changes.view(np.bool_).reshape(end - start, line)[:, :-1]

    def window(self, index: int, box: tuple[int, int, int, int]) -> NDArray[np.bool_]:
        """Return the part of one mask in a box (left, top, right, bottom), (bottom - top, right - left).

        This is as fast as the box is small. The box must hold all the pixels that the mask has in its rows.
        """
        left, top, right, bottom = box
        line, width = self.shape[2] + 1, right - left + 1
        bounds = self._bounds[index]
        first, last = np.searchsorted(bounds, (top * line, bottom * line))
        rows, columns = np.divmod(bounds[first:last].astype(np.int64), line)
        changes = np.zeros((bottom - top) * width, dtype=np.uint8)
        changes[(rows - top) * width + columns - left] = 1
        if last > first:
            np.bitwise_xor.accumulate(changes, out=changes)  # from each run's first column to its last
        return changes.view(np.bool_).reshape(bottom - top, width)[:, :-1]

    def column_runs(self, index: int) -> NDArray[np.int64]:
        """Return the lengths of one mask's runs down the columns, outside and inside by turns, as COCO counts them."""
        height, width = self.shape[1:]
        box = self.box(index) or (0, 0, 0, 0)
        left, top, right, bottom = box
        part = self.window(index, box)
        step = strip_rows(max(1, bottom - top))
        found = [np.zeros(1, dtype=np.int64)]
        for start in range(0, right - left, step):
            strip = part[:, start : start + step].T  # columns rows
            changes = np.zeros((len(strip), bottom - top + 1), dtype=np.bool_)
            changes[:, 0], changes[:, -1] = strip[:, 0], strip[:, -1]
            np.not_equal(strip[:, 1:], strip[:, :-1], out=changes[:, 1:-1])
            columns, rows = np.divmod(np.flatnonzero(changes), bottom - top + 1)
            found.append((left + start + columns) * height + top + rows)
        bounds = np.concatenate([*found, [height * width]])
        lengths = np.diff(bounds)
        # A run that reaches the bottom goes on at the top of the next column, so that no pixels lie between the two.
        joined = np.flatnonzero(lengths[1:-1] == 0) + 1
        bounds = np.delete(bounds, np.concatenate([joined, joined + 1]))
        lengths = np.diff(bounds)
        return lengths if lengths[-1] or len(lengths) == 1 else lengths[:-1]

    def runs(self, index: int) -> Runs:
        """Return the runs of one mask."""
        bounds = self._bounds[index].astype(np.int64)
        rows, columns = np.divmod(bounds, self.shape[2] + 1)
        return Runs(rows[::2], columns[::2], columns[1::2])

    def area(self, index: int) -> int:
        """Return the number of a mask's pixels."""
        runs = self.runs(index)
        return int((runs.rights - runs.lefts).sum())

    def box(self, index: int) -> tuple[int, int, int, int] | None:
        """Return the left, top, right and bottom of a mask, the last two exclusive; None if it is empty."""
        runs = self.runs(index)
        if not len(runs.rows):
            return None
        return int(runs.lefts.min()), int(runs.rows[0]), int(runs.rights.max()), int(runs.rows[-1]) + 1


def strip_rows(width: int) -> int:
    """Return the number of rows of a strip of an image with this width."""
    return max(1, STRIP_PIXELS // max(1, width))
