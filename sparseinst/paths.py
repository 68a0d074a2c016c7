"""The name of every file that a run writes. No other module spells one out."""

from __future__ import annotations

import hashlib
import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

WEIGHTS = "model.safetensors"


@dataclass(frozen=True)
class RunPaths:
    """The files of one run below its folder."""

    root: Path

    @property
    def config(self) -> Path:
        return self.root / "config.yaml"

    @property
    def log(self) -> Path:
        return self.root / "log.txt"

    @property
    def metrics(self) -> Path:
        """One JSON object a line: the losses of training steps, and evaluations."""
        return self.root / "metrics.jsonl"

    @property
    def tensorboard(self) -> Path:
        return self.root / "tensorboard"

    @property
    def checkpoints(self) -> Path:
        return self.root / "checkpoints"

    def checkpoint(self, iteration: int) -> Path:
        return self.checkpoints / f"{iteration:08d}.pt"

    @property
    def weights(self) -> Path:
        """The trained model, with its config inside; there when training is done."""
        return self.root / WEIGHTS

    @property
    def evaluation(self) -> Path:
        """The figures, and of which settings and data they are."""
        return self.root / "evaluation.json"

    @property
    def code(self) -> Path:
        """Which code trained: one JSON object a line, for each process that began or went on with it."""
        return self.root / "code.jsonl"

    @property
    def predictions(self) -> Path:
        """Of an evaluation: its instances in COCO's result format, for comparisons over the same images."""
        return self.root / "predictions.json"

    @property
    def submitted(self) -> Path:
        """As what job the stage was last sent to a cluster."""
        return self.root / "submitted.json"

    @property
    def attempts(self) -> Path:
        return self.root / "attempts"

    def attempt(self, number: int) -> Path:
        """Who began the attempt of that number."""
        return self.attempts / f"{number:04d}.json"

    def beat(self, number: int, rank: int) -> Path:
        """The heartbeat of one rank of an attempt."""
        return self.attempts / f"{number:04d}.{rank}.beat"

    def end(self, number: int, rank: int) -> Path:
        """How an attempt ended for one rank."""
        return self.attempts / f"{number:04d}.{rank}.end"


@contextmanager
def atomic(path: Path, check: Callable[[], None] | None = None) -> Iterator[Path]:
    """A temporary sibling to write to; renamed to `path` when the block ends well, removed when it does not.

    Args:
        check: called right before the renaming; what it raises prevents it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        if check is not None:
            check()
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def file_digest(path: Path) -> str:
    """16 hexadecimal digits of a file's SHA-256."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]
