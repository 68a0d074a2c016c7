"""Collect what a table shows from the records: measured values, the paper's values, differences, verdicts. Imports no torch."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from sparseinst.ablation.compare import compare_key
from sparseinst.ablation.peers import PeerResult, find_peers
from sparseinst.ablation.statistics import Difference, Noise, Sample, Spread, Verdict, difference, pooled_spread, verdict
from sparseinst.ablation.store import RESULTS, Record, Store
from sparseinst.ablation.study import (
    AccuracyFigure,
    Figure,
    MechanismFigure,
    Profile,
    Row,
    Table,
    list_tables,
    read_profile,
    read_tables,
    row_config,
)

SEEDS = range(10)
"""The seeds that a report looks for."""
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


@dataclass(frozen=True)
class Cell:
    measured: Sample | None
    """None if there is no value."""
    paper: float | None
    difference: Difference | None = None
    """The difference from the reference row, for AP metrics; None for that row itself, and if no source of noise is known."""


@dataclass(frozen=True)
class RowResult:
    row: Row
    state: str
    """`done` if an evaluation is recorded, otherwise the state of the training or evaluation that is missing."""
    cells: dict[Column, Cell]
    paper_difference: float | None
    """The paper's difference in AP from the reference row."""
    verdict: Verdict | None
    keys: tuple[str, ...] = ()
    """The keys of the row's records: trainings, evaluations, timings, comparisons with the reference row."""
    trainings: tuple[str, ...] = ()
    """The keys of the trainings alone."""
    evaluations: tuple[str, ...] = ()
    """The keys of the evaluations alone."""
    timing: str = "done"
    """The state of the row's timing."""

    def state_of(self, metric: Figure) -> str:
        """Return the state of the stages that measure a metric; `done` if they are recorded."""
        return self.state if metric in EVALUATED else self.timing

    @property
    def missing(self) -> str | None:
        """The states of the stages that are not done; None if all are."""
        states = {"": self.state, "timing ": self.timing}
        return ", ".join(f"{prefix}{state}" for prefix, state in states.items() if state != "done") or None


@dataclass(frozen=True)
class TableResult:
    table: Table
    profile: str
    columns: list[Column]
    rows: list[RowResult]
    peers: list[PeerResult] = field(default_factory=list)
    """The results of other systems that were measured here."""
    provenance: list[str] = field(default_factory=list)
    """Which code, devices and data the values come from."""

    @property
    def name(self) -> str:
        """The name of the table's files, without suffix."""
        return f"{self.table.name}-{self.profile}"


@dataclass
class _RowRecords:
    """The records of one row."""

    evaluations: dict[int, Record]
    """The evaluations, by seed."""
    latencies: dict[str, Record]
    """The timings, by device."""
    trainings: list[str]
    """The keys of the recorded trainings."""
    state: str
    timing: str = "done"


def read_results(
    names: Sequence[str], profile: str, results: Path = RESULTS, states: Mapping[str, str] | None = None
) -> list[TableResult]:
    """Return the results of tables, from their specs and the records.

    The spread over seeds is pooled over all tables that exist, so that a table shows the same values alone and with others.

    Args:
        names: tables by name or specs by path; an empty list means all tables.
        profile: the scale, by name or path.
        states: the states of stages that are not done, by key; a stage without a state is pending.

    Raises:
        UserError: a spec or the profile does not exist, or contains a mistake.
    """
    tables, settings, store = read_tables(names), read_profile(profile), Store(results)
    keys = store.keys()
    others = read_tables(["all"]) if list_tables() else []
    spreads = seed_spreads([*tables, *others], settings, store, keys)
    return [collect(table, settings, store, states or {}, spreads, keys) for table in tables]


def seed_spreads(tables: Sequence[Table], profile: Profile, store: Store, keys: set[str]) -> dict[Figure, Spread]:
    """Return the spread over seeds of each AP metric, pooled over all rows of the tables that have several seeds.

    A row that several tables share counts once.
    """
    rows: dict[str, _RowRecords] = {}
    for table in tables:
        if "evaluate" in table.spec.stages():
            for row in table.spec.rows:
                key = row_config(table.spec, row, profile).evaluate_key()
                if key not in rows:
                    rows[key] = _find_records(table, row, profile, store, {}, keys)
    samples = {metric: [_sample(records, Column(metric)) for records in rows.values()] for metric in get_args(AccuracyFigure)}
    pooled = {metric: pooled_spread(sample for sample in of_rows if sample is not None) for metric, of_rows in samples.items()}
    return {metric: spread for metric, spread in pooled.items() if spread is not None}


def collect(
    table: Table,
    profile: Profile,
    store: Store,
    states: Mapping[str, str],
    spreads: Mapping[Figure, Spread],
    keys: set[str] | None = None,
) -> TableResult:
    """Return the results of one table.

    Args:
        states: the states of stages that are not done, by key; a stage without a state is pending.
        spreads: the spread of each metric over seeds; see `seed_spreads`.
        keys: the keys of all records; None reads them from the store.
    """
    keys = store.keys() if keys is None else keys
    records = {row.name: _find_records(table, row, profile, store, states, keys) for row in table.spec.rows}
    peers = find_peers(store, table.spec.peers, profile.name, keys)
    devices = sorted({d for entry in records.values() for d in entry.latencies} | {d for peer in peers for d in peer.whole_ms})
    columns = [column for metric in table.spec.figures for column in _columns(metric, devices)]
    samples = {
        (name, column): sample
        for name, entry in records.items()
        for column in columns
        if (sample := _sample(entry, column)) is not None
    }
    reference = table.spec.reference
    trainings = {row.name: row_config(table.spec, row, profile).train_key() for row in table.spec.rows}
    rows = []
    for row in table.spec.rows:
        entry = records[row.name]
        errors = _standard_errors(entry, records[reference], store, keys) if reference not in (None, row.name) else {}
        cells = {}
        for column in columns:
            measured = samples.get((row.name, column))
            base = samples.get((reference, column)) if reference not in (None, row.name) else None
            from_reference = None
            if measured is not None and base is not None and column.metric in ACCURACY:
                same_weights = trainings[row.name] == trainings[str(reference)] and _evaluate_same_weights(
                    entry, records[str(reference)]
                )
                if same_weights:  # the two rows are compared seed by seed, so the reference needs the row's seeds
                    base = _sample(records[str(reference)], column, entry.evaluations) or base
                noise = Noise(spreads.get(column.metric), errors.get(column.metric, ()), same_weights)
                from_reference = difference(measured, base, noise)
            cells[column] = Cell(measured, row.paper.get(column.metric), from_reference)
        paper = _paper_difference(table, row)
        ap = cells.get(Column("AP"))
        ap_verdict = verdict(ap.difference, paper) if ap is not None and paper is not None else None
        row_keys = _row_keys(entry, records.get(str(reference)), keys)
        evaluations = tuple(record.key for record in entry.evaluations.values())
        rows.append(
            RowResult(row, entry.state, cells, paper, ap_verdict, row_keys, tuple(entry.trainings), evaluations, entry.timing)
        )
    return TableResult(table, profile.name, columns, rows, peers, _provenance(records.values()))


def _evaluate_same_weights(row: _RowRecords, reference: _RowRecords) -> bool:
    """Return whether two rows of one training evaluate the same files. A training that was done again can give other weights."""
    digests = [
        {record.provenance.get("weights") for entry in (row, reference) if (record := entry.evaluations.get(seed)) is not None}
        for seed in row.evaluations
    ]
    return all(len(found) <= 1 for found in digests)


def _columns(metric: Figure, devices: Sequence[str]) -> list[Column]:
    """Return the columns of a metric: a timing has one for each device."""
    if metric in EVALUATED:
        return [Column(metric)]
    return [Column(metric, device) for device in devices] or [Column(metric)]


def _find_records(
    table: Table, row: Row, profile: Profile, store: Store, states: Mapping[str, str], keys: set[str]
) -> _RowRecords:
    """Read the records of one row: all seeds and all devices."""
    stages = table.spec.stages()
    base = row_config(table.spec, row, profile)
    entry = _RowRecords({}, {}, [], "done")
    if "evaluate" in stages:
        for seed in SEEDS:
            config = base.model_copy(update={"train": base.train.model_copy(update={"seed": seed})})
            key, training = config.evaluate_key(), config.train_key()
            if training in keys:
                entry.trainings.append(training)
            record = store.load(key) if key in keys else None
            if record is not None:
                entry.evaluations[seed] = record
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


def _sample(entry: _RowRecords, column: Column, seeds: Container[int] = SEEDS) -> Sample | None:
    """Return the row's values in a column: one for each of the seeds, or one timing; None if there is none."""
    if column.metric in EVALUATED:
        records = [record for seed, record in sorted(entry.evaluations.items()) if seed in seeds]
        values = [_evaluated_value(record.result, column.metric) for record in records]
        known = tuple(float(value) for value in values if value is not None)
        return Sample(known) if known else None
    record = entry.latencies.get(column.device or "")
    return Sample((_timed_value(record.result, column.metric),)) if record is not None else None


def _evaluated_value(result: dict[str, Any], metric: str) -> float | None:
    """Return a metric of an evaluation, AP and shares in percent; None if it has no value."""
    if metric in ACCURACY:
        ap: float | None = result["figures"].get(metric)
        return ap
    value = result.get("mechanism", {}).get(metric)
    return value if value is None or metric in _NOT_PERCENT else 100 * value


def _timed_value(result: dict[str, Any], metric: str) -> float:
    """Return a metric of a timing, in milliseconds or images per second."""
    if metric in result["modules_ms"]:
        return float(result["modules_ms"][metric])
    median = float(result["whole_ms"]["median"])
    return median if metric == "ms" else 1000 / median


def _standard_errors(row: _RowRecords, reference: _RowRecords, store: Store, keys: set[str]) -> dict[str, list[float]]:
    """Return the standard errors of the paired bootstrap over images by metric, one for each seed that both rows have."""
    errors: dict[str, list[float]] = {}
    for seed, record in row.evaluations.items():
        baseline = reference.evaluations.get(seed)
        key = compare_key(baseline.key, record.key) if baseline is not None else ""
        comparison = store.load(key) if key in keys else None
        for metric, error in (comparison.result["standard_error"] if comparison is not None else {}).items():
            errors.setdefault(metric, []).append(error)
    return errors


def _row_keys(row: _RowRecords, reference: _RowRecords | None, keys: set[str]) -> tuple[str, ...]:
    """Return the keys of a row's records; see `RowResult.keys`."""
    measured = [record.key for record in (*row.evaluations.values(), *row.latencies.values())]
    baselines = reference.evaluations if reference is not None else {}
    compared = [compare_key(baselines[s].key, record.key) for s, record in row.evaluations.items() if s in baselines]
    return (*row.trainings, *measured, *(key for key in compared if key in keys))


def _paper_difference(table: Table, row: Row) -> float | None:
    reference = next((other for other in table.spec.rows if other.name == table.spec.reference), None)
    if reference is None or reference is row or "AP" not in row.paper or "AP" not in reference.paper:
        return None
    return round(row.paper["AP"] - reference.paper["AP"], 1)


def _provenance(rows: Iterable[_RowRecords]) -> list[str]:
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

    code = [about for r in records for about in (r.provenance, r.provenance.get("trained", {}), *_earlier_code(r)) if about]
    commits = sorted({str(about.get("commit") or "unknown")[:10] + ("+" if about.get("changes") else "") for about in code})
    return [
        f"{len(records)} records",
        f"device {distinct('device')}",
        f"seeds {distinct('seed')}",
        f"sparseinst {distinct('versions', 'sparseinst')} at {', '.join(commits)}",
        f"torch {distinct('versions', 'torch')}",
        f"evaluator hotcoco {distinct('versions', 'hotcoco')}",
        f"validation data {distinct('data')}",
    ]


def _earlier_code(record: Record) -> list[dict[str, Any]]:
    """Return the versions of the code that trained the weights before the last version took over."""
    earlier: list[dict[str, Any]] = record.provenance.get("trained", {}).get("earlier", [])
    return earlier
