"""Read the files of attempts: who began one, which ranks are alive, and how each of them ended. Imports no torch.

`attempts` lists the files and writes them.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field

from sparseinst.files import json_fields
from sparseinst.machine import machine_name, process_name
from sparseinst.paths import RunPaths

LOST_SECONDS = 30.0
"""A process on another machine counts as gone if its last heartbeat is older. The machines' clocks must differ by less."""
Outcome = Literal["done", "failed", "interrupted", "superseded"]


_Seconds = Annotated[float, Field(ge=0, le=1e15)]
_Whole = Annotated[int, Field(ge=0, le=2**22)]
"""A process id, a rank or a count; Linux allows no larger process id."""


class _About(BaseModel):
    """The types of the fields of an attempt's own file."""

    began: _Seconds = 0
    host: str = ""
    machine: str = ""
    pid: _Whole = 0
    process: str | None = None
    job: str | None = None
    restarts: _Whole = 0
    world_size: _Whole = 1
    address: str | None = None
    hang_seconds: _Seconds | None = None


class _Beat(BaseModel):
    """The types of the fields of a heartbeat."""

    phase: str = ""
    step: int | None = None
    since: _Seconds = 0
    pid: _Whole = 0
    process: str | None = None
    machine: str = ""


class _End(BaseModel):
    """The types of the fields of an end."""

    outcome: Outcome
    reason: str | None = None
    at: _Seconds = 0
    traceback: str | None = None


@dataclass(frozen=True)
class AttemptRecord:
    """The content of one attempt's files."""

    number: int
    about: dict[str, Any]
    beats: dict[int, tuple[float, dict[str, Any]]]
    """By rank: the age of the last heartbeat in seconds, and its content."""
    ends: dict[int, dict[str, Any]]
    """By rank: `outcome`, `reason`, `at`."""

    @property
    def job(self) -> str | None:
        return self.about.get("job")

    @property
    def began(self) -> float:
        return float(self.about.get("began", 0.0))

    @property
    def ended(self) -> bool:
        return 0 in self.ends

    def silent_seconds(self) -> float:
        """Return the seconds since rank 0's last heartbeat, or since the attempt began."""
        return self.beats[0][0] if 0 in self.beats else max(0.0, time.time() - self.began)

    def process_lives(self) -> bool | None:
        """Return whether rank 0's process is alive; None if it is on another machine."""
        if self.about.get("machine") != machine_name():
            return None
        return self.about.get("process") == process_name(int(self.about.get("pid", 0)))

    def at_work(self) -> bool:
        """Return whether the attempt is still running, as far as this machine can see."""
        if self.ended:
            return False
        lives = self.process_lives()
        return lives if lives is not None else self.silent_seconds() < LOST_SECONDS

    @property
    def done(self) -> bool:
        """Whether the attempt finished its stage."""
        return bool(self.ends.get(0, {}).get("outcome") == "done")

    def failure(self) -> str | None:
        """Return the reason of the first rank that failed, since the others fail as a consequence; None if none failed."""
        failed = [(end.get("at", 0.0), rank, end) for rank, end in self.ends.items() if end.get("outcome") == "failed"]
        if not failed:
            return None
        _, rank, end = min(failed, key=lambda entry: entry[:2])
        prefix = f"rank {rank}: " if self.about.get("world_size", 1) > 1 else ""
        return f"{prefix}{end.get('reason')}"


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
    """Return one attempt of a run; an attempt whose files are missing or damaged is empty."""
    beats, ends = {}, {}
    for file in paths.attempts.glob(f"{number:04d}.*.*"):
        rank = file.name.split(".")[1]
        if not rank.isdecimal():
            continue
        if file.suffix == ".beat":
            beats[int(rank)] = _read_beat(file)
        elif file.suffix == ".end":
            ends[int(rank)] = _read_fields(file, _End)
    return AttemptRecord(number, _read_fields(paths.attempt(number), _About), beats, ends)


def _read_beat(path: Path) -> tuple[float, dict[str, Any]]:
    try:
        with path.open("rb") as file:  # opening the file makes a network file system fetch its current time stamp
            written = os.fstat(file.fileno()).st_mtime
            content = json_fields(file.read(), _Beat)
    except FileNotFoundError:
        return float("inf"), {}
    return max(0.0, time.time() - written) if content else float("inf"), content


def _read_fields(path: Path, model: type[BaseModel]) -> dict[str, Any]:
    """Return the fields of a file; an empty dict if the file is missing or damaged."""
    try:
        return json_fields(path.read_bytes(), model)
    except FileNotFoundError:
        return {}


def describe_hang(attempt: AttemptRecord, limit: float) -> str | None:
    """Describe the hung rank; if several hang, the one that most likely caused it.

    Args:
        limit: seconds without a heartbeat, or in the same phase, after which a rank counts as hung.

    Returns:
        A rank without heartbeats is named first, then one that is not merely waiting for the others. None if no rank hangs.
    """
    stuck = []
    for rank in range(attempt.about.get("world_size", 1)):
        silent, at = attempt.beats.get(rank, (time.time() - attempt.began, {"phase": "start", "since": attempt.began}))
        in_phase = time.time() - at.get("since", attempt.began)
        if max(silent, in_phase) > limit:
            where = f"{at.get('phase')}" + (f" of step {at['step']}" if at.get("step") is not None else "")
            stuck.append((silent <= limit, at.get("phase") == "wait", rank, f"rank {rank} hung in {where} for {in_phase:.0f} s"))
    return min(stuck)[-1] if stuck else None
