"""Measure whether a small scale orders the rows as the paper does. Imports no torch.

In every pair of distinct rows of the paper's ablations, one row has the higher AP. The share of pairs that have the same order at
the small scale, and Kendall's rank correlation (tau-b), show how far the results of small runs can be trusted.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparseinst.ablation.statistics import CONFIDENCE, Sample, SeedNoise, TypicalNoise
from sparseinst.ablation.store import Store
from sparseinst.ablation.study import Table as StudyTable
from sparseinst.ablation.study import all_tables, list_tables, read_profile, read_tables
from sparseinst.errors import UserError
from sparseinst.report.collect import RowResult, TableResult, read_results, typical_noises
from sparseinst.report.records import Column

CLEAR = 0.5
"""The order of two rows is clear if their AP in the paper differs by this much or more."""
_DRAWS = 2000
_AP = Column("AP")


@dataclass(frozen=True)
class Rank:
    """One distinct row: one set of evaluations, even if several tables show it."""

    name: str
    tables: tuple[str, ...]
    paper: float
    measured: Sample
    history: Mapping[int, float] = field(default_factory=dict)
    """AP by training step, from the evaluations during training; the mean over seeds. Empty for a row that evaluates trainings of
    the reference row in another way."""
    doubts: tuple[str, ...] = ()
    """The reasons why a training of this row is no evidence; see `ablation.gate`."""

    @property
    def trained(self) -> bool:
        return not self.doubts


@dataclass(frozen=True)
class Agreement:
    """How many pairs of rows have the paper's order."""

    pairs: int
    agree: int
    interval: tuple[float, float] | None
    """The 95 % interval of the share that agrees, from the noise of seeds; None if no row has several seeds."""
    tau: float | None
    tau_interval: tuple[float, float] | None

    @property
    def share(self) -> float | None:
        """The share of pairs that agree; None if there are no pairs."""
        return self.agree / self.pairs if self.pairs else None

    def as_json(self) -> dict[str, Any]:
        share, tau = self.share, self.tau
        return {
            "pairs": self.pairs,
            "agree": self.agree,
            "agreement": round(share, 4) if share is not None else None,
            "interval": [round(end, 4) for end in self.interval] if self.interval is not None else None,
            "tau": round(tau, 4) if tau is not None else None,
            "tau_interval": [round(end, 4) for end in self.tau_interval] if self.tau_interval is not None else None,
        }


@dataclass(frozen=True)
class Fidelity:
    """How well the order of the rows in a profile agrees with the paper's."""

    profile: str
    ranks: list[Rank]
    missing: list[str]
    """The rows that have an AP in the paper and are not measured yet."""
    all: Agreement
    """The agreement over all pairs."""
    clear: Agreement
    """The agreement over the pairs that differ by `CLEAR` or more in the paper."""
    trained: tuple[Agreement, Agreement]
    """The same two over the rows whose trainings are all evidence."""
    tables: dict[str, tuple[Agreement, Agreement]]
    """The agreement over all pairs of a table and over its clear pairs, by table."""
    steps: dict[int, tuple[Agreement, Agreement]]
    """The same two, by training step, over the rows with a history, for the steps that all of them have."""
    typical: TypicalNoise | None
    """The noise of AP over seeds of a typical row, assumed for rows with one seed; None if no row has several."""
    disagreements: list[tuple[Rank, Rank]]
    """The clear pairs that have the other order here, sorted by their difference in the paper, the largest first. The first row
    of a pair is the one with the higher AP in the paper."""


def fidelity(
    results: Sequence[TableResult], typical: TypicalNoise | None, histories: Mapping[str, Mapping[int, float]]
) -> Fidelity:
    """Compare the order of the rows with the paper's.

    Args:
        results: tables of one profile whose rows can be compared with each other; a row that several tables show counts once.
        typical: the noise of AP over seeds of a typical row; None if no row has several seeds.
        histories: AP by training step, by the key of the training.
    """
    ranks, missing = _ranks(results, histories)
    trained = [rank for rank in ranks if rank.trained]
    by_table = {result.table.name: [rank for rank in ranks if result.table.name in rank.tables] for result in results}
    followed = [rank for rank in ranks if rank.history]
    steps = sorted(set.intersection(*(set(rank.history) for rank in followed))) if followed else []
    ordered = sorted(ranks, key=lambda r: -r.paper)
    clear_pairs = [pair for pair in itertools.combinations(ordered, 2) if paper_difference(pair) >= CLEAR]
    disagreements = [pair for pair in clear_pairs if pair[0].measured.mean <= pair[1].measured.mean]
    return Fidelity(
        profile=results[0].profile if results else "",
        ranks=ranks,
        missing=missing,
        all=_agreement(ranks, 0.0, typical),
        clear=_agreement(ranks, CLEAR, typical),
        trained=(_agreement(trained, 0.0, typical), _agreement(trained, CLEAR, typical)),
        tables={
            name: (_agreement(own, 0.0, typical), _agreement(own, CLEAR, typical))
            for name, own in by_table.items()
            if len(own) > 1
        },
        steps={step: _at_step(followed, step) for step in steps},
        typical=typical,
        disagreements=sorted(disagreements, key=paper_difference, reverse=True),
    )


def paper_difference(pair: tuple[Rank, Rank]) -> float:
    """Return how much higher the AP of the first row is in the paper, to the one decimal that the paper has."""
    return round(pair[0].paper - pair[1].paper, 1)


def _ranks(results: Sequence[TableResult], histories: Mapping[str, Mapping[int, float]]) -> tuple[list[Rank], list[str]]:
    """Return the distinct rows with an AP in the paper and a measured AP, and the names of the rows that are not measured."""
    found: dict[tuple[str, ...], Rank] = {}
    missing = []
    for result in results:
        reference = next((row for row in result.rows if row.row.name == result.table.spec.reference), None)
        for entry in result.rows:
            cell = entry.cells.get(_AP)
            if cell is None or cell.paper is None:
                continue
            name = f"{result.table.name} {entry.row.name}"
            if cell.measured is None:
                missing.append(name)
                continue
            key = entry.evaluations
            if key in found:
                found[key] = replace(found[key], tables=(*found[key].tables, result.table.name))
                continue
            # The evaluations during a training are those of the reference row, if another row evaluates it in another way.
            own = reference in (None, entry) or not set(entry.trainings) & set(reference.trainings if reference else ())
            by_seed = [histories[training] for training in entry.trainings if training in histories and own]
            steps = set.intersection(*(set(ap) for ap in by_seed)) if by_seed else set()
            history = {step: float(np.mean([ap[step] for ap in by_seed])) for step in steps}
            measured = _paired(result, entry) or cell.measured
            found[key] = Rank(name, (result.table.name,), cell.paper, measured, history, entry.doubts)
    return list(found.values()), missing


def _paired(result: TableResult, entry: RowResult) -> Sample | None:
    """Return the AP of a row that is compared on some of the reference row's seeds: that of the reference, plus the difference.

    Returns:
        None if the row has trainings of its own.
    """
    if entry.compared_seeds is None or (difference := entry.cells[_AP].difference) is None:
        return None
    base = next(row for row in result.rows if row.row.name == result.table.spec.reference).cells[_AP].measured
    return Sample(tuple(value + difference.value for value in base.values)) if base is not None else None


def _agreement(ranks: Sequence[Rank], least: float, typical: TypicalNoise | None) -> Agreement:
    """Return the agreement over the pairs that differ by `least` or more in the paper.

    Args:
        typical: the noise of AP over seeds of a typical row; None for no intervals.
    """
    paper = np.array([rank.paper for rank in ranks])
    measured = np.array([rank.measured.mean for rank in ranks])
    if typical is None or len(ranks) < 2:
        return Agreement(*_count(paper, measured, least), None, _tau(paper, measured, least), None)
    # A parametric bootstrap: each draw moves every row's mean by the noise that remains over its seeds.
    noises = [SeedNoise.of(rank.measured, typical) for rank in ranks]
    errors = np.sqrt([noise.variance / noise.seeds for noise in noises])
    moved = measured + errors * np.random.default_rng(0).standard_normal((_DRAWS, len(ranks)))
    counts = [_count(paper, draw, least) for draw in moved]
    shares = [agree / pairs for pairs, agree in counts if pairs]
    taus = [tau for draw in moved if (tau := _tau(paper, draw, least)) is not None]
    return Agreement(*_count(paper, measured, least), _interval(shares), _tau(paper, measured, least), _interval(taus))


def _interval(values: Sequence[float]) -> tuple[float, float] | None:
    """Return the ends of the central interval that holds 95 % of the values; None if there are no values."""
    if not values:
        return None
    low, high = np.quantile(values, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2]).tolist()
    return low, high


def _pairs(paper: NDArray[np.float64], least: float) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Return the indices of the pairs that differ in the paper, by `least` or more."""
    first, second = np.triu_indices(len(paper), 1)
    distances = np.round(np.abs(paper[first] - paper[second]), 1)
    kept = (distances > 0) & (distances >= least)
    return first[kept], second[kept]


def _count(paper: NDArray[np.float64], measured: NDArray[np.float64], least: float) -> tuple[int, int]:
    """Return the number of pairs and the number of those that have the paper's order."""
    first, second = _pairs(paper, least)
    agree = np.sign(paper[first] - paper[second]) == np.sign(measured[first] - measured[second])
    return len(first), int(agree.sum())


def _tau(paper: NDArray[np.float64], measured: NDArray[np.float64], least: float) -> float | None:
    """Return Kendall's tau-b if `least` is 0; otherwise (agreeing - disagreeing) / pairs over the clear pairs.

    Returns:
        None if there is no pair or all values are equal.
    """
    if least > 0:
        pairs, agree = _count(paper, measured, least)
        return 2 * agree / pairs - 1 if pairs else None
    if len(paper) < 2 or len(set(paper.tolist())) < 2:
        return None
    if len(set(measured.tolist())) < 2:
        return None
    from scipy import stats  # its import takes a second, and a report that needs no order of rows has no use for it

    return float(stats.kendalltau(paper, measured).statistic)


def _at_step(ranks: Sequence[Rank], step: int) -> tuple[Agreement, Agreement]:
    at_step = [Rank(rank.name, rank.tables, rank.paper, Sample((rank.history[step],))) for rank in ranks]
    return _agreement(at_step, 0.0, None), _agreement(at_step, CLEAR, None)


def read_fidelity(names: Sequence[str], profile: str, results: Path) -> Fidelity:
    """Read specs and records, and compare the order of the rows with the paper's.

    Args:
        names: tables by name; an empty list means all tables whose rows share the paper's base config (Tables 2 to 7).

    Raises:
        UserError: a spec or the profile does not exist or contains a mistake, or rows of these tables cannot be compared.
    """
    tables = {name: table for name in names or list_tables() for table in read_tables([name]) if names or _comparable(table)}
    other = [table.name for table in tables.values() if not _comparable(table)]
    if other:
        raise UserError(
            f"{other[0]}: its rows cannot be compared with those of other tables: the table changes the paper's base config, "
            "or the paper states no AP for it"
        )
    settings, store = read_profile(profile), Store(results)
    # The noise is that of all tables, as in the report.
    every = [*tables.values(), *all_tables()]
    typical = typical_noises(every, settings, store, store.keys()).get("AP")
    collected = read_results(list(tables), profile, results)
    histories = {}
    for key in {key for result in collected for entry in result.rows for key in entry.trainings}:
        record = store.load(key)
        history = record.result.get("history", []) if record is not None else []
        histories[key] = {entry["iteration"]: entry["AP"] for entry in history if entry.get("AP") is not None}
    return fidelity(collected, typical, {key: history for key, history in histories.items() if history})


def _comparable(table: StudyTable) -> bool:
    """Return whether the table's rows share the paper's base config and have an AP in the paper."""
    spec = table.spec
    return spec.preset == "paper" and not spec.set and any("AP" in row.paper for row in spec.rows)
