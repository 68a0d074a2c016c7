"""Report a running training in a progress bar, metrics.jsonl, TensorBoard and loggers, and stop it if a loss is NaN."""

from __future__ import annotations

import contextlib
import logging
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor
from torch.utils.tensorboard.writer import SummaryWriter

from sparseinst.checked import json_line, read_json_lines
from sparseinst.distributed import average, rank
from sparseinst.errors import RunFailed
from sparseinst.files import atomic
from sparseinst.paths import RunPaths
from sparseinst.progress import progress_bar
from sparseinst.training.loggers import Loggers

_log = logging.getLogger(__name__)


Pending = Sequence[tuple[int, dict[str, Tensor]]]
"""The losses of steps (counted from 0) that are not written yet."""


class _LogFile(logging.FileHandler):
    """A log file that ignores a full disk. The other writes of the run report the full disk."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 (the library's name)
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            super().close()


@contextmanager
def logging_to(path: Path, lead: bool = True) -> Iterator[None]:
    """Append the package's log messages with their time to a file, within this context. Only the leading process writes."""
    handler = _LogFile(path, encoding="utf-8") if lead else logging.NullHandler()
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
    """Collect each step's losses without waiting for the device, and write their means every `every` steps.

    The means are over these steps and over all processes. Only rank 0 writes.

    Args:
        start: the number of optimiser steps that are done. Later records, which a killed run may have left, are removed.
        total: the number of steps of the whole run.
        check: is called before each write. If it raises an error, nothing is written.
        evaluated: whether the evaluation after `start` steps was finished before the run stopped. Its record is then kept.
        loggers: are opened and closed with the monitor; None logs to no service.
        pending: the collected losses of a run that was stopped between two writes. Then its lines are those of one that was not.
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
        evaluated: bool = True,
        loggers: Loggers | None = None,
        pending: Pending = (),
    ) -> None:
        self.paths, self.every, self.total, self.device, self.check = paths, every, total, device, check
        self.lead = rank() == 0
        self.loggers = loggers if self.lead else None
        if self.lead:
            check()
            _truncate(paths, start, evaluated)
            self.tensorboard = SummaryWriter(str(paths.tensorboard), purge_step=start or None)
            self.metrics = paths.metrics.open("a", encoding="utf-8")
        self.progress = progress_bar("steps", visible=visible and self.lead)
        self.task = self.progress.add_task("train", total=total, completed=start)
        self.pending = list(pending)
        self._restart_clock()

    def _restart_clock(self) -> None:
        self.began, self.timed, self.paused = time.perf_counter(), 0, 0.0
        """When the first step since the last line began, the steps since then, and the seconds between that are not theirs."""

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Do not count the time of this context, an evaluation or a checkpoint, as time of a step."""
        began = time.perf_counter()
        yield
        self.paused += time.perf_counter() - began

    def __enter__(self) -> Self:
        self.progress.start()
        if self.loggers is not None:
            self.loggers.open()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.progress.stop()
        if self.lead:
            self.tensorboard.close()
            self.metrics.close()
        if self.loggers is not None:
            stopped = kind is not None and not issubclass(kind, Exception)
            self.loggers.close("finished" if kind is None else "stopped" if stopped else "failed")

    def step(self, iteration: int, losses: Mapping[str, Tensor], learning_rate: float, **values: float) -> None:
        """Collect the weighted losses of optimiser step `iteration`, counted from 0. `values` are written with the means."""
        self.pending.append((iteration, {name: loss.detach() for name, loss in losses.items()}))
        self.timed += 1
        self.progress.update(self.task, completed=iteration + 1)
        if (iteration + 1) % self.every == 0 or iteration + 1 == self.total:
            self.flush(learning_rate, **values)

    def flush(self, learning_rate: float | None = None, **values: float) -> None:
        """Write the means of the collected losses, and the mean time of the steps of this process, without evaluations and
        checkpoints.

        Raises:
            RunFailed: a loss is NaN or infinite. The message names the loss and the step.
        """
        if not self.pending:
            return
        names = list(self.pending[0][1])
        own_losses = torch.stack([torch.stack([losses[name] for name in names]) for _, losses in self.pending])
        losses_by_step = average(own_losses, self.device).cpu()
        for (iteration, _), row in zip(self.pending, losses_by_step.tolist(), strict=True):
            for name, value in zip(names, row, strict=True):
                if not torch.isfinite(torch.tensor(value)):
                    raise RunFailed(diverged(f"the {name} loss became {value} in step {iteration}", self.paths))
        means = dict(zip(names, losses_by_step.mean(0).tolist(), strict=True))
        iteration = self.pending[-1][0] + 1
        seconds = (time.perf_counter() - self.began - self.paused) / max(1, self.timed)
        record = {"iteration": iteration, **{f"loss_{k}": round(v, 6) for k, v in means.items()}}
        record |= {"loss": round(sum(means.values()), 6), "seconds": round(seconds, 4), **values}
        if learning_rate is not None:
            record["learning_rate"] = learning_rate
        self.write(record, "train")
        self.progress.update(self.task, description=f"train  loss {record['loss']:.3f}")
        _log.info("step %d/%d  %s", iteration, self.total, "  ".join(f"{k} {v:.3f}" for k, v in means.items()))
        self.pending.clear()
        self._restart_clock()

    def say(self, text: str) -> None:
        """Write a line to the log, and above the progress bar if there is one."""
        _log.info("%s", text)
        if not self.progress.disable:
            self.progress.console.print(text, highlight=False, markup=False)

    def write(self, record: Mapping[str, Any], group: str) -> None:
        """Write a record to metrics.jsonl as one line, and its numbers to TensorBoard and the loggers.

        It must have the key `iteration`.
        """
        if not self.lead:
            return
        self.check()
        self.metrics.write(json_line(record))
        self.metrics.flush()
        for name, value in record.items():
            if name != "iteration" and isinstance(value, int | float):
                self.tensorboard.add_scalar(f"{group}/{name}", value, record["iteration"])
        if self.loggers is not None:
            self.loggers.write(record, group)


def diverged(what: str, paths: RunPaths) -> str:
    """Return the error message for a training that diverged; `what` names the value that is no longer finite."""
    return (
        f"training diverged: {what}; the last good checkpoint is kept in {paths.checkpoints}; lower train.learning_rate, "
        "set train.clip_norm, or use train.precision=fp32 or bf16"
    )


def _truncate(paths: RunPaths, start: int, evaluated: bool) -> None:
    """Keep the records of metrics.jsonl up to step `start`. A killed run may have left later ones, or an incomplete line.

    Args:
        evaluated: keep the record of the evaluation after `start` steps. Otherwise remove it, because the evaluation runs again.
    """
    if not paths.metrics.exists():
        return
    kept = []
    for record in read_json_lines(paths.metrics):
        if record["iteration"] < start or (record["iteration"] == start and (evaluated or "loss" in record)):
            kept.append(json_line(record))
    with atomic(paths.metrics) as temporary:
        temporary.write_text("".join(kept), encoding="utf-8")
