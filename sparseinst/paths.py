"""The name of every file that a run writes. No other module spells one out."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
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
        return self.root / "evaluation.json"

    @property
    def predictions(self) -> Path:
        """Of an evaluation: its instances in COCO's result format, for comparisons over the same images."""
        return self.root / "predictions.json"

    @property
    def state(self) -> Path:
        """What a stage's process last said of itself."""
        return self.root / "state.json"

    @property
    def lock(self) -> Path:
        """Held while this folder is trained in."""
        return self.root / ".lock"

    @property
    def claim(self) -> Path:
        """Held by the process that works on the stage of this folder."""
        return self.root / ".claim"


@contextmanager
def atomic(path: Path) -> Iterator[Path]:
    """A temporary sibling to write to; renamed to `path` when the block ends well, removed when it does not."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
