"""Evaluate a peer as our models are evaluated."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from sparseinst.data.coco import CocoSplit, category_names
from sparseinst.data.images import read_image
from sparseinst.errors import UserError
from sparseinst.evaluation.coco_metrics import Evaluator, coco_figures, figures_by_limit
from sparseinst.evaluation.evaluate import Evaluation
from sparseinst.evaluation.predictions import in_coco_format, write_predictions
from sparseinst.integrations.peers.peer import Peer
from sparseinst.progress import progress_bar


@torch.inference_mode()
def evaluate_peer(
    peer: Peer, split: CocoSplit, *, predictions: Path | None = None, evaluator: Evaluator = "hotcoco", progress: bool = True
) -> Evaluation:
    """Segment every image of the split and compute the metrics, as `evaluate` does for our models.

    Categories are matched by name. Instances of categories that the split lacks are left out.

    Raises:
        UserError: the split has none of the peer's categories, or the peer's categories are unknown.
        DataError: an image cannot be read.
    """
    began = time.perf_counter()
    ids = category_ids(peer.categories, split)
    results = []
    with progress_bar("images", visible=progress) as bar:
        for record in bar.track(split.images, total=len(split.images), description="evaluate"):
            photo = np.asarray(read_image(record.path, (record.height, record.width)))
            found = peer.segment(peer.prepare(photo))
            results += in_coco_format(record.id, found, ids)
    if predictions is not None:
        write_predictions(predictions, results)
    images = [image.id for image in split.images]
    figures, by_limit = coco_figures(split.file, results, images, evaluator), figures_by_limit(split, results, images, evaluator)
    return Evaluation(figures, len(images), seconds=round(time.perf_counter() - began, 2), by_limit=by_limit)


def category_ids(names: Sequence[str], split: CocoSplit) -> list[int | None]:
    """Return the split's category id for each name, or None if the split lacks it. Raises `UserError` if it lacks all of them."""
    known = {category.name: category.id for category in split.categories}
    ids = [known.get(name) for name in names]
    if not any(identifier is not None for identifier in ids):
        some = ", ".join(category_names(split.categories)[:3])
        raise UserError(
            f"{split.file}: the peer knows none of the categories ({some}, ...), because it was trained on other data"
        )
    return ids
