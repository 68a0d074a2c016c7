"""Check the order in which images are loaded, and how processes share it."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sparseinst.config import Config, TrainConfig
from sparseinst.data.coco import CocoSplit, ImageRecord, train_split
from sparseinst.data.loader import BatchOrder, Draw, TrainSet, collate, train_loader
from sparseinst.errors import DataError


def wide_and_tall(count: int) -> CocoSplit:
    images = [ImageRecord(i, Path(f"{i}.png"), 40 + 30 * (i % 3 == 0), 60) for i in range(count)]
    return CocoSplit(Path("a.json"), (), tuple(images))


def order(split: CocoSplit, **where: Any) -> list[list[Draw]]:
    config = TrainConfig(iterations=12, batch_size=4, warmup_iterations=0, seed=1)
    return list(BatchOrder(split, config, **where))


def test_order_resumes_exactly_and_groups_orientations() -> None:
    split = wide_and_tall(10)
    whole = order(split)
    assert len(whole) == 12
    for start in range(12):
        assert order(split, start=start) == whole[start:]
    assert order(split) == whole
    for batch in whole:
        assert len({split.images[d.image].width > split.images[d.image].height for d in batch}) == 1
    numbers = [draw.number for batch in whole for draw in batch]
    assert len(set(numbers)) == len(numbers)


def test_processes_and_parts_share_each_batch() -> None:
    split = wide_and_tall(10)
    whole = [set(batch) for batch in order(split)]
    halves = [order(split, parts=2, rank=rank, world_size=2) for rank in range(2)]
    assert [set(a) | set(b) for a, b in zip(*halves, strict=True)] == whole
    parts = order(split, parts=2)
    assert [set(parts[i]) | set(parts[i + 1]) for i in range(0, 24, 2)] == whole
    with pytest.raises(DataError, match="into 4 parts that 3 processes share equally"):
        order(split, parts=4, world_size=3)


def test_parts_may_differ_in_their_orientation() -> None:
    """The reference's processes group their own images. One tall image in ten must not wait for a whole batch of tall ones."""
    split = wide_and_tall(10)

    def tall(draws: list[Draw]) -> set[bool]:
        return {split.images[draw.image].height > split.images[draw.image].width for draw in draws}

    whole = order(split, parts=2, by_part=True)
    assert all(len(tall(part)) == 1 for part in whole)
    assert any(tall(whole[step]) != tall(whole[step + 1]) for step in range(0, 24, 2))
    for rank in range(2):
        assert order(split, parts=2, rank=rank, world_size=2, by_part=True) == whole[rank::2]
    assert order(split, parts=2, start=5, by_part=True) == whole[10:]
    assert order(split, by_part=True) == order(split)


def test_all_images_are_used_about_equally_often() -> None:
    split = wide_and_tall(10)
    config = TrainConfig(iterations=50, batch_size=4, warmup_iterations=0)
    used = np.bincount([d.image for batch in BatchOrder(split, config) for d in batch], minlength=10)
    assert used.min() >= 18
    assert used.max() <= 22


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_do_not_depend_on_workers(tiny: Config, workers: int) -> None:
    data = tiny.data.model_copy(update={"workers": workers})
    dataset = TrainSet(train_split(data), data, seed=0)
    batches = list(train_loader(dataset, BatchOrder(dataset.split, tiny.train), pin_memory=False))
    assert len(batches) == 6
    direct = [collate([dataset[d] for d in draws]) for draws in BatchOrder(dataset.split, tiny.train)]
    for batch, expected in zip(batches, direct, strict=True):
        assert torch.equal(batch.images, expected.images)
        assert all(torch.equal(a, b) for a, b in zip(batch.masks, expected.masks, strict=True))
        assert batch.images.shape[2] % 32 == batch.images.shape[3] % 32 == 0
