"""Repeat the run of a record, or compute its metrics again, and compare the results. Imports no torch by itself."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from sparseinst.ablation.gate import untrained_ap
from sparseinst.ablation.provenance import code_digest
from sparseinst.ablation.statistics import Difference, Sample, SeedNoise
from sparseinst.ablation.store import Record, Store
from sparseinst.config import Config
from sparseinst.errors import UserError
from sparseinst.files import file_digest
from sparseinst.overrides import parse_config
from sparseinst.paths import RUNS, RunPaths, stored_weights
from sparseinst.words import counted

if TYPE_CHECKING:
    from sparseinst.data.coco import CocoSplit

Outcome = Literal["same bits", "same within noise", "different", "undecided"]
"""`undecided`: the bits differ, and there is nothing to judge the difference by, such as a second trained seed of the row."""


@dataclass(frozen=True)
class Verification:
    """The result of repeating the run of a record, or of computing its metrics again."""

    key: str
    outcome: Outcome
    lines: list[str] = field(default_factory=list)
    """Lines that tell a reader what was compared."""


def verify(key: str, store: Store, device: str | None, *, threads: int | None = None, progress: bool = True) -> Verification:
    """Repeat the training and the evaluation of a record, or its timing, and compare the results.

    The repeated run has its own folder below `runs/verify`. A stopped verification continues there.

    Args:
        key: the record's key, or the first characters of it.
        threads: the number of threads. None takes the number in the record, because another number can change the weights.

    Raises:
        UserError: there is no such record, or it cannot be verified.
    """
    record = find_record(key, store)
    if record.kind not in ("train", "evaluate", "latency"):
        raise UserError(
            f"{record.key}: a record of the kind {record.kind!r} cannot be verified, only train, evaluate and latency"
        )
    if not record.config:
        raise UserError(f"{record.key}: its record holds no config, so its run cannot be repeated")
    config = parse_config(record.config)
    recorded = record.provenance.get("arithmetic") or {}
    used = threads or recorded.get("threads")
    import torch

    from sparseinst.device import pick_device

    if used is not None:
        torch.set_num_threads(int(used))
    lines = [f"{record.kind} {record.key}: {used or 'default'} threads here, {recorded.get('threads', 'unknown')} in the record"]
    if record.kind == "latency":
        return _verify_timing(record, config, device, lines)
    here, there = torch.backends.cpu.get_cpu_capability(), recorded.get("instructions")
    if pick_device(device).type == "cpu" and there not in (None, here):
        lines.append(f"the CPU's instructions: {here} here, {there} in the record, so the bits may differ")
    # The folder is named by the threads and the code, so a stopped verification continues only if both are the same.
    folder = RUNS / "verify" / f"{config.train_key()}-{torch.get_num_threads()}-{code_digest()}"
    found = _verify_training(record, config, RunPaths(folder), store, device, lines, progress)
    shutil.rmtree(folder)  # the next call does the work again
    return found


def verify_metrics(key: str, predictions: Path, store: Store) -> Verification:
    """Compute the metrics of an evaluation and their resamplings again from its predictions, and compare them with its record.

    Nothing is trained, and the network does not run.

    Args:
        key: the record's key, or the first characters of it.
        predictions: the instances in COCO's result format; `runs/KEY/predictions.json.gz` of the evaluation.

    Raises:
        UserError: there is no such record, its metrics cannot be computed again, or the predictions cannot be read.
    """
    from sparseinst.data.coco import val_split
    from sparseinst.evaluation.coco_metrics import coco_figures, figures_by_limit
    from sparseinst.evaluation.predictions import read_predictions
    from sparseinst.evaluation.resampling import resampled_figures

    record = find_record(key, store)
    if record.kind != "evaluate" or not record.config:
        raise UserError(f"{record.key}: only an evaluation whose record holds a config has predictions to compute metrics from")
    if left_out := record.result.get("skipped"):
        raise UserError(
            f"{record.key}: the evaluation left out {counted(left_out, 'image')} and its record does not name them, so its "
            "metrics cannot be computed again"
        )
    split = val_split(parse_config(record.config).data)
    known = record.provenance.get("data")
    if known is None:
        raise UserError(f"{record.key}: its record does not say which annotations it used")
    if file_digest(split.file) != known:
        raise UserError(f"{split.file}: these are not the annotations of the record {record.key}")
    results, images = read_predictions(predictions), [image.id for image in split.images]
    _check_predictions(predictions, results, split)
    lines = [f"evaluate {record.key}: {len(results)} predictions on {len(images)} images, from {predictions}"]
    draws: dict[str, list[float | None]] = record.result.get("resampled", {})
    figures = coco_figures(split.file, results, images) | figures_by_limit(split, results, images)
    resampled = resampled_figures(split.file, results, images, len(draws["AP"])) if draws else {}
    theirs = record.result["figures"] | record.result.get("by_limit", {})
    other, in_resamplings = _other(figures, theirs), _other(resampled, draws)
    for name in dict.fromkeys(("AP", *other)):
        lines.append(f"{name}: {_text(figures.get(name))} here, {_text(theirs.get(name))} in the record")
    if draws:
        which = f"{', '.join(in_resamplings)} differ" if in_resamplings else "all metrics are the same"
        lines.append(f"in {len(draws['AP'])} resamplings of the images, {which}")
    return Verification(record.key, "different" if other or in_resamplings else "same bits", lines)


def _check_predictions(file: Path, results: Sequence[dict[str, Any]], split: CocoSplit) -> None:
    """Raise `UserError` if a prediction is for an image that the split lacks, or if its mask is none of this image's size."""
    from sparseinst.data.annotations import check_segmentation

    sizes = {image.id: (image.height, image.width) for image in split.images}
    for number, one in enumerate(results):
        size = sizes.get(one["image_id"])
        if size is None:
            raise UserError(f"{file}: image {one['image_id']} is none of {split.file}, so these are predictions for other images")
        try:
            check_segmentation(one["segmentation"], *size)
        except ValueError as error:
            raise UserError(f"{file}: the mask of prediction {number} is damaged: {error}") from None


def _other(here: Mapping[str, Any], there: Mapping[str, Any]) -> list[str]:
    """Return the names of the values that differ, sorted."""
    return sorted(name for name in here.keys() | there.keys() if here.get(name) != there.get(name))


def _verify_training(
    record: Record, config: Config, paths: RunPaths, store: Store, device: str | None, lines: list[str], progress: bool
) -> Verification:
    from sparseinst.inference.weights import file_tensors_digest

    weights = _train(config, paths, device, progress)
    known, found = record.provenance.get("weights"), file_tensors_digest(weights)
    lines.append(f"weights: {found} here, {known or 'unknown'} in the record")
    evaluation = record if record.kind == "evaluate" else store.load(config.evaluate_key())
    if record.kind == "train" and found == known:
        return Verification(record.key, "same bits", lines)
    if evaluation is None:
        lines.append("the weights differ, and there is no evaluation of this training to compare")
        return Verification(record.key, "undecided", lines)
    figures = _evaluate(weights, config, device, progress)
    theirs = evaluation.result["figures"]
    lines.append(f"AP: {_text(figures['AP'])} here, {_text(theirs['AP'])} in the record")
    if record.kind == "evaluate" and figures == theirs and known in (None, found):
        return Verification(record.key, "same bits", lines)
    return Verification(record.key, _within_noise(figures["AP"], theirs["AP"], _noise(evaluation, store), lines), lines)


def find_record(key: str, store: Store) -> Record:
    """Return the only record whose key starts with `key`. Raises `UserError` if there is none or if there are several."""
    every = store.keys()
    keys = sorted(known for known in every if known.startswith(key))
    if key in keys:
        keys = [key]
    if len(keys) != 1:
        found = f"{len(keys)} records have keys with this beginning" if keys else "there is no such record"
        raise UserError(f"{key}: {found} in {store.folder}; the page of `sparseinst report --html` lists all keys")
    record = store.load(keys[0])
    if record is None:
        raise UserError(f"{key}: its record is damaged")
    return record


def _train(config: Config, paths: RunPaths, device: str | None, progress: bool) -> Path:
    from sparseinst.device import pick_device
    from sparseinst.training.train import train

    start = stored_weights(config.pretrain_key()) if config.pretrains else None
    return train(config, paths.root, device=pick_device(device), progress=progress, start=start)


def _evaluate(weights: Path, config: Config, device: str | None, progress: bool) -> dict[str, float | None]:
    from sparseinst.data.coco import val_split
    from sparseinst.device import pick_device
    from sparseinst.evaluation.evaluate import evaluate
    from sparseinst.evaluation.weights import prepare_network
    from sparseinst.inference.engine_network import open_source

    chosen = pick_device(device)
    network = prepare_network(open_source(weights), config, device=chosen).network
    return evaluate(network, val_split(config.data), config, device=chosen, progress=progress).figures


def _noise(record: Record, store: Store) -> SeedNoise | None:
    """Return the noise of AP over seeds of a record's row; None if the row has one seed, or if all its seeds have the same AP."""
    values = _seeds_of(record, store)
    return SeedNoise.of(Sample(values), None) if len(set(values)) > 1 else None


def _seeds_of(record: Record, store: Store) -> tuple[float, ...]:
    """Return the APs of all evaluations that differ from a record's only in the seed, without rejected trainings."""
    found = []
    for other in (store.load(key) for key in sorted(store.keys())):
        if other is None or other.kind != "evaluate" or other.provenance.get("profile") != record.provenance.get("profile"):
            continue
        ap = other.result["figures"].get("AP")
        if ap is None or untrained_ap(ap) or _row_key(other) != _row_key(record):
            continue
        training = store.load(parse_config(other.config).train_key())
        if training is None or not training.result.get("not_trained"):
            found.append(ap)
    return tuple(found)


def _row_key(record: Record) -> str:
    config: Any = parse_config(record.config)
    return str(config.replace({"train.seed": 0}).evaluate_key())


def _within_noise(here: float | None, there: float | None, noise: SeedNoise | None, lines: list[str]) -> Outcome:
    if here is None or there is None or noise is None:
        lines.append(
            "AP has no value"
            if noise is not None
            else "the noise of this row is unknown: it has fewer than two seeds that count as trained and differ in AP"
        )
        return "undecided"
    two_seeds = replace(noise, variance=2 * noise.variance, seeds=1)
    limit = Difference(0.0, (two_seeds,), 0.0).high
    lines.append(
        f"in 95 % of cases, two seeds of this row differ by less than {limit:.2f} AP; here the difference is "
        f"{abs(here - there):.2f} AP"
    )
    return "same within noise" if abs(here - there) <= limit else "different"


def _verify_timing(record: Record, config: Config, device: str | None, lines: list[str]) -> Verification:
    """Repeat a timing. The times agree if their ranges from the 5th to the 95th percentile overlap."""
    from sparseinst.bench.benchmark import measure_latency
    from sparseinst.device import pick_device
    from sparseinst.machine import device_name

    here = device_name(device)
    if here != record.provenance.get("device"):
        raise UserError(f"{record.key}: it was timed on {record.provenance.get('device')}, but this device is {here}")
    now, before = measure_latency(config, device=pick_device(device)).whole_ms, record.result["whole_ms"]
    lines.append(f"milliseconds: {_range(now)} here, {_range(before)} in the record")
    overlap = now["p5"] <= before["p95"] and before["p5"] <= now["p95"]
    return Verification(record.key, "same within noise" if overlap else "different", lines)


def _range(times: dict[str, float]) -> str:
    return f"{times['median']:.1f} ({times['p5']:.1f}-{times['p95']:.1f})"


def _text(ap: float | None) -> str:
    return f"{ap:.4f}" if ap is not None else "none"
