"""Compare two evaluations over the same images with a paired bootstrap. Imports no torch.

The bootstrap resamples images, so it measures how much a difference depends on the images of the validation set. `statistics`
estimates from several seeds how much the difference depends on the seed of the training.
"""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sparseinst.ablation.plan import Plan
from sparseinst.ablation.statistics import CONFIDENCE
from sparseinst.ablation.store import Record, Store
from sparseinst.ablation.study import row_config
from sparseinst.config import DataConfig
from sparseinst.paths import run_folder
from sparseinst.section import content_hash

SAMPLES = 1000


def compare_key(baseline: str, other: str) -> str:
    """Return the key of the comparison of two evaluations."""
    return content_hash({"stage": "compare", "baseline": baseline, "other": other, "samples": SAMPLES})


@dataclass(frozen=True)
class Pair:
    """Two evaluations over the same images, as plain data."""

    baseline: str
    """The key of the reference row's evaluation."""
    other: str
    """The key of the other evaluation."""
    data: dict[str, Any]
    """The `data` section of their config."""


def plan_pairs(plan: Plan) -> list[Pair]:
    """Pair each row with its table's reference row of the same seed, even if that row is not part of the plan.

    Returns:
        Each pair once.
    """
    pairs: dict[tuple[str, str], Pair] = {}
    for planned in plan.rows:
        spec, other = planned.table.spec, planned.keys.get("evaluate")
        if spec.reference is None or other is None or spec.reference == planned.row.name:
            continue
        row = next(row for row in spec.rows if row.name == spec.reference)
        config = row_config(spec, row, plan.profile, planned.seed)
        baseline = config.evaluate_key()
        if baseline != other:
            pairs[baseline, other] = Pair(baseline, other, config.data.model_dump(mode="json"))
    return list(pairs.values())


def compare_pairs(pairs: Sequence[Pair], store: Store) -> int:
    """Compare the pairs that are evaluated and not compared yet.

    Returns:
        The number of pairs that cannot be compared because the predictions of an evaluation are gone.
    """
    missing = 0
    for pair in pairs:
        key = compare_key(pair.baseline, pair.other)
        if store.has(key) or not (store.has(pair.baseline) and store.has(pair.other)):
            continue
        if all(run_folder(evaluation).predictions.exists() for evaluation in (pair.baseline, pair.other)):
            store.write(Record("compare", key, _compare(pair)))
        else:
            missing += 1
    return missing


def _compare(pair: Pair) -> dict[str, Any]:
    """Return the result of a comparison: differences, standard errors and intervals in percentage points, by metric."""
    from hotcoco import COCO, COCOeval, compare

    from sparseinst.data.coco import val_split

    split = val_split(DataConfig.model_validate_json(json.dumps(pair.data)))
    images = sorted(image.id for image in split.images)  # a profile may limit the images
    evaluations = []
    with contextlib.redirect_stdout(io.StringIO()):  # hotcoco prints its progress
        truth = COCO(str(split.file))
        for key in (pair.baseline, pair.other):
            results = json.loads(run_folder(key).predictions.read_text(encoding="utf-8"))
            evaluation = COCOeval(truth, truth.loadRes(results), "segm")
            evaluation.params.imgIds = images
            evaluation.evaluate()
            evaluations.append(evaluation)
        before, after = evaluations
        comparison = compare(before, after, n_bootstrap=SAMPLES, seed=0, confidence=CONFIDENCE)
    metrics = [name for name, value in comparison["metrics_a"].items() if value >= 0 and comparison["metrics_b"][name] >= 0]
    return {
        "baseline": pair.baseline,
        "other": pair.other,
        "samples": SAMPLES,
        "confidence": CONFIDENCE,
        "difference": {name: round(100 * comparison["deltas"][name], 4) for name in metrics},
        "standard_error": {name: round(100 * comparison["ci"][name]["std_err"], 4) for name in metrics},
        "interval": {name: [round(100 * comparison["ci"][name][end], 4) for end in ("lower", "upper")] for name in metrics},
    }
