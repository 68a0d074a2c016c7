"""Time each setting in a new process of its own.

No state of an allocator, a compiler or earlier work in the process carries over from one setting to the next. Our models keep
freed memory in their process, as our commands do. Mode `plain` and peers do not, because their users' processes do not either.
"""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from typing import TYPE_CHECKING, Any

from sparseinst.bench.rows import Setting, Task, build_workload
from sparseinst.errors import RunFailed
from sparseinst.inference.memory import keep_freed_memory

if TYPE_CHECKING:
    from sparseinst.bench.benchmark import LocalSide


def measure_isolated(setting: Setting, task: Task, device: Any, warmup: int, repetitions: int) -> dict[str, Any]:
    """Measure one setting in a process of its own, and return the fields of `Latency`, `flops`, `parameters` and
    `first_image_s`, the seconds from the start of the process to the result of its first image.

    Raises:
        UserError, DataError: the workload cannot be built.
        RunFailed: the process was killed.
    """
    began = time.time()
    with _start_process(setting) as process:
        return _wait_for_result(process.submit(_measure, setting, task, device, warmup, repetitions, began), setting)


@dataclass(frozen=True)
class Runner:
    """The runs of one setting among others that took turns."""

    seconds: list[float]
    first_image_s: float
    """From the start of its process to the result of the first image."""
    facts: dict[str, Any] | None
    """See `Workload.facts`."""
    post_ms: float | None
    """The median time of post-processing in milliseconds, from as many further runs; None if it cannot be told apart."""


def race_isolated(
    settings: Sequence[Setting], task: Task, device: Any, warmup: int, repetitions: int, *, post: bool = True
) -> list[Runner]:
    """Time settings by turns, each in a process of its own, and return the runs of each.

    The processes prepare one after the other, so that none delays another one's first image.

    Args:
        post: also time post-processing, in as many further runs.

    Raises:
        UserError, DataError: a workload cannot be built, or the settings have different numbers of batches.
        RunFailed: a process was killed.
    """
    from sparseinst.bench.benchmark import take_turns

    with ExitStack() as stack:
        sides, firsts, facts = [], [], []
        for setting in settings:
            began = time.time()
            process = stack.enter_context(_start_process(setting))
            first, fact, num_batches = _wait_for_result(process.submit(_prepare, setting, task, device, began), setting)
            firsts.append(first)
            facts.append(fact)
            sides.append(IsolatedSide(process, setting, num_batches))
        seconds = take_turns(sides, warmup=warmup, repetitions=repetitions)
        numbers = range(len(seconds[0]) if post else 0)
        post_ms = [_median_ms([side.time_post(number) for number in numbers]) for side in sides]
    return [Runner(*runner) for runner in zip(seconds, firsts, facts, post_ms, strict=True)]


def _median_ms(seconds: Sequence[float | None]) -> float | None:
    known = [value for value in seconds if value is not None]
    return round(1000 * statistics.median(known), 3) if known else None


class IsolatedSide:
    """A side of a comparison (`benchmark.ComparedSide`) that runs in another process."""

    def __init__(self, process: ProcessPoolExecutor, setting: Setting, num_batches: int) -> None:
        self.num_batches = num_batches
        self._process, self._setting = process, setting

    def time_batch(self, number: int) -> float:
        seconds: float = _wait_for_result(self._process.submit(_time_batch, self._setting, number), self._setting)
        return seconds

    def time_post(self, number: int) -> float | None:
        """Run batch number n, and return the time of its post-processing in seconds; None if it cannot be told apart."""
        seconds: float | None = _wait_for_result(self._process.submit(_time_post, self._setting, number), self._setting)
        return seconds


@contextmanager
def _start_process(setting: Setting) -> Iterator[ProcessPoolExecutor]:
    """Start a new process for a setting, and end it when the context is left."""
    from sparseinst.integrations.peers import is_peer

    keep_memory = setting.mode != "plain" and not is_peer(setting.model)
    context = get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context, initializer=_initialize_process, initargs=(keep_memory,)) as process:
        yield process


def _wait_for_result(future: Future[Any], setting: Setting) -> Any:
    """Wait for a call in another process, and return its result. Raises `RunFailed` if the process was killed."""
    try:
        return future.result()
    except BrokenProcessPool:
        raise RunFailed(f"{setting}: its process was killed; if memory is short, use a smaller --batch or --size") from None


# The functions below run in the isolated process.

_prepared_sides: dict[Setting, LocalSide] = {}


def _initialize_process(keep_memory: bool) -> None:
    logging.basicConfig(format="%(levelname)s: %(message)s")
    if keep_memory:
        keep_freed_memory()


def _measure(setting: Setting, task: Task, device: Any, warmup: int, repetitions: int, began: float) -> dict[str, Any]:
    """Build the workload of a setting, and measure it."""
    from sparseinst.bench.benchmark import LocalSide, measure

    workload, count = build_workload(setting, task, device)
    LocalSide(workload, device).time_batch(0)
    first = round(time.time() - began, 3)
    measured = asdict(measure(workload, device=device, warmup=warmup, repetitions=repetitions))
    return {**measured, **count(), "first_image_s": first}


def _prepare(setting: Setting, task: Task, device: Any, began: float) -> tuple[float, dict[str, Any] | None, int]:
    """Build the workload of a setting, keep it in this process, and run its first image.

    Returns:
        The seconds since this process was started, the facts about the workload, and its number of batches.
    """
    from sparseinst.bench.benchmark import LocalSide

    side = _prepared_sides[setting] = LocalSide(build_workload(setting, task, device)[0], device)
    side.time_batch(0)
    return round(time.time() - began, 3), side.facts, side.num_batches


def _time_batch(setting: Setting, number: int) -> float:
    """Run a batch of a prepared setting, and return its time in seconds."""
    return _prepared_sides[setting].time_batch(number)


def _time_post(setting: Setting, number: int) -> float | None:
    """Run a batch of a prepared setting, and return its time of post-processing in seconds; None if it cannot be told apart."""
    return _prepared_sides[setting].time_modules(number).get("post")
