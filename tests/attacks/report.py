"""Judge how a command took an attack, and write the table of all attacks."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

Word = Literal["survived", "one line", "traceback", "hang", "silent"]
"""`survived`: the command succeeded and its result is right; `one line`: it refused in one line; `silent`: it succeeded,
and its result is wrong."""
BAD: tuple[Word, ...] = ("traceback", "hang", "silent")


@dataclass(frozen=True)
class Outcome:
    """How a command took one attack."""

    word: Word
    detail: str = ""
    """The message, or the seed and the place of the attack."""


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int | None
    """The exit code; None if it did not end in time."""
    output: str
    errors: str


def command(*arguments: str, folder: Path, limit: float = 300.0, environment: Mapping[str, str] | None = None) -> Ended:
    """Run `sparseinst` in a process of its own."""
    ours = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[2]), **(environment or {})}
    with subprocess.Popen(
        [sys.executable, "-m", "sparseinst", *arguments], cwd=folder, env=ours, text=True, errors="replace",
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
    ) as process:  # fmt: skip
        try:
            output, errors = process.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            output, errors = process.communicate()
            return Ended(None, output, errors)
    return Ended(process.returncode, output, errors)


def judge(ended: Ended, right: Callable[[], bool], detail: str = "") -> Outcome:
    """Return the outcome of a command after an attack.

    Args:
        right: whether the result is that without the attack; asked only if the command succeeded.
    """
    lines = [line for line in ended.errors.splitlines() if line.startswith("error: ")]
    if ended.code is None:
        return Outcome("hang", detail)
    if "Traceback (most recent call last)" in ended.errors or (ended.code != 0 and not lines):
        return Outcome("traceback", f"{detail} {(ended.errors.splitlines() or [''])[-1]}")
    if ended.code != 0:
        return Outcome("one line", f"{detail} {lines[-1]}")
    return Outcome("survived" if right() else "silent", detail)


@dataclass
class Tally:
    """The number of attacks of each kind, by outcome."""

    counts: dict[str, Counter[Word]] = field(default_factory=dict)

    def add(self, kind: str, outcome: Outcome) -> None:
        """Count one attack."""
        self.counts.setdefault(kind, Counter())[outcome.word] += 1

    def bad(self) -> int:
        """Return the number of attacks that ended in a traceback, a hang or a wrong result."""
        return sum(counter[word] for counter in self.counts.values() for word in BAD)

    def markdown(self) -> str:
        """Return a table with a row for each kind of attack."""
        words: Sequence[Word] = get_args(Word)
        total = sum(self.counts.values(), Counter())
        rows = [*self.counts.items(), ("all", total)]
        lines = [f"| attack | tried | {' | '.join(words)} |", "|---" * (len(words) + 2) + "|"]
        for kind, counter in rows:
            lines.append(f"| {kind} | {counter.total()} | " + " | ".join(str(counter[word] or "") for word in words) + " |")
        return "\n".join(lines)
