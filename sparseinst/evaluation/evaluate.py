"""Evaluate a model on a split in COCO's format: predictions, COCO's twelve mask metrics, metrics of the activation maps."""

from __future__ import annotations

import itertools
import logging
import time
from collections import Counter, deque
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from sparseinst.attempts import Attempt
from sparseinst.config import Config
from sparseinst.data.coco import CocoSplit
from sparseinst.data.loader import Batch, EvalSet, eval_loader
from sparseinst.device import autocast
from sparseinst.distributed import gather, rank, same_for_all, world_size
from sparseinst.errors import DataError, memory_explained
from sparseinst.evaluation.coco_metrics import Evaluator, coco_metrics, figures_by_limit
from sparseinst.evaluation.examine import SegmentedImage, TiledImage
from sparseinst.evaluation.mechanism import Matches, summarise
from sparseinst.evaluation.predictions import write_predictions
from sparseinst.models.network import InstanceNetwork, Predictions
from sparseinst.paste import paste_by_column
from sparseinst.postprocess import ImageSize, Instances, postprocess
from sparseinst.progress import progress_bar

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Evaluation:
    """The result of one evaluation."""

    figures: dict[str, float | None]
    """COCO's mask metrics in percent; None if the data has no object of that size."""
    images: int
    """The number of evaluated images."""
    skipped: list[str] = field(default_factory=list)
    """The reasons why images were skipped; the objects of skipped images do not count as missed."""
    seconds: float = 0.0
    skipped_images: list[int] = field(default_factory=list)
    """The ids of the skipped images."""
    mechanism: dict[str, float | None] = field(default_factory=dict)
    """The metrics of the instance activation maps; see `mechanism.METRICS`."""
    by_category: dict[str, float | None] = field(default_factory=dict)
    """The AP of each category by its name, and its id if two have this name; None for a category without objects."""
    by_limit: dict[str, float | None] = field(default_factory=dict)
    """AP at several numbers of predictions, see `figures_by_limit`; empty if no image has over 100 objects of a category."""
    maps: int | None = None
    """The number of the model's maps, if `by_limit` is not empty and there are no tiles: a model predicts at most this many
    instances in an image."""
    matches: Matches = field(default_factory=dict, repr=False, compare=False)
    """The map that the matching of the training assigns to each object."""
    engine: dict[str, Any] | None = field(default=None, compare=False)
    """What ran the network: the fields of `EngineFacts`, and in int8 the `recipe`; None if the caller ran it itself."""

    def as_json(self) -> dict[str, Any]:
        """Return all fields except the matches, which have an entry for every object, and without empty limits."""
        left_out = {"matches"} if self.by_limit else {"matches", "by_limit", "maps"}
        if self.engine is None:
            left_out.add("engine")
        return {name: value for name, value in asdict(self).items() if name not in left_out}


@memory_explained("lower inference.short_side and inference.long_side, or set inference.precision=bf16")
@torch.no_grad()
def evaluate(
    model: InstanceNetwork,
    split: CocoSplit,
    config: Config,
    *,
    device: torch.device,
    predictions: Path | None = None,
    progress: bool = True,
    evaluator: Evaluator = "hotcoco",
    attempt: Attempt | None = None,
) -> Evaluation:
    """Segment every image of the split and compute the metrics.

    All processes of a process group call this. Each segments its share of the images, and each returns the metrics of all
    images. Every image counts once.

    Args:
        model: the model in evaluation mode, on `device`.
        predictions: a file for the predictions in COCO's result format (without boxes); None writes none.
        evaluator: the library that computes the metrics.
        attempt: its heartbeat reports the current image.

    Raises:
        DataError: an image or an annotation cannot be read and `data.on_bad_image` is not `skip`, or no image can be read.
    """
    began = time.perf_counter()
    dataset = EvalSet(split, config.data, config.inference, part=rank(), parts=world_size())
    loader = eval_loader(dataset, config.data.workers, pin_memory=device.type == "cuda")
    own: list[SegmentedImage | None] = []
    pending: deque[Future[SegmentedImage | None]] = deque()

    # A second thread encodes the masks while the network works on the next input; at most `_MOST_WAITING` inputs wait for it.
    with (
        progress_bar("images" if config.inference.tile is None else "tiles", visible=progress and rank() == 0) as bar,
        ThreadPoolExecutor(1) as encoder,
    ):
        for number, batch in enumerate(bar.track(loader, total=len(dataset), description="evaluate")):
            if attempt is not None:
                attempt.at("image", number)
            [tile] = batch.tiles
            if (tile.top, tile.left) == (0, 0):  # the first tile of an image
                image = TiledImage(batch.records[0], split, config)
            if batch.skipped:
                pending.append(encoder.submit(image.skip, batch.skipped))
            else:
                raw = forward_batch(model, batch, config, device)
                [found] = segment(raw, batch, config)
                # Copy the outputs: a CUDA graph writes those of the next image into the same memory.
                raw = Predictions(*(tensor.cpu() if tensor.is_cuda else tensor for tensor in raw))
                pending.append(encoder.submit(image.add, raw, batch, found, model.mask_size(batch.padded)))
            if len(pending) > _MOST_WAITING:
                own.append(pending.popleft().result())
        own.extend(future.result() for future in pending)
    if attempt is not None:
        attempt.at("wait")
    shares = gather([image for image in own if image is not None])
    result = _compare(shares, split, config, predictions, evaluator, attempt) if rank() == 0 else None
    result = same_for_all(result)
    assert result is not None
    return replace(result, seconds=round(time.perf_counter() - began, 2))


_MOST_WAITING = 4


def _compare(
    shares: list[list[SegmentedImage]],
    split: CocoSplit,
    config: Config,
    predictions: Path | None,
    evaluator: Evaluator,
    attempt: Attempt | None,
) -> Evaluation:
    """Return the evaluation of the images of all processes, in the split's order."""
    images = [image for group in itertools.zip_longest(*shares) for image in group if image is not None]
    skipped = [reason for image in images for reason in image.skipped]
    for reason in skipped:
        _log.warning("skipped %s", reason)
    image_ids = [image.id for image in images if not image.skipped]
    if not image_ids:
        raise DataError(f"{split.file}: none of its images can be read")
    results = [instance for image in images for instance in image.instances]
    if predictions is not None:
        write_predictions(predictions, results, attempt.check if attempt is not None else None)
    observed = [(image.id, image.pairs) for image in images if image.pairs is not None]
    by_limit = figures_by_limit(split, results, image_ids, evaluator)
    metrics = coco_metrics(split.file, results, image_ids, evaluator)
    return Evaluation(
        metrics.figures,
        len(image_ids),
        skipped,
        skipped_images=[image.id for image in images if image.skipped],
        mechanism=summarise([pairs for _, pairs in observed]),
        by_category=_by_name(metrics.by_category, split),
        by_limit=by_limit,
        maps=config.model.decoder.iam.num_maps if by_limit and config.inference.tile is None else None,
        matches={f"{image}-{number}": index for image, pairs in observed for number, index in pairs.matched.items()},
    )


def _by_name(by_category: dict[int, float | None], split: CocoSplit) -> dict[str, float | None]:
    """Return the AP of each category of a split by its name, and its id if two have this name."""
    names = Counter(category.name for category in split.categories)
    return {
        category.name if names[category.name] == 1 else f"{category.name} (id {category.id})": by_category.get(category.id)
        for category in split.categories
    }


def forward_batch(model: InstanceNetwork, batch: Batch, config: Config, device: torch.device) -> Predictions:
    """Return the model's raw output for a batch."""
    images = model.normalise(batch.images.to(device, non_blocking=True), batch.sizes)
    with autocast(device, config.inference.precision):
        raw: Predictions = model(images)
    return raw


def segment(raw: Predictions, batch: Batch, config: Config) -> list[Instances]:
    """Return the instances of each image or tile.

    Masks are stored column by column, because `encode` is fastest with that layout.
    """
    sizes = [ImageSize(size, tile.size) for size, tile in zip(batch.sizes, batch.tiles, strict=True)]
    return postprocess(raw, batch.padded, sizes, config.inference, paste_by_column)
