"""Measure latency by the paper's protocol (section 4.3, Table 8).

The clock covers the forward pass and post-processing. Decoding, resizing, normalisation and padding are not timed.
The device is synchronised before the clock is read, and the warm-up is not timed.
"""

from __future__ import annotations

import shutil
import statistics
import subprocess
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch

from sparseinst.bench.roofline import synchronised_time
from sparseinst.bench.timed import Workload, network_workload
from sparseinst.config import Config
from sparseinst.errors import UserError


@dataclass(frozen=True)
class Latency:
    """The measured latency of a workload."""

    whole_ms: dict[str, float]
    """`median`, `mean`, `p5` and `p95` in milliseconds over the repetitions. The device is synchronised once per repetition."""
    modules_ms: dict[str, float]
    """Median of each module in milliseconds, empty if the modules cannot be timed separately. The device is synchronised after
    each module, so the sum exceeds the median of the whole."""
    modules_range_ms: dict[str, tuple[float, float]]
    """The 5th and 95th percentile of each module in milliseconds."""
    size: tuple[int, int] | None
    """Height and width of the padded input. None if they differ between batches."""
    kept: int
    """In inference, the instances that post-processing kept in the last batch. With random weights it keeps every map, which is
    the slowest case. In training, the instances that the step learned from."""
    repetitions: int
    drift: float = 1.0
    """Median of the last third of the repetitions, divided by the median of the first third. It is well above 1 if the device was
    throttled."""
    peak_memory_mb: int | None = None
    """Peak memory of the GPU in MiB. None on a CPU."""
    clocks: str | None = None
    """The GPU's clocks, temperature and throttling before and after, as its driver reports them. None on a CPU."""
    facts: dict[str, Any] | None = None
    """What ran the network; see `engines.base.EngineFacts`. None in training."""


def measure(workload: Workload, *, device: torch.device, warmup: int = 10, repetitions: int = 50) -> Latency:
    """Measure the latency of the whole workload and, in separate runs, of each module.

    Args:
        warmup: number of runs before the clock starts, raised to the number of batches.
        repetitions: number of timed runs, rounded up so that each batch runs equally often.
    """
    [found] = measure_by_turns([lambda: workload], device=device, warmup=warmup, repetitions=repetitions)
    if isinstance(found, Exception):
        raise found
    return found


@torch.no_grad()
def measure_by_turns(
    builders: Sequence[Callable[[], Workload]], *, device: torch.device, warmup: int = 10, repetitions: int = 50
) -> list[Latency | Exception]:
    """Measure workloads by turns, so that their times can be compared although the speed of the machine changes.

    Args:
        builders: return the workloads.
        warmup, repetitions: as in `measure`.

    Returns:
        For each workload its latency, or the exception that it raised.
    """
    timed: list[_Timed | Exception] = []
    for build in builders:
        others = torch.cuda.memory_allocated(device) if device.type == "cuda" and timed else 0
        try:
            timed.append(_Timed(build(), device, warmup, repetitions, others))
        except Exception as error:  # noqa: BLE001 (the other workloads are still timed)
            timed.append(_freed(error, device))
    for number in range(max((one.repetitions for one in timed if isinstance(one, _Timed)), default=0)):
        for place, one in enumerate(timed):
            if isinstance(one, _Timed) and number < one.repetitions:
                try:
                    one.take_turn(number)
                except Exception as error:  # noqa: BLE001 (as above)
                    timed[place] = _freed(error, device)
    return [one.latency() if isinstance(one, _Timed) else one for one in timed]


def _freed(error: Exception, device: torch.device) -> Exception:
    """Return the exception of a workload whose memory is free again for the other ones."""
    traceback.clear_frames(error.__traceback__)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return error


class _Timed:
    """A workload that is warm, and its times so far.

    Args:
        others: the bytes of the GPU's memory that other workloads hold.
    """

    def __init__(self, workload: Workload, device: torch.device, warmup: int, repetitions: int, others: int) -> None:
        self._workload, self._device = workload, device
        self.repetitions = round_up_repetitions(workload, repetitions)
        self._whole: list[float] = []
        self._modules: dict[str, list[float]] = {name: [] for name in workload.modules}
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        self._kept = 0
        for number in range(max(warmup, workload.num_batches)):
            self._kept = workload.run(number, _ignore)
        self._peak = torch.cuda.max_memory_allocated(device) - others if device.type == "cuda" else None
        self._clocks = gpu_clocks(device)

    def take_turn(self, number: int) -> None:
        """Time batch number n as a whole, and then module by module."""
        self._whole.append(_time_batch(self._workload, number, self._device))
        if self._workload.modules:
            for name, seconds in _time_modules(self._workload, number, self._device).items():
                self._modules[name].append(seconds)

    def latency(self) -> Latency:
        spread = {name: percentiles(seconds) for name, seconds in self._modules.items()}
        return Latency(
            percentiles(self._whole),
            {name: times["median"] for name, times in spread.items()},
            {name: (times["p5"], times["p95"]) for name, times in spread.items()},
            self._workload.size,
            self._kept,
            self.repetitions,
            _drift(self._whole, self._workload.num_batches),
            self._peak // 2**20 if self._peak is not None else None,
            f"{self._clocks} | {gpu_clocks(self._device)}" if self._clocks is not None else None,
            self._workload.facts,
        )


def measure_latency(config: Config, *, device: torch.device, warmup: int = 10, repetitions: int = 50) -> Latency:
    """Measure the latency of a config's model with random weights, in mode `eager`."""
    return measure(network_workload(config, device=device), device=device, warmup=warmup, repetitions=repetitions)


def measure_latencies(configs: Sequence[Config], *, device: torch.device) -> list[Latency | Exception]:
    """Measure the latency of several configs' models by turns. The stage `latency` calls this function.

    Returns:
        For each config the latency, or the exception that its model raised.
    """
    return measure_by_turns([partial(network_workload, config, device=device) for config in configs], device=device)


def round_up_repetitions(workload: Workload | ComparedSide, repetitions: int) -> int:
    """Return the next number of repetitions in which each batch runs equally often, and at least twice for the drift."""
    return max(2, -(-repetitions // workload.num_batches)) * workload.num_batches


class ComparedSide(Protocol):
    """One of the two sides of a comparison, in this process or in another one."""

    num_batches: int
    """Number of different batches. Batch `num_batches` is batch 0 again."""

    def time_batch(self, number: int) -> float:
        """Run batch number n, and return its time in seconds."""


class LocalSide:
    """A side of a comparison that runs in this process."""

    def __init__(self, workload: Workload, device: torch.device) -> None:
        self.num_batches, self.facts = workload.num_batches, workload.facts
        self._workload, self._device = workload, device

    @torch.no_grad()
    def time_batch(self, number: int) -> float:
        return _time_batch(self._workload, number, self._device)

    @torch.no_grad()
    def time_modules(self, number: int) -> dict[str, float]:
        """Run batch number n with synchronisation after each module, and return the time of each module in seconds."""
        return _time_modules(self._workload, number, self._device)


def take_turns(sides: Sequence[ComparedSide], *, warmup: int = 10, repetitions: int = 50) -> list[list[float]]:
    """Time sides by turns, and return the seconds of each side's runs. Run n of each side takes the same images.

    Raises:
        UserError: the sides have different numbers of batches.
    """
    batches = [side.num_batches for side in sides]
    if len(set(batches)) > 1:
        raise UserError(
            f"the sides have {' and '.join(map(str, batches))} batches, but a ratio needs the same batches on both sides"
        )
    for number in range(max(warmup, batches[0])):
        for side in sides:
            side.time_batch(number)
    turns = [[side.time_batch(number) for side in sides] for number in range(round_up_repetitions(sides[0], repetitions))]
    return [list(seconds) for seconds in zip(*turns, strict=True)]


def ratio_of(first: Sequence[float], second: Sequence[float]) -> dict[str, float]:
    """Return `median`, `p5` and `p95` of the first side's time divided by the second's, turn by turn."""
    ratios = np.percentile(np.divide(first, second), (50, 5, 95))
    return {name: round(float(value), 3) for name, value in zip(("median", "p5", "p95"), ratios, strict=True)}


def percentiles(seconds: Sequence[float]) -> dict[str, float]:
    """Return `median`, `p5`, `p95` and `mean` in milliseconds."""
    values = dict(zip(("median", "p5", "p95"), np.percentile(seconds, (50, 5, 95)), strict=True)) | {"mean": np.mean(seconds)}
    return {name: round(1000 * float(value), 3) for name, value in values.items()}


def gpu_clocks(device: torch.device) -> str | None:
    """Return the GPU's clocks, temperature and active reasons for throttling. None without a GPU or without nvidia-smi."""
    command = shutil.which("nvidia-smi") if device.type == "cuda" else None
    if command is None:
        return None
    fields = "clocks.sm,clocks.mem,temperature.gpu,clocks_throttle_reasons.active"
    query = [command, f"--query-gpu={fields}", "--format=csv,noheader", f"--id={device.index or 0}"]
    completed = subprocess.run(query, capture_output=True, text=True, check=False)
    return completed.stdout.strip() if completed.returncode == 0 else None


def _ignore(_module: str) -> None:
    pass


def _time_batch(workload: Workload, number: int, device: torch.device) -> float:
    """Run a batch without synchronisation between its modules, and return its time in seconds."""
    began = synchronised_time(device)
    workload.run(number, _ignore)
    return synchronised_time(device) - began


def _time_modules(workload: Workload, number: int, device: torch.device) -> dict[str, float]:
    """Run a batch with synchronisation after each module, and return the time of each module in seconds."""
    marks = {"start": synchronised_time(device)}
    workload.run(number, lambda name: marks.update({name: synchronised_time(device)}))
    names = ("start", *workload.modules)
    return {name: marks[name] - marks[earlier] for earlier, name in zip(names, workload.modules, strict=False)}


def _drift(seconds: Sequence[float], num_batches: int) -> float:
    """Return the median of the last third divided by the median of the first third.

    Each third is shortened to a multiple of the number of batches, so that photos of different sizes do not count as drift.
    """
    third = max(1, len(seconds) // 3 // num_batches) * num_batches
    return round(statistics.median(seconds[-third:]) / statistics.median(seconds[:third]), 3)
