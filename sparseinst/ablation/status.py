"""What became of every stage: told from records and from what attempts and jobs left. Imports no torch."""

from __future__ import annotations

import datetime
import json
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from sparseinst.ablation.plan import Plan, StageRun
from sparseinst.ablation.submission import Queue, Submission, dead_rank, last_words, own_words, read_exit, read_submission
from sparseinst.ablation.work import run_folder
from sparseinst.attempts import Past, hanging, latest, process_name
from sparseinst.errors import UserError
from sparseinst.paths import RunPaths

State = Literal["done", "running", "queued", "pending", "failed", "lost", "cancelled", "interrupted"]
"""`queued`: a cluster has it; `pending`: nobody has it yet; `lost`: it went silent, and nothing tells why."""

NEEDS_RETRY: tuple[State, ...] = ("failed", "lost", "cancelled")
"""States that end only when somebody asks for it."""
_PUT_BACK = ("REQUEUE", "PREEMPTION", "NODE FAILURE")
"""Why SLURM ends a job that it starts again, in its words."""
HANG_SECONDS = 1800.0
"""A rank that has not moved for so long is said to hang, where the job has no limit of its own."""

_TAIL = 4096  # bytes; the last line of metrics.jsonl is far shorter


@dataclass(frozen=True)
class Status:
    run: StageRun
    state: State
    progress: float
    """In [0, 1], of the steps of a training."""
    eta_seconds: float | None = None
    reason: str | None = None
    """Why it is not done, in one line."""
    attempts: int = 0
    """How often it was begun."""
    job: str | None = None
    """What a cluster calls it."""


def plan_status(plan: Plan, queue: Queue | None = None) -> list[Status]:
    """The state of every stage of a plan, from the files that processes left.

    Args:
        queue: what the scheduler said, where it was asked.
    """
    found = {run.key: _status(run, run.key in plan.done, queue) for run in plan.runs.values()}
    for key, status in found.items():
        training = found.get(str(status.run.needs))
        if status.state == "queued" and training is not None and training.state in NEEDS_RETRY:
            # The scheduler takes it out of its queue, and tells nobody.
            found[key] = replace(status, state="pending", reason=f"its training is {training.state}")
    return list(found.values())


def _status(run: StageRun, done: bool, queue: Queue | None) -> Status:
    if done:
        return Status(run, "done", 1.0)
    paths = run_folder(run.key)
    submission, past = read_submission(paths), latest(paths)
    job = submission.job if submission is not None else None
    if submission is not None and (past is None or (past.job != submission.job and past.began < submission.at)):
        state, why = _before_it_began(submission, queue)
        return Status(run, state, 0.0, reason=why, attempts=past.number if past else 0, job=job)
    if past is None:
        return Status(run, "pending", 0.0)
    progress, eta = _progress(run, paths)
    state, why = _of_attempt(past, submission, queue)
    return Status(run, state, progress, eta if state == "running" else None, why, past.number, job)


def _before_it_began(submission: Submission, queue: Queue | None) -> tuple[State, str | None]:
    """A job that no attempt tells of yet."""
    if submission.cancelled:
        return "cancelled", None
    ended = read_exit(submission)
    if ended is not None and not ended.told:
        said = own_words(submission) or dead_rank(submission) or last_words(submission)
        return "failed", f"its job ended with exit code {ended.code} before it began: {said}"
    if _is_gone(submission, queue):
        return "lost", f"there is no job {submission.job} any more"
    return "queued", None


def _is_gone(submission: Submission, queue: Queue | None) -> bool:
    if submission.kind == "slurm":
        return queue is not None and queue.lacks(submission)
    return submission.process is None or process_name(int(submission.process.split()[0])) != submission.process


def _of_attempt(past: Past, submission: Submission | None, queue: Queue | None) -> tuple[State, str | None]:
    """The state that the newest attempt, and the job it belongs to, tell of."""
    if not past.ended and past.at_work():
        state: State = "running"
        why = hanging(past, float(past.about.get("hang_seconds") or HANG_SECONDS))
    else:
        why = past.failure()
        state = "failed" if why else "interrupted"
    if submission is None or submission.job != past.job:
        return state, why or ("`sparseinst run` goes on from the last checkpoint" if state == "interrupted" else None)
    if submission.cancelled:
        return "cancelled", None
    ended = read_exit(submission, past.about.get("restarts", 0))
    if ended is not None and ended.code != 0 and not ended.told:
        # The job is over, whatever its processes could still say: which of them was killed first is the scheduler's to tell.
        return "failed", dead_rank(submission) or past.failure() or f"its job ended with exit code {ended.code}"
    return (state, why) if state == "running" else _of_ended_job(past, submission, queue)


def _of_ended_job(past: Past, submission: Submission, queue: Queue | None) -> tuple[State, str | None]:
    """An attempt that does not go on: will its job?"""
    words, failure = last_words(submission) or "", past.failure()
    if _is_gone(submission, queue):
        return "failed" if failure else "lost", f"there is no job {submission.job} any more. {failure or words}".strip()
    if any(why in words for why in _PUT_BACK) or (past.ended and failure is None):
        # Whatever its processes said while they were ended.
        return "queued", "stopped by the scheduler, to be started again"
    if failure is not None:
        return "failed", failure
    if "TIME LIMIT" in words:
        return "failed", f"over its time limit: {words}"
    if "CANCELLED" in words:
        return "cancelled", words
    return "lost", f"silent for {past.silent_seconds():.0f} s on {past.about.get('host')}; --scheduler asks whether its job lives"


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
                "attempts": status.attempts,
                "job": status.job,
            }
            for status in found
        ]
    }


def picture(found: Sequence[Status]) -> Group:
    """The states for people: what is not done, run by run, and a count of all."""
    table = Table("run", "stage", "row", "state", "progress", "ETA", "job", "why", box=None, pad_edge=False)
    for status in found:
        if status.state != "done":
            eta = str(datetime.timedelta(seconds=round(status.eta_seconds))) if status.eta_seconds is not None else ""
            progress = f"{100 * status.progress:.0f} %" if status.progress else ""
            run = status.run
            again = f"begun {status.attempts} times" if status.attempts > 1 else ""
            why = "; ".join(part for part in (again, status.reason) if part)
            table.add_row(run.key, run.stage, run.label, status.state, progress, eta, status.job or "", escape(why))
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


def find_runs(text: str, plan: Plan) -> list[StageRun]:
    """The stages whose key begins with, or else whose label holds, the text. Raises `UserError` where there is none."""
    runs = plan.runs.values()
    found = [run for run in runs if run.key.startswith(text)] or [run for run in runs if text.casefold() in run.label.casefold()]
    if not found:
        raise UserError(f"no run is called {text!r}; `sparseinst status` lists them")
    return found


def find_log(text: str, plan: Plan, rank: int | None = None) -> Path:
    """The log of the one stage that `find_runs` finds.

    Args:
        rank: what that process of its job on a cluster said, rather than the stage's own log.

    Raises:
        UserError: no such run, or several, or none that has a log.
    """

    def log(run: StageRun) -> Path:
        paths = run_folder(run.key)
        submission = read_submission(paths)
        if submission is None or (rank is None and paths.log.exists()):
            return paths.log
        return submission.log(rank or 0)

    found = find_runs(text, plan)
    found = [run for run in found if log(run).exists()] or found
    if len(found) > 1:
        raise UserError(f"{text!r} fits {len(found)} runs: {', '.join(f'{run.key} ({run.label})' for run in found[:5])}")
    if not log(found[0]).exists():
        raise UserError(f"{found[0].label} ({found[0].key}) has no log yet")
    return log(found[0])


def follow(path: Path, *, every: float = 1.0) -> Iterable[str]:
    """The lines of a growing file, for ever."""
    with path.open(encoding="utf-8") as file:
        while True:
            line = file.readline()
            if line:
                yield line
            else:
                time.sleep(every)
