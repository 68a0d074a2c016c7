"""Measure how many training images per second the data loader delivers (`sparseinst data speed`)."""

from __future__ import annotations

import time
from collections.abc import Sequence

from sparseinst.config import Config
from sparseinst.data.coco import CocoSplit
from sparseinst.data.loader import PREFETCH, BatchOrder, TrainSet, train_loader

STRIDE = 4
"""The stride of the masks that the paper's models predict."""


def loading_speed(split: CocoSplit, config: Config, *, workers: int, images: int, batch: int = 8) -> float:
    """Return the training images per second that the loader decodes, augments and rasterises, after its workers have started.

    Args:
        workers: the number of worker processes; with 0, this process does the work.
        images: the smallest number of images to time; more are timed with many workers. A split with fewer images is repeated.

    Raises:
        DataError: an image or annotation cannot be read.
    """
    # The workers load some batches before the clock starts. Skip as many, and time far more, so that they matter little.
    prefetched = workers * PREFETCH
    skipped = max(1, prefetched)
    steps = skipped + max(1, images // batch, 4 * prefetched)
    config = config.replace(
        {"data.workers": workers, "train.batch_size": batch, "train.accumulate": 1, "train.iterations": steps}
        | {"train.warmup_iterations": 0}
    )
    dataset = TrainSet(split, config.data, config.train.seed, STRIDE)
    order = BatchOrder(dataset.split, config.train)
    batches = iter(train_loader(dataset, order, pin_memory=False))
    for _ in range(skipped):
        next(batches)
    began = time.perf_counter()
    for _ in range(steps - skipped):  # Do not exhaust the loader: it would wait for its workers to stop.
        next(batches)
    return (steps - skipped) * batch / (time.perf_counter() - began)


def doubled(most: int) -> Sequence[int]:
    """Return 0, 1, 2, 4, ... up to `most`, which is always the last value."""
    return sorted({0, most, *(2**power for power in range(most.bit_length()))})
