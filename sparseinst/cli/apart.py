"""What `bench` times has a process of its own, started afresh.

So neither memory that something else freed, nor what something else compiled or heated up, counts for it; and what is ours keeps
freed memory, as our commands do, while `plain` and peers have what their users have.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict
from multiprocessing import get_context
from typing import TYPE_CHECKING, Any

from sparseinst.cli.timing import Setting, Task, timed
from sparseinst.engine.memory import keep_freed_memory
from sparseinst.errors import RunFailed

if TYPE_CHECKING:
    from sparseinst.engine.benchmark import Comparison, Here


def measure_apart(setting: Setting, task: Task, device: Any, warmup: int, repetitions: int) -> dict[str, Any]:
    """The latency of one setting, and what is known of it. Raises `UserError`, `RunFailed`."""
    with _process(setting) as process:
        return _result(process.submit(_measure, setting, task, device, warmup, repetitions), setting)


def compare_apart(pair: list[Setting], task: Task, device: Any, warmup: int, repetitions: int) -> Comparison:
    """Two settings by turns, each in its process. Raises `UserError`, `RunFailed`."""
    from sparseinst.engine.benchmark import compare

    with _process(pair[0]) as first, _process(pair[1]) as second:
        # Both at once: compiling takes long.
        begun = [process.submit(_prepare, setting, task, device) for process, setting in zip((first, second), pair, strict=True)]
        one, other = (
            _There(process, setting, _result(turns, setting))
            for process, setting, turns in zip((first, second), pair, begun, strict=True)
        )
        return compare(one, other, warmup=warmup, repetitions=repetitions)


class _There:
    """A side of a comparison, as seen from outside its process: `benchmark.Side`."""

    def __init__(self, process: ProcessPoolExecutor, setting: Setting, turns: int) -> None:
        self.turns = turns
        self._process, self._setting = process, setting

    def seconds(self, number: int) -> float:
        seconds: float = _result(self._process.submit(_seconds, self._setting, number), self._setting)
        return seconds


@contextmanager
def _process(setting: Setting) -> Iterator[ProcessPoolExecutor]:
    from sparseinst.integrations.peers import is_peer

    ours = setting.mode != "plain" and not is_peer(setting.model)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=_start, initargs=(ours,)) as process:
        yield process


def _result(future: Future[Any], setting: Setting) -> Any:
    try:
        return future.result()
    except BrokenProcessPool:
        raise RunFailed(f"{setting}: its process was killed; where memory is short, take a smaller --batch or --size") from None


# What follows runs in the process.

_prepared: dict[Setting, Here] = {}


def _start(ours: bool) -> None:
    logging.basicConfig(format="%(levelname)s: %(message)s")
    if ours:
        keep_freed_memory()


def _measure(setting: Setting, task: Task, device: Any, warmup: int, repetitions: int) -> dict[str, Any]:
    from sparseinst.engine.benchmark import measure

    what, known = timed(setting, task, device)
    return asdict(measure(what, device=device, warmup=warmup, repetitions=repetitions)) | known


def _prepare(setting: Setting, task: Task, device: Any) -> int:
    """Have it ready; the number of its batches."""
    from sparseinst.engine.benchmark import Here

    _prepared[setting] = Here(timed(setting, task, device)[0], device)
    return _prepared[setting].turns


def _seconds(setting: Setting, number: int) -> float:
    return _prepared[setting].seconds(number)
