"""Files about a stage's job on a cluster, written when it was sent and while it ran; and SLURM's queue. Imports no torch."""

from __future__ import annotations

import functools
import getpass
import json
import re
import subprocess
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field, TypeAdapter

from sparseinst.errors import RunFailed
from sparseinst.files import atomic
from sparseinst.paths import RunPaths

ASK_SECONDS = 30.0
"""An answer of squeue is reused for this long, by all processes of a user."""


@dataclass(frozen=True)
class Submission:
    """A stage as it was sent to a cluster."""

    cluster: str
    """The profile's name."""
    kind: str
    """slurm, local or debug."""
    job: Annotated[str, Field(pattern=r"^[\w.-]+$")]
    """The scheduler's name of the job, with the array index."""
    folder: Annotated[str, Field(pattern=r"^[^\x00]+$")]
    """The folder of its processes' outputs."""
    at: float
    """When it was sent, in seconds since 1970."""
    user: str = ""
    """The user who sent it."""
    process: Annotated[str, Field(pattern=r"^\d{1,10}( \d+)?$")] | None = None
    """The process of a local job, named as by `machine.process_name`; None on a cluster."""
    machine: str | None = None
    """The machine of a local job, named as by `machine.machine_name`; None on a cluster."""
    cancelled: bool = False

    def log(self, rank: int) -> Path:
        """Return the file that holds one rank's standard error."""
        return Path(self.folder) / f"{self.job}_{rank}_log.err"


@dataclass(frozen=True)
class Exit:
    """How a batch script ended."""

    code: int
    signalled: bool
    """Whether the scheduler had signalled the job to stop."""
    at: float
    """When it ended, in seconds since 1970."""


def write_submission(paths: RunPaths, submission: Submission) -> None:
    """Write a stage's submission to its folder."""
    with atomic(paths.submitted) as temporary:
        temporary.write_text(json.dumps(asdict(submission)) + "\n", encoding="utf-8")


def read_submission(paths: RunPaths) -> Submission | None:
    """Return a stage's last submission; None if there is none or the file is damaged."""
    try:
        return _submission().validate_json(paths.submitted.read_bytes(), strict=True)
    except (FileNotFoundError, ValueError):
        return None


@functools.cache
def _submission() -> TypeAdapter[Submission]:
    return TypeAdapter(Submission)


START = "sparseinst: the job starts, restarts:"
"""A line that separates the outputs of a job's starts, which go to the same file."""

EXIT_TRAP = (
    "outputs={folder}",
    "job=${{SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}}${{SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}}",
    "start=${{SLURM_RESTART_COUNT:-0}}",
    # If submitit is killed while it writes, it leaves such a file, and its next write would fail.
    'rm -f "$outputs/$job"_*.save_tmp',
    f'echo "{START} $start" >&2',
    "trap 'signalled=1' TERM",
    'trap \'echo "$? ${{signalled:-0}} $(date +%s)" > "$outputs/$job.$start.exit"\' EXIT',
)
"""Lines of the batch script that write the file behind `Exit`. Format them with the shell-quoted `folder`."""


def read_exit(submission: Submission, restarts: int | None = None) -> Exit | None:
    """Return how a start of the job ended; None while it runs, or if it could not write that because its node was lost.

    Args:
        restarts: how often the job had been requeued before this start; None for the last start that ended.
    """
    name = f"{submission.job}.{'*' if restarts is None else restarts}.exit"
    starts = {path: path.suffixes[-2][1:] for path in Path(submission.folder).glob(name)}
    files = sorted((path for path, start in starts.items() if start.isdecimal()), key=lambda path: int(starts[path]))
    if not files:
        return None
    try:
        code, signalled, at = files[-1].read_text(encoding="ascii").split()
        return Exit(int(code), signalled == "1", float(at))
    except ValueError:  # the file is being written
        return None


_KILLED = re.compile(r"srun: error: (\S+): tasks? (\d+)\S*: (.+)")
_SCHEDULER = re.compile(r"(?:slurmstepd\S*|srun): error: (.+)")


def killed_rank(submission: Submission) -> str | None:
    """Return srun's report of the first rank that was killed, with the last line of that rank's output.

    None if the first rank that ended exited by itself. It has recorded the reason then, and srun ended the others.
    """
    for line in _tail(submission.log(0)):
        found = _KILLED.search(line)
        if found:
            if found[3].startswith("Exited with exit code"):
                return None
            last_line = last_output_line(submission, int(found[2]))
            return f"rank {found[2]} on {found[1]}: {found[3]}" + (f"; its last output: {last_line}" if last_line else "")
    return None


def last_output_line(submission: Submission, rank: int = 0) -> str | None:
    """Return the last line of a rank's own output, without the scheduler's messages."""
    own = [line for line in _tail(submission.log(rank)) if line.strip() and not _SCHEDULER.search(line) and "srun:" not in line]
    return own[-1].strip()[:200] if own else None


def scheduler_message(submission: Submission) -> str | None:
    """Return the scheduler's last message about the job; its message about a cancellation, if there is one."""
    found = [match[1].strip("* ") for line in _tail(submission.log(0)) if (match := _SCHEDULER.search(line))]
    cancelled = [message for message in found if "CANCELLED" in message]
    return (cancelled or found or [None])[-1]


def _tail(path: Path, size: int = 8192) -> list[str]:
    """Return the last lines of an output, from the job's newest start only."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - size))
            text = file.read().decode("utf-8", errors="replace")
    except FileNotFoundError:
        return []
    return text.rpartition(START)[2].splitlines()[1:] if START in text else text.splitlines()


@dataclass(frozen=True)
class Queue:
    """The jobs that SLURM had when it was asked."""

    jobs: frozenset[str]
    at: float
    """When it was asked, in seconds since 1970."""
    user: str
    """The user whose jobs these are."""

    def lacks(self, submission: Submission) -> bool:
        """Return whether the job is known to be gone: this user sent it before SLURM was asked, and SLURM does not list it."""
        return submission.user == self.user and submission.at < self.at and submission.job not in self.jobs


def ask_queue(folder: Path) -> Queue:
    """Return this user's jobs that SLURM has, waiting or running. An answer is reused for `ASK_SECONDS`.

    Args:
        folder: where the answer is kept, for all processes of this user.

    Raises:
        RunFailed: squeue is not installed or does not answer.
    """
    user = getpass.getuser()
    kept = folder / f".squeue-{user}"
    if not kept.exists() or time.time() - kept.stat().st_mtime >= ASK_SECONDS:
        try:
            command = ["squeue", "--me", "--noheader", "--array", "--format=%i"]
            output = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
        except (OSError, subprocess.SubprocessError) as error:
            raise RunFailed(f"squeue does not answer: {getattr(error, 'stderr', None) or error}".strip()) from None
        with atomic(kept) as temporary:
            temporary.write_text(output, encoding="utf-8")
    return Queue(frozenset(kept.read_text(encoding="utf-8").split()), kept.stat().st_mtime, user)
