"""`sparseinst data speed`: how many training images a second the loader decodes, augments and draws."""

from __future__ import annotations

import time
from collections.abc import Sequence

from sparseinst.config import Config
from sparseinst.data.coco import CocoSplit
from sparseinst.data.loader import PREFETCH, BatchOrder, TrainSet, train_loader

STRIDE = 4
"""Of the masks that the models of the paper predict."""


def loading_speed(split: CocoSplit, config: Config, *, workers: int, images: int, batch: int = 8) -> float:
    """Images a second, once the workers have begun.

    Args:
        workers: processes; with 0 this one does it itself.
        images: how many are timed, at least; more with many workers. The split begins anew where it has fewer.

    Raises:
        DataError: an image or annotation that cannot be read.
    """
    # What is under way when the clock starts counts for nothing: that is waited for first, and little of what is timed.
    under_way = workers * PREFETCH
    first = max(1, under_way)
    steps = first + max(1, images // batch, 4 * under_way)
    config = config.replace(
        {"data.workers": workers, "train.batch_size": batch, "train.accumulate": 1, "train.iterations": steps}
        | {"train.warmup_iterations": 0}
    )
    dataset = TrainSet(split, config.data, config.train.seed, STRIDE)
    batches = iter(train_loader(dataset, BatchOrder(dataset.split, config.train), pin_memory=False))
    for _ in range(first):
        next(batches)
    began = time.perf_counter()
    for _ in range(steps - first):  # and not to the end, where the workers are waited for
        next(batches)
    return (steps - first) * batch / (time.perf_counter() - began)


def doubled(most: int) -> Sequence[int]:
    """0, 1, 2, 4, ... up to `most`, which comes last."""
    return sorted({0, most, *(2**power for power in range(most.bit_length()))})
