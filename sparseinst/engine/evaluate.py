"""Evaluation: predictions for a COCO-format split and its twelve mask figures.

The figures come from hotcoco, whose numbers equal pycocotools'; pycocotools itself can be asked for.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import itertools
import json
import logging
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from sparseinst.attempts import Attempt
from sparseinst.config import Config
from sparseinst.data.coco import CocoSplit, check_categories, encode, val_split
from sparseinst.data.loader import Batch, EvalSet, eval_loader
from sparseinst.engine import optimize as optimizing
from sparseinst.engine.checkpoint import load_weights
from sparseinst.engine.device import autocast
from sparseinst.engine.distributed import gather, rank, same_for_all, world_size
from sparseinst.engine.monitor import progress_bar
from sparseinst.engine.truth import pycocotools_truth
from sparseinst.errors import DataError, UserError
from sparseinst.models.sparseinst import SparseInst
from sparseinst.paste import paste_by_column
from sparseinst.paths import RunPaths, atomic, file_digest
from sparseinst.postprocess import ImageSize, Instances, postprocess

_log = logging.getLogger(__name__)

FIGURES = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100", "ARs", "ARm", "ARl")
"""COCO's twelve, of masks, in percent."""

Engine = Literal["hotcoco", "pycocotools"]


@dataclass(frozen=True)
class Evaluation:
    figures: dict[str, float | None]
    """In percent; None where the data holds no object of that size."""
    images: int
    """Images evaluated."""
    skipped: list[str] = field(default_factory=list)
    """Why images were left out; their objects do not count as missed."""
    seconds: float = 0.0
    skipped_images: list[int] = field(default_factory=list)
    """Their ids."""


@torch.no_grad()
def evaluate(
    model: SparseInst,
    split: CocoSplit,
    config: Config,
    *,
    device: torch.device,
    predictions: Path | None = None,
    progress: bool = True,
    engine: Engine = "hotcoco",
    attempt: Attempt | None = None,
) -> Evaluation:
    """Segment every image of the split and compare.

    In a process group all its processes call this; each takes its share of the images, every image counts once, and all get
    the figures.

    Args:
        model: in evaluation mode, on `device`.
        predictions: also write them there, in COCO's result format (without boxes).
        attempt: is told how far it is.

    Raises:
        DataError: an image that cannot be read, unless `data.on_bad_image` is `skip`.
    """
    began = time.perf_counter()
    dataset = EvalSet(split, config.data, config.inference, part=rank(), parts=world_size())
    loader = eval_loader(dataset, config.data.workers, pin_memory=device.type == "cuda")
    own: list[_Segmented] = []
    pending: deque[tuple[Batch, Future[list[dict[str, Any]]]]] = deque()

    def encoded() -> None:
        batch, instances = pending.popleft()
        own.append(_Segmented(batch.records[0].id, instances.result(), batch.skipped))

    # Masks are encoded beside the network's work on the next image; a few images at most wait for it.
    with progress_bar("images", visible=progress and rank() == 0) as bar, ThreadPoolExecutor(1) as encoder:
        for number, batch in enumerate(bar.track(loader, total=len(dataset), description="evaluate")):
            if attempt is not None:
                attempt.at("image", number)
            found = [] if batch.skipped else segment_batch(model, batch, config, device)
            pending.append((batch, encoder.submit(_encode, batch, found, split)))
            if len(pending) > _WAITING:
                encoded()
        while pending:
            encoded()
    if attempt is not None:
        attempt.at("wait")
    shares = gather(own)
    result = _compare(shares, split, predictions, engine, attempt) if rank() == 0 else None
    result = same_for_all(result)
    assert result is not None
    return replace(result, seconds=round(time.perf_counter() - began, 2))


_WAITING = 4


class _Segmented(NamedTuple):
    """One image."""

    id: int
    instances: list[dict[str, Any]]
    skipped: list[str]


def _compare(
    shares: list[list[_Segmented]], split: CocoSplit, predictions: Path | None, engine: Engine, attempt: Attempt | None
) -> Evaluation:
    """The figures of all processes' images, put back into the split's order."""
    images = [image for turn in itertools.zip_longest(*shares) for image in turn if image is not None]
    skipped = [reason for image in images for reason in image.skipped]
    for reason in skipped:
        _log.warning("skipped %s", reason)
    image_ids = [image.id for image in images if not image.skipped]
    if not image_ids:
        raise DataError(f"{split.file}: not one of its images can be read")
    results = [instance for image in images for instance in image.instances]
    if predictions is not None:
        write_predictions(predictions, results, attempt.check if attempt is not None else None)
    left_out = [image.id for image in images if image.skipped]
    return Evaluation(coco_figures(split.file, results, image_ids, engine), len(image_ids), skipped, skipped_images=left_out)


def write_predictions(file: Path, results: list[dict[str, Any]], check: Callable[[], None] | None = None) -> None:
    """Keep instances in COCO's result format. What `check` raises prevents it."""
    with atomic(file, check) as temporary:
        temporary.write_text(json.dumps(results), encoding="utf-8")


def evaluate_run(folder: Path, config: Config, *, device: torch.device) -> Evaluation:
    """The figures of a finished run, kept beside it: computed once for the same settings and the same annotation file.

    Args:
        config: its `data` and `inference` are taken; the rest belongs to the weights.
    """
    paths = RunPaths(folder)
    of = {"key": config.evaluate_key(), "annotations": file_digest(val_split(config.data).file)}
    kept = _kept(paths.evaluation, of)
    if kept is not None:
        return kept
    overrides = {
        f"{part}.{name}": value for part in ("data", "inference") for name, value in config.model_dump(mode="json")[part].items()
    }
    result = evaluate_weights(paths.weights, overrides, device=device)
    with atomic(paths.evaluation) as temporary:
        temporary.write_text(json.dumps({"of": of, **asdict(result)}, indent=1) + "\n", encoding="utf-8")
    return result


def _kept(file: Path, of: dict[str, str]) -> Evaluation | None:
    """What is kept there, where it is of the same."""
    if not file.exists():
        return None
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        return Evaluation(**found) if found.pop("of", None) == of else None
    except (ValueError, TypeError, AttributeError) as error:
        _log.warning("%s is damaged (%s): evaluating again", file, error)
        return None


def evaluate_weights(
    weights: Path,
    overrides: Mapping[str, Any],
    *,
    device: torch.device,
    predictions: Path | None = None,
    engine: Engine = "hotcoco",
    optimize: optimizing.Mode | None = None,
) -> Evaluation:
    """The figures of a weights file.

    Args:
        overrides: dotted paths below `data` and `inference`; the rest belongs to the weights.
        optimize: see `engine.optimize`; None for the model as it is.

    Raises:
        UserError: another override, or data of other categories than the weights were trained on.
    """
    model, config, categories = load_weights(weights)
    foreign = [path for path in overrides if path.split(".")[0] not in ("data", "inference")]
    if foreign:
        raise UserError(f"{foreign[0]}: belongs to the weights; only data.* and inference.* can be set in evaluation")
    config = config.replace(overrides)
    split = val_split(config.data)
    check_categories(split, categories, f"{weights}")
    model = model.to(device)
    if optimize is not None:
        model = optimizing.optimize(model, device=device, mode=optimize, precision=config.inference.precision)
    return evaluate(model, split, config, device=device, predictions=predictions, engine=engine)


def segment_batch(model: SparseInst, batch: Batch, config: Config, device: torch.device) -> list[Instances]:
    """The instances of each image; masks lie by column in memory, as `encode` takes them fastest."""
    images = model.normalise(batch.images.to(device, non_blocking=True), batch.sizes)
    with autocast(device, config.inference.precision):
        raw = model(images)
    sizes = [ImageSize(size, (record.height, record.width)) for size, record in zip(batch.sizes, batch.records, strict=True)]
    return postprocess(raw, batch.padded, sizes, config.inference, paste_by_column)


def _encode(batch: Batch, found: list[Instances], split: CocoSplit) -> list[dict[str, Any]]:
    """In COCO's result format: the file's own category ids, run lengths, scores."""
    ids = [category.id for category in split.categories]
    pairs = zip(batch.records, found, strict=False)  # nothing is found in an image that was left out
    return [result for record, instances in pairs for result in in_coco_format(record.id, instances, ids)]


def in_coco_format(image_id: int, instances: Instances, category_ids: Sequence[int | None]) -> list[dict[str, Any]]:
    """The instances of one image as COCO's result format has them.

    Args:
        category_ids: by label; instances of a label without one are left out.
    """
    runs = encode(instances.masks.cpu().numpy())
    return [
        {"image_id": image_id, "category_id": category, "score": score, "segmentation": run}
        for label, score, run in zip(instances.labels.tolist(), instances.scores.tolist(), runs, strict=True)
        if (category := category_ids[label]) is not None
    ]


def coco_figures(
    annotations: Path, results: list[dict[str, Any]], image_ids: list[int], engine: Engine = "hotcoco"
) -> dict[str, float | None]:
    """The twelve figures of these results over these images, in percent."""
    coco = importlib.import_module(engine if engine == "hotcoco" else "pycocotools.coco")
    evaluation = importlib.import_module(engine if engine == "hotcoco" else "pycocotools.cocoeval")
    with contextlib.redirect_stdout(io.StringIO()):  # both print their summary
        truth = coco.COCO(str(annotations)) if engine == "hotcoco" else pycocotools_truth(annotations)
        found = truth.loadRes(results) if results or engine == "hotcoco" else coco.COCO()  # pycocotools fails on []
        comparison = evaluation.COCOeval(truth, found, "segm")
        comparison.params.imgIds = sorted(image_ids)
        comparison.evaluate()
        comparison.accumulate()
        comparison.summarize()
    values = [float(value) for value in comparison.stats]
    return {name: None if value < 0 else 100 * value for name, value in zip(FIGURES, values, strict=True)}
