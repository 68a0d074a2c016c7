"""Fill the disk that a command writes to, or make it read-only. Only root can mount such disks.

Each command first runs on a disk with enough space. It then runs on disks that hold only a part of what it wrote, and on one that
is read-only, and must refuse in one line. What it leaves must be whole: it runs once more with enough space, which must succeed
and write all files of the first run.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from xml.etree import ElementTree

import onnx
from PIL import Image
from safetensors.torch import load_file

from sparseinst.data.shapes import write_shapes
from tests.attacks.report import Ended, Outcome, command, judge, options
from tests.conftest import TINY

ROOT = Path(__file__).parents[2]
LIMIT = 180.0
ROOMY = 512 * 2**20
PAGE = 4096
SETTINGS = {**TINY, "train.iterations": 6, "train.checkpoint_every": 2, "train.evaluate_every": 3}
READERS: dict[str, Callable[[Path], object]] = {
    ".json": lambda path: json.loads(path.read_text(encoding="utf-8")),
    ".safetensors": load_file,
    ".png": lambda path: Image.open(path).load(),
    ".jpg": lambda path: Image.open(path).load(),
    ".svg": ElementTree.parse,
    ".onnx": onnx.load,
    ".pt": lambda path: _check_archive(path),
    ".pt2": lambda path: _check_archive(path),
}
"""Reads each kind of file, and raises an error if it is not whole."""


def _check_archive(path: Path) -> None:
    with zipfile.ZipFile(path) as archive:
        if (broken := archive.testzip()) is not None:
            raise ValueError(f"entry {broken} fails its checksum")


@contextmanager
def disk(folder: Path, size: int) -> Iterator[Path]:
    """Mount an empty disk with this many bytes."""
    folder.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def remount(folder: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", str(folder)], check=True)


class Lab:
    """A small data set and a trained model on an ordinary disk, and the commands that write."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        write_shapes(folder / "data", train=24, val=4, side=64)
        for name in ("experiments", "slurm"):
            (folder / name).symlink_to(ROOT / name)
        train = ["train", "--data", str(folder / "data"), "--device", "cpu", *options(SETTINGS)]
        assert command(*train, "--output", str(folder / "trained"), folder=folder, limit=LIMIT).code == 0
        weights = ["--weights", str(folder / "trained")]
        self.commands: dict[str, list[str]] = {
            "train": [*train, "--output", "DISK/run"],
            "evaluate": ["evaluate", *weights, "--device", "cpu", "--predictions", "DISK/predictions.json"],
            "predict": ["predict", str(folder / "data/val2017"), *weights, "--device", "cpu", "--output", "DISK/seen"],
            "maps": ["maps", *weights, "--device", "cpu", "--output", "DISK/maps"],
            "failures": ["failures", *weights, "--device", "cpu", "--output", "DISK/failures"],
            "curves": ["curves", str(folder / "trained"), "--output", "DISK/curves.png"],
            "export to ONNX": ["export", *weights, "--output", "DISK/model.onnx"],
            "export to torch": ["export", *weights, "--output", "DISK/model.pt2", "--form", "torch"],
            "publish": ["publish", str(folder / "trained"), "--output", "DISK/published"],
            "init": ["init", "--data", str(folder / "data"), "--output", "DISK/config.yaml"],
            "data shapes": ["data", "shapes", "--output", "DISK/shapes", "--train", "6", "--val", "2"],
            "data look": ["data", "look", str(folder / "data"), "--output", "DISK/look.png"],
            "report": ["report", "all", "--profile", "small", "--results", "DISK/results", "--html"],
            "bench": ["bench", *SMALL_BENCH, "--output", "DISK/bench.json"],
            "run": ["run", "table5", "--profile", "smoke", "--row", "BCE", "--results", "DISK/results", "--device", "cpu"],
        }

    def call(self, name: str, disk: Path) -> Ended:
        """Run a command whose output goes to the disk; `report` finds records there."""
        arguments = [argument.replace("DISK", str(disk)) for argument in self.commands[name]]
        return command(*arguments, folder=self.folder, limit=LIMIT)


SMALL_BENCH = ["--model", "r50-iam", "--size", "64", "--device", "cpu", "--repetitions", "3", "--warmup", "1"]


def used(folder: Path) -> int:
    """Return how many bytes of a mounted disk are in use."""
    found = os.statvfs(folder)
    return (found.f_blocks - found.f_bfree) * found.f_frsize


def written(folder: Path) -> set[Path]:
    """Return the paths in a folder, of the files of the kinds that can be checked."""
    return {path.relative_to(folder) for path in folder.rglob("*") if path.suffix in READERS and path.is_file()}


def damaged(folder: Path) -> list[str]:
    """Return the temporary files that are left, and the files that cannot be read, of the kinds that can be checked."""
    found = [f"{path.name}: left behind" for path in folder.rglob("*.tmp")]
    for path in sorted(folder.rglob("*")):
        if (reader := READERS.get(path.suffix)) and path.is_file():
            try:
                reader(path)
            except Exception as error:  # noqa: BLE001 (any error means that the file is not whole)
                found.append(f"{path.name}: {error}")
    return found


def attacks(folder: Path, count: int, seed: int) -> Iterator[tuple[str, Outcome]]:
    """Yield the kind and the outcome of each attack. Each command gets about `count` / 4 full disks, and one that is read-only.

    Yields nothing, and says so, if this process may not mount disks.
    """
    if os.geteuid() != 0:
        print("full and read-only disks are left out: only root can mount them", file=sys.stderr)
        return
    lab = Lab(folder / "lab")
    for name in lab.commands:
        with disk(folder / "disk", ROOMY) as place:
            ended = lab.call(name, place)
            assert ended.code == 0, f"{name}: {ended.errors}"
            needed, whole = used(place), written(place)
        for number in range(max(1, count // 4)):
            chance = random.Random(f"{name} {seed} {number}")
            yield f"a full disk: {name}", _full(lab, name, folder / "disk", chance, needed, whole)
        yield f"a read-only disk: {name}", _read_only(lab, name, folder / "disk")


def _full(lab: Lab, name: str, folder: Path, chance: random.Random, needed: int, whole: set[Path]) -> Outcome:
    """Attack a command with a disk that has less space than it `needed`.

    The disk may still suffice, because some of the needed space was for temporary files. Then the command must succeed.

    Args:
        whole: the files that the command writes.
    """
    free = int(needed * chance.uniform(0.0, 0.95)) // PAGE * PAGE
    with disk(folder, free + PAGE) as place:
        filler = place / "filler"
        filler.write_bytes(bytes(PAGE))  # a disk has at least one page, and a small file would fit into it
        ended = lab.call(name, place)

        def is_whole() -> bool:
            return not damaged(place) and written(place) >= whole

        outcome = judge(ended, is_whole, f"{free} of {needed} bytes")
        if outcome.word == "one line" and ended.code != 1:
            return Outcome("silent", f"exit code {ended.code}: {outcome.detail}")
        if outcome.word == "one line" and (broken := damaged(place)):
            return Outcome("silent", f"left {broken}: {outcome.detail}")
        if outcome.word != "one line":
            return outcome
        remount(place, f"size={ROOMY}")
        again = judge(lab.call(name, place), is_whole, "again, with enough space")
        return outcome if again.word == "survived" else Outcome("silent", f"{again.detail}; before: {outcome.detail}")


def _read_only(lab: Lab, name: str, folder: Path) -> Outcome:
    with disk(folder, ROOMY) as place:
        remount(place, "ro")
        ended = lab.call(name, place)
        outcome = judge(ended, lambda: False, "read-only")
        return outcome if outcome.word != "one line" or ended.code == 2 else Outcome("silent", f"exit code {ended.code}")
