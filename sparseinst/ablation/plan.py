"""Plan the distinct stages that tables need: which of them are done, and what the others cost. Imports no torch."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from sparseinst.ablation.provenance import is_other_code
from sparseinst.ablation.store import Record, Store
from sparseinst.ablation.study import SEEDS, Profile, Row, Spec, row_config, select_rows
from sparseinst.ablation.study import Table as StudyTable
from sparseinst.config import Config
from sparseinst.errors import UserError
from sparseinst.machine import device_name
from sparseinst.paths import stored_weights
from sparseinst.section import STAGES, Stage
from sparseinst.words import counted, three_digits


@dataclass(frozen=True)
class StageRun:
    """One stage. It is done once, even if several rows need it."""

    stage: Stage
    key: str
    config: Config
    label: str
    """The first row that needs it, for people."""
    needs: str | None = None
    """The key of the stage whose weights it uses: the training of an evaluation, the pretraining of a training."""
    remake: bool = False
    """Whether the stage is recorded, but its weights are gone and another stage needs them. Then it is done again."""

    def name(self, profile: str) -> str:
        """Return the run's name for people, which also states seed 0, the stage and the profile."""
        seed = " seed 0" if self.stage in ("train", "evaluate") and self.config.train.seed == 0 else ""
        return f"{self.label}{seed}, {self.stage}, profile {profile}"

    def is_done(self, store: Store) -> bool:
        """Return whether the stage has a record and, if its weights had to be made again, whether they exist."""
        return store.has(self.key) and not (self.remake and stored_weights(self.key) is None)


@dataclass(frozen=True)
class PlannedRow:
    """One row with one seed."""

    table: StudyTable
    row: Row
    seed: int
    keys: dict[Stage, str]


@dataclass(frozen=True)
class Plan:
    rows: list[PlannedRow]
    runs: dict[str, StageRun]
    """The stages by key, in the order in which they are done: pretrainings, trainings, evaluations, timings."""
    done: set[str]
    """Keys of the stages that have a record, and weights if another stage needs them."""
    profile: Profile
    device: str
    """The name of the device on which latency is measured."""

    def to_do(self) -> list[StageRun]:
        return [run for run in self.runs.values() if run.key not in self.done]


def make_plan(
    tables: Sequence[StudyTable],
    profile: Profile,
    store: Store,
    *,
    seeds: Sequence[int] | Callable[[StudyTable, Row], Sequence[int]] = (0,),
    row: str | None = None,
    device: str | None = None,
    name: str | None = None,
) -> Plan:
    """Plan the stages that the rows need.

    Args:
        seeds: each row is trained once with each seed; latency is measured with the first seed only. A function gives each row
            seeds of its own; a row without seeds is left out.
        row: plan only the row of this name, or the rows whose name contains this text.
        device: the value of `--device`. The keys of timings contain that device's own name.
        name: the device's own name, if the device is on another machine.

    Raises:
        UserError: a row does not fit the profile, or no row has such a name.
    """
    name = name or device_name(device)
    rows: list[PlannedRow] = []
    runs: dict[str, StageRun] = {}
    for table in tables:
        for chosen in select_rows(table.spec, row):
            its_seeds = seeds(table, chosen) if callable(seeds) else seeds
            for seed in its_seeds:
                planned, its_runs = _plan_row(table, chosen, seed, profile, name, with_latency=seed == its_seeds[0])
                rows.append(planned)
                runs |= {run.key: run for run in its_runs if run.key not in runs}
    if not rows:
        names = ", ".join(known.name for table in tables for known in table.spec.rows)
        raise UserError(f"no row is called {row!r} (rows: {names})")
    ordered = {run.key: run for stage in STAGES for run in runs.values() if run.stage == stage}
    return Plan(rows, *_find_done(ordered, store), profile, name)


def _find_done(runs: dict[str, StageRun], store: Store) -> tuple[dict[str, StageRun], set[str]]:
    """Return the stages and the keys of those that are done, with each stage marked that must be done again for its weights."""
    done = set(runs) & store.keys()
    for run in reversed(runs.values()):  # evaluations before trainings, trainings before pretrainings
        if run.key not in done and run.needs in done and stored_weights(run.needs) is None:
            done.remove(run.needs)
            # A damaged record is renamed when it is loaded; its stage is then simply not done.
            runs = {**runs, run.needs: replace(runs[run.needs], remake=store.load(run.needs) is not None)}
    return runs, done


def _plan_row(
    table: StudyTable, row: Row, seed: int, profile: Profile, device: str, *, with_latency: bool
) -> tuple[PlannedRow, list[StageRun]]:
    try:
        config = row_config(table.spec, row, profile, seed)
    except UserError as error:
        raise UserError(f"{table.name}, row {row.name!r}, profile {profile.name!r}: {error}") from None
    label = f"{table.name} {row.name}" + (f" seed {seed}" if seed else "")
    keys: dict[Stage, str] = {}
    runs = []
    needed: str | None
    for stage in _stages(table.spec, config):
        if stage == "latency" and not with_latency:
            continue
        if stage == "evaluate":
            train_key = keys.get("train") or config.train_key()  # a key takes a third of a millisecond
            keys[stage], needed = config.evaluate_key(train_key), train_key
        else:
            keys[stage], needed = stage_key(config, stage, device), needed_key(config, stage)
        runs.append(StageRun(stage, keys[stage], config, label, needed))
    return PlannedRow(table, row, seed, keys), runs


def stage_key(config: Config, stage: Stage, device: str) -> str:
    """Return the key of a stage.

    Args:
        device: the name of the device on which latency is measured.
    """
    if stage == "latency":
        return config.latency_key(device)
    keys = {"pretrain": config.pretrain_key, "train": config.train_key, "evaluate": config.evaluate_key}
    return keys[stage]()


def needed_key(config: Config, stage: Stage) -> str | None:
    """Return the key of the stage whose weights this stage uses; None if it uses none."""
    if stage == "evaluate":
        return config.train_key()
    return config.pretrain_key() if stage == "train" and config.pretrains else None


def _stages(spec: Spec, config: Config) -> list[Stage]:
    """Return the stages of a row: those of its table, after a pretraining if the config enables it."""
    stages = list(spec.stages())
    return ["pretrain", *stages] if "train" in stages and config.pretrains else stages


@dataclass(frozen=True)
class Costs:
    """The hours that each kind of stage takes."""

    hours: dict[Stage, float]
    unit: str
    measured: dict[Stage, int]
    """The number of records that the hours are the median of; with 0 they are the profile's estimate."""

    def of(self, runs: Sequence[StageRun]) -> float:
        """Return the hours that these stages take together."""
        return sum(self.hours.get(run.stage, 0.0) for run in runs)


def costs(plan: Plan, store: Store) -> Costs:
    """Return the median hours of the plan's records with the same profile and device; without records, the profile's estimate.

    A run that was slow because of other work changes the median little.
    """
    stated = plan.profile.cost
    hours: dict[Stage, float] = {stage: getattr(stated, stage) for stage in STAGES} if stated is not None else {}
    unit = stated.unit if stated is not None else "hours"
    seconds: dict[Stage, list[float]] = {stage: [] for stage in STAGES}
    for key in plan.runs.keys() & store.keys():
        record = store.load(key)
        if record is not None and _same_conditions(record, plan):
            devices = record.provenance.get("world_size", 1) if unit == "GPU-hours" else 1
            seconds[plan.runs[key].stage].append(record.provenance["seconds"] * devices)
    measured = {stage: len(times) for stage, times in seconds.items()}
    hours |= {stage: statistics.median(times) / 3600 for stage, times in seconds.items() if times}
    return Costs(hours, unit, measured)


def _same_conditions(record: Record, plan: Plan) -> bool:
    """Return whether a record is of the plan's profile and device, and states its wall time."""
    about = record.provenance
    return (about.get("profile"), about.get("device")) == (plan.profile.name, plan.device) and "seconds" in about


def by_other_code(plan: Plan, store: Store) -> list[StageRun]:
    """Return the stages that are done and that code with other uncommitted changes did; see `is_other_code`."""
    found = []
    for key in plan.done:
        record = store.load(key)
        if record is not None and plan.runs[key].stage != "pretrain" and is_other_code(record.provenance):
            found.append(plan.runs[key])
    return found


def unused_records(tables: Sequence[StudyTable], profile: Profile, store: Store, among: set[str] | None = None) -> list[Record]:
    """Return the records of a profile that no row of the tables needs, with any seed and on any device.

    A row leaves such records if its settings change, or if it is removed.

    Args:
        among: return those of these keys that the profile does not need, whatever profile made them.
    """
    needed: set[str] = set()
    timed = []
    for table in tables:
        for row in table.spec.rows:
            config = row_config(table.spec, row, profile)
            needed |= {key for pair in config.keys_of_seeds(SEEDS).values() for key in pair}
            needed |= {config.pretrain_key()} if config.pretrains else set()
            timed.append(f"{config.latency_prefix()}-")
    keys = store.keys() if among is None else among
    others = sorted(key for key in keys - needed if not key.startswith(tuple(timed)))
    records = [record for key in others if store.path(key).exists() and (record := store.load(key)) is not None]
    if among is not None:
        return records
    return [record for record in records if record.kind != "peer" and record.provenance.get("profile") == profile.name]


MOST_LINES = 200
"""The longest list of rows that is printed for people."""


def as_json(plan: Plan, cost: Costs) -> dict[str, Any]:
    """Return rows, stages and remaining hours as JSON data, for scripts."""
    return {
        "profile": plan.profile.name,
        "rows": [
            {"table": r.table.name, "row": r.row.name, "labels": r.row.labels, "seed": r.seed}
            | {stage: r.keys.get(stage) for stage in STAGES}
            for r in plan.rows
        ],
        "stages": [
            {"stage": run.stage, "key": key, "done": key in plan.done, "remake": run.remake}
            | {"cost_hours": round(cost.hours.get(run.stage, 0.0), 4)}
            for key, run in plan.runs.items()
        ],
        "total": {"to_do": len(plan.to_do()), "cost_hours": round(cost.of(plan.to_do()), 3), "unit": cost.unit},
    }


def show(plan: Plan, cost: Costs) -> None:
    """Print the plan for people, with a line for each row, or for each table if there are more than `MOST_LINES` rows."""
    table = Table(title=f"profile {escape(plan.profile.name)}; latency on {plan.device}", title_justify="left")
    shown = [stage for stage in STAGES if any(run.stage == stage for run in plan.runs.values())]
    short = len(plan.rows) > MOST_LINES
    for name in ("table", "rows" if short else "row", "seeds" if short else "seed", *shown):
        table.add_column(name)
    for cells in _summary(plan, shown) if short else _lines(plan, shown):
        table.add_row(*map(escape, cells))
    Console(width=max(Console().width, 100)).print(table)
    if short:
        print(f"{len(plan.rows)} rows are too many to show; --json lists them all")
    left = plan.to_do()
    for stage in STAGES:
        runs = [run for run in plan.runs.values() if run.stage == stage]
        if not runs:
            continue
        hours = f", {three_digits(cost.hours[stage])} {cost.unit} each" if stage in cost.hours else ""
        measured = cost.measured.get(stage)
        source = f" (median of {counted(measured, 'record')})" if measured else " (estimate)" if hours else ""
        print(f"{stage}: {counted(len(runs), 'distinct run')}, {sum(run.key in plan.done for run in runs)} done{hours}{source}")
    total = f"{counted(len(plan.rows), 'row')}, {counted(len(plan.runs), 'distinct run')}"
    print(f"{total}, {len(left)} to do: about {three_digits(cost.of(left))} {cost.unit}")
    if plan.profile.cost is not None and any(not cost.measured.get(run.stage) for run in left):
        print(f"Estimates: {plan.profile.cost.source}")


def _lines(plan: Plan, stages: Sequence[Stage]) -> list[list[str]]:
    """Return the cells of each row and seed."""
    return [
        [planned.table.name, planned.row.name, str(planned.seed), *(_mark(planned.keys.get(stage), plan) for stage in stages)]
        for planned in plan.rows
    ]


def _summary(plan: Plan, stages: Sequence[Stage]) -> list[list[str]]:
    """Return the cells of each table: the number of rows and seeds, and how many distinct runs of each stage are done."""
    tables: dict[str, list[PlannedRow]] = {}
    for planned in plan.rows:
        tables.setdefault(planned.table.name, []).append(planned)
    lines = []
    for name, rows in tables.items():
        line = [name, str(len({planned.row.name for planned in rows})), str(len({planned.seed for planned in rows}))]
        for stage in stages:
            keys = {planned.keys[stage] for planned in rows if stage in planned.keys}
            line.append(f"{len(keys & plan.done)} of {len(keys)} done" if keys else "")
        lines.append(line)
    return lines


def _mark(key: str | None, plan: Plan) -> str:
    return "" if key is None else f"{key[:8]} {'done' if key in plan.done else 'to do'}"
