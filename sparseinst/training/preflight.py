"""Check a config before a long run: a model that cannot learn eight images by heart will not learn many (`train --preflight`)."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from sparseinst.checked import read_json_lines
from sparseinst.config import WITHOUT_AUGMENTATION, Config
from sparseinst.data.coco import check_categories, train_split, val_split
from sparseinst.data.images import read_image
from sparseinst.data.masks import encode
from sparseinst.data.network_input import cut, image_tiles
from sparseinst.data.objects import Objects, fullest_tile
from sparseinst.data.tiles import tiles_of
from sparseinst.data.transforms import as_mask
from sparseinst.errors import DataError, RunFailed
from sparseinst.evaluation.weights import evaluate_run, evaluate_weights
from sparseinst.files import atomic, make_folder
from sparseinst.nested import flatten
from sparseinst.paths import RunPaths
from sparseinst.training.train import train

IMAGES = 8
STEPS = 500
MOST_LEFT = 0.6
"""The loss must fall below this fraction of what it was in the first steps."""
LEAST_AP50 = 20.0
LEAST_RATE = 4e-4
"""A lower learning rate is raised to this one: it may suit a long run, but shows nothing in so few steps."""


@dataclass(frozen=True)
class Preflight:
    """The result of a check that passed."""

    loss_before: float
    """The mean loss of the first tenth of the steps."""
    loss_after: float
    ap50: float
    """On the images that it learned, in percent."""
    seconds: float
    image_seconds: float
    """The median time of a step, divided by its number of images."""
    training_hours: float
    """An estimate of how long the steps of the whole training take."""
    evaluation_hours: float
    """An estimate of how long all evaluations take, during the training and at its end."""


def preflight(config: Config, output: Path, *, device: torch.device) -> Preflight:
    """Train a model on the first eight training images with instances, and evaluate it on the same images.

    With `data.tile`, the check uses one tile of each of these images, the one with most instances.

    The check uses the model and the losses of the config, and its learning rate unless that is below `LEAST_RATE`. It uses no
    augmentation and skips the stage `pretrain`: a backbone that needs this stage starts from random weights, and its norms are
    trained.

    Args:
        output: the folder of this run.

    Raises:
        UserError, DataError: the settings or the data are not valid for training, or the validation data for the evaluation.
        RunFailed: the model did not learn the images. The message gives the losses and the AP50.
    """
    began = time.perf_counter()
    evaluated = _evaluated_inputs(config)
    if config.data.tile is None:
        what, images, annotations = "images", config.data.train_images, _eight_images(config, output)
    else:
        what, (images, annotations) = "tiles", _eight_tiles(config, config.data.tile, output)
    small = _small(config, annotations, images)
    train(small, output, device=device, progress=True)
    result = evaluate_run(output, small, device=device)
    losses, seconds = _losses(output)
    tenth = max(1, len(losses) // 10)
    before, after = sum(losses[:tenth]) / tenth, sum(losses[-tenth:]) / tenth
    ap50 = result.figures["AP50"] or 0.0
    reached = (
        f"after {STEPS} steps on {IMAGES} {what} the loss went from {before:.2f} to {after:.2f}, and AP50 on them is {ap50:.1f}"
    )
    if after > MOST_LEFT * before:
        raise RunFailed(
            f"preflight: {reached}: it hardly learns. Check the masks (`data check`), the loss weights and the initial weights"
        )
    if ap50 < LEAST_AP50:
        times = STEPS * small.train.batch_size // IMAGES
        raise RunFailed(
            f"preflight: {reached}, too little for {what} that it saw {times} times. Objects may be too small for the input "
            "(inference.short_side, model.decoder.mask_scale), or masks may be wrong (`data look`)"
        )
    image_seconds = statistics.median(seconds) / small.train.batch_size
    return Preflight(
        before,
        after,
        ap50,
        time.perf_counter() - began,
        image_seconds,
        image_seconds * config.train.batch_size * config.train.iterations / 3600,
        evaluation_hours(
            evaluated, _evaluation_seconds(output, small, 1, device), _evaluation_seconds(output, small, IMAGES, device)
        ),
    )


def _evaluated_inputs(config: Config) -> list[int]:
    """Return how many images or tiles each evaluation segments, during a training and at its end.

    Raises:
        DataError: the validation data cannot be read, or has other categories than the training data.
    """
    train, val = train_split(config.data), val_split(config.data)
    check_categories(val, train.categories, f"{train.file}")
    tiles = [len(image_tiles((image.height, image.width), config.inference)) for image in val.images]
    during = sum(config.train.evaluates_after(done) for done in range(config.train.iterations))
    return [sum(tiles[: config.train.evaluate_images])] * during + [sum(tiles)]


def _evaluation_seconds(run: Path, small: Config, images: int, device: torch.device) -> float:
    """Return how long an evaluation of the first images of the check takes."""
    limited = small.replace({"data.val_limit": images}).model_dump(mode="json")
    overrides = {**flatten(limited["data"], "data."), **flatten(limited["inference"], "inference.")}
    return evaluate_weights(RunPaths(run).weights, overrides, device=device).seconds


def evaluation_hours(inputs: Sequence[int], one: float, eight: float) -> float:
    """Return how long evaluations take.

    Args:
        inputs: the number of images or tiles of each evaluation.
        one, eight: the seconds for an evaluation of one, and of `IMAGES` images or tiles. Something of an evaluation takes the
            same time for any number of images.
    """
    each = max(0.0, eight - one) / (IMAGES - 1)
    return (len(inputs) * max(0.0, one - each) + sum(inputs) * each) / 3600


def _eight_images(config: Config, output: Path) -> Path:
    """Write an annotation file with the images of the check into the run's folder, and return its absolute path."""
    split = train_split(config.data)
    chosen = {image.id for image in split.with_instances().images[:IMAGES]}
    data = json.loads(split.file.read_text(encoding="utf-8"))
    data["images"] = [image for image in data["images"] if image["id"] in chosen]
    data["annotations"] = [annotation for annotation in data["annotations"] if annotation["image_id"] in chosen]
    file = make_folder(output) / "eight_images.json"
    with atomic(file) as temporary:
        temporary.write_text(json.dumps(data), encoding="utf-8")
    return file.resolve()


def _eight_tiles(config: Config, side: int, output: Path) -> tuple[str, Path]:
    """Write the tiles of the check into the run's folder. Return the absolute paths of their folder and annotation file."""
    split = train_split(config.data)
    folder = make_folder(make_folder(output) / "eight_tiles").resolve()
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for record in split.with_instances().images:
        size = record.height, record.width
        try:
            tile, part = fullest_tile(Objects(record, split), tiles_of(size, side))
            picture = cut(read_image(record.path, size), tile)
        except DataError:
            if config.data.on_bad_image == "error":
                raise
            continue
        images.append({"id": len(images) + 1, "file_name": f"{record.id}.png", "height": tile.height, "width": tile.width})
        with atomic(folder / f"{record.id}.png") as temporary:
            picture.save(temporary, format="PNG")
        for label, segment in zip(part.labels.tolist(), part.segments, strict=True):
            mask = as_mask(segment, tile.size)
            about = {"id": len(annotations) + 1, "image_id": len(images), "category_id": split.categories[label].id}
            annotations.append({**about, "segmentation": encode(mask[None])[0], "area": int(mask.sum()), "iscrowd": 0})
        if len(images) == IMAGES:
            break
    file = folder.parent / "eight_tiles.json"
    categories = [asdict(category) for category in split.categories]
    with atomic(file) as temporary:
        temporary.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    return str(folder), file


def _small(config: Config, annotations: Path, images: str) -> Config:
    """Return the config of the check, which trains and evaluates on the images of this annotation file and folder."""
    data = config.data
    from_nothing = config.pretrains
    frozen = config.model.backbone.frozen_norm and not from_nothing
    return config.replace(
        {
            "data.train_annotations": str(annotations),
            "data.train_limit": None,
            "data.train_images": images,
            "data.val_images": images,
            "data.val_annotations": str(annotations),
            "data.val_limit": None,
            "data.short_sides": [config.inference.sides()[0]],
            **{f"data.{name}": value for name, value in WITHOUT_AUGMENTATION.items()},
            "inference.tile": data.tile,  # objects must have the size that they have in training
            "inference.engine": "torch",  # the check is of the training
            "inference.precision": config.inference.precision if config.inference.engine == "torch" else "fp32",
            "model.backbone.frozen_norm": frozen,
            "pretrain.enabled": False,
            "train.iterations": STEPS,
            "train.learning_rate": max(config.train.learning_rate, LEAST_RATE),
            "train.warmup_iterations": STEPS // 10,
            "train.batch_size": min(IMAGES // 2, config.train.batch_size),
            "train.accumulate": 1,
            "train.ema_decay": None,
            "train.evaluate_every": None,
            "train.patience": None,
            "train.checkpoint_activations": config.train.checkpoint_activations and frozen,  # only frozen norms allow it
            "train.log_every": 10,
            "train.loggers": [],
            "train.checkpoint_every": STEPS,
        }
    )


def _losses(run: Path) -> tuple[list[float], list[float]]:
    """Return the loss and the seconds of a step in each line of a run's log, which are means over several steps."""
    steps = [record for record in read_json_lines(RunPaths(run).metrics) if "loss" in record]
    return [record["loss"] for record in steps], [record["seconds"] for record in steps]
