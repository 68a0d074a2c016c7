"""From tables to the distinct stages they need, which of them are done, and what the rest costs. Imports no torch."""

from __future__ import annotations

import functools
import platform
import re
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from sparseinst.ablation.store import Record, Store
from sparseinst.ablation.study import Profile, Row, row_config, select_rows
from sparseinst.ablation.study import Table as StudyTable
from sparseinst.config import Config
from sparseinst.errors import UserError
from sparseinst.section import Stage


@dataclass(frozen=True)
class StageRun:
    """One stage to be done once, whichever rows ask for it."""

    stage: Stage
    key: str
    config: Config
    label: str
    """The first row that asked for it, for people."""
    needs: str | None = None
    """The key of the training whose weights it evaluates."""


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
    """By key: trainings first, in the order of the tables."""
    done: set[str]
    profile: Profile
    device: str
    """Name of the device that latency is measured on."""

    def to_do(self) -> list[StageRun]:
        return [run for run in self.runs.values() if run.key not in self.done]


def make_plan(
    tables: Sequence[StudyTable],
    profile: Profile,
    store: Store,
    *,
    seeds: Sequence[int] = (0,),
    row: str | None = None,
    device: str | None = None,
    name: str | None = None,
) -> Plan:
    """The stages that the rows need.

    Args:
        seeds: each row is trained once with each; the first is enough for latency.
        row: only rows whose name holds this text.
        device: where it will run, as `--device` names it; latency is kept apart by the device's own name.
        name: that name, where the device is on another machine.

    Raises:
        UserError: a row that does not fit the profile, or no row of that name.
    """
    name = name or device_name(device)
    rows: list[PlannedRow] = []
    runs: dict[str, StageRun] = {}
    for table in tables:
        for chosen in select_rows(table.spec, row):
            for seed in seeds:
                planned, its_runs = _plan_row(table, chosen, seed, profile, name, with_latency=seed == seeds[0])
                rows.append(planned)
                runs |= {run.key: run for run in its_runs if run.key not in runs}
    if not rows:
        names = ", ".join(known.name for table in tables for known in table.spec.rows)
        raise UserError(f"no row is called {row!r} (rows: {names})")
    ordered = {run.key: run for stage in ("train", "evaluate", "latency") for run in runs.values() if run.stage == stage}
    return Plan(rows, ordered, set(ordered) & store.keys(), profile, name)


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
    for stage in table.spec.stages():
        if stage == "latency" and not with_latency:
            continue
        keys[stage] = stage_key(config, stage, device)
        runs.append(StageRun(stage, keys[stage], config, label, config.train_key() if stage == "evaluate" else None))
    return PlannedRow(table, row, seed, keys), runs


def stage_key(config: Config, stage: Stage, device: str) -> str:
    """The key of one stage of a config; `device` is the name of the one that latency is measured on."""
    if stage == "latency":
        return config.latency_key(device)
    return config.train_key() if stage == "train" else config.evaluate_key()


@dataclass(frozen=True)
class Costs:
    """Hours a stage takes."""

    hours: dict[Stage, float]
    unit: str
    measured: dict[Stage, int]
    """From how many records the hours come; a stage without any is the profile's own estimate."""

    def of(self, runs: Sequence[StageRun]) -> float:
        return sum(self.hours.get(run.stage, 0.0) for run in runs)


def costs(plan: Plan, store: Store) -> Costs:
    """What each kind of stage takes: the mean of the plan's own records of the same profile and device, else the estimate."""
    stated = plan.profile.cost
    hours: dict[Stage, float] = (
        {"train": stated.train, "evaluate": stated.evaluate, "latency": stated.latency} if stated is not None else {}
    )
    unit = stated.unit if stated is not None else "hours"
    seconds: dict[Stage, list[float]] = {"train": [], "evaluate": [], "latency": []}
    for key in plan.done:
        record = store.load(key)
        if record is not None and _same_place(record, plan):
            devices = record.provenance.get("world_size", 1) if unit == "GPU-hours" else 1
            seconds[plan.runs[key].stage].append(record.provenance["seconds"] * devices)
    measured = {stage: len(found) for stage, found in seconds.items()}
    hours |= {stage: sum(found) / len(found) / 3600 for stage, found in seconds.items() if found}
    return Costs(hours, unit, measured)


def _same_place(record: Record, plan: Plan) -> bool:
    known = record.provenance
    return (known.get("profile"), known.get("device")) == (plan.profile.name, plan.device) and "seconds" in known


def as_json(plan: Plan, cost: Costs) -> dict[str, Any]:
    """For scripts: rows, stages and the hours still to be spent."""
    return {
        "profile": plan.profile.name,
        "rows": [
            {"table": r.table.name, "row": r.row.name, "labels": r.row.labels, "seed": r.seed}
            | {stage: r.keys.get(stage) for stage in ("train", "evaluate", "latency")}
            for r in plan.rows
        ],
        "stages": [
            {"stage": run.stage, "key": key, "done": key in plan.done, "cost_hours": round(cost.hours.get(run.stage, 0.0), 4)}
            for key, run in plan.runs.items()
        ],
        "total": {"to_do": len(plan.to_do()), "cost_hours": round(cost.of(plan.to_do()), 3), "unit": cost.unit},
    }


def show(plan: Plan, cost: Costs) -> None:
    """Print the plan for people."""
    table = Table(title=f"profile {plan.profile.name}; latency on {plan.device}", title_justify="left")
    for name in ("table", "row", "seed", "train", "evaluate", "latency"):
        table.add_column(name)
    for planned in plan.rows:
        marks = [_mark(planned.keys.get(stage), plan) for stage in ("train", "evaluate", "latency")]
        table.add_row(planned.table.name, planned.row.name, str(planned.seed), *marks)
    Console(width=max(Console().width, 100)).print(table)
    left = plan.to_do()
    for stage in ("train", "evaluate", "latency"):
        runs = [run for run in plan.runs.values() if run.stage == stage]
        if not runs:
            continue
        hours = f", {cost.hours[stage]:.3g} {cost.unit} each" if stage in cost.hours else ""
        source = f" (mean of {cost.measured[stage]} records)" if cost.measured.get(stage) else " (estimate)" if hours else ""
        print(f"{stage}: {len(runs)} distinct runs, {len(runs) - sum(r in left for r in runs)} done{hours}{source}")
    print(f"{len(plan.rows)} rows, {len(plan.runs)} distinct runs, {len(left)} to do: about {cost.of(left):.3g} {cost.unit}")
    if plan.profile.cost is not None and any(not cost.measured.get(run.stage) for run in left):
        print(f"Estimates: {plan.profile.cost.source}")


def _mark(key: str | None, plan: Plan) -> str:
    return "" if key is None else f"{key[:8]} {'done' if key in plan.done else 'to do'}"


@functools.cache
def device_name(device: str | None) -> str:
    """What the device calls itself: the GPU's name where `device` (or, for None, the machine) has one, else the processor's.

    Raises:
        UserError: not a device's name.
    """
    if device is not None and not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise UserError(f"device {device!r}: cpu, cuda or cuda:1 was expected")
    if device != "cpu":
        index = int((device or "").partition(":")[2] or 0)
        names = gpu_names()
        if index < len(names):
            return names[index]
    return _processor_name()


@functools.cache
def gpu_names() -> list[str]:
    """Of the machine's GPUs, as their driver tells; none where there is no driver."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return []
    asked = subprocess.run([command, "--query-gpu=name", "--format=csv,noheader"], capture_output=True, text=True, check=False)
    return [line.strip() for line in asked.stdout.splitlines() if line.strip()] if asked.returncode == 0 else []


def _processor_name() -> str:
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
