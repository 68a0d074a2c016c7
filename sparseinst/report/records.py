"""Find the records of a table's rows, and read values and their noise from them. Imports no torch."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast, get_args

import numpy as np

from sparseinst.ablation.gate import untrained_ap
from sparseinst.ablation.peers import Evaluated
from sparseinst.ablation.statistics import Sample
from sparseinst.ablation.store import Record, Store
from sparseinst.ablation.study import SEEDS, AccuracyFigure, Figure, MechanismFigure, Profile, Row, Table, row_config

ACCURACY: tuple[str, ...] = get_args(AccuracyFigure)
EVALUATED: tuple[str, ...] = (*ACCURACY, *get_args(MechanismFigure))
"""The metrics that come from an evaluation; all others come from a timing."""
_NOT_PERCENT = ("lift", "duplicates")
"""The mechanism metrics that are not shares, so that they are not shown in percent."""


@dataclass(frozen=True)
class Column:
    """A column of a table: one metric, and for a timing one device."""

    metric: Figure
    device: str | None = None
    """The device that was timed; the times of two devices never share a column."""

    @property
    def title(self) -> str:
        return self.metric if self.device is None else f"{self.metric} ({self.device})"


@dataclass
class RowRecords:
    """The records of one row."""

    evaluations: dict[int, Record]
    """The evaluations, by seed."""
    latencies: dict[str, Record]
    """The timings, by device."""
    trainings: list[str]
    """The keys of the recorded trainings."""
    state: str
    timing: str = "done"
    not_trained: list[str] = field(default_factory=list)
    """The reasons why a training of this row is no evidence."""


def find_records(table: Table, row: Row, profile: Profile, store: Store, states: Mapping[str, str], keys: set[str]) -> RowRecords:
    """Read the records of one row: all seeds and all devices."""
    stages = table.spec.stages()
    base = row_config(table.spec, row, profile)
    entry = RowRecords({}, {}, [], "done")
    if "evaluate" in stages:
        for seed, (training, key) in base.keys_of_seeds(SEEDS).items():
            record = store.load(key) if key in keys else None
            if training in keys:
                entry.trainings.append(training)
                trained = store.load(training) if record is not None else None
                reasons = trained.result.get("not_trained", []) if trained is not None else []
                entry.not_trained += [f"seed {seed}: {why}" for why in reasons]
            if record is not None:
                entry.evaluations[seed] = record
                entry.not_trained += [f"seed {seed}: {why}" for why in untrained_ap(record.result["figures"].get("AP"))]
            elif seed == SEEDS[0]:
                known = (states.get(stage_key) for stage_key in (key, training))
                entry.state = next((state for state in known if state not in (None, "pending", "done")), None) or "pending"
        if entry.evaluations:
            entry.state = "done"
    if "latency" in stages:
        prefix = base.latency_prefix()
        for key in sorted(key for key in keys if key.startswith(f"{prefix}-")):
            record = store.load(key)
            if record is not None:
                entry.latencies[record.provenance.get("device", "unknown device")] = record
        if not entry.latencies:
            not_done = (state for key, state in states.items() if key.startswith(f"{prefix}-") and state != "done")
            entry.timing = next(not_done, "pending")
    return entry


def columns_of(metric: Figure, devices: Sequence[str]) -> list[Column]:
    """Return the columns of a metric: a timing has one for each device."""
    if metric in EVALUATED:
        return [Column(metric)]
    return [Column(metric, device) for device in devices] or [Column(metric)]


def sample_of(entry: RowRecords, column: Column, seeds: Container[int] = SEEDS) -> Sample | None:
    """Return the row's values in a column: one for each of the seeds, or one timing; None if there is none."""
    if column.metric in EVALUATED:
        records = [record for seed, record in sorted(entry.evaluations.items()) if seed in seeds]
        values = [_evaluated_value(record.result, column.metric) for record in records]
        known = tuple(float(value) for value in values if value is not None)
        return Sample(known) if known else None
    record = entry.latencies.get(column.device or "")
    value = _timed_value(record.result, column.metric) if record is not None else None
    return Sample((value,)) if value is not None else None


def _evaluated_value(result: dict[str, Any], metric: str) -> float | None:
    """Return a metric of an evaluation, AP and shares in percent; None if it has no value."""
    if metric in ACCURACY:
        ap: float | None = result["figures"].get(metric)
        return ap
    value = result.get("mechanism", {}).get(metric)
    return value if value is None or metric in _NOT_PERCENT else 100 * value


def _timed_value(result: dict[str, Any], metric: str) -> float | None:
    """Return a metric of a timing, in milliseconds or images per second; None for a module that was not timed by itself."""
    if metric not in ("ms", "FPS"):
        return cast("float | None", result["modules_ms"].get(metric))
    median = float(result["whole_ms"]["median"])
    return median if metric == "ms" else 1000 / median


def timed_spread(result: dict[str, Any], metric: str) -> tuple[float, float] | None:
    """Return the 5th and 95th percentile of a timing; None if they are not recorded."""
    if metric not in ("ms", "FPS"):
        of_module = result.get("modules_range_ms", {}).get(metric)
        return tuple(of_module) if of_module is not None else None
    whole = result["whole_ms"]
    if not {"p5", "p95"} <= whole.keys():
        return None
    low, high = float(whole["p5"]), float(whole["p95"])
    return (low, high) if metric == "ms" else (1000 / high, 1000 / low)


def evaluate_same_weights(row: RowRecords, reference: RowRecords) -> bool:
    """Return whether two rows of one training evaluate the same files. A training that was done again can give other weights."""
    digests = [
        {record.provenance.get("weights") for entry in (row, reference) if (record := entry.evaluations.get(seed)) is not None}
        for seed in row.evaluations
    ]
    return all(len(found) <= 1 for found in digests)


def share_images(row: RowRecords, reference: RowRecords) -> bool:
    """Return whether all evaluations of two rows are of the same validation images."""
    records = [*row.evaluations.values(), *reference.evaluations.values()]
    contents = {record.provenance.get("images") for record in records} - {None}  # old records do not state it
    return len({evaluated_on(record) for record in records}) <= 1 and len(contents) <= 1


def evaluated_on(record: Record) -> Evaluated:
    """Return what an evaluation evaluated."""
    return record.provenance.get("data"), record.result.get("images")


def image_error(row: RowRecords, reference: RowRecords, metric: str, seeds: Container[int] = SEEDS) -> float | None:
    """Return the standard error over images of the difference of the seeds' means.

    Args:
        seeds: the seeds that are compared.

    Returns:
        None if an evaluation has no resamplings, or if so few images decide about the metric that it is the same in all of them.
    """
    means = []
    for entry in (row, reference):
        resampled = [r.result.get("resampled", {}).get(metric) for seed, r in entry.evaluations.items() if seed in seeds]
        if not resampled or any(values is None for values in resampled) or len({len(values) for values in resampled}) > 1:
            return None
        means.append(np.mean([[np.nan if value is None else value for value in values] for values in resampled], axis=0))
    if len(means[0]) != len(means[1]):
        return None
    differences = means[0] - means[1]
    known = differences[~np.isnan(differences)]
    if len(known) < 2 or (len(known) < len(differences) and not np.ptp(known)):
        return None
    return float(known.std(ddof=1))


def sessions_of(rows: Iterable[RowRecords]) -> dict[str, int]:
    """Return the number of sessions in which the rows were timed, by device. A record without a session was timed alone."""
    found: dict[str, set[str]] = {}
    for entry in rows:
        for device, record in entry.latencies.items():
            found.setdefault(device, set()).add(record.provenance.get("session") or record.key)
    return {device: len(sessions) for device, sessions in found.items()}


def provenance_of(rows: Iterable[RowRecords]) -> list[str]:
    """Return the devices, seeds, versions and data in the records of all rows, each value once."""
    records = [r for entry in rows for r in (*entry.evaluations.values(), *entry.latencies.values())]
    if not records:
        return []

    def distinct(*path: str) -> str:
        values = set()
        for record in records:
            value: Any = record.provenance
            for name in path:
                value = value.get(name) if isinstance(value, dict) else None
            if value is not None:
                values.add(str(value))
        return ", ".join(sorted(values)) or "unknown"

    def differing(name: str, *path: str) -> list[str]:
        text = distinct(*path)
        return [f"{name} {text}"] if ", " in text else []

    evaluated = any(record.kind == "evaluate" for record in records)
    code = [about for r in records for about in (r.provenance, r.provenance.get("trained", {}), *_earlier_code(r)) if about]
    commits = sorted({commit_of(about) for about in code})
    return [
        f"{len(records)} records",
        f"device {distinct('device')}",
        f"seeds {distinct('seed')}",
        f"sparseinst {distinct('versions', 'sparseinst')} at {', '.join(commits)}",
        f"torch {distinct('versions', 'torch')}",
        *([f"evaluator hotcoco {distinct('versions', 'hotcoco')}"] if evaluated else []),
        *([f"validation data {distinct('data')}"] if evaluated else []),
        # The same in almost all tables, so they are only worth their room if the records differ.
        *differing("image content", "images"),
        *differing("threads", "arithmetic", "threads"),
        *differing("instructions", "arithmetic", "instructions"),
        *differing("parts of a batch", "parts"),
    ]


def commit_of(about: Mapping[str, Any]) -> str:
    """Return ten digits of the commit in a provenance, with a plus and six digits of the changes if the code differed from it."""
    changes = about.get("changes")
    return str(about.get("commit") or "unknown")[:10] + (f"+{changes[:6]}" if changes else "")


def _earlier_code(record: Record) -> list[dict[str, Any]]:
    """Return the versions of the code that trained the weights before the last version took over."""
    earlier: list[dict[str, Any]] = record.provenance.get("trained", {}).get("earlier", [])
    return earlier
