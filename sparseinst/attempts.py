"""Who works in a run's folder: numbered attempts with heartbeats, of which only the newest may write. Imports no torch.

    attempts/0003.json     who began it, when and where
    attempts/0003.0.beat   rank 0's heartbeat: what it is at, and since when
    attempts/0003.0.end    how it ended for rank 0

A lock is not enough on a cluster: a lost node holds it for ever, and a job that was requeued may run beside a copy of itself
that its node never killed. Here an attempt is begun by creating the next number, exclusively; whoever has an older number
finds that out before each write, and stops.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
import traceback
import uuid
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from sparseinst.errors import RunFailed, UserError
from sparseinst.paths import RunPaths, atomic

BEAT_SECONDS = 5.0
LOST_SECONDS = 30.0
"""Without a heartbeat for so long, a process on another machine counts as gone. Clocks may differ by less than that."""
JOIN_SECONDS = 300.0
"""How long the other ranks of a job wait for rank 0 to begin."""

Outcome = Literal["done", "failed", "interrupted", "superseded"]


class Held(UserError):
    """Another attempt is at work."""


class Superseded(RunFailed):
    """A newer attempt has taken over."""


@dataclass(frozen=True)
class Job:
    """One start of a job on a cluster."""

    id: str
    """As the scheduler names it, array index included."""
    restarts: int = 0
    """How often the scheduler has put it back into the queue."""


@dataclass(frozen=True)
class Past:
    """What an attempt's files tell."""

    number: int
    about: dict[str, Any]
    beats: dict[int, tuple[float, dict[str, Any]]]
    """By rank: seconds since the last heartbeat, and what it said."""
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
        """Since rank 0 was last heard of."""
        return self.beats[0][0] if 0 in self.beats else max(0.0, time.time() - self.began)

    def process_lives(self) -> bool | None:
        """Whether rank 0's process lives; None where it is on another machine."""
        if self.about.get("machine") != _machine():
            return None
        return self.about.get("process") == process_name(int(self.about.get("pid", 0)))

    def at_work(self) -> bool:
        """Whether somebody works on it, as far as can be told from here."""
        if self.ended:
            return False
        lives = self.process_lives()
        return lives if lives is not None else self.silent_seconds() < LOST_SECONDS

    def failure(self) -> str | None:
        """Why it failed: of several ranks the first one's word, the others failed with it."""
        failed = [(end.get("at", 0.0), rank, end) for rank, end in self.ends.items() if end.get("outcome") == "failed"]
        if not failed:
            return None
        _, rank, end = min(failed, key=lambda entry: entry[:2])
        who = f"rank {rank}: " if self.about.get("world_size", 1) > 1 else ""
        return f"{who}{end.get('reason')}"


def latest(paths: RunPaths) -> Past | None:
    """The newest attempt in a run's folder; None where nobody ever tried."""
    number = _newest(paths)
    return _read(paths, number) if number else None


def _newest(paths: RunPaths) -> int:
    try:
        names = os.listdir(paths.attempts)  # noqa: PTH208 (status asks thousands of folders)
    except FileNotFoundError:
        return 0
    return max((int(name[:4]) for name in names if name.endswith(".json") and name[:4].isdigit()), default=0)


def _read(paths: RunPaths, number: int) -> Past:
    beats, ends = {}, {}
    for file in paths.attempts.glob(f"{number:04d}.*.*"):
        rank = file.name.split(".")[1]
        if not rank.isdigit():
            continue
        if file.suffix == ".beat":
            beats[int(rank)] = _read_beat(file)
        elif file.suffix == ".end":
            ends[int(rank)] = _read_json(file)
    return Past(number, _read_json(paths.attempt(number)), beats, ends)


def _read_beat(path: Path) -> tuple[float, dict[str, Any]]:
    try:
        with path.open(encoding="utf-8") as file:  # opening it makes a network file system ask its server for the time
            written = os.fstat(file.fileno()).st_mtime
            content = json.loads(file.read())
    except (FileNotFoundError, ValueError):
        return float("inf"), {}
    return max(0.0, time.time() - written), content


def _read_json(path: Path) -> dict[str, Any]:
    """Empty for a file that is missing or damaged: then nothing is known."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


class Attempt:
    """One rank's part in an attempt; a context, in which the heartbeat beats.

    Leaving the context notes how it ended: done, failed (any exception), interrupted (the process was told to stop), or
    superseded.
    """

    def __init__(self, paths: RunPaths, number: int, about: dict[str, Any], rank: int = 0) -> None:
        self.paths, self.number, self.about, self.rank = paths, number, about, rank
        self._at: dict[str, Any] = {"phase": "start", "step": None, "since": time.time()}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat_on, daemon=True, name="heartbeat")

    @property
    def world_size(self) -> int:
        return int(self.about["world_size"])

    @property
    def address(self) -> str | None:
        """host:port at which rank 0 meets the others."""
        return self.about.get("address")

    @classmethod
    def begin(
        cls, paths: RunPaths, *, job: Job | None = None, world_size: int = 1, address: str | None = None,
        hang_seconds: float | None = None,
    ) -> Self:  # fmt: skip
        """Claim the folder; for rank 0.

        Args:
            hang_seconds: end the process, with the reason noted, when a rank has not moved for so long.

        Raises:
            Held: somebody else works there, as far as can be told.
        """
        last = latest(paths)
        # A job that was put back into the queue takes over from itself, whatever became of its old copy.
        requeued = last is not None and job is not None and last.job == job.id and last.about.get("restarts", 0) < job.restarts
        if last is not None and not requeued and last.at_work():
            raise Held(_holder(paths, last))
        about = {
            "began": time.time(), "host": socket.gethostname(), "machine": _machine(), "pid": os.getpid(),
            "process": process_name(os.getpid()), "job": job.id if job else None, "restarts": job.restarts if job else 0,
            "world_size": world_size, "address": address, "hang_seconds": hang_seconds,
        }  # fmt: skip
        number = last.number + 1 if last is not None else 1
        paths.attempts.mkdir(parents=True, exist_ok=True)
        temporary = paths.attempts / f".{uuid.uuid4().hex[:8]}.tmp"
        temporary.write_text(json.dumps(about) + "\n", encoding="utf-8")
        try:
            os.link(temporary, paths.attempt(number))  # unlike a rename it fails where the number is taken
        except FileExistsError:
            raise Held(_holder(paths, _read(paths, number))) from None
        finally:
            temporary.unlink()
        return cls(paths, number, about)

    @classmethod
    def join(cls, paths: RunPaths, job: Job, rank: int) -> Self:
        """The attempt that rank 0 of the same start of the job begins; for the other ranks.

        Raises:
            RunFailed: rank 0 did not begin in time.
        """
        until = time.monotonic() + JOIN_SECONDS
        while time.monotonic() < until:
            last = latest(paths)
            if last is not None and (last.job, last.about.get("restarts")) == (job.id, job.restarts) and last.at_work():
                return cls(paths, last.number, last.about, rank)
            time.sleep(0.2)
        raise RunFailed(f"{paths.root}: rank 0 of job {job.id} did not begin within {JOIN_SECONDS:g} s")

    def __enter__(self) -> Self:
        self._beat()
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join()
        if self.paths.end(self.number, self.rank).exists():  # noted before
            return
        if error is None:
            self._end("done")
        else:
            self.note(error)

    def note(self, error: BaseException) -> None:
        """Note why it ends, before it does."""
        if self.paths.end(self.number, self.rank).exists():
            return
        if isinstance(error, Superseded):
            self._end("superseded")
        elif isinstance(error, Exception) and not isinstance(error, Held):
            self._end("failed", reason(error), "".join(traceback.format_exception(error)))
        else:  # KeyboardInterrupt, or SystemExit of a signal's handler, or a folder within is held
            self._end("interrupted")

    def at(self, phase: str, step: int | None = None) -> None:
        """Note what this rank is at now. `wait` is what ranks do that need the others."""
        self._at = {"phase": phase, "step": step, "since": time.time()}

    def rest(self) -> None:
        """Let this attempt stand still without being taken for hung."""
        self.about["hang_seconds"] = None

    def check(self) -> None:
        """Before each write. Raises `Superseded`."""
        if self.paths.attempt(self.number + 1).exists():
            raise Superseded(f"{self.paths.root}: a newer attempt has taken over; attempt {self.number} stops")

    def _beat_on(self) -> None:
        while not self._stop.wait(BEAT_SECONDS):
            with contextlib.suppress(OSError):  # a full disk must not kill the run; the training's own writes tell of it
                self._beat()
                self._watch()

    def _beat(self) -> None:
        path = self.paths.beat(self.number, self.rank)
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps({**self._at, "pid": os.getpid()}) + "\n", encoding="utf-8")
        temporary.replace(path)

    def _watch(self) -> None:
        """Rank 0: end the process where a rank hangs; it cannot end the others, but the launcher then does."""
        limit = self.about.get("hang_seconds")
        if self.rank or not limit:
            return
        hung = hanging(_read(self.paths, self.number), limit)
        if hung:
            self._end("failed", hung)
            os._exit(1)

    def _end(self, outcome: Outcome, why: str | None = None, trace: str | None = None) -> None:
        end = {"outcome": outcome, "reason": why, "at": time.time(), "traceback": trace}
        with contextlib.suppress(OSError), atomic(self.paths.end(self.number, self.rank)) as temporary:
            temporary.write_text(json.dumps(end) + "\n", encoding="utf-8")


def hanging(past: Past, limit: float) -> str | None:
    """Which rank has not moved for `limit` seconds: one that is silent, else one that does not just wait for the others."""
    stuck = []
    for rank in range(past.about.get("world_size", 1)):
        silent, at = past.beats.get(rank, (time.time() - past.began, {"phase": "start", "since": past.began}))
        stands = time.time() - at.get("since", past.began)
        if max(silent, stands) > limit:
            where = f"{at.get('phase')}" + (f" of step {at['step']}" if at.get("step") is not None else "")
            stuck.append((silent <= limit, at.get("phase") == "wait", rank, f"rank {rank} hung in {where} for {stands:.0f} s"))
    return min(stuck)[-1] if stuck else None


def reason(error: BaseException) -> str:
    """An exception in one line."""
    known = isinstance(error, RunFailed | UserError)
    return (str(error).splitlines() or [""])[0] if known else f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def _holder(paths: RunPaths, last: Past) -> str:
    job = f", job {last.job}" if last.job else ""
    who = f"host {last.about.get('host')}, pid {last.about.get('pid')}{job}"
    return f"{paths.root}: another process is at work in this folder ({who})"


@cache
def _machine() -> str:
    """Names this machine, this boot of it, and this container."""
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):  # not on every system
        parts += [
            Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip(),
            str(Path("/proc/self/ns/pid").readlink()),
        ]
    return " ".join(parts)


def process_name(pid: int) -> str | None:
    """A living process of this machine, by its number and its start; None for a dead one."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        if Path("/proc/self").exists() or not pid:
            return None
        try:  # no /proc on this system
            os.kill(pid, 0)
        except OSError:
            return None
        return str(pid)
    return None if fields[0] in "ZX" else f"{pid} {fields[19]}"  # its start, in ticks since the machine's


def usable_cores() -> int:
    """Those that this process may use, which on a cluster are fewer than there are."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on every system
        return os.cpu_count() or 1
