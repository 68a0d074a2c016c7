"""From a network's raw output to what an evaluation keeps of an image: its instances, and the metrics of its activation maps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from sparseinst.config import Config
from sparseinst.data.coco import CocoSplit, ImageRecord
from sparseinst.data.loader import Batch
from sparseinst.data.masks import Mask, encode_runs, overlaps
from sparseinst.data.network_input import image_tiles
from sparseinst.data.objects import Objects, read_segments
from sparseinst.data.transforms import as_mask, resize_segments
from sparseinst.errors import DataError
from sparseinst.evaluation.mechanism import Pairs, match_maps, of_matched, of_tiles, with_found
from sparseinst.evaluation.predictions import in_coco_format
from sparseinst.inference.join import Placed, as_masks, join, place
from sparseinst.models.network import Predictions
from sparseinst.postprocess import Instances


class SegmentedImage(NamedTuple):
    """The instances of one image and its activation maps' metrics."""

    id: int
    instances: list[dict[str, Any]]
    """In COCO's result format."""
    skipped: list[str]
    pairs: Pairs | None
    """None if the image has no object, or if the image or its annotations cannot be read."""


def examine(
    raw: Predictions, batch: Batch, found: Instances, split: CocoSplit, config: Config, mask_size: tuple[int, int]
) -> SegmentedImage:
    """Return what an evaluation keeps of an image that was segmented as a whole.

    Args:
        raw: the model's output for this image, on the CPU.
        found: the instances of the image.
        mask_size: height and width of the predicted masks.

    Raises:
        DataError: an annotation cannot be read and `data.on_bad_image` is `error`.
    """
    [record], [size] = batch.records, batch.sizes
    results = in_coco_format(record.id, found, [category.id for category in split.categories])
    try:
        segments, labels = read_segments(record, split)
    except DataError as error:
        if config.data.on_bad_image == "error":
            raise
        return SegmentedImage(record.id, [], [str(error)], None)
    whole = (record.height, record.width)
    labels_and_scores = found.labels.cpu().numpy(), found.scores.cpu().numpy()
    iou = overlaps([result["segmentation"] for result in results], _true_segmentations(record), *whole)
    pairs = None
    if len(labels):
        small = [as_mask(segment, size) for segment in resize_segments(segments, whole, size)]
        observed = _observe(raw, batch.padded, labels, small, config, mask_size) or of_tiles([])
        originals = (as_mask(segment, whole) for segment in segments)  # one at a time, since an image may have very many
        pairs = with_found(observed, labels, iou, labels_and_scores, originals)
    return SegmentedImage(record.id, results, batch.skipped, pairs)


def _observe(
    raw: Predictions,
    padded: tuple[int, int],
    labels: NDArray[np.int64],
    masks: Sequence[Mask],
    config: Config,
    mask_size: tuple[int, int],
) -> Pairs | None:
    """Return the metrics of the maps; None if no object has a pixel at the network's size.

    The arguments are those of `match_maps`.
    """
    if not any(mask.any() for mask in masks):
        return None
    return of_matched(match_maps(raw, padded, labels, masks, config, mask_size))


class TiledImage:
    """An image that is segmented tile by tile. `add` takes its tiles in order, and returns the image after the last one.

    An image that is segmented as a whole is a single tile. The maps are compared with the objects within each tile; `duplicates`
    and `neighbours_recall` come from the joined instances.
    """

    def __init__(self, record: ImageRecord, split: CocoSplit, config: Config) -> None:
        self.record = record
        self._split, self._config = split, config
        self._size = record.height, record.width
        self._tiles = image_tiles(self._size, config.inference)
        self._added = 0
        self._placed: list[Placed] = []
        self._pairs: list[Pairs] = []
        self._objects: Objects | None = None
        self._skipped: list[str] = []

    def add(self, raw: Predictions, batch: Batch, found: Instances, mask_size: tuple[int, int]) -> SegmentedImage | None:
        """Add the next tile. The arguments, and errors, are those of `examine`."""
        if len(self._tiles) == 1:
            return examine(raw, batch, found, self._split, self._config, mask_size)
        if not self._added:
            self._objects = self._read_objects()
        [tile], [size] = batch.tiles, batch.sizes
        self._placed += place(found, tile, self._added, self._size)
        if self._objects is not None:
            part = self._objects.inside(tile)
            masks = [as_mask(segment, size) for segment in resize_segments(part.segments, tile.size, size)]
            observed = _observe(raw, batch.padded, part.labels, masks, self._config, mask_size)
            self._pairs += [observed] if observed is not None else []
        return self._next()

    def skip(self, reasons: list[str]) -> SegmentedImage | None:
        """Add the next tile, of an image that cannot be read. The whole image then counts as skipped."""
        self._skipped = reasons
        return self._next()

    def _next(self) -> SegmentedImage | None:
        self._added += 1
        if self._added < len(self._tiles):
            return None
        return SegmentedImage(self.record.id, [], self._skipped, None) if self._skipped else self._joined()

    def _read_objects(self) -> Objects | None:
        """Return the objects of the image; None if they cannot be read and the image is skipped."""
        try:
            return Objects(self.record, self._split)
        except DataError as error:
            if self._config.data.on_bad_image == "error":
                raise
            self._skipped = [str(error)]
            return None

    def _joined(self) -> SegmentedImage:
        joined = join(self._placed, self._tiles)
        masks = as_masks(joined, self._size)
        results: list[dict[str, Any]] = [
            {
                "image_id": self.record.id,
                "category_id": self._split.categories[one.label].id,
                "score": one.score,
                "segmentation": encode_runs(masks.column_runs(index), self._size),
            }
            for index, one in enumerate(joined)
        ]
        pairs = None
        if self._objects is not None and len(self._objects.labels):
            iou = overlaps([result["segmentation"] for result in results], _true_segmentations(self.record), *self._size)
            found = np.array([one.label for one in joined], np.int64), np.array([one.score for one in joined], np.float32)
            pairs = with_found(of_tiles(self._pairs), self._objects.labels, iou, found, self._objects.masks())
        return SegmentedImage(self.record.id, results, [], pairs)


def _true_segmentations(record: ImageRecord) -> list[Any]:
    return [annotation.segmentation for annotation in record.annotations if not annotation.crowd]
