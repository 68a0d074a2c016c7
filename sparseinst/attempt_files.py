"""Read the files of attempts: who began one, which ranks are alive, and how each of them ended. Imports no torch.

`attempts` lists the files and writes them. What is read from a file is validated; a damaged file counts as one without values.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, Field

from sparseinst.files import parse_json
from sparseinst.machine import machine_name, process_name
from sparseinst.paths import RunPaths

LOST_SECONDS = 30.0
"""A process on another machine counts as gone if its last heartbeat is older. The machines' clocks must differ by less."""
Outcome = Literal["done", "failed", "interrupted", "superseded"]


_Seconds = Annotated[float, Field(ge=0, le=1e15)]
_Whole = Annotated[int, Field(ge=0, le=2**22)]
"""A process id, a rank or a count; Linux allows no larger process id."""


class AttemptStart(BaseModel, frozen=True):
    """An attempt's own file: the process of rank 0, which began it. A missing or damaged file has the defaults."""

    began: _Seconds = 0.0
    """Seconds since 1970, like all times here."""
    host: str = "unknown"
    machine: str = ""
    """The machine, named as by `machine.machine_name`."""
    pid: _Whole = 0
    process: str | None = None
    """The process, named as by `machine.process_name`."""
    job: str | None = None
    """The scheduler's name of the job, with the array index."""
    restarts: _Whole = 0
    """How often the scheduler had requeued the job."""
    world_size: _Whole = 1
    address: str | None = None
    """The host:port at which the other ranks connect to rank 0."""
    hang_seconds: _Seconds | None = None
    """A rank that makes no progress for this long hangs; None for no limit."""


class Heartbeat(BaseModel, frozen=True):
    """A heartbeat of one rank."""

    phase: str
    """What the rank is doing."""
    step: int | None = None
    since: _Seconds
    """When the phase began."""
    pid: _Whole = 0
    process: str | None = None
    machine: str = ""


class AttemptEnd(BaseModel, frozen=True):
    """How an attempt ended for one rank."""

    outcome: Outcome
    reason: str | None = None
    at: _Seconds = 0.0
    traceback: str | None = None


@dataclass(frozen=True)
class AttemptRecord:
    """The content of one attempt's files."""

    number: int
    start: AttemptStart
    beats: dict[int, tuple[float, Heartbeat]]
    """By rank: the age of the last heartbeat in seconds, and its content. A damaged one is infinitely old."""
    ends: dict[int, AttemptEnd | None]
    """By rank: how it ended; None if the file is damaged."""

    @property
    def job(self) -> str | None:
        return self.start.job

    @property
    def began(self) -> float:
        return self.start.began

    @property
    def ended(self) -> bool:
        return 0 in self.ends

    def silent_seconds(self) -> float:
        """Return the seconds since rank 0's last heartbeat, or since the attempt began."""
        return self.beats[0][0] if 0 in self.beats else max(0.0, time.time() - self.began)

    def process_lives(self) -> bool | None:
        """Return whether rank 0's process is alive; None if it is on another machine."""
        if self.start.machine != machine_name():
            return None
        return self.start.process == process_name(self.start.pid)

    def at_work(self) -> bool:
        """Return whether the attempt is still running, as far as this machine can see."""
        if self.ended:
            return False
        lives = self.process_lives()
        return lives if lives is not None else self.silent_seconds() < LOST_SECONDS

    @property
    def done(self) -> bool:
        """Whether the attempt finished its stage."""
        end = self.ends.get(0)
        return end is not None and end.outcome == "done"

    def failure(self) -> str | None:
        """Return the reason of the first rank that failed, since the others fail as a consequence; None if none failed."""
        failed = [(end.at, rank, end) for rank, end in self.ends.items() if end is not None and end.outcome == "failed"]
        if not failed:
            return None
        _, rank, end = min(failed, key=lambda entry: entry[:2])
        prefix = f"rank {rank}: " if self.start.world_size > 1 else ""
        return f"{prefix}{end.reason}"


def latest_attempt(paths: RunPaths) -> AttemptRecord | None:
    """Return the newest attempt in a run's folder; None if there is none."""
    number = _newest_number(paths)
    return read_attempt(paths, number) if number else None


def _newest_number(paths: RunPaths) -> int:
    try:
        names = os.listdir(paths.attempts)  # noqa: PTH208 (faster; status lists thousands of folders)
    except FileNotFoundError:
        return 0
    return max((int(name[:4]) for name in names if name.endswith(".json") and name[:4].isdecimal()), default=0)


def read_attempt(paths: RunPaths, number: int) -> AttemptRecord:
    """Return one attempt of a run."""
    start = parse_json(_content(paths.attempt(number)), AttemptStart) or AttemptStart()
    beats, ends = {}, {}
    for file in paths.attempts.glob(f"{number:04d}.*.*"):
        rank = file.name.split(".")[1]
        if not rank.isdecimal():
            continue
        if file.suffix == ".beat":
            beats[int(rank)] = _read_beat(file, start.began)
        elif file.suffix == ".end":
            ends[int(rank)] = parse_json(_content(file), AttemptEnd)
    return AttemptRecord(number, start, beats, ends)


def _read_beat(path: Path, began: float) -> tuple[float, Heartbeat]:
    """Return the age of a heartbeat and its content. A damaged one counts as written before the attempt began."""
    try:
        with path.open("rb") as file:  # opening the file makes a network file system fetch its current time stamp
            written = os.fstat(file.fileno()).st_mtime
            beat = parse_json(file.read(), Heartbeat)
    except FileNotFoundError:
        beat = None
    if beat is None:
        return float("inf"), Heartbeat(phase="an unknown phase", since=began)
    return max(0.0, time.time() - written), beat


def _content(path: Path) -> bytes:
    """Return the content of a file; nothing if the file is missing."""
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return b""


def describe_hang(attempt: AttemptRecord, limit: float) -> str | None:
    """Describe the hung rank; if several hang, the one that most likely caused it.

    Args:
        limit: seconds without a heartbeat, or in the same phase, after which a rank counts as hung.

    Returns:
        A rank without heartbeats is named first, then one that is not merely waiting for the others. None if no rank hangs.
    """
    stuck = []
    for rank in range(attempt.start.world_size):
        none_yet = time.time() - attempt.began, Heartbeat(phase="start", since=attempt.began)
        silent, beat = attempt.beats.get(rank, none_yet)
        in_phase = time.time() - beat.since
        if max(silent, in_phase) > limit:
            where = beat.phase + (f" of step {beat.step}" if beat.step is not None else "")
            stuck.append((silent <= limit, beat.phase == "wait", rank, f"rank {rank} hung in {where} for {in_phase:.0f} s"))
    return min(stuck)[-1] if stuck else None
