"""The state of every stage, found from records and from the files of attempts and jobs. Imports no torch."""

from __future__ import annotations

import datetime
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, Field
from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.table import Table

from sparseinst.ablation.plan import Plan, StageRun
from sparseinst.attempt_files import AttemptRecord, describe_hang, latest_attempt
from sparseinst.errors import UserError
from sparseinst.files import parse_json
from sparseinst.launch.names import folded, named_runs
from sparseinst.launch.submission import (
    Queue,
    Submission,
    killed_rank,
    last_output_line,
    read_exit,
    read_submission,
    scheduler_message,
)
from sparseinst.machine import machine_name, process_name
from sparseinst.paths import RunPaths, run_folder

State = Literal["done", "running", "queued", "pending", "failed", "lost", "cancelled", "interrupted"]
"""`queued`: a cluster has it; `pending`: it has not been started or sent; `lost`: it stopped, and no file shows why."""

NEEDS_RETRY: tuple[State, ...] = ("failed", "lost", "cancelled")
"""States that only `sparseinst retry` or `sparseinst run` ends."""
_REQUEUED = ("REQUEUE", "PREEMPTION", "NODE FAILURE")
"""Words in SLURM's messages about a job that it stops and will start again."""
HANG_SECONDS = 1800.0
"""A rank that makes no progress for this long is reported as hung, if its attempt has no limit of its own."""


class _Step(BaseModel):
    """The types of the fields of a line of metrics.jsonl that tell the progress."""

    iteration: Annotated[int, Field(ge=0)]
    seconds: Annotated[float, Field(ge=0, le=1e6)]


_STATES_EVERY = 300.0  # seconds between two lists of all states if the output is no terminal
_TAIL = 4096  # bytes; the last line of metrics.jsonl is far shorter


@dataclass(frozen=True)
class Status:
    run: StageRun
    state: State
    progress: float
    """The fraction of a training's steps that are done, in [0, 1]."""
    eta_seconds: float | None = None
    reason: str | None = None
    """Why the stage is not done, in one line."""
    attempts: int = 0
    """How often the stage was begun."""
    job: str | None = None
    """The scheduler's name of its job."""


def plan_status(plan: Plan, queue: Queue | None = None) -> list[Status]:
    """Return the state of every stage of a plan, from the files that processes wrote.

    Args:
        queue: the scheduler's answer, if it was asked.
    """
    states = {run.key: _status(run, run.key in plan.done, queue) for run in plan.runs.values()}
    removed: dict[str, str] = {}
    for key, status in states.items():  # a stage comes after those that it needs
        needed = states.get(str(status.run.needs))
        if status.state != "queued" or needed is None:
            continue
        if needed.state in NEEDS_RETRY:
            what = "pretraining" if status.run.stage == "train" else "training"
            removed[key] = f"the {what} that it needs is {needed.state}"
        elif needed.run.key in removed:
            removed[key] = removed[needed.run.key]
        if key in removed:  # the scheduler silently removes such a job from its queue
            states[key] = replace(status, state="pending", reason=removed[key])
    return list(states.values())


def _status(run: StageRun, done: bool, queue: Queue | None) -> Status:
    if done:
        return Status(run, "done", 1.0)
    paths = run_folder(run.key)
    submission, attempt = read_submission(paths), latest_attempt(paths)
    job = submission.job if submission is not None else None
    if submission is not None and (attempt is None or (attempt.job != submission.job and attempt.began < submission.at)):
        state, why = _state_before_attempt(submission, queue)
        return Status(run, state, 0.0, reason=why, attempts=attempt.number if attempt else 0, job=job)
    if attempt is None:
        return Status(run, "pending", 0.0)
    if attempt.done:  # but its record is gone, or its weights, which another stage needs
        return Status(run, "pending", 0.0, reason="its result is gone", attempts=attempt.number)
    progress, eta = _progress(run, paths)
    state, why = _state_of_attempt(attempt, submission, queue)
    # A later attempt is that of another job, or of `sparseinst run`, which is no job.
    return Status(run, state, progress, eta if state == "running" else None, why, attempt.number, attempt.job)


def _state_before_attempt(submission: Submission, queue: Queue | None) -> tuple[State, str | None]:
    """Return the state and its reason for a job that has not begun an attempt yet."""
    if submission.cancelled:
        return "cancelled", None
    ended = read_exit(submission)
    if ended is not None and not ended.signalled:
        last_line = last_output_line(submission) or killed_rank(submission) or scheduler_message(submission)
        return "failed", f"its job ended with exit code {ended.code} before the stage began: {last_line}"
    if _is_gone(submission, queue):
        return "lost", f"job {submission.job} no longer exists"
    return "queued", None


def _is_gone(submission: Submission, queue: Queue | None) -> bool:
    """Return whether the job is known to exist no longer."""
    if submission.kind == "slurm":
        return queue is not None and queue.lacks(submission)
    if submission.machine not in (None, machine_name()):
        return False  # only heartbeats tell about processes of another machine
    return submission.process is None or process_name(int(submission.process.split()[0])) != submission.process


def _state_of_attempt(attempt: AttemptRecord, submission: Submission | None, queue: Queue | None) -> tuple[State, str | None]:
    """Return the state and its reason from the newest attempt and the job that it belongs to."""
    if not attempt.ended and attempt.at_work():
        state: State = "running"
        why = describe_hang(attempt, attempt.start.hang_seconds or HANG_SECONDS)
    else:
        why = attempt.failure()
        state = "failed" if why else "interrupted"
    if submission is None or submission.job != attempt.job:
        return state, why or ("`sparseinst run` continues from the last checkpoint" if state == "interrupted" else None)
    if submission.cancelled:
        return "cancelled", None
    ended = read_exit(submission, attempt.start.restarts)
    if ended is not None and ended.code != 0 and not ended.signalled:
        # The job is over, even if heartbeats are still fresh. Prefer the scheduler's report of the rank that was killed first.
        return "failed", killed_rank(submission) or attempt.failure() or f"its job ended with exit code {ended.code}"
    return (state, why) if state == "running" else _state_of_ended_attempt(attempt, submission, queue)


def _state_of_ended_attempt(attempt: AttemptRecord, submission: Submission, queue: Queue | None) -> tuple[State, str | None]:
    """Return the state and its reason for an attempt that has stopped: will its job start again?"""
    message, failure = scheduler_message(submission) or "", attempt.failure()
    if _is_gone(submission, queue):
        return "failed" if failure else "lost", f"job {submission.job} no longer exists. {failure or message}".strip()
    if any(words in message for words in _REQUEUED) or (attempt.ended and failure is None):
        # Errors of its processes do not count: the scheduler was stopping them.
        return "queued", "the scheduler stopped the job and will start it again"
    if failure is not None:
        return "failed", failure
    if "TIME LIMIT" in message:
        return "failed", f"the job exceeded its time limit: {message}"
    if "CANCELLED" in message:
        return "cancelled", message
    ended = read_exit(submission, attempt.start.restarts)
    if ended is not None and ended.signalled:
        # SLURM's message about it can be missing from the output.
        asks = "" if queue is not None else "; `sparseinst status --scheduler` asks SLURM whether it will start again"
        return "queued", f"the scheduler stopped the job{asks}"
    silent = f"no heartbeat for {attempt.silent_seconds():.0f} s from {attempt.start.host}"
    return "lost", f"{silent}; `sparseinst status --scheduler` asks SLURM whether the job still exists"


def _progress(run: StageRun, paths: RunPaths) -> tuple[float, float | None]:
    """Return the fraction of a training's steps that are done, and the seconds that the rest will take."""
    if run.stage not in ("pretrain", "train") or not paths.metrics.exists():
        return 0.0, None
    with paths.metrics.open("rb") as file:
        file.seek(max(0, paths.metrics.stat().st_size - _TAIL))
        lines = file.read().decode("utf-8", errors="replace").splitlines()
    for line in reversed(lines):
        step = parse_json(line, _Step)
        if step is None:  # a damaged line, or the metrics of an evaluation
            continue
        total = (run.config.train if run.stage == "train" else run.config.pretrain).iterations
        return step.iteration / total, step.seconds * (total - step.iteration)
    return 0.0, None


def as_json(states: Iterable[Status]) -> dict[str, Any]:
    """Return the states as JSON data, for scripts."""
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
            for status in states
        ]
    }


def states_table(states: Sequence[Status]) -> Group:
    """Return the states for people: a table of the stages that are not done, and the count of each state."""
    table = Table("run", "stage", "row", "state", "progress", "ETA", "job", "why", box=None, pad_edge=False)
    for status in states:
        if status.state != "done":
            eta = str(datetime.timedelta(seconds=round(status.eta_seconds))) if status.eta_seconds is not None else ""
            progress = f"{100 * status.progress:.0f} %" if status.progress else ""
            run = status.run
            attempts = f"{status.attempts} attempts" if status.attempts > 1 else ""
            why = "; ".join(part for part in (attempts, status.reason) if part)
            table.add_row(run.key, run.stage, escape(run.label), status.state, progress, eta, status.job or "", escape(why))
    counts = Counter(status.state for status in states)
    left = _training_time_left(states)
    summary = ", ".join(f"{counts[state]} {state}" for state in get_args(State) if counts[state])
    if states and counts["done"] == len(states):
        stages = Counter(status.run.stage for status in states)
        summary = f"all {len(states)} runs are done: " + ", ".join(f"{count} {stage}" for stage, count in stages.items())
    elif left is not None:
        summary += (
            f"; the trainings need about {datetime.timedelta(seconds=60 * math.ceil(left / 60))} more, if as many run at a time"
        )
    return Group(table, summary) if table.row_count else Group(summary)


def _training_time_left(states: Sequence[Status]) -> float | None:
    """Return the seconds until all trainings are done, if as many run at a time as now and all take as long as those that run.

    Returns:
        None if no training runs, or if the time of those that run is not known yet.
    """
    trainings = [status for status in states if status.run.stage == "train" and status.state != "done"]
    running = [status for status in trainings if status.state == "running"]
    known = [status for status in running if status.eta_seconds is not None and 0 < status.progress < 1]
    if not known:
        return None
    each = sum((status.eta_seconds or 0.0) / (1 - status.progress) for status in known) / len(known)
    rest = sum(each * (1 - status.progress) if status in running else each for status in trainings)
    return rest / len(running)


def show(states: Sequence[Status]) -> None:
    """Print the states."""
    Console(width=max(Console().width, 120)).print(states_table(states))


def watch(get_states: Callable[[], Sequence[Status]], going_on: Callable[[], bool], *, every: float = 2.0) -> None:
    """Update the states on the terminal while `going_on()` is true.

    If the output is no terminal, print a line for each stage that begins or ends, now and then the states, and at the end all.
    """
    if not Console().is_terminal:
        _print_changes(get_states, going_on, every)
        return
    with Live(states_table(get_states()), auto_refresh=False) as live:
        while going_on():
            time.sleep(every)
            live.update(states_table(get_states()), refresh=True)


def _print_changes(get_states: Callable[[], Sequence[Status]], going_on: Callable[[], bool], every: float) -> None:
    states = get_states()
    before, printed = {status.run.key: status.state for status in states}, time.monotonic()
    while going_on():
        time.sleep(every)
        states = get_states()
        for status in states:
            if before.get(status.run.key) != status.state:
                why = f" ({status.reason})" if status.reason else ""
                now = datetime.datetime.now().astimezone().strftime("%H:%M")
                print(f"{now}  {status.run.stage} {status.run.label}: {status.state}{why}", flush=True)
        before = {status.run.key: status.state for status in states}
        if time.monotonic() - printed > _STATES_EVERY:
            show(states)
            printed = time.monotonic()
    show(get_states())


def find_runs(text: str, plan: Plan) -> list[StageRun]:
    """Return the stages whose key begins with the text; if there is none, those whose label contains it (`table5/dice`, `dice`).

    Raises:
        UserError: no stage matches.
    """
    runs = plan.runs.values()
    found = [run for run in runs if run.key.startswith(text)] or [run for run in runs if folded(text) in folded(run.label)]
    if not found:
        raise UserError(f"no run is called {text!r}; `sparseinst status` lists them")
    return found


def find_log(text: str, plan: Plan, rank: int | None = None) -> Path:
    """Return the log of the one stage that the text matches, as in `find_runs`, or else of a run in `runs` with such a name.

    Args:
        rank: return the output of this rank of its job on a cluster instead of the stage's own log.

    Raises:
        UserError: the text matches no stage, or several, or the stage has no log yet.
    """

    def log(paths: RunPaths) -> Path:
        submission = read_submission(paths)
        if submission is None or (rank is None and paths.log.exists()):
            return paths.log
        return submission.log(rank or 0)

    if (folder := RunPaths(Path(text))).log.exists():  # the folder of any run
        return folder.log
    found = _find_folders(text, plan)
    if not found:
        raise UserError(f"no run is called {text!r}; `sparseinst status` lists them")
    found = {key: run for key, run in found.items() if log(run[0]).exists()} or found
    found = {key: run for key, run in found.items() if key in plan.runs} or found  # the profile of the command
    if len(found) > 1:  # several rows share a pretraining, which has the name of the first of them
        found = {key: run for key, run in found.items() if ", pretrain, " not in run[1]} or found
    if len(found) > 1:
        more = f" and {len(found) - 5} more" if len(found) > 5 else ""
        names = ", ".join(f"{key} ({name})" for key, (_, name) in list(found.items())[:5])
        raise UserError(f"{text!r} matches {len(found)} runs: {names}{more}")
    [(key, (paths, name))] = found.items()
    if not log(paths).exists():
        raise UserError(f"{name} ({key}) has no log yet; only trainings and the jobs of a cluster write one")
    return log(paths)


def _find_folders(text: str, plan: Plan) -> dict[str, tuple[RunPaths, str]]:
    """Return the folder and the name of each run with such a key, or else with such a name, by key.

    These are the stages of the plan, and the runs in `runs`, which may have another profile or belong to a spec of the user.
    """
    known = {run.key: (run_folder(run.key), run.label) for run in plan.runs.values()}
    known |= {paths.root.name: (paths, name) for paths, name in named_runs()}
    if by_key := {key: run for key, run in known.items() if key.startswith(text)}:
        return by_key
    named = {key: run for key, run in known.items() if folded(text) in folded(run[1])}
    # `table4/softmax` means the row of this name, with seed 0, and not also `table4/softmax without groups`.
    labels = {key: folded(plan.runs[key].label if key in plan.runs else _label(name)) for key, (_, name) in named.items()}
    exact = {key: run for key, run in named.items() if folded(text) in (labels[key], labels[key].partition(" ")[2])}
    return exact or named


def _label(name: str) -> str:
    """Return the table and the row in a run's name, without seed 0, stage and profile; see `StageRun.name`."""
    return name.rsplit(", ", 2)[0].removesuffix(" seed 0")


def follow(path: Path, *, every: float = 1.0) -> Iterable[str]:
    """Yield the lines of a growing file; this never ends."""
    with path.open(encoding="utf-8", errors="replace") as file:
        while True:
            line = file.readline()
            if line:
                yield line
            else:
                time.sleep(every)
