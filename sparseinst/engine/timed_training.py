"""What is timed of training: a step, and the batches that take turns in it. Decoding and augmentation come before."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from sparseinst.config import Config
from sparseinst.data.coco import CocoSplit, ImageRecord
from sparseinst.data.loader import Batch, BatchOrder, Example, TrainSet, collate
from sparseinst.data.transforms import Sample, rasterise, short_side_size
from sparseinst.engine.device import tf32
from sparseinst.engine.step import PHASES, Step, check_classes
from sparseinst.engine.timed import PHOTO, TURNS, Passed, Timed
from sparseinst.models.sparseinst import SparseInst, build_model

INSTANCES = 7
"""Of each random image: COCO's mean, crowds left out."""

TrainingMode = Literal["plain", "eager", "compiled", "recomputed"]
"""See `training_to_time`."""


def random_batches(config: Config, stride: int) -> list[Batch]:
    """Noise with ellipses as instances, at the first of the training sizes."""
    random = np.random.default_rng(0)
    height, width = short_side_size(*PHOTO, config.data.short_sides[0], config.data.long_side)
    y, x = np.ogrid[:height, :width]

    def example() -> Example:
        pixels = random.integers(0, 256, (height, width, 3), dtype=np.uint8)
        ellipses = []
        for _ in range(INSTANCES):
            (v, u), (b, a) = random.random(2) * (height, width), random.uniform(0.05, 0.4, 2) * (height, width)
            ellipses.append((((y - v) / b) ** 2 + ((x - u) / a) ** 2 < 1).astype(np.uint8))
        labels = random.integers(0, config.model.num_classes, INSTANCES)
        labels, masks = rasterise(Sample(pixels, list(ellipses), labels), stride)
        record = ImageRecord(0, Path(), height, width)
        return Example(torch.from_numpy(pixels).permute(2, 0, 1), torch.from_numpy(labels), torch.from_numpy(masks), record, ())

    return [collate([example() for _ in range(config.train.batch_size)]) for _ in range(TURNS)]


def photo_batches(split: CocoSplit, config: Config, stride: int) -> list[Batch]:
    """The first batches of a training: the same images and augmentations with any stride. Raises `DataError`."""
    dataset = TrainSet(split, config.data, config.train.seed, stride)
    order = BatchOrder(dataset.split, config.train)
    return [collate([dataset[draw] for draw in draws]) for _, draws in zip(range(TURNS), order, strict=False)]


def _lively(model: SparseInst) -> SparseInst:
    """With every branch at work: norms frozen at timm's start would multiply the last layer of each by zero."""
    for name, buffer in model.backbone.named_buffers():
        if name.endswith("weight") and not buffer.any():
            buffer.fill_(0.2)
    return model


def training_to_time(
    config: Config,
    *,
    device: torch.device,
    model: SparseInst | None = None,
    mode: TrainingMode = "eager",
    split: CocoSplit | None = None,
) -> Timed:
    """A step of training, from a batch in the processor's memory to new weights.

    Args:
        mode: `plain`: as the reference trains, contiguous tensors, masks of the image's size made small by the step itself, and
            torch's default AdamW; `eager`: as `train` does it; `compiled` and `recomputed`: with `train.compile`, and with
            `train.checkpoint_activations`.
        model: one with trained weights; without it the model has as many classes as the data.
        split: of these photos, in place of noise with ellipses.

    Raises:
        UserError: norms that are not frozen cannot be `recomputed`, or a model for other classes.
        DataError: data that cannot be read.
    """
    torch.manual_seed(0)
    changes = {"train.compile": mode == "compiled", "train.checkpoint_activations": mode == "recomputed", "train.accumulate": 1}
    if split is not None and model is None:
        changes["model.num_classes"] = len(split.categories)
    config = config.replace(changes)
    if split is not None:
        check_classes(config, split)
    network = copy.deepcopy(model) if model is not None else _lively(build_model(config.model, load_pretrained=False))
    stride = 1 if mode == "plain" else network.mask_stride()
    step = Step(network, config, device, stride=stride, plain=mode == "plain")
    for group in step.optimizer.param_groups:
        group["lr"] = 0.0  # The weights stay, so that a turn is the same work as the last.
    batches = random_batches(config, stride) if split is None else photo_batches(split, config, stride)
    if device.type == "cuda":
        batches = [
            batch._replace(
                images=batch.images.pin_memory(),
                labels=[labels.pin_memory() for labels in batch.labels],
                masks=[masks.pin_memory() for masks in batch.masks],
            )
            for batch in batches
        ]

    def run(number: int, passed: Passed) -> int:
        batch = batches[number % len(batches)]
        with torch.enable_grad(), tf32(config.train.precision == "tf32"):
            step.gradients([batch], passed)
            step.update()
        passed("update")
        return sum(map(len, batch.labels))

    shapes = {batch.padded for batch in batches}
    return Timed(run, PHASES, shapes.pop() if len(shapes) == 1 else None, len(batches))
