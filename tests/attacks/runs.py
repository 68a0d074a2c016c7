"""Attack runs: kill them, flip bits, and cut off, empty or replace their files. Then call the same command again."""

from __future__ import annotations

import json
import random
import shutil
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from sparseinst.checked import read_json_lines
from sparseinst.data.shapes import write_shapes
from sparseinst.errors import UserError
from sparseinst.inference.weights import file_tensors_digest
from sparseinst.paths import RunPaths
from tests.attacks.report import Ended, Outcome, command, judge, options, start
from tests.conftest import TINY

Damage = Callable[[bytes, random.Random], bytes]

SETTINGS = {**TINY, "train.iterations": 24, "train.checkpoint_every": 3, "train.evaluate_every": 6}


def flip(content: bytes, chance: random.Random) -> bytes:
    """Flip one bit anywhere."""
    damaged = bytearray(content)
    damaged[chance.randrange(len(damaged))] ^= 1 << chance.randrange(8)
    return bytes(damaged)


def flip_in_header(content: bytes, chance: random.Random) -> bytes:
    """Flip one bit in a header of a zip archive."""
    places, at = [], content.find(b"PK")
    while at >= 0:
        places.append(at)
        at = content.find(b"PK", at + 1)
    damaged = bytearray(content)
    damaged[min(chance.choice(places) + chance.randrange(46), len(damaged) - 1)] ^= 1 << chance.randrange(8)
    return bytes(damaged)


def cut(content: bytes, chance: random.Random) -> bytes:
    return content[: chance.randrange(len(content))]


def empty(content: bytes, chance: random.Random) -> bytes:
    return b""


def foreign(content: bytes, chance: random.Random) -> bytes:
    """Return the content of another kind of file."""
    return chance.choice([b"12\n", b"{}\n", b"[]\n", b"null", b"\xff\xfe\x00", b"PK\x05\x06" + bytes(18), chance.randbytes(5000)])


class Lab:
    """A finished run, and copies of it to damage."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        write_shapes(folder / "data", train=24, val=4, side=64)
        self.whole = RunPaths(folder / "whole")
        assert self.train(self.whole).code == 0
        self.digest, self.metrics = file_tensors_digest(self.whole.weights), metrics(self.whole)
        self.evaluation = self.evaluate(self.whole).output

    def arguments(self, paths: RunPaths) -> list[str]:
        return ["train", "--data", str(self.folder / "data"), "--output", str(paths.root), "--device", "cpu", *options(SETTINGS)]

    def train(self, paths: RunPaths, *more: str) -> Ended:
        return command(*self.arguments(paths), *more, folder=self.folder)

    def evaluate(self, paths: RunPaths) -> Ended:
        return command("evaluate", "--weights", str(paths.root), "--device", "cpu", folder=self.folder)

    def copy(self, *, finished: bool) -> RunPaths:
        """Return a copy of the run, as it was finished or as it was just before it wrote its weights."""
        paths = RunPaths(self.folder / "copy")
        shutil.rmtree(paths.root, ignore_errors=True)
        shutil.copytree(self.whole.root, paths.root)
        if not finished:
            paths.weights.unlink()
            paths.evaluation.unlink()
        return paths

    def is_right(self, paths: RunPaths) -> bool:
        """Return whether a run has the bits of the whole one."""
        try:
            return file_tensors_digest(paths.weights) == self.digest
        except UserError:
            return False

    def repeats(self, paths: RunPaths) -> bool:
        """Return whether a run has the bits and the metrics of the whole one."""
        return self.is_right(paths) and metrics(paths) == self.metrics

    def keeps_right_lines(self, paths: RunPaths) -> bool:
        """Return whether a run has the bits of the whole one, and all its lines of metrics but at most the damaged ones."""
        lines = metrics(paths)
        return self.is_right(paths) and all(line in self.metrics for line in lines) and len(lines) >= len(self.metrics) - 2

    def keeps_first_lines(self, paths: RunPaths) -> bool:
        """Return whether a run has the bits of the whole one, and no line of metrics but its first ones."""
        lines = metrics(paths)
        return self.is_right(paths) and lines == self.metrics[: len(lines)]


def metrics(paths: RunPaths) -> list[dict[str, Any]]:
    """Return the lines of a run's metrics without those that measure time."""
    lines = read_json_lines(paths.metrics)
    return [{name: value for name, value in line.items() if "seconds" not in name} for line in lines]


def attacks(folder: Path, count: int, seed: int) -> Iterator[tuple[str, Outcome]]:
    """Yield the kind and the outcome of `count` attacks of each kind, and of twice as many kills."""
    lab = Lab(folder)
    for number in range(2 * count):
        yield "kill a training at a random moment, go on", _kill(lab, random.Random(f"kill {seed} {number}"))

    def newest(paths: RunPaths, _: random.Random) -> Path:
        return paths.saved_checkpoints()[0]

    def of_attempts(paths: RunPaths, chance: random.Random) -> Path:
        return chance.choice(sorted(path for path in paths.attempts.iterdir() if path.stat().st_size))

    resumed: list[tuple[str, Callable[[RunPaths, random.Random], Path], Damage, Callable[[RunPaths], bool]]] = [
        ("one bit of the newest checkpoint", newest, flip, lab.repeats),
        ("one bit of its zip headers", newest, flip_in_header, lab.repeats),
        ("cut off the newest checkpoint", newest, cut, lab.repeats),
        ("replace the newest checkpoint", newest, foreign, lab.repeats),
        ("one bit of metrics.jsonl", lambda paths, _: paths.metrics, flip, lab.keeps_right_lines),
        ("cut off metrics.jsonl", lambda paths, _: paths.metrics, cut, lab.keeps_first_lines),
        ("one bit of config.yaml", lambda paths, _: paths.config, flip, lab.is_right),
        ("empty config.yaml", lambda paths, _: paths.config, empty, lab.is_right),
        ("one bit of a file of the attempts", of_attempts, flip, lab.is_right),
        ("replace a file of the attempts", of_attempts, foreign, lab.is_right),
    ]
    for kind, choose, damage, right in resumed:
        for number in range(1 if damage is empty else count):
            chance = random.Random(f"{kind} {seed} {number}")
            paths = lab.copy(finished=False)
            _damage(choose(paths, chance), damage, chance)
            yield f"{kind}, go on", judge(lab.train(paths), partial(right, paths), f"{seed} {number}")
    for number in range(max(1, count // 4)):
        yield "every checkpoint, called twice", _every_checkpoint(lab, random.Random(f"every {seed} {number}"))
    for kind, damage in {"one bit of the weights": flip, "cut off the weights": cut, "replace the weights": foreign}.items():
        for number in range(count):
            paths = lab.copy(finished=True)
            _damage(paths.weights, damage, random.Random(f"{kind} {seed} {number}"))
            ended = lab.evaluate(paths)
            yield f"{kind}, evaluate", judge(ended, lambda e=ended: e.output == lab.evaluation, f"{seed} {number}")
    yield from record_attacks(folder / "table", count, seed)
    yield from look_attacks(folder / "table", count, seed)


def record_attacks(folder: Path, count: int, seed: int) -> Iterator[tuple[str, Outcome]]:
    """Yield the outcomes of attacks on the records of a row: `run` must do the stage again with the same result."""
    folder.mkdir(parents=True)
    for name in ("experiments", "slurm"):
        (folder / name).symlink_to(Path(__file__).parents[2] / name)
    arguments = ["run", "table5", "--profile", "smoke", "--row", "dice alone", "--device", "cpu"]
    assert command(*arguments, folder=folder).code == 0
    records = {path: path.read_bytes() for path in sorted((folder / "results" / "records").glob("*.json"))}
    results = {path: _result(path) for path in records}
    for kind, damage in {
        "one bit of a record": flip,
        "cut off a record": cut,
        "empty a record": empty,
        "replace a record": foreign,
    }.items():
        for number in range(count):
            chance = random.Random(f"{kind} {seed} {number}")
            path = chance.choice(list(records))
            _damage(path, damage, chance)
            ended = command(*arguments, folder=folder)
            aside = path.with_suffix(".damaged")

            def right(aside: Path = aside) -> bool:
                return aside.exists() and {path: _result(path) for path in records} == results

            yield f"{kind}, run", judge(ended, right, f"{seed} {number}")
            aside.unlink(missing_ok=True)
            for path, content in records.items():
                path.write_bytes(content)


def look_attacks(folder: Path, count: int, seed: int) -> Iterator[tuple[str, Outcome]]:
    """Yield the outcomes of attacks on the log of looks: `report` must refuse it, since verdicts depend on it.

    The folder is that of `record_attacks`.
    """
    arguments = ["run", "table5", "--profile", "smoke", "--until-settled", "--device", "cpu"]
    assert command(*arguments, folder=folder).code == 0
    [file] = (folder / "results" / "looks").glob("*.json")
    whole = file.read_bytes()
    for kind, damage in {"one bit of a look": flip, "cut off a look": cut, "replace a look": foreign}.items():
        for number in range(count):
            _damage(file, damage, random.Random(f"{kind} {seed} {number}"))
            ended = command("report", "table5", "--profile", "smoke", folder=folder)
            yield f"{kind}, report", judge(ended, lambda: False, f"{seed} {number}")
            file.write_bytes(whole)


def _result(path: Path) -> Any:
    """Return what a record says, without times; None if it cannot be read."""
    try:
        result = json.loads(path.read_bytes())["result"]
    except (ValueError, KeyError, TypeError, OSError):
        return None
    return {name: value for name, value in result.items() if name != "seconds"}


def _damage(path: Path, damage: Damage, chance: random.Random) -> None:
    path.write_bytes(damage(path.read_bytes(), chance))


def _kill(lab: Lab, chance: random.Random) -> Outcome:
    """Kill a training once or twice, at moments after it began to write, and let it end then."""
    paths = RunPaths(lab.folder / "killed")
    shutil.rmtree(paths.root, ignore_errors=True)
    for _ in range(chance.choice([1, 2])):
        process = start(*lab.arguments(paths), folder=lab.folder)
        target = chance.randrange(1, len(lab.metrics))
        while process.is_running() and not (paths.metrics.exists() and paths.metrics.read_bytes().count(b"\n") >= target):
            time.sleep(0.002)
        time.sleep(chance.uniform(0.0, 0.05))
        process.kill()
        shutil.rmtree(process.folder)
    ended = lab.train(paths)
    return judge(ended, partial(lab.repeats, paths))


def _every_checkpoint(lab: Lab, chance: random.Random) -> Outcome:
    """Damage all checkpoints: both calls must refuse, and `--from-scratch` must give the same bits."""
    paths = lab.copy(finished=False)
    for path in paths.checkpoints.iterdir():
        if chance.random() < 0.5:
            torch.save({"other": torch.zeros(3)}, path)
        else:
            _damage(path, cut, chance)
    for _ in range(2):
        outcome = judge(lab.train(paths), lambda: False)
        if outcome.word != "one line":
            return outcome
    again = judge(lab.train(paths, "--from-scratch"), partial(lab.repeats, paths))
    return outcome if again.word == "survived" else again
