"""Latency by the paper's protocol (section 4.3, Table 8): synchronised, warm-up left out, forward and post-processing.

Decoding, resizing, normalisation and padding of the image are not timed.
"""

from __future__ import annotations

import shutil
import statistics
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from sparseinst.config import Config
from sparseinst.engine.roofline import now
from sparseinst.engine.timed import Timed, network_to_time
from sparseinst.errors import UserError


@dataclass(frozen=True)
class Latency:
    whole_ms: dict[str, float]
    """`median`, `mean`, `p5` and `p95` over the repetitions, one synchronisation each."""
    modules_ms: dict[str, float]
    """Medians, synchronised after each module, so that they sum to more than the whole; empty for what runs as one."""
    size: tuple[int, int] | None
    """Height and width of the padded input; None where they change."""
    kept: int
    """Instances that post-processing resized in the last batch: random weights keep every map, the slowest case. Of training
    those that were learned."""
    repetitions: int
    drift: float = 1.0
    """Median of the last third of the repetitions over that of the first: well above 1 where the device was throttled."""
    peak_memory_mb: int | None = None
    """Of the GPU's memory; None on a processor."""
    clocks: str | None = None
    """What the GPU's driver says of clocks, temperature and throttling, before and after; None on a processor."""


@torch.no_grad()
def measure(timed: Timed, *, device: torch.device, warmup: int = 10, repetitions: int = 50) -> Latency:
    """Time it: the unbroken whole, and then, by itself, each module.

    Every batch is run once, at least, before the clock is started, and all as often as each other with it.
    """
    warmup, repetitions = max(warmup, timed.turns), whole_turns(timed, repetitions)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    parts: dict[str, list[float]] = {name: [] for name in timed.modules}
    whole: list[float] = []
    kept = 0
    for number in range(warmup):
        kept = timed.run(number, lambda _: None)
    before = gpu_clocks(device)
    for number in range(repetitions):
        whole.append(_seconds(timed, number, device))
        if timed.modules:
            marks = {"start": now(device)}
            timed.run(number, lambda name: marks.update({name: now(device)}))  # noqa: B023
            for earlier, name in zip(("start", *timed.modules), timed.modules, strict=False):
                parts[name].append(marks[name] - marks[earlier])
    after = gpu_clocks(device)
    # As many whole turns as there are in a third: photos of other sizes are no drift.
    third = max(1, repetitions // 3 // timed.turns) * timed.turns
    return Latency(
        percentiles(whole),
        {name: round(1000 * statistics.median(values), 3) for name, values in parts.items()},
        timed.size,
        kept,
        repetitions,
        round(statistics.median(whole[-third:]) / statistics.median(whole[:third]), 3),
        torch.cuda.max_memory_allocated(device) // 2**20 if device.type == "cuda" else None,
        f"{before} | {after}" if before is not None else None,
    )


def measure_latency(config: Config, *, device: torch.device, warmup: int = 10, repetitions: int = 50) -> Latency:
    """`measure` of `network_to_time`, the model as it is and with random weights: the stage `latency`."""
    return measure(network_to_time(config, device=device), device=device, warmup=warmup, repetitions=repetitions)


def whole_turns(timed: Timed | Side, repetitions: int) -> int:
    """At least as many repetitions, so that each batch comes as often as any other, and twice: the drift needs that."""
    return max(2, -(-repetitions // timed.turns)) * timed.turns


@dataclass(frozen=True)
class Comparison:
    first_ms: dict[str, float]
    second_ms: dict[str, float]
    """`median`, `mean`, `p5` and `p95` each."""
    ratio: dict[str, float]
    """First over second of each turn: `median`, `p5` and `p95`. Over 1: the second is faster."""
    repetitions: int


class Side(Protocol):
    """Something that can be timed by turns, in this process or another."""

    turns: int
    """Batches until the first comes again."""

    def seconds(self, number: int) -> float:
        """How long the n-th batch took."""


class Here:
    """A side in this process."""

    def __init__(self, timed: Timed, device: torch.device) -> None:
        self.turns = timed.turns
        self._timed, self._device = timed, device

    @torch.no_grad()
    def seconds(self, number: int) -> float:
        return _seconds(self._timed, number, self._device)


def compare(first: Side, second: Side, *, warmup: int = 10, repetitions: int = 50) -> Comparison:
    """Time two things by turns, so that what else the machine does falls on both.

    Raises:
        UserError: they do not take the same number of batches.
    """
    if first.turns != second.turns:
        raise UserError(f"{first.turns} batches against {second.turns}: a ratio needs the same images, and as many at once")
    repetitions = whole_turns(first, repetitions)
    for number in range(max(warmup, first.turns)):
        for side in (first, second):
            side.seconds(number)
    pairs = [tuple(side.seconds(number) for side in (first, second)) for number in range(repetitions)]
    ratios = np.percentile([a / b for a, b in pairs], (50, 5, 95))
    return Comparison(
        percentiles([a for a, _ in pairs]),
        percentiles([b for _, b in pairs]),
        {name: round(float(value), 3) for name, value in zip(("median", "p5", "p95"), ratios, strict=True)},
        repetitions,
    )


def _seconds(timed: Timed, number: int, device: torch.device) -> float:
    began = now(device)
    timed.run(number, lambda _: None)
    return now(device) - began


def percentiles(seconds: Sequence[float]) -> dict[str, float]:
    """`median`, `mean`, `p5` and `p95` in milliseconds."""
    found = dict(zip(("median", "p5", "p95"), np.percentile(seconds, (50, 5, 95)), strict=True)) | {"mean": np.mean(seconds)}
    return {name: round(1000 * float(value), 3) for name, value in found.items()}


def gpu_clocks(device: torch.device) -> str | None:
    """Clocks, temperature and active reasons for throttling, as nvidia-smi tells them; None without a GPU or without it."""
    command = shutil.which("nvidia-smi") if device.type == "cuda" else None
    if command is None:
        return None
    fields = "clocks.sm,clocks.mem,temperature.gpu,clocks_throttle_reasons.active"
    query = [command, f"--query-gpu={fields}", "--format=csv,noheader", f"--id={device.index or 0}"]
    asked = subprocess.run(query, capture_output=True, text=True, check=False)
    return asked.stdout.strip() if asked.returncode == 0 else None
