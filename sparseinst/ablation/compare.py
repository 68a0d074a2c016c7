"""Differences between two evaluations over the same images, with a paired bootstrap. Imports no torch.

The bootstrap draws images, so it tells how far a difference depends on which images were in the validation set. How far it
depends on the seed of the training, `statistics` tells from several seeds.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
from typing import Any

from sparseinst.ablation.plan import Plan
from sparseinst.ablation.store import Record, Store
from sparseinst.ablation.work import run_folder
from sparseinst.config import Config, content_hash

_log = logging.getLogger(__name__)

SAMPLES = 1000
CONFIDENCE = 0.95


def compare_key(baseline: str, other: str) -> str:
    """Names the comparison of two evaluations."""
    return content_hash({"stage": "compare", "baseline": baseline, "other": other, "samples": SAMPLES})


def compare_rows(plan: Plan, store: Store) -> int:
    """Compare each row with its table's reference row of the same seed, where both are evaluated and it is not done yet.

    Returns:
        How many comparisons were made.
    """
    evaluations = {
        (planned.table.name, planned.row.name, planned.seed): planned.keys["evaluate"]
        for planned in plan.rows
        if "evaluate" in planned.keys
    }
    made = 0
    for planned in plan.rows:
        reference = planned.table.spec.reference
        other = planned.keys.get("evaluate")
        if reference is None or other is None or reference == planned.row.name:
            continue
        baseline = evaluations.get((planned.table.name, reference, planned.seed))
        if baseline is None or store.has(compare_key(baseline, other)):
            continue
        paths = [run_folder(key).predictions for key in (baseline, other)]
        if not (store.has(baseline) and store.has(other) and all(path.exists() for path in paths)):
            continue
        result = _compare(plan.runs[other].config, baseline, other)
        store.write(Record("compare", compare_key(baseline, other), result))
        made += 1
    return made


def _compare(config: Config, baseline: str, other: str) -> dict[str, Any]:
    from hotcoco import COCO, COCOeval, compare

    from sparseinst.data.coco import val_split

    file = val_split(config.data).file
    evaluations = []
    with contextlib.redirect_stdout(io.StringIO()):  # it tells of its progress
        truth = COCO(str(file))
        for key in (baseline, other):
            results = json.loads(run_folder(key).predictions.read_text(encoding="utf-8"))
            evaluation = COCOeval(truth, truth.loadRes(results), "segm")
            evaluation.evaluate()
            evaluations.append(evaluation)
        before, after = evaluations
        found = compare(before, after, n_bootstrap=SAMPLES, seed=0, confidence=CONFIDENCE)
    figures = [name for name, value in found["metrics_a"].items() if value >= 0 and found["metrics_b"][name] >= 0]
    return {
        "baseline": baseline,
        "other": other,
        "samples": SAMPLES,
        "confidence": CONFIDENCE,
        "difference": {name: round(100 * found["deltas"][name], 4) for name in figures},
        "standard_error": {name: round(100 * found["ci"][name]["std_err"], 4) for name in figures},
        "interval": {name: [round(100 * found["ci"][name][end], 4) for end in ("lower", "upper")] for name in figures},
    }
