"""Measure whether each instance activation map highlights the object whose mask it makes (paper, 3.1).

AP does not show this: a model can make correct masks from maps that respond at the same places in every image. The bipartite
matching of the training assigns one map to each object, and the metrics describe where these maps respond. No training loss
contains these metrics.

Shapes: K objects of one image; M matched pairs; N instance maps; G groups; h w height and width of the maps (1/8 of the padded
input); H W of the original image; H' W' of the resized image before padding.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.ndimage import binary_dilation
from torch import Tensor
from torch.nn import functional as F

from sparseinst.config import STRIDES, Config
from sparseinst.criterion import prepare_targets
from sparseinst.data.masks import Mask
from sparseinst.matcher import match
from sparseinst.models.network import Predictions
from sparseinst.postprocess import instance_maps

METRICS = (
    "own", "others", "background", "border", "prefers_own", "chance", "peak_on_own", "lift", "duplicates", "neighbours_recall",
)  # fmt: skip
"""The names of the metrics.

A map's mass is the sum of its values, which is normalised to 1. `own`, `others`, `background`: the fractions of the mass on
its own object, on the image's other objects, and outside all objects; a crowd is no object. `border`: the fraction on the
outermost ring of cells, whether objects cover these or not. `prefers_own`: the fraction of maps whose mean response per cell
is highest on their own object, among all objects of the image; only images with at least two objects count. `chance`: the
expected `prefers_own` of maps that do not depend on the objects. `peak_on_own`: the fraction of maps whose strongest cell lies
on their own object. `lift`: `own` divided by the fraction of the cells that the object covers. `duplicates`: for each object
that a confident instance covers, the number of further confident instances that cover it, of any category.
`neighbours_recall`: of the pairs of touching objects of one category, the fraction in which a kept instance of that category
covers each of the two. The others are means over matched pairs."""

CONFIDENT = 0.4
"""An instance with this score or more can count as a duplicate; the paper draws such instances in Figure 5."""
FOUND_IOU = 0.5
"""An instance covers an object if their IoU is this or more."""
TOUCHING_PIXELS = 2
"""Two masks touch if at most this number of pixels lies between them."""


class Pairs(NamedTuple):
    """The values of one image before they are averaged. Each list has one entry per matched pair, except where noted."""

    own: list[float]
    others: list[float]
    border: list[float]
    lift: list[float]
    prefers: list[bool]
    """`prefers` and `chance` are empty if the image has only one object."""
    chance: list[float]
    peak: list[bool]
    duplicates: list[int]
    """One entry for each found object."""
    neighbours: list[bool]
    """One entry for each pair of touching objects of one category: whether both are found."""
    matched: dict[str, int]
    """Maps the name of an object in its image to the index of its matched instance map: the object's index, in a whole image."""


class MatchedMaps(NamedTuple):
    """The matched pairs of one image: objects and their maps."""

    objects: NDArray[np.int64]
    """(M,) the index of each pair's object, below K."""
    maps: NDArray[np.int64]
    """(M,) the index of each pair's map, below N."""
    responses: NDArray[np.float32]
    """(M, h, w) the maps, each with a sum of 1."""
    covered: NDArray[np.float32]
    """(K, h, w) the fraction of each cell that an object covers, in [0, 1]."""


def match_maps(
    raw: Predictions,
    padded: tuple[int, int],
    labels: NDArray[np.int64],
    masks: Sequence[Mask],
    config: Config,
    mask_size: tuple[int, int],
) -> MatchedMaps:
    """Assign a map to each object of one image or tile that has a pixel, with the matching of the training.

    Args:
        raw: the model's output for this image alone.
        padded: height and width of the network's input.
        labels: (K,) the labels of the objects.
        masks: K masks of the objects, (H', W'), 0 or 1; at least one has a pixel. The training leaves out the others, too.
        mask_size: height and width of the predicted masks.
    """
    stacked = torch.from_numpy(np.stack(masks))  # K H' W'
    seen = torch.from_numpy(np.array([mask.any() for mask in masks])).nonzero()[:, 0]
    targets = prepare_targets([torch.from_numpy(labels)[seen]], [stacked[seen]], padded, mask_size)
    [pairs] = match(_on_cpu(raw), targets, config.matcher)
    maps = instance_maps(raw.responses[0].cpu(), config.model.decoder.iam.num_maps)[pairs.predictions].numpy()  # M h w
    return MatchedMaps(seen[pairs.instances].numpy(), pairs.predictions.numpy(), maps, _coverage(stacked, padded).numpy())


def of_matched(matches: MatchedMaps) -> Pairs:
    """Return the values that need only the maps, and the matched pairs."""
    matched = dict(zip(map(str, matches.objects.tolist()), matches.maps.tolist(), strict=True))
    return of_maps(matches.responses, matches.covered, matches.objects)._replace(matched=matched)


def with_found(
    pairs: Pairs,
    labels: NDArray[np.int64],
    overlaps: Any,
    found: tuple[NDArray[np.int64], NDArray[np.float32]],
    originals: Iterable[Mask],
) -> Pairs:
    """Return the values of one image with those that need its kept instances.

    Args:
        labels: (K,) the labels of the objects.
        overlaps: (instances, K) IoU of the kept instances with the objects.
        found: labels and scores of the kept instances.
        originals: K masks of the objects at the image's own size, (H, W), 0 or 1.
    """
    recalled = _recalled(labels, overlaps, found[0])
    neighbours = [bool(recalled[a] and recalled[b]) for a, b in touching(labels, originals)]
    return pairs._replace(duplicates=_duplicates(overlaps, found[1]), neighbours=neighbours)


def of_tiles(parts: Sequence[Pairs]) -> Pairs:
    """Return the values of an image from those of its tiles, in their order. An object in two tiles counts in both."""
    every: dict[str, list[Any]] = {name: [] for name in Pairs._fields if name != "matched"}
    for part in parts:
        for name, values in every.items():
            values += getattr(part, name)
    matched = {f"{number}-{name}": index for number, part in enumerate(parts) for name, index in part.matched.items()}
    return Pairs(**every, matched=matched)


def _on_cpu(raw: Predictions) -> Predictions:
    return Predictions(*(tensor.cpu() for tensor in raw))


def _coverage(masks: Tensor, padded: tuple[int, int]) -> Tensor:
    """Return the fraction of each cell of the maps that an object covers: (K, H', W') to (K, h, w) in [0, 1]."""
    height, width = masks.shape[-2:]
    whole = F.pad(masks.float(), (0, padded[1] - width, 0, padded[0] - height))
    return F.avg_pool2d(whole[None], STRIDES[0])[0]


def of_maps(maps: NDArray[np.float32], covered: NDArray[np.float32], own: NDArray[np.int64]) -> Pairs:
    """Return the values that need only the maps; `duplicates`, `neighbours` and `matched` stay empty.

    Args:
        maps: (M, h, w), each with a sum of 1.
        covered: (K, h, w) the fraction of each cell that an object covers.
        own: (M,) the index of each map's object, which covers some cells.
    """
    flat, cells = maps.reshape(len(maps), -1).astype(np.float64), covered.reshape(len(covered), -1).astype(np.float64)
    on_objects = flat @ cells.T  # M K
    area = cells.sum(1)  # K
    rows = np.arange(len(flat))
    share = on_objects[rows, own]
    ring = np.ones(maps.shape[1:], dtype=bool)
    ring[1:-1, 1:-1] = False
    per_cell = on_objects / area.clip(min=1e-9)
    seen = int((cells.max(1) > 0).sum())  # an object may vanish at the network's resolution
    several = seen > 1
    peak = flat.argmax(1)
    return Pairs(
        own=share.tolist(),
        others=(flat @ cells.sum(0).clip(max=1) - share).clip(min=0).tolist(),
        border=(flat @ ring.ravel()).tolist(),
        lift=(share / (area[own] / flat.shape[1]).clip(min=1e-9)).tolist(),
        prefers=(per_cell.argmax(1) == own).tolist() if several else [],
        chance=[1 / seen] * len(flat) if several else [],
        # A small object may cover no cell completely. A cell belongs to it if its coverage is at least half of the highest one.
        peak=(cells[own, peak] >= 0.5 * cells[own].max(1)).tolist(),
        duplicates=[],
        neighbours=[],
        matched={},
    )


def _recalled(labels: NDArray[np.int64], overlaps: Any, found: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Return for each object whether a kept instance of its category covers it, (K,).

    Args:
        found: the labels of the kept instances.
    """
    if not len(found):
        return np.zeros(len(labels), dtype=np.bool_)
    hits = (np.asarray(overlaps) >= FOUND_IOU) & (found[:, None] == labels[None])
    return np.asarray(hits.any(0))


def _duplicates(overlaps: Any, scores: NDArray[np.float32]) -> list[int]:
    """Return for each object that a confident instance covers the number of further ones, of any category."""
    if not len(scores):
        return []
    hits = ((np.asarray(overlaps) >= FOUND_IOU) & (scores[:, None] >= CONFIDENT)).sum(0)
    return [int(count) - 1 for count in hits if count]


def touching(labels: NDArray[np.int64], masks: Iterable[Mask]) -> list[tuple[int, int]]:
    """Return the pairs of objects that have the same category and at most `TOUCHING_PIXELS` pixels between them.

    Args:
        masks: the masks (H, W) of the objects. They are read one after the other, since a large image may have very many.
    """
    near = TOUCHING_PIXELS + 1
    parts = [_with_margin(mask, near) for mask in masks]
    boxes = np.array([(p.top, p.left, p.bottom, p.right) if p is not None else (0, 0, 0, 0) for p in parts]).reshape(-1, 4)
    pairs = []
    for first, one in enumerate(parts):
        box, later = boxes[first], boxes[first + 1 :]
        overlap = (later[:, :2] < box[2:]).all(1) & (box[:2] < later[:, 2:]).all(1) & (labels[first + 1 :] == labels[first])
        if one is None or not overlap.any():
            continue
        grown = binary_dilation(one.mask, iterations=near)
        for second in (np.flatnonzero(overlap) + first + 1).tolist():
            other = parts[second]
            assert other is not None
            (top, left), (bottom, right) = np.maximum(box[:2], boxes[second, :2]), np.minimum(box[2:], boxes[second, 2:])
            own = grown[top - one.top : bottom - one.top, left - one.left : right - one.left]
            if (own & other.mask[top - other.top : bottom - other.top, left - other.left : right - other.left]).any():
                pairs.append((first, second))
    return pairs


class _Box(NamedTuple):
    """A mask in its bounding box with a margin."""

    top: int
    left: int
    mask: NDArray[np.bool_]

    @property
    def bottom(self) -> int:
        return self.top + self.mask.shape[0]

    @property
    def right(self) -> int:
        return self.left + self.mask.shape[1]


def _with_margin(mask: Mask, margin: int) -> _Box | None:
    """Return a mask in its bounding box with a margin, which ends at the side of the image; None if the mask is empty."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(rows):
        return None
    top, left = max(0, int(rows[0]) - margin), max(0, int(columns[0]) - margin)
    return _Box(top, left, mask[top : rows[-1] + margin + 1, left : columns[-1] + margin + 1].astype(np.bool_))


def summarise(observed: Sequence[Pairs]) -> dict[str, float | None]:
    """Return the `METRICS`: means over all pairs of all images; None if a metric has no entries."""

    def mean(name: str) -> float | None:
        values = [value for pairs in observed for value in getattr(pairs, name)]
        return round(float(np.mean(values)), 4) if values else None

    own, others = mean("own"), mean("others")
    return {
        "own": own,
        "others": others,
        "background": round(1 - own - others, 4) if own is not None and others is not None else None,
        "border": mean("border"),
        "prefers_own": mean("prefers"),
        "chance": mean("chance"),
        "peak_on_own": mean("peak"),
        "lift": mean("lift"),
        "duplicates": mean("duplicates"),
        "neighbours_recall": mean("neighbours"),
    }


Matches = dict[str, int]
"""The index of each object's map, by `IMAGE-NUMBER`: the image's id and the object's number in the image. With tiles, it is
`IMAGE-TILE-NUMBER`, where only tiles with objects count."""


def stability(before: Matches, after: Matches) -> float | None:
    """Return the percentage of objects that have the same map in two evaluations; None if no object is in both.

    This is the opposite of the instability that DN-DETR measures for queries (CVPR 2022, section 3.2). It is low at the start of
    a training, while maps take over objects from each other, and rises as the assignment settles.
    """
    both = before.keys() & after.keys()
    return 100 * sum(before[name] == after[name] for name in both) / len(both) if both else None
