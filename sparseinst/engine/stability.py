"""How steadily objects are matched to the same instance activation map while a model trains.

The measure of DN-DETR (CVPR 2022, section 3.2), there for queries, turned round: the share of objects that keep their map from
one evaluation to the next. It begins low, as maps take over objects from each other, and rises as each map finds its own.
"""

from __future__ import annotations

import numpy as np
import torch

from sparseinst.attempts import Attempt
from sparseinst.config import Config
from sparseinst.criterion import prepare_targets
from sparseinst.data.coco import CocoSplit
from sparseinst.data.loader import Example, collate, read_sample
from sparseinst.data.transforms import rasterise, resize, short_side_size
from sparseinst.engine.device import autocast
from sparseinst.errors import DataError
from sparseinst.matcher import match
from sparseinst.models.sparseinst import SparseInst

IMAGES = 200
"""As many of the first validation images are looked at."""

Matches = dict[str, int]
"""The map of each object, by `IMAGE-NUMBER` of the object in its image."""


@torch.no_grad()
def matched_maps(
    model: SparseInst,
    split: CocoSplit,
    config: Config,
    *,
    device: torch.device,
    attempt: Attempt | None = None,
    most: int = IMAGES,
) -> Matches:
    """Which map the training's matching gives each object of the first images; images that cannot be read are left out.

    Args:
        model: in evaluation mode, on `device`.
        attempt: is told how far it is.
    """
    found: Matches = {}
    stride = model.mask_stride()
    for number, record in enumerate(split.with_instances().images[:most]):
        if attempt is not None:
            attempt.at("match", number)
        try:
            sample = read_sample(record, split)
        except DataError:
            continue  # the evaluation beside this one stops or says it, as `data.on_bad_image` wants
        size = short_side_size(record.height, record.width, *config.inference.sides())
        sample = resize(sample, size)
        labels, masks = rasterise(sample, stride)
        image = torch.from_numpy(np.ascontiguousarray(sample.image)).permute(2, 0, 1)
        batch = collate([Example(image, torch.from_numpy(labels), torch.from_numpy(masks), record, ())])
        mask_size = model.mask_size(batch.padded)
        targets = prepare_targets([batch.labels[0].to(device)], [batch.masks[0].to(device)], batch.padded, mask_size, stride)
        with autocast(device, config.inference.precision):
            raw = model(model.normalise(batch.images.to(device), batch.sizes))
        [pairs] = match(raw, targets, config.matcher)
        for instance, index in zip(pairs.instances.tolist(), pairs.predictions.tolist(), strict=True):
            found[f"{record.id}-{instance}"] = index
    return found


def stability(before: Matches, after: Matches) -> float | None:
    """The share, in percent, of objects that kept their map; None where no object is in both."""
    both = before.keys() & after.keys()
    return 100 * sum(before[name] == after[name] for name in both) / len(both) if both else None
