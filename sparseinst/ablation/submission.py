"""What is known of a stage's job on a cluster without asking the scheduler: what was sent, and what its processes left."""

from __future__ import annotations

import json
import re
import subprocess
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from sparseinst.errors import RunFailed
from sparseinst.paths import RunPaths, atomic

ASK_SECONDS = 30.0
"""The scheduler is asked for its queue at most so often, whoever asks."""


@dataclass(frozen=True)
class Submission:
    """A stage as it was sent to a cluster."""

    cluster: str
    """The profile's name."""
    kind: str
    """slurm, local or debug."""
    job: str
    """As the scheduler names it, array index included."""
    folder: str
    """Where its processes' outputs are."""
    at: float
    """When, in seconds since 1970."""
    cancelled: bool = False

    def log(self, rank: int) -> Path:
        """What one process said."""
        return Path(self.folder) / f"{self.job}_{rank}_log.err"

    @property
    def exit(self) -> Path:
        """What the batch script leaves when it ends."""
        return Path(self.folder) / f"{self.job}.exit"


@dataclass(frozen=True)
class Exit:
    code: int
    told: bool
    """Whether the scheduler had told the job to end."""
    at: float


def write_submission(paths: RunPaths, submission: Submission) -> None:
    with atomic(paths.submitted) as temporary:
        temporary.write_text(json.dumps(asdict(submission)) + "\n", encoding="utf-8")


def read_submission(paths: RunPaths) -> Submission | None:
    """None where it was never sent, or where the file is damaged."""
    try:
        return Submission(**json.loads(paths.submitted.read_text(encoding="utf-8")))
    except (FileNotFoundError, ValueError, TypeError):
        return None


START = "sparseinst: the job starts"
"""Parts what the starts of one job left in the same file."""

EXIT_TRAP = (
    "outputs={folder}",
    "job=${{SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}}${{SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}}",
    'rm -f "$outputs/$job.exit"',
    f"echo '{START}' >&2",
    "trap 'told=1' TERM",
    'trap \'echo "$? ${{told:-0}} $(date +%s)" > "$outputs/$job.exit"\' EXIT',
)
"""Lines of the batch script that leave `Exit`; to be formatted with the quoted folder."""


def read_exit(submission: Submission) -> Exit | None:
    """None while the batch script runs, and where it could leave nothing (its node is gone)."""
    try:
        code, told, at = submission.exit.read_text(encoding="ascii").split()
        return Exit(int(code), told == "1", float(at))
    except (FileNotFoundError, ValueError):
        return None


_DEAD = re.compile(r"srun: error: (\S+): tasks? (\d+)\S*: (.+)")
_SCHEDULER = re.compile(r"(?:slurmstepd\S*|srun): error: (.+)")


def dead_rank(submission: Submission | None) -> str | None:
    """Which process died first, and of what, in srun's words; with the last line it said itself."""
    if submission is None:
        return None
    for line in _tail(submission.log(0)):
        found = _DEAD.search(line)
        if found and not found[3].startswith("Exited with exit code"):  # that one noted its reason itself
            own = [said for said in _tail(submission.log(int(found[2]))) if not _SCHEDULER.search(said) and "srun:" not in said]
            said = f"; it last said: {own[-1].strip()[:200]}" if own else ""
            return f"rank {found[2]} on {found[1]}: {found[3]}{said}"
    return None


def last_words(submission: Submission) -> str | None:
    """What the scheduler last said of the job: why it ended it, where it said that."""
    found = [match[1].strip("* ") for line in _tail(submission.log(0)) if (match := _SCHEDULER.search(line))]
    why = [words for words in found if "CANCELLED" in words]
    return (why or found or [None])[-1]


def _tail(path: Path, size: int = 8192) -> list[str]:
    """The last lines of an output, of the job's newest start alone."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - size))
            text = file.read().decode("utf-8", errors="replace")
    except FileNotFoundError:
        return []
    return text.rpartition(START)[2].splitlines()


def ask_queue(folder: Path) -> frozenset[str]:
    """The jobs of this user that SLURM has, waiting or running; an answer serves for half a minute.

    Args:
        folder: where answers are kept, for all processes.

    Raises:
        RunFailed: squeue is not there or does not answer.
    """
    kept = folder / ".squeue"
    if kept.exists() and time.time() - kept.stat().st_mtime < ASK_SECONDS:
        return frozenset(kept.read_text(encoding="utf-8").split())
    try:
        command = ["squeue", "--me", "--noheader", "--array", "--format=%i"]
        told = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise RunFailed(f"squeue does not answer: {getattr(error, 'stderr', None) or error}".strip()) from None
    with atomic(kept) as temporary:
        temporary.write_text(told, encoding="utf-8")
    return frozenset(told.split())
