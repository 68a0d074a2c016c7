"""Numbered attempts decide which process may write to a run's folder. Imports no torch.

    attempts/0003.json     the process that began the attempt, when and where
    attempts/0003.0.beat   rank 0's heartbeat: its current phase, and when that phase began
    attempts/0003.0.end    how the attempt ended for rank 0
    attempts/0003.0.stacks what each thread of rank 0 was doing when it hung; empty while it does not

A lock is not enough on a cluster: a lost node never releases it, and a requeued job may run beside an old copy of itself that its
node did not kill. A process therefore begins an attempt by creating the file with the next number, which only one process can do.
Before each write it checks for a higher number, and stops if there is one.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import socket
import threading
import time
import traceback
import uuid
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self, TextIO

from sparseinst.attempt_files import AttemptRecord, AttemptStart, Outcome, describe_hang, latest_attempt, read_attempt
from sparseinst.errors import RunFailed, UserError
from sparseinst.files import atomic, make_folder, remove_temporaries, write_error
from sparseinst.machine import machine_name, process_name
from sparseinst.paths import RunPaths

BEAT_SECONDS = 5.0
JOIN_SECONDS = 300.0
"""The other ranks of a job wait this long for rank 0 to begin the attempt."""


class Held(UserError):
    """Another process is working in the folder."""


class Superseded(RunFailed):
    """A newer attempt has taken over the folder."""


@dataclass(frozen=True)
class Job:
    """One start of a job on a cluster."""

    id: str
    """The scheduler's name of the job, with the array index."""
    restarts: int = 0
    """How often the scheduler has requeued the job."""


class Attempt:
    """One rank's part in an attempt, as a context manager that writes heartbeats.

    On exit it records how the rank ended: done, failed (any exception), interrupted (the process was asked to stop), or
    superseded.
    """

    def __init__(self, paths: RunPaths, number: int, start: AttemptStart, rank: int = 0) -> None:
        self.paths, self.number, self.start, self.rank = paths, number, start, rank
        self._at: dict[str, Any] = {"phase": "start", "step": None, "since": time.time()}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._beat_until_stopped, daemon=True, name="heartbeat")
        self._stacks: TextIO | None = None

    @property
    def world_size(self) -> int:
        return self.start.world_size

    @property
    def address(self) -> str | None:
        """The host:port at which the other ranks connect to rank 0."""
        return self.start.address

    @classmethod
    def begin(
        cls, paths: RunPaths, *, job: Job | None = None, world_size: int = 1, address: str | None = None,
        hang_seconds: float | None = None,
    ) -> Self:  # fmt: skip
        """Claim the folder. Rank 0 calls this.

        Args:
            address: host:port at which the other ranks connect to rank 0.
            hang_seconds: if a rank makes no progress for this long, record that as the reason and end the process.

        Raises:
            Held: another process is working in the folder, as far as this machine can see.
        """
        last = latest_attempt(paths)
        # A requeued job takes over from its own earlier start, even if that old copy still runs.
        requeued = last is not None and job is not None and last.job == job.id and last.start.restarts < job.restarts
        if last is not None and not requeued and last.at_work():
            raise Held(_held_message(paths, last))
        start = AttemptStart(
            began=time.time(), host=socket.gethostname(), machine=machine_name(), pid=os.getpid(),
            process=process_name(os.getpid()), job=job.id if job else None, restarts=job.restarts if job else 0,
            world_size=world_size, address=address, hang_seconds=hang_seconds,
        )  # fmt: skip
        number = last.number + 1 if last is not None else 1
        make_folder(paths.attempts)
        temporary = paths.attempts / f".{uuid.uuid4().hex[:8]}.tmp"
        try:
            temporary.write_text(json.dumps(start.model_dump()) + "\n", encoding="utf-8")
            os.link(temporary, paths.attempt(number))  # unlike a rename, a link fails if the number is taken
        except FileExistsError:
            raise Held(_held_message(paths, read_attempt(paths, number))) from None
        except OSError as error:
            raise write_error(paths.root, error) or error from None
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
        for folder in (paths.root, paths.checkpoints):  # no other process writes to them now
            remove_temporaries(folder)
        remove_temporaries(paths.attempts, older_than=60)  # others may be trying to begin
        return cls(paths, number, start)

    @classmethod
    def join(cls, paths: RunPaths, job: Job, rank: int) -> Self:
        """Join the attempt that rank 0 of the same job start begins. The other ranks call this.

        Raises:
            RunFailed: rank 0 did not begin within `JOIN_SECONDS`.
        """
        deadline = time.monotonic() + JOIN_SECONDS
        while time.monotonic() < deadline:
            last = latest_attempt(paths)
            if last is not None and (last.job, last.start.restarts) == (job.id, job.restarts) and last.at_work():
                return cls(paths, last.number, last.start, rank)
            time.sleep(0.2)
        raise RunFailed(f"{paths.root}: rank 0 of job {job.id} did not begin within {JOIN_SECONDS:g} s")

    def __enter__(self) -> Self:
        try:
            self._beat()
            if self.start.hang_seconds:
                self._stacks = self.paths.stacks(self.number, self.rank).open("w", encoding="utf-8")
        except OSError as error:
            raise write_error(self.paths.root, error) or error from None
        self._watch_heartbeat()
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join()
        if self._stacks is not None:
            faulthandler.cancel_dump_traceback_later()
            self._close_stacks(self._stacks)
        if self.paths.end(self.number, self.rank).exists():  # the end is recorded already
            return
        if error is None:
            self._end("done")
        else:
            self.record_error(error)

    def record_error(self, error: BaseException) -> None:
        """Record why the attempt ends for this rank; the first record stays."""
        if self.paths.end(self.number, self.rank).exists():
            return
        if isinstance(error, Superseded):
            self._end("superseded")
        elif isinstance(error, Exception) and not isinstance(error, Held):
            self._end("failed", reason(error), "".join(traceback.format_exception(error)))
        else:  # KeyboardInterrupt, SystemExit from a signal handler, or another process holds the folder
            self._end("interrupted")

    def at(self, phase: str, step: int | None = None) -> None:
        """Set the phase that this rank has just begun. `wait` is the phase in which a rank waits for the others."""
        self._at = {"phase": phase, "step": step, "since": time.time()}

    def check(self) -> None:
        """Raise `Superseded` if a newer attempt exists. Call this before each write."""
        if self.paths.attempt(self.number + 1).exists():
            raise Superseded(f"{self.paths.root}: a newer attempt has taken over; attempt {self.number} stops")

    def _beat_until_stopped(self) -> None:
        while not self._stop.wait(BEAT_SECONDS):
            self._watch_heartbeat()
            with contextlib.suppress(OSError):  # a full disk must not end the run here; the run's own writes report it
                self._beat()
            with contextlib.suppress(OSError):
                self._end_if_hung()

    def _beat(self) -> None:
        path = self.paths.beat(self.number, self.rank)
        temporary = path.with_suffix(".tmp")
        process = {"pid": os.getpid(), "process": process_name(os.getpid()), "machine": machine_name()}
        temporary.write_text(json.dumps({**self._at, **process}) + "\n", encoding="utf-8")
        temporary.replace(path)

    def _end_if_hung(self) -> None:
        """Write this process's stacks if it hangs. On rank 0, then end the process; the launcher then ends the other ranks."""
        limit = self.start.hang_seconds
        if not limit:
            return
        if time.time() - self._at["since"] > limit:
            self._write_stacks()
        if self.rank:
            return
        # The other ranks notice at the same time and need up to a heartbeat to write their stacks.
        hang = describe_hang(read_attempt(self.paths, self.number), limit + 2 * BEAT_SECONDS)
        if hang:
            self._write_stacks()
            self._end("failed", hang)
            os._exit(1)

    def _watch_heartbeat(self) -> None:
        """Let Python's watchdog write the stacks if the next heartbeats do not come. On rank 0, it then ends the process.

        Code that hangs and holds the interpreter's lock stops the thread of the heartbeat, too. The watchdog needs no lock. The
        other ranks write theirs a heartbeat earlier, because rank 0 then records the reason and ends the job.
        """
        if self._stacks is None or self.start.hang_seconds is None:
            return
        after = self.start.hang_seconds + (1 if self.rank else 2) * BEAT_SECONDS
        with contextlib.suppress(RuntimeError):  # no thread can be started now; the next heartbeat tries again
            faulthandler.dump_traceback_later(after, file=self._stacks, exit=self.rank == 0)

    def _write_stacks(self) -> None:
        """Write the stack of each thread of this process to a file of the attempt, once."""
        if self._stacks is not None and not os.fstat(self._stacks.fileno()).st_size:
            faulthandler.dump_traceback(self._stacks, all_threads=True)

    def _close_stacks(self, file: TextIO) -> None:
        with contextlib.suppress(OSError):
            empty = not os.fstat(file.fileno()).st_size
            file.close()
            if empty:
                self.paths.stacks(self.number, self.rank).unlink(missing_ok=True)

    def _end(self, outcome: Outcome, why: str | None = None, trace: str | None = None) -> None:
        end = {"outcome": outcome, "reason": why, "at": time.time(), "traceback": trace}
        with contextlib.suppress(UserError, RunFailed, OSError), atomic(self.paths.end(self.number, self.rank)) as temporary:
            temporary.write_text(json.dumps(end) + "\n", encoding="utf-8")


def reason(error: BaseException) -> str:
    """Return an exception as one line."""
    known = isinstance(error, RunFailed | UserError)
    return (str(error).splitlines() or [""])[0] if known else f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def _held_message(paths: RunPaths, last: AttemptRecord) -> str:
    """Return the message that names the process which holds the folder."""
    job = f", job {last.job}" if last.job else ""
    process = f"host {last.start.host}, pid {last.start.pid}{job}"
    return f"{paths.root}: another process is at work in this folder ({process})"
