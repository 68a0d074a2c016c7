"""What is known of a stage's job on a cluster without asking the scheduler: what was sent, and what its processes left."""

from __future__ import annotations

import getpass
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
    user: str = ""
    """Who sent it."""
    process: str | None = None
    """Of a local job: its process, as `attempts.process_name` has it."""
    cancelled: bool = False

    def log(self, rank: int) -> Path:
        """What one process said."""
        return Path(self.folder) / f"{self.job}_{rank}_log.err"


@dataclass(frozen=True)
class Exit:
    """How a batch script ended."""

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


START = "sparseinst: the job starts, restarts:"
"""Parts what the starts of one job left in the same file."""

EXIT_TRAP = (
    "outputs={folder}",
    "job=${{SLURM_ARRAY_JOB_ID:-$SLURM_JOB_ID}}${{SLURM_ARRAY_TASK_ID:+_$SLURM_ARRAY_TASK_ID}}",
    "start=${{SLURM_RESTART_COUNT:-0}}",
    # What a kill in the middle of submitit's own writing leaves, which its next writing would stumble over.
    'rm -f "$outputs/$job"_*.save_tmp',
    f'echo "{START} $start" >&2',
    "trap 'told=1' TERM",
    'trap \'echo "$? ${{told:-0}} $(date +%s)" > "$outputs/$job.$start.exit"\' EXIT',
)
"""Lines of the batch script that leave `Exit`; to be formatted with the quoted folder."""


def read_exit(submission: Submission, restarts: int | None = None) -> Exit | None:
    """How a start of the job ended; None while it runs, and where it could leave nothing (its node is gone).

    Args:
        restarts: which start; None for the last one that ended.
    """
    name = f"{submission.job}.{'*' if restarts is None else restarts}.exit"
    files = sorted(Path(submission.folder).glob(name), key=lambda path: int(path.suffixes[-2][1:]))
    if not files:
        return None
    try:
        code, told, at = files[-1].read_text(encoding="ascii").split()
        return Exit(int(code), told == "1", float(at))
    except ValueError:  # it is being written
        return None


_DEAD = re.compile(r"srun: error: (\S+): tasks? (\d+)\S*: (.+)")
_SCHEDULER = re.compile(r"(?:slurmstepd\S*|srun): error: (.+)")


def dead_rank(submission: Submission) -> str | None:
    """Which process was killed, and by what, in srun's words, with the last line it said itself; None where the first one to end
    did so by itself, and so has noted why: the others were ended with it."""
    for line in _tail(submission.log(0)):
        found = _DEAD.search(line)
        if found:
            if found[3].startswith("Exited with exit code"):
                return None
            said = own_words(submission, int(found[2]))
            return f"rank {found[2]} on {found[1]}: {found[3]}" + (f"; it last said: {said}" if said else "")
    return None


def own_words(submission: Submission, rank: int = 0) -> str | None:
    """The last line that a process said itself."""
    own = [line for line in _tail(submission.log(rank)) if line.strip() and not _SCHEDULER.search(line) and "srun:" not in line]
    return own[-1].strip()[:200] if own else None


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
    return text.rpartition(START)[2].splitlines()[1:] if START in text else text.splitlines()


@dataclass(frozen=True)
class Queue:
    """What SLURM answered."""

    jobs: frozenset[str]
    at: float
    user: str

    def lacks(self, submission: Submission) -> bool:
        """Whether the job is known to be gone: it was sent before the answer, by the user whose jobs were asked for."""
        return submission.user == self.user and submission.at < self.at and submission.job not in self.jobs


def ask_queue(folder: Path) -> Queue:
    """The jobs of this user that SLURM has, waiting or running; an answer serves for half a minute.

    Args:
        folder: where answers are kept, for all processes of this user.

    Raises:
        RunFailed: squeue is not there or does not answer.
    """
    user = getpass.getuser()
    kept = folder / f".squeue-{user}"
    if not kept.exists() or time.time() - kept.stat().st_mtime >= ASK_SECONDS:
        try:
            command = ["squeue", "--me", "--noheader", "--array", "--format=%i"]
            told = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
        except (OSError, subprocess.SubprocessError) as error:
            raise RunFailed(f"squeue does not answer: {getattr(error, 'stderr', None) or error}".strip()) from None
        with atomic(kept) as temporary:
            temporary.write_text(told, encoding="utf-8")
    return Queue(frozenset(kept.read_text(encoding="utf-8").split()), kept.stat().st_mtime, user)
