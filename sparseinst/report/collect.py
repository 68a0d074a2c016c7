"""Collect what a table shows from the records: measured values, the paper's values, differences, verdicts. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import get_args

from sparseinst.ablation.looks import Look, last_decisions, look_name, penalties, read_looks
from sparseinst.ablation.peers import PeerResult, find_peers
from sparseinst.ablation.statistics import (
    Comparison,
    Difference,
    Judgement,
    Sample,
    TypicalNoise,
    difference,
    judge,
    typical_noise,
)
from sparseinst.ablation.store import RESULTS, Store
from sparseinst.ablation.study import (
    SEEDS,
    AccuracyFigure,
    Figure,
    Profile,
    Row,
    Table,
    all_tables,
    read_profile,
    read_tables,
    row_config,
)
from sparseinst.config import Config
from sparseinst.report.records import (
    ACCURACY,
    EVALUATED,
    Column,
    RowRecords,
    columns_of,
    evaluate_same_weights,
    evaluated_on,
    find_records,
    image_error,
    provenance_of,
    sample_of,
    sessions_of,
    share_images,
    timed_spread,
)


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
    doubts: tuple[str, ...] = ()
    """The reasons why a training of this row itself is no evidence."""
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
    compared_seeds: tuple[int, ...] | None = None
    """The seeds on which the row is compared, if it evaluates trainings of the reference row that has other seeds too."""
    other_images: bool = False
    """Whether the row and the reference row were not evaluated on the same images. Such a row has no difference."""

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
    sessions: dict[str, int] = field(default_factory=dict)
    """How many times the rows' timings were begun, by device. Times of one session were measured by turns."""
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


def read_results(
    names: Sequence[str], profile: str, results: Path = RESULTS, states: Mapping[str, str] | None = None
) -> list[TableResult]:
    """Return the results of tables, from their specs and the records.

    The typical noise of seeds comes from all tables that exist, so that a table shows the same values alone and with others.

    Args:
        names: tables by name or specs by path; an empty list means all tables.
        profile: the scale, by name or path.
        states: the states of stages that are not done, by key; a stage without a state is pending.

    Raises:
        UserError: a spec or the profile does not exist, or contains a mistake.
    """
    tables, settings, store = read_tables(names), read_profile(profile), Store(results).reader()
    keys = store.keys()
    others = all_tables()
    known: KnownRecords = {}
    noises = typical_noises([*tables, *others], settings, store, keys, states or {}, known)
    return [collect(table, settings, store, states or {}, noises, keys, known) for table in tables]


KnownRecords = dict[tuple[str, str], RowRecords]
"""The records of rows by the names of the table and the row, so that a report finds them once."""


def typical_noises(
    tables: Sequence[Table],
    profile: Profile,
    store: Store,
    keys: set[str],
    states: Mapping[str, str] | None = None,
    known: KnownRecords | None = None,
) -> dict[Figure, TypicalNoise]:
    """Return the typical noise over seeds of each AP metric, from all rows of the tables.

    Each distinct training counts once: of several rows that evaluate it, the one with the most seeds counts, and of these the
    first by name. The order of the tables therefore changes nothing. Rows that are not trained do not count.

    Args:
        states: as in `collect`; they only go into `known`.
        known: receives the records of the rows.
    """
    known = {} if known is None else known
    rows: dict[str, dict[tuple[int, str, str], RowRecords]] = {}
    for table in tables:
        if "evaluate" in table.spec.stages():
            for row in table.spec.rows:
                if (table.name, row.name) not in known:
                    known[table.name, row.name] = find_records(table, row, profile, store, states or {}, keys)
                records = known[table.name, row.name]
                order = (-len(records.evaluations), table.name, row.name)
                rows.setdefault(row_config(table.spec, row, profile).train_key(), {})[order] = records
    first = [rows[key][min(rows[key])] for key in sorted(rows)]
    trained = [records for records in first if not records.not_trained]
    samples = {metric: [sample_of(records, Column(metric)) for records in trained] for metric in get_args(AccuracyFigure)}
    noises = {metric: typical_noise(sample for sample in of_rows if sample is not None) for metric, of_rows in samples.items()}
    return {metric: noise for metric, noise in noises.items() if noise is not None}


def collect(
    table: Table,
    profile: Profile,
    store: Store,
    states: Mapping[str, str],
    noises: Mapping[Figure, TypicalNoise],
    keys: set[str] | None = None,
    known: KnownRecords | None = None,
) -> TableResult:
    """Return the results of one table.

    Args:
        states: the states of stages that are not done, by key; a stage without a state is pending.
        noises: the noise of a typical row for each metric, from all tables; see `typical_noises`.
        keys: the keys of all records; None reads them from the store.
        known: the records of rows that were found with the same states; those of other rows are read.
    """
    keys = store.keys() if keys is None else keys
    known = {} if known is None else known
    records = {
        row.name: known.get((table.name, row.name)) or find_records(table, row, profile, store, states, keys)
        for row in table.spec.rows
    }
    ours = {evaluated_on(record) for entry in records.values() for record in entry.evaluations.values()}
    peers = find_peers(store, table.spec.peers, profile.name, keys, ours)
    devices = sorted({d for entry in records.values() for d in entry.latencies} | {d for peer in peers for d in peer.whole_ms})
    columns = [column for metric in table.spec.figures for column in columns_of(metric, devices)]
    reference = table.spec.reference
    configs = {row.name: row_config(table.spec, row, profile) for row in table.spec.rows}
    rows = []
    for row in table.spec.rows:
        entry = records[row.name]
        base = records[reference] if reference is not None and reference != row.name else None
        shares = base is not None and configs[row.name].train_key() == configs[str(reference)].train_key()
        cells = {column: _cell(entry, base, column, row, noises, shares_training=shares) for column in columns}
        doubts = dict.fromkeys((*entry.not_trained, *(f"{reference}: {why}" for why in (base.not_trained if base else ()))))
        rows.append(
            RowResult(
                row=row,
                state=entry.state,
                cells=cells,
                paper_difference=_paper_difference(table, row),
                judgement=None,
                not_trained=tuple(doubts) if base is not None and entry.evaluations else tuple(entry.not_trained),
                doubts=tuple(entry.not_trained),
                as_run=_as_run(configs[row.name]),
                keys=(*entry.trainings, *(record.key for record in (*entry.evaluations.values(), *entry.latencies.values()))),
                trainings=tuple(entry.trainings),
                evaluations=tuple(record.key for record in entry.evaluations.values()),
                timing=entry.timing,
                compared_seeds=_compared_seeds(entry, base) if shares else None,
                other_images=base is not None and bool(entry.evaluations) and not share_images(entry, base),
            )
        )
    found = TableResult(table, profile.name, columns, rows, peers, sessions_of(records.values()), provenance_of(records.values()))
    return replace(found, rows=_judged(found, read_looks(store.results, look_name(table, profile))))


def _cell(
    entry: RowRecords,
    reference: RowRecords | None,
    column: Column,
    row: Row,
    noises: Mapping[Figure, TypicalNoise],
    *,
    shares_training: bool,
) -> Cell:
    """Return a row's cell in a column.

    Args:
        reference: the records of the reference row; None for that row itself, and if the table has none.
        shares_training: both rows evaluate the same training.
    """
    measured = sample_of(entry, column)
    found = None
    if measured is not None and reference is not None and column.metric in ACCURACY:
        # Two evaluations of the same weights are compared seed by seed.
        paired = entry.evaluations.keys() & reference.evaluations.keys() if shares_training else set()
        same_weights = bool(paired) and evaluate_same_weights(entry, reference)
        seeds = paired if same_weights else SEEDS
        own, base = sample_of(entry, column, seeds), sample_of(reference, column, seeds)
        if own is not None and base is not None and share_images(entry, reference):
            error = image_error(entry, reference, column.metric, seeds)
            found = difference(own, base, noises.get(column.metric), error, same_weights=same_weights)
    timed = entry.latencies.get(column.device or "")
    spread = timed_spread(timed.result, column.metric) if timed is not None and column.metric not in EVALUATED else None
    return Cell(measured, row.paper.get(column.metric), found, spread)


def _compared_seeds(entry: RowRecords, reference: RowRecords | None) -> tuple[int, ...] | None:
    """Return the seeds of two rows that evaluate the same trainings, if the reference row has others too."""
    if reference is None or not reference.evaluations.keys() - entry.evaluations.keys():
        return None
    return tuple(sorted(entry.evaluations.keys() & reference.evaluations.keys())) or None


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


def repeated_comparisons(results: Sequence[TableResult]) -> set[tuple[str, str]]:
    """Return the table and the row of each comparison that an earlier table or an earlier row shows already.

    Two comparisons are one if they have the same evaluations of both rows. Each table has its own false discovery rate, so the
    verdicts on them can differ.
    """
    seen: set[tuple[tuple[str, ...], tuple[str, ...]]] = set()
    repeated = set()
    for result in results:
        reference = next((row.evaluations for row in result.rows if row.row.name == result.table.spec.reference), ())
        for row in result.rows:
            if row.row.name == result.table.spec.reference or not row.evaluations:
                continue
            pair = (row.evaluations, reference)
            if pair in seen:
                repeated.add((result.table.name, row.row.name))
            seen.add(pair)
    return repeated


def _judged(result: TableResult, looks: Sequence[Look]) -> list[RowResult]:
    """Return the rows with their verdicts.

    Args:
        looks: the looks at the table while its seeds were added. The p-values are corrected for them, and a comparison that a
            look has settled stays settled.

    Returns:
        The rows; the interval of a settled difference is the one that was compared with the paper's difference.
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
            judgement = judgements[first]
            ap = row.cells[Column("AP")]
            assert ap.difference is not None
            shown = replace(ap, difference=replace(ap.difference, confidence=judgement.confidence))
            cells = {**row.cells, Column("AP"): shown}
            rows.append(replace(row, cells=cells, judgement=judgement, same_as=first if first != row.row.name else None))
    return rows


def _as_run(config: Config) -> str:
    """Return the backbone, image size and width of a row, for people."""
    width = round(config.model.encoder.channels * config.model.width_factor)
    tile = "" if config.inference.tile is None else f" per tile of {config.inference.tile} px"
    return f"{config.model.backbone.name}, {config.inference.sides()[0]} px{tile}, {width} channels"


def _paper_difference(table: Table, row: Row) -> float | None:
    reference = next((other for other in table.spec.rows if other.name == table.spec.reference), None)
    if reference is None or reference is row or "AP" not in row.paper or "AP" not in reference.paper:
        return None
    return round(row.paper["AP"] - reference.paper["AP"], 1)
