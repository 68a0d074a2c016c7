"""What became of every stage: told from records, locks and the states that processes left. Imports no torch."""

from __future__ import annotations

import datetime
import json
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from filelock import FileLock, Timeout
from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from sparseinst.ablation.plan import Plan, StageRun
from sparseinst.ablation.work import run_folder
from sparseinst.errors import UserError
from sparseinst.paths import RunPaths

State = Literal["done", "running", "failed", "interrupted", "pending"]

_TAIL = 4096  # bytes; the last line of metrics.jsonl is far shorter


@dataclass(frozen=True)
class Status:
    run: StageRun
    state: State
    progress: float
    """In [0, 1], of the steps of a training."""
    eta_seconds: float | None = None
    reason: str | None = None
    """Why it failed, in one line."""


def plan_status(plan: Plan) -> list[Status]:
    """The state of every stage of a plan."""
    return [_status(run, run.key in plan.done) for run in plan.runs.values()]


def _status(run: StageRun, done: bool) -> Status:
    if done:
        return Status(run, "done", 1.0)
    paths = run_folder(run.key)
    state = _read_state(paths.state)
    if state is None:
        return Status(run, "pending", 0.0)
    progress, eta = _progress(run, paths)
    if _is_held(paths.claim):
        return Status(run, "running", progress, eta)
    if state.get("state") == "failed":
        return Status(run, "failed", progress, reason=str(state.get("reason")))
    return Status(run, "interrupted", progress, reason="its process ended; `sparseinst run` goes on from the last checkpoint")


def _read_state(path: Path) -> dict[str, Any] | None:
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError:
        return {}
    return state if isinstance(state, dict) else {}


def _is_held(path: Path) -> bool:
    if not path.exists():
        return False
    try:
        with FileLock(path, timeout=0):
            return False
    except Timeout:
        return True


def _progress(run: StageRun, paths: RunPaths) -> tuple[float, float | None]:
    """Fraction of a training's steps that are done, and the seconds that the rest will take."""
    if run.stage != "train" or not paths.metrics.exists():
        return 0.0, None
    with paths.metrics.open("rb") as file:
        file.seek(max(0, paths.metrics.stat().st_size - _TAIL))
        lines = file.read().decode("utf-8", errors="replace").splitlines()
    for line in reversed(lines):
        try:
            record = json.loads(line)
            done, seconds = int(record["iteration"]), float(record["seconds"])
        except (ValueError, KeyError, TypeError):  # an unfinished line, or an evaluation
            continue
        total = run.config.train.iterations
        return done / total, seconds * (total - done)
    return 0.0, None


def as_json(found: Iterable[Status]) -> dict[str, Any]:
    return {
        "runs": [
            {
                "key": status.run.key,
                "stage": status.run.stage,
                "label": status.run.label,
                "state": status.state,
                "progress": round(status.progress, 4),
                "eta_seconds": round(status.eta_seconds) if status.eta_seconds is not None else None,
                "reason": status.reason,
            }
            for status in found
        ]
    }


def picture(found: Sequence[Status]) -> Group:
    """The states for people: what is not done, run by run, and a count of all."""
    table = Table("run", "stage", "row", "state", "progress", "ETA", "why", box=None, pad_edge=False)
    for status in found:
        if status.state != "done":
            eta = str(datetime.timedelta(seconds=round(status.eta_seconds))) if status.eta_seconds is not None else ""
            progress = f"{100 * status.progress:.0f} %" if status.progress else ""
            run = status.run
            table.add_row(run.key, run.stage, run.label, status.state, progress, eta, escape(status.reason or ""))
    counts = Counter(status.state for status in found)
    summary = ", ".join(f"{counts[state]} {state}" for state in get_args(State) if counts[state])
    return Group(table, summary) if table.row_count else Group(summary)


def show(found: Sequence[Status]) -> None:
    """Print the states."""
    Console(width=max(Console().width, 120)).print(picture(found))


def watch(look: Callable[[], Sequence[Status]], going_on: Callable[[], bool], *, every: float = 2.0) -> None:
    """Keep the states on the terminal up to date while `going_on`; on no terminal, print them once at the end."""
    with Live(picture(look()), auto_refresh=False) as live:
        while going_on():
            time.sleep(every)
            live.update(picture(look()), refresh=True)


def find_log(text: str, plan: Plan) -> Path:
    """The log of the one stage whose key or label begins with, or holds, the text. Raises `UserError`."""
    runs = plan.runs.values()
    found = [run for run in runs if run.key.startswith(text)] or [run for run in runs if text.casefold() in run.label.casefold()]
    found = [run for run in found if run_folder(run.key).log.exists()] or found
    if not found:
        raise UserError(f"no run is called {text!r}; `sparseinst status` lists them")
    if len(found) > 1:
        raise UserError(f"{text!r} fits {len(found)} runs: {', '.join(f'{run.key} ({run.label})' for run in found[:5])}")
    log = run_folder(found[0].key).log
    if not log.exists():
        raise UserError(f"{found[0].label} ({found[0].key}) has no log yet")
    return log


def follow(path: Path, *, every: float = 1.0) -> Iterable[str]:
    """The lines of a growing file, for ever."""
    with path.open(encoding="utf-8") as file:
        while True:
            line = file.readline()
            if line:
                yield line
            else:
                time.sleep(every)
