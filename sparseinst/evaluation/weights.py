"""Evaluate finished runs, weights files and artifacts of engines."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from sparseinst.config import Config, NetworkPrecision, OptimizeMode
from sparseinst.data.coco import CocoSplit, check_categories, val_annotations, val_split
from sparseinst.errors import UserError
from sparseinst.evaluation.coco_metrics import Evaluator
from sparseinst.evaluation.evaluate import Evaluation, evaluate
from sparseinst.files import atomic, file_digest
from sparseinst.inference.artifacts import read_about
from sparseinst.inference.engine_network import Prepared, Source, load_artifact, open_source
from sparseinst.inference.quantization import Score
from sparseinst.inference.weights import file_tensors_digest
from sparseinst.nested import flatten
from sparseinst.paths import RunPaths

_log = logging.getLogger(__name__)


def evaluate_run(folder: Path, config: Config, *, device: torch.device) -> Evaluation:
    """Evaluate a finished run and keep the result in its folder.

    A kept result for the same settings, annotation file and weights is returned without a new evaluation.

    Args:
        config: only its `data` and `inference` are used; the other settings come with the weights.

    Raises:
        UserError: as in `evaluate_weights`.
    """
    paths = RunPaths(folder)
    identity = {"key": config.evaluate_key(), "annotations": file_digest(val_annotations(config.data))}
    identity["weights"] = file_tensors_digest(paths.weights)
    kept = _read_kept(paths.evaluation, identity)
    if kept is not None:
        return kept
    settings = config.model_dump(mode="json")
    overrides = {**flatten(settings["data"], "data."), **flatten(settings["inference"], "inference.")}
    result = evaluate_weights(paths.weights, overrides, device=device)
    with atomic(paths.evaluation) as temporary:
        temporary.write_text(json.dumps({"of": identity, **result.as_json()}, indent=1) + "\n", encoding="utf-8")
    return result


def _read_kept(file: Path, identity: dict[str, str]) -> Evaluation | None:
    """Return the evaluation in a file; None if there is none, it is damaged, or it has another identity."""
    if not file.exists():
        return None
    try:
        kept = json.loads(file.read_text(encoding="utf-8"))
        return Evaluation(**kept) if kept.pop("of", None) == identity else None
    except (ValueError, TypeError, AttributeError) as error:
        _log.warning("%s is damaged (%s); the run is evaluated again", file, error)
        return None


def evaluate_weights(
    weights: Path,
    overrides: Mapping[str, Any],
    *,
    device: torch.device,
    predictions: Path | None = None,
    evaluator: Evaluator = "hotcoco",
    optimize: OptimizeMode | None = None,
) -> Evaluation:
    """Evaluate a weights file, or an artifact of an engine, in the engine and precision of the settings `inference`.

    Args:
        overrides: settings of `data` and `inference`, by dotted path; the other settings come with the weights.
        evaluator: the library that computes the metrics.
        optimize: see `inference.optimize`; None leaves the model as it is.

    Raises:
        UserError: an override of another setting, or the data has other categories than the weights were trained on.
    """
    source, config = open_for_evaluation(weights, overrides)
    return evaluate_source(source, config, device=device, predictions=predictions, evaluator=evaluator, optimize=optimize)


def evaluate_source(
    source: Source,
    config: Config,
    *,
    device: torch.device,
    predictions: Path | None = None,
    evaluator: Evaluator = "hotcoco",
    optimize: OptimizeMode | None = None,
) -> Evaluation:
    """Evaluate what `open_for_evaluation` returned. The arguments and errors are those of `evaluate_weights`."""
    split = val_split(config.data)
    check_categories(split, source.categories, f"{source.path}")
    _warn_of_few_maps(split, config)
    prepared = prepare_network(source, config, device=device, optimize=optimize)
    result = evaluate(prepared.network, split, config, device=device, predictions=predictions, evaluator=evaluator)
    return replace(result, engine=prepared.as_json())


def open_for_evaluation(weights: Path, overrides: Mapping[str, Any]) -> tuple[Source, Config]:
    """Return weights or an artifact, and their config with the overrides.

    Raises:
        UserError: an override of a setting other than `data` and `inference`.
    """
    source = open_source(weights)
    refused = [path for path in overrides if path.split(".")[0] not in ("data", "inference")]
    if refused:
        raise UserError(f"{refused[0]}: belongs to the weights; an evaluation can only change data.* and inference.*")
    return source, source.config.replace(overrides)


def prepare_network(source: Source, config: Config, *, device: torch.device, optimize: OptimizeMode | None = None) -> Prepared:
    """Return the network in the engine and precision of the config. An int8 network that does not exist yet is made.

    Its AP on the validation data decides how much of it stays in float; see `inference.quantization`.
    """
    return source.prepare(config, device=device, optimize=optimize, score=_validation_score(config, source, device))


def _validation_score(config: Config, source: Source, device: torch.device) -> Score:
    """Return the function that evaluates an artifact on the validation data."""

    def score(artifact: Path, precision: NetworkPrecision) -> float | None:
        split = val_split(config.data)
        check_categories(split, source.categories, f"{source.path}")
        network = load_artifact(artifact, read_about(artifact), precision, keep_compiled=False).network
        return evaluate(network, split, config, device=device).figures["AP"]

    return score


def _warn_of_few_maps(split: CocoSplit, config: Config) -> None:
    """Warn if images or their tiles have more objects than the model has maps, since each map finds at most one of them."""
    maps, tile = config.model.decoder.iam.num_maps, config.inference.tile
    counts = [count for count in split.instances_per_tile(tile) if count > maps]
    if counts:
        _log.warning(
            "%d of %d images have more than model.decoder.iam.num_maps=%d objects%s, up to %d; the model cannot find the others",
            len(counts), len(split.images), maps, f" in a tile of {tile} pixels on average" if tile else "", max(counts),
        )  # fmt: skip
