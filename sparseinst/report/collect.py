"""From the store to what a table shows: measured figures, the paper's, differences, verdicts. Imports no torch."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
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
    Profile,
    Row,
    Table,
    list_tables,
    read_profile,
    read_tables,
    row_config,
)

SEEDS = range(10)
"""Which seeds a report looks for."""
ACCURACY: tuple[str, ...] = get_args(AccuracyFigure)


@dataclass(frozen=True)
class Column:
    """A column of numbers."""

    figure: Figure
    device: str | None = None
    """Where latency was measured; figures of two devices never share a column."""

    @property
    def title(self) -> str:
        return self.figure if self.device is None else f"{self.figure} ({self.device})"


@dataclass(frozen=True)
class Cell:
    measured: Sample | None
    """None for a gap."""
    paper: float | None
    difference: Difference | None = None
    """From the reference row; None for that row itself, and where nothing is known of the noise."""


@dataclass(frozen=True)
class RowResult:
    row: Row
    state: str
    """`done`, or what is missing: the state of its training and evaluation."""
    cells: dict[Column, Cell]
    paper_difference: float | None
    """In AP, from the reference row."""
    verdict: Verdict | None
    keys: tuple[str, ...] = ()
    """Of its records: trainings, evaluations, timings, comparisons with the reference row."""
    timing: str = "done"
    """The state of its timing."""

    def state_of(self, figure: Figure) -> str:
        """`done`, or why there is no such figure."""
        return self.state if figure in ACCURACY else self.timing

    @property
    def missing(self) -> str | None:
        """What is; None where all is measured."""
        gaps = {"": self.state, "timing ": self.timing}
        return ", ".join(f"{what}{state}" for what, state in gaps.items() if state != "done") or None


@dataclass(frozen=True)
class TableResult:
    table: Table
    profile: str
    columns: list[Column]
    rows: list[RowResult]
    peers: list[PeerResult] = field(default_factory=list)
    """Other systems that were measured here."""
    provenance: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        """Of its files."""
        return f"{self.table.name}-{self.profile}"


@dataclass
class _Found:
    """The records of one row."""

    evaluations: dict[int, Record]
    """By seed."""
    latencies: dict[str, Record]
    """By device."""
    trainings: list[str]
    """Keys of those that are recorded."""
    state: str
    timing: str = "done"


def read_results(
    names: Sequence[str], profile: str, results: Path = RESULTS, states: Mapping[str, str] | None = None
) -> list[TableResult]:
    """What these tables show, from specs and records.

    The spread over seeds is taken over every table there is, so that a table says the same alone and with others.

    Args:
        names: tables by name, specs by path; none for all.
        profile: the scale, by name or path.
        states: by key, of stages that are not done; others are pending.

    Raises:
        UserError: no such spec or profile, or a mistake in one.
    """
    tables, settings, store = read_tables(names), read_profile(profile), Store(results)
    keys = store.keys()
    others = read_tables(["all"]) if list_tables() else []
    spreads = seed_spreads([*tables, *others], settings, store, keys)
    return [collect(table, settings, store, states or {}, spreads, keys) for table in tables]


def seed_spreads(tables: Sequence[Table], profile: Profile, store: Store, keys: set[str]) -> dict[Figure, Spread]:
    """The spread over seeds of each figure, pooled over all rows of the tables that have several; a row that several tables
    share counts once."""
    rows: dict[str, _Found] = {}
    for table in tables:
        if "evaluate" in table.spec.stages():
            for row in table.spec.rows:
                key = row_config(table.spec, row, profile).evaluate_key()
                if key not in rows:
                    rows[key] = _find(table, row, profile, store, {}, keys)
    samples = {figure: [_sample(found, Column(figure)) for found in rows.values()] for figure in get_args(AccuracyFigure)}
    pooled = {figure: pooled_spread(sample for sample in found if sample is not None) for figure, found in samples.items()}
    return {figure: spread for figure, spread in pooled.items() if spread is not None}


def collect(
    table: Table,
    profile: Profile,
    store: Store,
    states: Mapping[str, str],
    spreads: Mapping[Figure, Spread],
    keys: set[str] | None = None,
) -> TableResult:
    """All that one table shows.

    Args:
        spreads: over seeds; see `seed_spreads`.
        states: by key, of stages that are not done; others are pending.
        keys: of the store, where the caller has them already.
    """
    keys = store.keys() if keys is None else keys
    found = {row.name: _find(table, row, profile, store, states, keys) for row in table.spec.rows}
    peers = find_peers(store, table.spec.peers, profile.name, keys)
    devices = sorted({d for entry in found.values() for d in entry.latencies} | {d for peer in peers for d in peer.whole_ms})
    columns = [column for figure in table.spec.figures for column in _columns(figure, devices)]
    samples = {
        (name, column): sample
        for name, entry in found.items()
        for column in columns
        if (sample := _sample(entry, column)) is not None
    }
    reference = table.spec.reference
    trainings = {row.name: row_config(table.spec, row, profile).train_key() for row in table.spec.rows}
    rows = []
    for row in table.spec.rows:
        errors = _standard_errors(found[row.name], found[reference], store, keys) if reference not in (None, row.name) else {}
        cells = {}
        for column in columns:
            measured = samples.get((row.name, column))
            base = samples.get((reference, column)) if reference not in (None, row.name) else None
            gap = None
            if measured is not None and base is not None and column.figure in ACCURACY:
                same = trainings[row.name] == trainings[str(reference)]
                if same:  # then seed by seed
                    base = _sample(found[str(reference)], column, found[row.name].evaluations) or base
                gap = difference(measured, base, Noise(spreads.get(column.figure), errors.get(column.figure, ()), same))
            cells[column] = Cell(measured, row.paper.get(column.figure), gap)
        paper = _paper_difference(table, row)
        ap = cells.get(Column("AP"))
        told = verdict(ap.difference, paper) if ap is not None and paper is not None else None
        known = _keys(found[row.name], found.get(str(reference)), keys)
        rows.append(RowResult(row, found[row.name].state, cells, paper, told, known, found[row.name].timing))
    return TableResult(table, profile.name, columns, rows, peers, _provenance(found.values()))


def _columns(figure: Figure, devices: Sequence[str]) -> list[Column]:
    if figure in ACCURACY:
        return [Column(figure)]
    return [Column(figure, device) for device in devices] or [Column(figure)]


def _find(table: Table, row: Row, profile: Profile, store: Store, states: Mapping[str, str], keys: set[str]) -> _Found:
    stages = table.spec.stages()
    base = row_config(table.spec, row, profile)
    entry = _Found({}, {}, [], "done")
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
                told = (states.get(stage_key) for stage_key in (key, training))
                entry.state = next((state for state in told if state not in (None, "pending", "done")), None) or "pending"
        if entry.evaluations:
            entry.state = "done"
    if "latency" in stages:
        prefix = base.latency_prefix()
        for key in sorted(key for key in keys if key.startswith(f"{prefix}-")):
            record = store.load(key)
            if record is not None:
                entry.latencies[record.provenance.get("device", "unknown device")] = record
        if not entry.latencies:
            untold = (state for key, state in states.items() if key.startswith(f"{prefix}-") and state != "done")
            entry.timing = next(untold, "pending")
    return entry


def _sample(entry: _Found, column: Column, seeds: Container[int] = SEEDS) -> Sample | None:
    if column.figure in ACCURACY:
        records = [record for seed, record in sorted(entry.evaluations.items()) if seed in seeds]
        values = [record.result["figures"].get(column.figure) for record in records]
        known = tuple(float(value) for value in values if value is not None)
        return Sample(known) if known else None
    record = entry.latencies.get(column.device or "")
    return Sample((_latency(record.result, column.figure),)) if record is not None else None


def _latency(result: dict[str, Any], figure: str) -> float:
    if figure in result["modules_ms"]:
        return float(result["modules_ms"][figure])
    median = float(result["whole_ms"]["median"])
    return median if figure == "ms" else 1000 / median


def _standard_errors(row: _Found, reference: _Found, store: Store, keys: set[str]) -> dict[str, list[float]]:
    """Of the paired bootstrap over images, by figure, one a seed that both rows have."""
    errors: dict[str, list[float]] = {}
    for seed, record in row.evaluations.items():
        baseline = reference.evaluations.get(seed)
        key = compare_key(baseline.key, record.key) if baseline is not None else ""
        comparison = store.load(key) if key in keys else None
        for figure, error in (comparison.result["standard_error"] if comparison is not None else {}).items():
            errors.setdefault(figure, []).append(error)
    return errors


def _keys(row: _Found, reference: _Found | None, keys: set[str]) -> tuple[str, ...]:
    """Of the records behind a row."""
    measured = [record.key for record in (*row.evaluations.values(), *row.latencies.values())]
    baselines = reference.evaluations if reference is not None else {}
    compared = [compare_key(baselines[s].key, record.key) for s, record in row.evaluations.items() if s in baselines]
    return (*row.trainings, *measured, *(key for key in compared if key in keys))


def _paper_difference(table: Table, row: Row) -> float | None:
    reference = next((other for other in table.spec.rows if other.name == table.spec.reference), None)
    if reference is None or reference is row or "AP" not in row.paper or "AP" not in reference.paper:
        return None
    return round(row.paper["AP"] - reference.paper["AP"], 1)


def _provenance(found: Any) -> list[str]:
    """What the records say of themselves, each fact once."""
    records = [r for entry in found for r in (*entry.evaluations.values(), *entry.latencies.values())]
    if not records:
        return []

    def all_of(*path: str) -> str:
        values = set()
        for record in records:
            value: Any = record.provenance
            for name in path:
                value = value.get(name) if isinstance(value, dict) else None
            if value is not None:
                values.add(str(value))
        return ", ".join(sorted(values)) or "unknown"

    code = [about for r in records for about in (r.provenance, r.provenance.get("trained", {}), *_earlier(r)) if about]
    commits = sorted({str(about.get("commit") or "unknown")[:10] + ("+" if about.get("changes") else "") for about in code})
    return [
        f"{len(records)} records",
        f"device {all_of('device')}",
        f"seeds {all_of('seed')}",
        f"sparseinst {all_of('versions', 'sparseinst')} at {', '.join(commits)}",
        f"torch {all_of('versions', 'torch')}",
        f"evaluator hotcoco {all_of('versions', 'hotcoco')}",
        f"validation data {all_of('data')}",
    ]


def _earlier(record: Record) -> list[dict[str, Any]]:
    """Code that worked on the weights before that which ended their training."""
    found: list[dict[str, Any]] = record.provenance.get("trained", {}).get("earlier", [])
    return found
