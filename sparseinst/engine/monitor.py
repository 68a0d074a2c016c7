"""What a training run says while it goes: progress bar, metrics.jsonl, TensorBoard; and the watch for NaN."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor
from torch.utils.tensorboard.writer import SummaryWriter

from sparseinst.engine.distributed import average, rank
from sparseinst.errors import RunFailed
from sparseinst.paths import RunPaths, atomic

_log = logging.getLogger(__name__)


def progress_bar(unit: str, *, visible: bool = True) -> Progress:
    """A bar with count, elapsed time and ETA, on standard error; silent where that is no terminal."""
    console = Console(stderr=True)
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        TimeElapsedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(),
        console=console,
        disable=not visible or not console.is_terminal,
    )


@contextmanager
def logging_to(path: Path, lead: bool = True) -> Iterator[None]:
    """Also write what the package logs to a file, at its end, with the time; of several processes the leading one does."""
    handler = logging.FileHandler(path, encoding="utf-8") if lead else logging.NullHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger = logging.getLogger("sparseinst")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        handler.close()


class Monitor:
    """Takes every step's losses without waiting for the device; reads them every `every` steps, as means over all processes.

    Rank 0 alone writes.

    Args:
        start: optimiser steps already done; what the files hold of later steps, from a run that was killed, is removed.
        total: steps of the whole run.
        check: called before each write; what it raises prevents it.
    """

    def __init__(
        self,
        paths: RunPaths,
        *,
        start: int,
        total: int,
        every: int,
        visible: bool,
        device: torch.device,
        check: Callable[[], None],
    ) -> None:
        self.paths, self.every, self.total, self.device, self.check = paths, every, total, device, check
        self.lead = rank() == 0
        if self.lead:
            check()
            _truncate(paths, start)
            self.tensorboard = SummaryWriter(str(paths.tensorboard), purge_step=start or None)
            self.metrics = paths.metrics.open("a", encoding="utf-8")
        self.progress = progress_bar("steps", visible=visible and self.lead)
        self.task = self.progress.add_task("train", total=total, completed=start)
        self.waiting: list[tuple[int, dict[str, Tensor]]] = []
        self.since = time.perf_counter()

    def __enter__(self) -> Self:
        self.progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.progress.stop()
        if self.lead:
            self.tensorboard.close()
            self.metrics.close()

    def step(self, iteration: int, losses: Mapping[str, Tensor], learning_rate: float, **facts: float) -> None:
        """Note the weighted losses of optimiser step `iteration`, counted from 0."""
        self.waiting.append((iteration, {name: loss.detach() for name, loss in losses.items()}))
        self.progress.update(self.task, completed=iteration + 1)
        if (iteration + 1) % self.every == 0 or iteration + 1 == self.total:
            self.flush(learning_rate, **facts)

    def flush(self, learning_rate: float | None = None, **facts: float) -> None:
        """Read what is waiting, write its mean.

        Raises:
            RunFailed: a loss was NaN or infinite; names the loss and the step.
        """
        if not self.waiting:
            return
        names = list(self.waiting[0][1])
        own = torch.stack([torch.stack([losses[name] for name in names]) for _, losses in self.waiting])
        values = average(own, self.device).cpu()
        for (iteration, _), row in zip(self.waiting, values.tolist(), strict=True):
            for name, value in zip(names, row, strict=True):
                if not torch.isfinite(torch.tensor(value)):
                    raise RunFailed(diverged(f"the {name} loss became {value} in step {iteration}", self.paths))
        means = dict(zip(names, values.mean(0).tolist(), strict=True))
        iteration = self.waiting[-1][0] + 1
        seconds = (time.perf_counter() - self.since) / len(self.waiting)
        record = {"iteration": iteration, **{f"loss_{k}": round(v, 6) for k, v in means.items()}}
        record |= {"loss": round(sum(means.values()), 6), "seconds": round(seconds, 4), **facts}
        if learning_rate is not None:
            record["learning_rate"] = learning_rate
        self.write(record, "train")
        self.progress.update(self.task, description=f"train  loss {record['loss']:.3f}")
        _log.info("step %d/%d  %s", iteration, self.total, "  ".join(f"{k} {v:.3f}" for k, v in means.items()))
        self.waiting.clear()
        self.since = time.perf_counter()

    def write(self, record: Mapping[str, Any], group: str) -> None:
        """One line of metrics.jsonl and its numbers in TensorBoard; `record` holds `iteration`."""
        if not self.lead:
            return
        self.check()
        self.metrics.write(json.dumps(record) + "\n")
        self.metrics.flush()
        for name, value in record.items():
            if name != "iteration" and isinstance(value, int | float):
                self.tensorboard.add_scalar(f"{group}/{name}", value, record["iteration"])


def diverged(what: str, paths: RunPaths) -> str:
    return (
        f"training diverged: {what}; the last good checkpoint is kept in {paths.checkpoints}: lower train.learning_rate, "
        "set train.clip_norm, or use train.precision=fp32 or bf16"
    )


def _truncate(paths: RunPaths, start: int) -> None:
    """Keep the lines of metrics.jsonl up to step `start`; a killed run may have left later or unfinished ones."""
    if not paths.metrics.exists():
        return
    kept = []
    for line in paths.metrics.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            _log.warning("%s: an unfinished line, left by a kill, was removed", paths.metrics)
            continue
        if record["iteration"] <= start:
            kept.append(line + "\n")
    with atomic(paths.metrics) as temporary:
        temporary.write_text("".join(kept), encoding="utf-8")
