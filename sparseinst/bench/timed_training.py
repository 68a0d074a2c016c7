"""Build the training workload that is timed: one optimiser step on prepared batches.

Decoding and augmentation happen before the clock starts.
"""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import torch

from sparseinst.bench.baselines import ReferenceStep
from sparseinst.bench.modes import TrainingMode
from sparseinst.bench.timed import PHOTO, RANDOM_BATCHES, OnModuleDone, Workload
from sparseinst.config import Config
from sparseinst.data.coco import CocoSplit, ImageRecord
from sparseinst.data.loader import Batch, BatchOrder, Example, TrainSet, collate
from sparseinst.data.tiles import tile_size, tiles_of
from sparseinst.data.transforms import Sample, rasterise, short_side_size
from sparseinst.device import tf32
from sparseinst.models.sparseinst import SparseInst, build_model
from sparseinst.training.step import PHASES, Step, check_classes

INSTANCES = 7
"""Instances in each random image. This is COCO's mean without crowds."""


def random_batches(config: Config, stride: int) -> list[Batch]:
    """Return batches of noise with ellipses as instances, at the first of the training sizes.

    Args:
        stride: the masks are downsampled by this factor.
    """
    random = np.random.default_rng(0)
    short = config.data.short_sides[0]
    if config.data.tile is None:
        height, width = short_side_size(*PHOTO, short, config.data.long_side)
    else:
        height, width = tile_size(tiles_of(PHOTO, config.data.tile)[0].size, config.data.tile, short)
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
        return Example(
            torch.from_numpy(pixels).permute(2, 0, 1), torch.from_numpy(labels), torch.from_numpy(masks), record, (), stride
        )

    return [collate([example() for _ in range(config.train.batch_size)]) for _ in range(RANDOM_BATCHES)]


def photo_batches(split: CocoSplit, config: Config, stride: int) -> list[Batch]:
    """Return the first batches of a training. The images and augmentations do not depend on the stride.

    Raises:
        DataError: an image cannot be read.
    """
    dataset = TrainSet(split, config.data, config.train.seed, stride)
    order = BatchOrder(dataset.split, config.train)
    return [collate([dataset[draw] for draw in draws]) for _, draws in zip(range(RANDOM_BATCHES), order, strict=False)]


def _pin(batch: Batch) -> Batch:
    """Return the batch in pinned memory, which a GPU can read while the host goes on."""
    return batch._replace(
        images=batch.images.pin_memory(),
        labels=[labels.pin_memory() for labels in batch.labels],
        masks=[masks.pin_memory() for masks in batch.masks],
    )


def _activate_all_branches(model: SparseInst) -> SparseInst:
    """Replace norm weights of zero by 0.2, and return the model.

    timm starts the last norm of each residual branch at zero. A frozen norm would stay there and multiply the branch by zero.
    """
    for name, buffer in model.backbone.named_buffers():
        if name.endswith("weight") and not buffer.any():
            buffer.fill_(0.2)
    return model


def training_workload(
    config: Config,
    *,
    device: torch.device,
    model: SparseInst | None = None,
    mode: TrainingMode = "eager",
    split: CocoSplit | None = None,
) -> Workload:
    """Return the workload of one training step, from a batch in host memory to updated weights.

    The learning rate is 0, so that the weights do not change and every step does the same work.

    Args:
        model: a model with trained weights. Without it the model has random weights and as many classes as the data.
        split: train on the photos of this split, instead of noise with ellipses.

    Raises:
        UserError: the mode is `recomputed` and the norms are not frozen, or the model is for other classes than the data.
        DataError: the data cannot be read.
    """
    torch.manual_seed(0)
    changes = {"train.compile": mode == "compiled", "train.checkpoint_activations": mode == "recomputed", "train.accumulate": 1}
    if split is not None and model is None:
        changes["model.num_classes"] = len(split.categories)
    config = config.replace(changes)
    if split is not None:
        check_classes(config, split)
    if model is not None:
        network = copy.deepcopy(model)
    else:
        network = _activate_all_branches(build_model(config.model, load_pretrained=False))
    stride = 1 if mode == "plain" else network.mask_stride()
    step = (ReferenceStep if mode == "plain" else Step)(network, config, device)
    for group in step.optimizer.param_groups:
        group["lr"] = 0.0
    batches = random_batches(config, stride) if split is None else photo_batches(split, config, stride)
    if device.type == "cuda":
        batches = [_pin(batch) for batch in batches]

    def run(number: int, phase_done: OnModuleDone) -> int:
        batch = batches[number % len(batches)]
        with torch.enable_grad(), tf32(config.train.precision == "tf32"):
            step.gradients([batch], phase_done)
            step.update()
        phase_done("update")
        return sum(map(len, batch.labels))

    shapes = {batch.padded for batch in batches}
    return Workload(run, PHASES, shapes.pop() if len(shapes) == 1 else None, len(batches))
