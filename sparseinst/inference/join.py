"""Join the instances of overlapping tiles into those of the whole image.

Within a tile nothing is suppressed, as in the paper. An object in the overlap of two tiles, however, is found twice, and only one
of the two instances may stay. The rule is that of SAHI (Akyon et al., ICIP 2022): in the order of their scores, an instance is
dropped if it shares more than half of the smaller mask with an instance of another tile that was kept. SAHI can merge such
instances instead; here only the pieces of an object that no tile shows as a whole are united.

K instances, h w height and width of a mask's box, H W height and width of the image or tile.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
from numpy.typing import NDArray

from sparseinst.data.tiles import Size, Tile
from sparseinst.inference.compact import CompactMasks
from sparseinst.postprocess import Instances

SAME = 0.5
"""Two instances of different tiles are the same object if they share more than this fraction of the smaller mask."""
CUT = 0.5
"""When the instances are ordered, the score of an instance at a side of its tile is multiplied by this: another tile may show the
object as a whole."""


@dataclass(frozen=True)
class Placed:
    """An instance of a tile at its place in the whole image."""

    score: float
    label: int
    map: int
    """The index of its instance activation map, below N."""
    tile: int
    """The index of its tile."""
    top: int
    left: int
    """The corner of the box. `left` is a multiple of 8, so that the bytes of all masks lie on one grid."""
    width: int
    bits: NDArray[np.uint8]
    """(h, ceil(w / 8)): the mask in its box, eight pixels in a byte, filled up with zeros. A large image has thousands of masks,
    and weak ones may fill a tile."""
    cut: bool
    """Whether the mask touches a side of its tile that lies inside the image."""
    response: NDArray[np.float32] | None = None
    """The response of its map over the tile, if requested."""

    @classmethod
    def of(
        cls,
        about: tuple[float, int, int, int],
        top: int,
        left: int,
        mask: NDArray[np.bool_],
        *,
        cut: bool,
        response: NDArray[np.float32] | None = None,
    ) -> Self:
        """Return an instance whose mask (h, w) begins at any `top` and `left`; `about` are its score, label, map and tile."""
        margin = left % 8
        bits = np.packbits(np.pad(mask, ((0, 0), (margin, 0))), axis=1)
        return cls(*about, top, left - margin, mask.shape[1] + margin, bits, cut, response)

    @property
    def mask(self) -> NDArray[np.bool_]:
        """The mask in its box, (h, w)."""
        return np.unpackbits(self.bits, axis=1, count=self.width).view(np.bool_)

    @property
    def bottom(self) -> int:
        return self.top + len(self.bits)

    @property
    def right(self) -> int:
        return self.left + self.width


def place(
    found: Instances,
    tile: Tile,
    number: int,
    image: Size,
    responses: NDArray[np.float32] | None = None,
    *,
    score: float = 0.0,
) -> list[Placed]:
    """Return the instances of a tile, placed in the image; those without a pixel are left out.

    Args:
        number: the index of the tile.
        responses: the response of each instance's map.
        score: of the joined instances, only those with this score or more will be used. Instances that are so weak that they
            cannot suppress one of these are left out.
    """
    scores, labels, maps = (values.cpu().numpy() for values in (found.scores, found.labels, found.maps))
    placed = []
    for index, mask in enumerate(found.masks.cpu().numpy()):
        if scores[index] < CUT * score:
            continue
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        if not len(rows):
            continue
        top, left, bottom, right = int(rows[0]), int(columns[0]), int(rows[-1]) + 1, int(columns[-1]) + 1
        cut = (
            (top == 0 and tile.top > 0)
            or (left == 0 and tile.left > 0)
            or (bottom == tile.height and tile.top + tile.height < image[0])
            or (right == tile.width and tile.left + tile.width < image[1])
        )
        response = responses[index] if responses is not None else None
        about = float(scores[index]), int(labels[index]), int(maps[index]), number
        corner = tile.top + top, tile.left + left
        placed.append(Placed.of(about, *corner, mask[top:bottom, left:right], cut=cut, response=response))
    return placed


def join(placed: Sequence[Placed], tiles: Sequence[Tile]) -> list[Placed]:
    """Return the instances of the image, best score first, one for each object.

    If an object has an instance already, another one is dropped. The pieces of an object that no tile shows as a whole are
    united: two instances that the sides of their tiles cut off are such pieces if they agree where the tiles overlap. Only
    instances of the same category and of different tiles are compared.

    Args:
        tiles: the tiles of the image; `Placed.tile` is an index of this list.
    """
    order = sorted(range(len(placed)), key=lambda index: (-placed[index].score * (CUT if placed[index].cut else 1), index))
    ranks = {index: rank for rank, index in enumerate(order)}
    boxes = np.array([(one.top, one.left, one.bottom, one.right) for one in placed], dtype=np.int64).reshape(-1, 4)
    numbers = np.array([one.tile for one in placed], dtype=np.int64)
    areas = [int(np.bitwise_count(one.bits).sum()) for one in placed]
    # The corners of two boxes that overlap lie in the same square of this side, or in adjacent ones.
    side = int((boxes[:, 2:] - boxes[:, :2]).max(initial=1))
    objects: dict[int, list[int]] = {}
    """The instances of each object, by its first one."""
    first: dict[int, int] = {}
    """The first instance of the object to which a kept instance belongs."""
    by_square: defaultdict[tuple[int, int, int], list[int]] = defaultdict(list)
    """The indices of the kept instances, by category and by the square in which their corner lies."""
    for index in order:
        one, box = placed[index], boxes[index]
        row, column = one.top // side, one.left // side
        squares = ((one.label, row + down, column + right) for down in (-1, 0, 1) for right in (-1, 0, 1))
        others = np.array([other for square in squares for other in by_square.get(square, ())], dtype=np.int64)
        overlap = (boxes[others, :2] < box[2:]).all(1) & (box[:2] < boxes[others, 2:]).all(1)
        near = others[overlap & (numbers[others] != one.tile)].tolist()
        same = [other for other in near if _shared(one, placed[other]) > SAME * min(areas[index], areas[other])]
        if all(placed[other].cut for other in same):
            # A weak piece does not change a strong instance.
            strong = [other for other in near if one.score >= CUT * placed[first[other]].score]
            pieces = [other for other in strong if one.cut and placed[other].cut and _agree(one, placed[other], tiles)]
            if same and not pieces:
                continue
            heads = sorted({first[other] for other in pieces}, key=ranks.__getitem__)
            members = [member for head in heads for member in objects.pop(head)] + [index]
            objects[members[0]] = members
            first |= dict.fromkeys(members, members[0])
            by_square[one.label, row, column].append(index)
    return sorted((_united([placed[index] for index in members]) for members in objects.values()), key=lambda one: -one.score)


def _agree(one: Placed, other: Placed, tiles: Sequence[Tile]) -> bool:
    """Tell whether the masks of two instances have an IoU above `SAME` where their tiles overlap."""
    both = tiles[one.tile].overlap(tiles[other.tile])
    if both is None:
        return False
    shared = _shared(one, other)
    return shared > SAME * (_pixels_in(one, both) + _pixels_in(other, both) - shared)


def _pixels_in(one: Placed, part: Tile) -> int:
    """Return the number of pixels of a mask in a part of the image."""
    rows = slice(max(0, part.top - one.top), max(0, part.top + part.height - one.top))
    columns = slice(max(0, part.left - one.left), max(0, part.left + part.width - one.left))
    return int(np.count_nonzero(one.mask[rows, columns]))


def _united(pieces: Sequence[Placed]) -> Placed:
    """Return the first of the pieces with the mask of all of them and their best score."""
    if len(pieces) == 1:
        return pieces[0]
    top, left = min(one.top for one in pieces), min(one.left for one in pieces)
    bottom, right = max(one.bottom for one in pieces), max(one.right for one in pieces)
    bits = np.zeros((bottom - top, -(-(right - left) // 8)), np.uint8)
    for one in pieces:
        start = (one.left - left) // 8
        bits[one.top - top : one.bottom - top, start : start + one.bits.shape[1]] |= one.bits
    score = max(one.score for one in pieces)
    return replace(pieces[0], score=score, top=top, left=left, width=right - left, bits=bits)


def as_masks(instances: Sequence[Placed], image: Size) -> CompactMasks:
    """Return the masks of instances, in the size of their image."""
    parts = ((one.top, one.left, one.mask) for one in instances)
    return CompactMasks.from_parts(parts, (len(instances), *image))


def _shared(one: Placed, other: Placed) -> int:
    """Return the number of pixels that two masks share, whose boxes overlap."""
    top, left = max(one.top, other.top), max(one.left, other.left)
    bottom, right = min(one.bottom, other.bottom), min(one.right, other.right)
    count = -(-(right - left) // 8)
    starts = ((each.bits[top - each.top : bottom - each.top], (left - each.left) // 8) for each in (one, other))
    first, second = (rows[:, start : start + count] for rows, start in starts)
    return int(np.bitwise_count(first & second).sum())
