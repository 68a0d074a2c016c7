"""Interrupt `train`, `run`, `evaluate` and `predict` at random moments, by Ctrl-C or SIGTERM, and call the same command again.

`survived` means that the interrupted command ended with one line and without a traceback, and that the second call gave the bits
of an undisturbed one; after a training's line, it must also go on at the step that the line names.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparseinst.cli import STOPPED
from sparseinst.inference.weights import file_tensors_digest
from sparseinst.paths import RunPaths
from tests.attacks.report import Outcome, command, start, wait
from tests.attacks.runs import Lab, metrics

ROOT = Path(__file__).parents[2]
_STEP = re.compile(r"stopped after step (\d+) of \d+ with a checkpoint")
_TIMES = ("seconds", "began", "ended", "updated")


@dataclass(frozen=True)
class Target:
    """A command that is interrupted."""

    name: str
    arguments: list[str]
    forget: Callable[[], None]
    """Removes what the command wrote."""
    result: Callable[[], Any]
    """Returns what it wrote, without times."""


def attacks(folder: Path, count: int, seed: int) -> Iterator[tuple[str, Outcome]]:
    """Yield the kind and the outcome of `count` interrupts of each command."""
    lab = Lab(folder)
    for target in _targets(lab, folder):
        target.forget()
        began = time.monotonic()
        assert command(*target.arguments, folder=folder).code == 0
        seconds, right = time.monotonic() - began, target.result()
        for number in range(count):
            chance = random.Random(f"interrupt {target.name} {seed} {number}")
            yield f"interrupt {target.name}, call it again", _interrupt(target, folder, seconds, right, chance)


def _targets(lab: Lab, folder: Path) -> list[Target]:
    run, out, table = RunPaths(folder / "interrupted"), folder / "out", folder
    for name in ("experiments", "slurm"):
        (folder / name).symlink_to(ROOT / name)
    weights, images = ["--weights", str(lab.whole.root), "--device", "cpu"], str(folder / "data" / "train2017")

    def forget_table() -> None:
        shutil.rmtree(table / "results", ignore_errors=True)
        for path in (table / "runs").glob("*"):
            if path.name != "data":
                shutil.rmtree(path)

    forget_run, forget_out = (lambda path=path: shutil.rmtree(path, ignore_errors=True) for path in (run.root, out))
    return [
        Target("train", lab.arguments(run), forget_run, lambda: (file_tensors_digest(run.weights), metrics(run))),
        Target(
            "run",
            ["run", "table5", "--profile", "smoke", "--row", "dice alone", "--device", "cpu"],
            forget_table,
            lambda: {path.name: _result(path) for path in (table / "results" / "records").glob("*.json")},
        ),
        Target("evaluate", ["evaluate", *weights, "--predictions", str(out / "found.json")], forget_out, lambda: _files(out)),
        Target("predict", ["predict", images, *weights, "--output", str(out), "--score", "0"], forget_out, lambda: _files(out)),
    ]


def _files(folder: Path) -> dict[str, str]:
    """Return the digest of each file of a folder; a temporary file that was left behind counts, too."""
    found = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in found}


def _result(path: Path) -> Any:
    """Return what a record says, without times."""
    found = json.loads(path.read_bytes())["result"]
    return {name: value for name, value in found.items() if name not in _TIMES}


def _interrupt(target: Target, folder: Path, seconds: float, right: Any, chance: random.Random) -> Outcome:
    number = chance.choice([signal.SIGINT, signal.SIGTERM])
    while True:
        target.forget()
        moment = chance.uniform(0.0, seconds)
        process = start(*target.arguments, folder=folder)
        time.sleep(moment)
        if process.is_running():
            break
        wait(process)  # it ended before the signal, which tests nothing
    os.kill(process.pid, number)
    ended = wait(process)
    detail = f"{number.name} after {moment:.2f} of {seconds:.2f} s"
    lines = [line for line in ended.errors.splitlines() if line == STOPPED or _STEP.match(line) or line == "Aborted."]
    if ended.code is None:
        return Outcome("hang", detail)
    if "Traceback" in ended.errors or (ended.code != 0 and len(lines) != 1):
        return Outcome("traceback", f"{detail}: code {ended.code}: {' | '.join(ended.errors.splitlines()[-3:])}")
    again = command(*target.arguments, folder=folder)
    step = _STEP.match(lines[0]) if lines else None
    detail = f"{detail}: {lines[0] if lines else 'it had ended before'}"
    if step is not None and f"resuming after step {step[1]}" not in again.errors:
        return Outcome("silent", f"{detail}; the next call did not go on there")
    if again.code != 0:
        return Outcome("traceback", f"{detail}; the next call: code {again.code}: {again.errors[-200:]}")
    return Outcome("survived" if target.result() == right else "silent", detail)
