"""Time a model in several engines and precisions by turns, and score the same artifacts.

Each row says how fast an artifact is and how much accuracy it loses against torch in float32. Every engine runs the same pre- and
post-processing and is scored by the same evaluation.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

from sparseinst.bench.benchmark import percentiles, ratio_of
from sparseinst.bench.isolated import Runner, race_isolated
from sparseinst.bench.rows import ENGINE_MODE, Setting, Task, build_workload, load_network, peer_takes, prepare_for_timing
from sparseinst.config import ENGINE_PRECISIONS
from sparseinst.data.coco import CocoSplit, check_categories, val_split
from sparseinst.data.masks import overlaps
from sparseinst.engines.names import ENGINES, check_engine
from sparseinst.errors import RunFailed, UserError
from sparseinst.evaluation.evaluate import Evaluation, evaluate
from sparseinst.evaluation.predictions import read_predictions
from sparseinst.evaluation.resampling import resampled_figures
from sparseinst.integrations.peers import is_peer
from sparseinst.machine import multiplies_bfloat16
from sparseinst.models.norms import probe_image
from sparseinst.words import install_extra

TORCH_PRECISIONS = ("fp32", "bf16")
"""The precisions of torch that are timed unless the user names some."""
_SAME_SCORE = 1e-4
"""Two engines agree on an instance if its scores differ by at most this."""
_SAME_MASK = 0.99
"""Two engines agree on an instance if the IoU of its masks is at least this."""


def engine_settings(
    base: Setting, engines: Sequence[str], precisions: Sequence[str] | None, modes: Sequence[str]
) -> tuple[list[Setting], list[str]]:
    """Return the settings to time, and a line for each engine and precision that is left out.

    Args:
        base: the model, the size and the batch.
        engines: names of engines; `all` stands for every engine that is installed.
        precisions: an engine without one of them is timed in the others; None takes all that the engine offers on this device.
        modes: the modes of torch.

    Raises:
        UserError: an engine is unknown, or none of the precisions can be timed.
    """
    every = "all" in engines
    missing = []
    settings = []
    for engine in ENGINES if every else [check_engine(name) for name in engines]:
        if every and (lack := _missing_package(engine)) is not None:
            missing.append(f"{engine} is left out: {lack} is not installed; {install_extra(engine)}")
            continue
        offered = TORCH_PRECISIONS if engine == "torch" and precisions is None else ENGINE_PRECISIONS[engine]
        chosen = [name for name in offered if precisions is None or name in precisions]
        if precisions is None and engine == "openvino":
            chosen.remove("fp16")  # CPUs without fp16 instructions compile bf16 instead, which is an error
            if not multiplies_bfloat16():
                chosen.remove("bf16")
                missing.append("openvino in bf16 is left out: this CPU has no bfloat16 instructions")
            if _missing_package("nncf") is not None:
                chosen.remove("int8")
                missing.append(f"int8 is left out: nncf is not installed; {install_extra('int8')}")
        if not chosen and not every:
            raise UserError(f"engine {engine} has none of {', '.join(precisions or ())}: it has {', '.join(offered)}")
        settings += [
            replace(base, engine=engine, precision=precision, mode=mode)
            for precision in chosen
            for mode in (modes if engine == "torch" else [ENGINE_MODE])
        ]
    if is_peer(base.model):
        settings = [setting for setting in settings if peer_takes(setting)]
        if not settings:
            raise UserError(
                f"--engines: {base.model} is a peer, which is timed in batch 1 and fp32 or, in openvino, bf16 or int8"
            )
    if not settings:
        raise UserError(f"no engine has the precision {' or '.join(precisions or ())}")
    return settings, missing


def _missing_package(name: str) -> str | None:
    """Return the name of a package that is not installed; None if it is there."""
    from importlib.util import find_spec

    return None if find_spec(name) is not None else name


def compare_engines(
    settings: Sequence[Setting],
    task: Task,
    device: torch.device,
    *,
    warmup: int,
    repetitions: int,
) -> list[dict[str, Any]]:
    """Time the settings of one model by turns with the reference's path, score their artifacts, and return a row for each.

    The first row is the reference's path: torch in mode `plain` and fp32; for a peer it is torch in mode `eager`. The keys of
    a row are the fields of `Setting`, `whole_ms`, `post_ms` (the median of post-processing alone), `ratio` (the reference's
    time divided by this one's), `AP`, `AP_lost` (`value`, `low` and `high`: a 95 % interval over resampled images),
    `agreement`, `bytes`, `prepare_s`, `first_image_s` and `facts`. Models and peers given by name have random weights, so
    that they have no AP. A peer has `published` instead: the `AP` of its published weights and its `source`.

    Raises:
        UserError, DataError: an engine, a precision or the data are not available.
        RunFailed: a process was killed, or an artifact that was timed is not the one that was scored.
    """
    mode = "eager" if is_peer(settings[0].model) else "plain"
    reference = replace(settings[0], engine="torch", precision="fp32", mode=mode)
    chosen = [reference, *(setting for setting in settings if setting != reference)]
    with tempfile.TemporaryDirectory() as folder:
        scored: dict[Setting, _Scored] = {}
        for number, setting in enumerate(chosen):
            # Mode plain runs the network of mode eager; only the time differs.
            same = replace(setting, mode="plain") if setting.mode == "eager" else setting
            if same not in scored:
                scored[same] = _score(setting, task, device, Path(folder) / f"{number}.json")
            scored[setting] = scored[same]
        runners = race_isolated(chosen, task, device, warmup, repetitions)
        comparison = _Accuracy(scored[reference])
        rows = []
        for setting, runner in zip(chosen, runners, strict=True):
            _check_same_artifact(setting, runner, scored[setting])
            rows.append(_row(setting, runner, runners[0], scored[setting]) | comparison.of(scored[setting]))
    return rows


@dataclass(frozen=True)
class _Scored:
    """The result of scoring an artifact."""

    facts: dict[str, Any]
    prepare_s: float
    """The seconds that the artifact took to make, or to load if it existed, with its first image."""
    predictions: Path
    split: CocoSplit | None = None
    """The evaluated images; None for random weights."""
    evaluation: Evaluation | None = None
    published: dict[str, Any] | None = None
    """The `AP` of a peer's published weights, and its `source`."""


def _score(setting: Setting, task: Task, device: torch.device, predictions: Path) -> _Scored:
    """Prepare a setting's network, and evaluate it if it is trained."""
    if is_peer(setting.model):
        return _prepare_peer(setting, task, device, predictions)
    config, source = load_network(setting, task.data, task.images)
    began = time.perf_counter()
    prepared = prepare_for_timing(setting, config, source, device)
    with torch.no_grad():
        prepared.network(probe_image().to(device))  # torch compiles with the first image
    prepare_s = round(time.perf_counter() - began, 2)
    if source is None:
        return _Scored(prepared.as_json(), prepare_s, predictions)
    split = val_split(config.data)
    check_categories(split, source.categories, setting.model)
    evaluation = evaluate(prepared.network, split, config, device=device, predictions=predictions)
    return _Scored(prepared.as_json(), prepare_s, predictions, split, evaluation)


def _prepare_peer(setting: Setting, task: Task, device: torch.device, predictions: Path) -> _Scored:
    began = time.perf_counter()
    workload, count = build_workload(setting, task, device)
    assert workload.facts is not None
    return _Scored(workload.facts, round(time.perf_counter() - began, 2), predictions, published=count()["published"])


def _check_same_artifact(setting: Setting, runner: Runner, scored: _Scored) -> None:
    timed = runner.facts["artifact"] if runner.facts is not None else None
    if timed != scored.facts["artifact"]:
        raise RunFailed(f"{setting}: timed the artifact {timed}, but scored {scored.facts['artifact']}: run the command again")


def _row(setting: Setting, runner: Runner, reference: Runner, scored: _Scored) -> dict[str, Any]:
    return {
        **asdict(setting),
        "whole_ms": percentiles(runner.seconds),
        "post_ms": runner.post_ms,
        "ratio": ratio_of(reference.seconds, runner.seconds),
        "repetitions": len(runner.seconds),
        "bytes": scored.facts["bytes"],
        "prepare_s": scored.prepare_s,
        "first_image_s": runner.first_image_s,
        "facts": scored.facts,
        **({"published": scored.published} if scored.published is not None else {}),
    }


class _Accuracy:
    """Compares evaluations with that of the reference, image by image."""

    def __init__(self, reference: _Scored) -> None:
        self._reference = reference
        self._known: dict[Path, dict[str, Any]] = {}
        if reference.evaluation is not None:
            self._results = read_predictions(reference.predictions)
            self._resampled = _resample(self._results, reference)

    def of(self, scored: _Scored) -> dict[str, Any]:
        """Return `AP`, `AP_lost` and `agreement` of an evaluation; they are None for random weights."""
        if scored.predictions not in self._known:  # several modes share an evaluation, and resampling takes long
            self._known[scored.predictions] = self._compare(scored)
        return self._known[scored.predictions]

    def _compare(self, scored: _Scored) -> dict[str, Any]:
        before = self._reference.evaluation
        if scored.evaluation is None or before is None:
            return {"AP": None, "AP_lost": None, "agreement": None}
        results = read_predictions(scored.predictions)
        lost = self._resampled - _resample(results, self._reference)
        ap, ap_before = scored.evaluation.figures["AP"], before.figures["AP"]
        low, high = np.nanpercentile(lost, (2.5, 97.5)) if not np.isnan(lost).all() else (np.nan, np.nan)
        value = None if ap is None or ap_before is None else round(ap_before - ap, 3)
        interval = {"value": value, "low": round(float(low), 3), "high": round(float(high), 3)}
        return {"AP": ap, "AP_lost": interval if value is not None else None, "agreement": agreement(self._results, results)}


def _resample(results: list[dict[str, Any]], scored: _Scored) -> NDArray[np.float64]:
    """Return the AP of results in each resampling of the images that were evaluated."""
    assert scored.split is not None
    assert scored.evaluation is not None
    skipped = set(scored.evaluation.skipped_images)
    ids = [image.id for image in scored.split.images if image.id not in skipped]
    values = resampled_figures(scored.split.file, results, ids)["AP"]
    return np.array([np.nan if value is None else value for value in values])


def agreement(expected: list[dict[str, Any]], found: list[dict[str, Any]]) -> dict[str, Any]:
    """Compare two evaluations' instances image by image.

    Returns:
        `images`, the number of images in which either has an instance, and `equal_images`, those in which each instance has a
        partner: the same class, scores within 1e-4, and masks with an IoU of 0.99 or more. `score_difference` is the largest
        difference of partners' scores, and `mask_iou` the mean IoU of partners' masks. Here the partner is the instance of the
        same class whose mask overlaps most.
    """
    by_image: dict[int, tuple[list[dict[str, Any]], list[dict[str, Any]]]] = {}
    for side, results in enumerate((expected, found)):
        for result in results:
            by_image.setdefault(result["image_id"], ([], []))[side].append(result)
    equal, differences, ious = 0, [0.0], []
    for ours, theirs in by_image.values():
        pairs = _partners(ours, theirs)
        differences += [abs(a["score"] - b["score"]) for a, b, _ in pairs]
        ious += [iou for _, _, iou in pairs]
        complete = len(pairs) == len(ours) == len(theirs)
        equal += complete and all(abs(a["score"] - b["score"]) <= _SAME_SCORE and iou >= _SAME_MASK for a, b, iou in pairs)
    return {
        "images": len(by_image),
        "equal_images": equal,
        "score_difference": round(max(differences), 6),
        "mask_iou": round(float(np.mean(ious)), 4) if ious else None,
    }


def _partners(ours: list[dict[str, Any]], theirs: list[dict[str, Any]]) -> list[tuple[dict[str, Any], dict[str, Any], float]]:
    """Return pairs of instances of one image with the IoU of their masks. The pairs with the largest IoU come first.

    Among equal masks, the pairs with the closest scores come first. Two empty masks are equal.
    """
    if not ours or not theirs:
        return []
    masks = [[result["segmentation"] for result in results] for results in (ours, theirs)]
    height, width = masks[0][0]["size"]
    iou = np.array(overlaps(masks[0], masks[1], height, width), dtype=np.float64).reshape(len(ours), len(theirs))
    iou[np.outer(*[coco_mask.area(side) == 0 for side in masks])] = 1.0
    scores, categories = (np.array([one[key] for one in ours]) for key in ("score", "category_id"))
    others, classes = (np.array([one[key] for one in theirs]) for key in ("score", "category_id"))
    preference = iou - _SAME_SCORE * np.abs(scores[:, None] - others)
    preference[categories[:, None] != classes] = -np.inf
    pairs = []
    while np.isfinite(preference.max()):
        row, column = np.unravel_index(preference.argmax(), iou.shape)
        pairs.append((ours[row], theirs[column], float(iou[row, column])))
        preference[row], preference[:, column] = -np.inf, -np.inf
    return pairs
