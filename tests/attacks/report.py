"""Judge how a command took an attack, and write the table of all attacks."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from sparseinst.cli import end_in_order_when_terminated, run_cli

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


@dataclass
class Process:
    """A command in a forked process, which need not import torch again."""

    pid: int
    folder: Path
    """Holds its output and its errors."""
    code: int | None = None

    def is_running(self) -> bool:
        """Return whether it has not ended yet."""
        if self.code is None:
            ended, status = os.waitpid(self.pid, os.WNOHANG)
            self.code = os.waitstatus_to_exitcode(status) if ended else None
        return self.code is None

    def kill(self) -> None:
        """Kill it, if it has not ended yet."""
        if self.is_running():
            os.kill(self.pid, signal.SIGKILL)
            self.code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def start(*arguments: str, folder: Path) -> Process:
    """Start `sparseinst` with these arguments in a folder."""
    outputs = Path(tempfile.mkdtemp())
    pid = os.fork()
    if pid:
        return Process(pid, outputs)
    code = 70
    try:
        os.chdir(folder)
        for number, name in ((1, "output"), (2, "errors")):
            os.dup2(os.open(outputs / name, os.O_WRONLY | os.O_CREAT), number)
        for number in (signal.SIGINT, signal.SIGTERM):  # a shell may have started this process with others
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        end_in_order_when_terminated()
        code = run_cli(list(arguments))
    except BaseException:  # noqa: BLE001 (this is what the attacks look for)
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def options(settings: Mapping[str, Any]) -> list[str]:
    """Return settings as options of a command line."""
    return [part for key, value in settings.items() for part in ("-o", f"{key}={json.dumps(value)}")]


def command(*arguments: str, folder: Path, limit: float = 120.0) -> Ended:
    """Run `sparseinst` with these arguments in a folder, for at most `limit` seconds."""
    return wait(start(*arguments, folder=folder), limit)


def wait(process: Process, limit: float = 120.0) -> Ended:
    """Wait until a command ends, for at most `limit` seconds."""
    began = time.monotonic()
    while process.is_running() and time.monotonic() - began < limit:
        time.sleep(0.01)
    hung = process.is_running()
    process.kill()
    output, errors = ((process.folder / name).read_text(errors="replace") for name in ("output", "errors"))
    shutil.rmtree(process.folder)
    return Ended(None if hung else process.code, output, errors)


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
