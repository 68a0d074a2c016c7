"""Collect what a table shows from the records: measured values, the paper's values, differences, verdicts. Imports no torch."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np

from sparseinst.ablation.gate import untrained_ap
from sparseinst.ablation.looks import Look, last_decisions, look_name, penalties, read_looks
from sparseinst.ablation.peers import PeerResult, find_peers
from sparseinst.ablation.statistics import Comparison, Difference, Judgement, Prior, Sample, difference, estimate_prior, judge
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
from sparseinst.config import Config

SEEDS = range(12)
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
    spread: tuple[float, float] | None = None
    """The 5th and 95th percentile of a timing."""


@dataclass(frozen=True)
class RowResult:
    row: Row
    state: str
    """`done` if an evaluation is recorded, otherwise the state of the training or evaluation that is missing."""
    cells: dict[Column, Cell]
    paper_difference: float | None
    """The paper's difference in AP from the reference row."""
    judgement: Judgement | None
    """The verdict on the difference in AP; None if there is none."""
    not_trained: tuple[str, ...] = ()
    """The reasons why a training of this row, or of the reference row, is no evidence. Such a row has no verdict."""
    same_as: str | None = None
    """An earlier row with the same evaluations, whose comparison is the same."""
    as_run: str = ""
    """The backbone, image size and width with which the row was run."""
    keys: tuple[str, ...] = ()
    """The keys of the row's records: trainings, evaluations, timings."""
    trainings: tuple[str, ...] = ()
    """The keys of the trainings alone."""
    evaluations: tuple[str, ...] = ()
    """The keys of the evaluations alone."""
    timing: str = "done"
    """The state of the row's timing."""

    @property
    def verdict(self) -> str:
        """The verdict in words; empty if there is none."""
        if self.not_trained:
            return "not trained"
        return self.judgement.text if self.judgement is not None else ""

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
    def comparisons(self) -> int:
        """The number of distinct comparisons that have a verdict; they share one false discovery rate."""
        return sum(row.judgement is not None and row.same_as is None for row in self.rows)

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
    not_trained: list[str] = field(default_factory=list)
    """The reasons why a training of this row is no evidence."""


def read_results(
    names: Sequence[str], profile: str, results: Path = RESULTS, states: Mapping[str, str] | None = None
) -> list[TableResult]:
    """Return the results of tables, from their specs and the records.

    The prior of the variance over seeds comes from all tables that exist, so that a table shows the same values alone and with
    others.

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
    priors = seed_priors([*tables, *others], settings, store, keys)
    return [collect(table, settings, store, states or {}, priors, keys) for table in tables]


def seed_priors(tables: Sequence[Table], profile: Profile, store: Store, keys: set[str]) -> dict[Figure, Prior]:
    """Return what all rows of the tables together tell about the variance over seeds of each AP metric.

    Each distinct training counts once. Rows that are not trained do not count.
    """
    rows: dict[str, _RowRecords] = {}
    for table in tables:
        if "evaluate" in table.spec.stages():
            for row in table.spec.rows:
                key = row_config(table.spec, row, profile).train_key()
                if key not in rows:
                    rows[key] = _find_records(table, row, profile, store, {}, keys)
    trained = [records for records in rows.values() if not records.not_trained]
    samples = {metric: [_sample(records, Column(metric)) for records in trained] for metric in get_args(AccuracyFigure)}
    priors = {metric: estimate_prior(sample for sample in of_rows if sample is not None) for metric, of_rows in samples.items()}
    return {metric: prior for metric, prior in priors.items() if prior is not None}


def collect(
    table: Table,
    profile: Profile,
    store: Store,
    states: Mapping[str, str],
    priors: Mapping[Figure, Prior],
    keys: set[str] | None = None,
) -> TableResult:
    """Return the results of one table.

    Args:
        states: the states of stages that are not done, by key; a stage without a state is pending.
        priors: what all tables tell about the variance over seeds of each metric; see `seed_priors`.
        keys: the keys of all records; None reads them from the store.
    """
    keys = store.keys() if keys is None else keys
    records = {row.name: _find_records(table, row, profile, store, states, keys) for row in table.spec.rows}
    peers = find_peers(store, table.spec.peers, profile.name, keys)
    devices = sorted({d for entry in records.values() for d in entry.latencies} | {d for peer in peers for d in peer.whole_ms})
    columns = [column for metric in table.spec.figures for column in _columns(metric, devices)]
    reference = table.spec.reference
    configs = {row.name: row_config(table.spec, row, profile) for row in table.spec.rows}
    rows = []
    for row in table.spec.rows:
        entry = records[row.name]
        base = records[reference] if reference is not None and reference != row.name else None
        shares = base is not None and configs[row.name].train_key() == configs[str(reference)].train_key()
        cells = {column: _cell(entry, base, column, row, priors, shares_training=shares) for column in columns}
        doubts = dict.fromkeys((*entry.not_trained, *(f"{reference}: {why}" for why in (base.not_trained if base else ()))))
        rows.append(
            RowResult(
                row=row,
                state=entry.state,
                cells=cells,
                paper_difference=_paper_difference(table, row),
                judgement=None,
                not_trained=tuple(doubts) if base is not None and entry.evaluations else tuple(entry.not_trained),
                as_run=_as_run(configs[row.name]),
                keys=(*entry.trainings, *(record.key for record in (*entry.evaluations.values(), *entry.latencies.values()))),
                trainings=tuple(entry.trainings),
                evaluations=tuple(record.key for record in entry.evaluations.values()),
                timing=entry.timing,
            )
        )
    found = TableResult(table, profile.name, columns, rows, peers, _provenance(records.values()))
    return replace(found, rows=_judged(found, read_looks(store.results, look_name(table, profile))))


def _cell(
    entry: _RowRecords,
    reference: _RowRecords | None,
    column: Column,
    row: Row,
    priors: Mapping[Figure, Prior],
    *,
    shares_training: bool,
) -> Cell:
    """Return a row's cell in a column.

    Args:
        reference: the records of the reference row; None for that row itself, and if the table has none.
        shares_training: both rows evaluate the same training.
    """
    measured = _sample(entry, column)
    found = None
    if measured is not None and reference is not None and column.metric in ACCURACY:
        same_weights = shares_training and _evaluate_same_weights(entry, reference)
        # Two evaluations of the same weights are compared seed by seed, so the reference needs the row's seeds.
        base = (_sample(reference, column, entry.evaluations) if same_weights else None) or _sample(reference, column)
        if base is not None and _share_images(entry, reference):
            error = _image_error(entry, reference, column.metric, entry.evaluations if same_weights else SEEDS)
            found = difference(measured, base, priors.get(column.metric), error, same_weights=same_weights)
    timed = entry.latencies.get(column.device or "")
    spread = _timed_spread(timed.result, column.metric) if timed is not None and column.metric not in EVALUATED else None
    return Cell(measured, row.paper.get(column.metric), found, spread)


def compared_rows(result: TableResult) -> dict[str, Comparison]:
    """Return the distinct comparisons of a table by row, without rows that are not trained.

    Rows that are one and the same evaluation count once, under the name of the first. A row that is the same evaluation as the
    reference row is no comparison.
    """
    first = {row.evaluations: row.row.name for row in result.rows if row.row.name == result.table.spec.reference}
    compared: dict[str, Comparison] = {}
    for row in result.rows:
        found = row.cells[Column("AP")].difference if Column("AP") in row.cells else None
        if found is None or row.not_trained:
            continue
        if first.setdefault(row.evaluations, row.row.name) == row.row.name:
            compared[row.row.name] = Comparison(found, row.paper_difference, result.table.spec.margin)
    return compared


def _judged(result: TableResult, looks: Sequence[Look]) -> list[RowResult]:
    """Return the rows with their verdicts.

    Args:
        looks: the looks at the table while its seeds were added. Verdicts pay for them, and what a look has settled stays
            settled.
    """
    penalty, decisions = penalties(looks), last_decisions(looks)
    compared = {name: replace(comparison, penalty=penalty.get(name, 1.0)) for name, comparison in compared_rows(result).items()}
    judgements = dict(zip(compared, judge(list(compared.values())), strict=True))
    for name, judgement in judgements.items():
        if judgement.verdict == "undecided" and name in decisions and decisions[name].kind == "settled":
            judgements[name] = replace(judgement, verdict=decisions[name].verdict, more_seeds=None)
    names = {row.evaluations: row.row.name for row in reversed(result.rows) if row.row.name in judgements}
    rows = []
    for row in result.rows:
        first = names.get(row.evaluations)
        if first is None or row.not_trained or row.cells[Column("AP")].difference is None:
            rows.append(row)
        else:
            rows.append(replace(row, judgement=judgements[first], same_as=first if first != row.row.name else None))
    return rows


def _as_run(config: Config) -> str:
    """Return the backbone, image size and width of a row, for people."""
    width = round(config.model.encoder.channels * config.model.width_factor)
    return f"{config.model.backbone.name}, {config.inference.sides()[0]} px, {width} channels"


def _share_images(row: _RowRecords, reference: _RowRecords) -> bool:
    """Return whether all evaluations of two rows are of the same validation images."""
    records = [*row.evaluations.values(), *reference.evaluations.values()]
    return len({(record.provenance.get("data"), record.result.get("images")) for record in records}) <= 1


def _image_error(row: _RowRecords, reference: _RowRecords, metric: str, reference_seeds: Container[int]) -> float | None:
    """Return the standard error over images of the difference of the seeds' means.

    Args:
        reference_seeds: the seeds of the reference row that are compared.

    Returns:
        None if an evaluation has no resamplings.
    """
    means = []
    for entry, seeds in ((row, SEEDS), (reference, reference_seeds)):
        resampled = [r.result.get("resampled", {}).get(metric) for seed, r in entry.evaluations.items() if seed in seeds]
        if not resampled or any(values is None for values in resampled) or len({len(values) for values in resampled}) > 1:
            return None
        means.append(np.mean([[np.nan if value is None else value for value in values] for values in resampled], axis=0))
    if len(means[0]) != len(means[1]):
        return None
    differences = means[0] - means[1]
    differences = differences[~np.isnan(differences)]
    return float(differences.std(ddof=1)) if len(differences) > 1 else None


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


def _timed_spread(result: dict[str, Any], metric: str) -> tuple[float, float] | None:
    """Return the 5th and 95th percentile of a timing; None for a module, whose percentiles are not recorded."""
    whole = result["whole_ms"]
    if metric in result["modules_ms"] or not {"p5", "p95"} <= whole.keys():
        return None
    low, high = float(whole["p5"]), float(whole["p95"])
    return (low, high) if metric == "ms" else (1000 / high, 1000 / low)


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
