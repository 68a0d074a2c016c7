"""Run what the command `bench` asks for, and return it as plain data for JSON."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from sparseinst.bench.isolated import compare_isolated, measure_isolated
from sparseinst.bench.roofline import count_network_cost, measure_peak
from sparseinst.bench.rows import ENGINE_MODE, Setting, Task, default_short_side, load_network
from sparseinst.errors import UserError
from sparseinst.integrations.peers import is_peer
from sparseinst.machine import device_name

MAX_PHOTOS = 64
"""All photos are in the device's memory at once, so their number is limited."""


def build_settings(
    models: Sequence[str],
    sizes: Sequence[int] | None,
    batches: Sequence[int],
    precisions: Sequence[str],
    modes: Sequence[str],
    engines: Sequence[str] = ("torch",),
) -> list[Setting]:
    """Return every combination of the values. Without sizes each model has the size that it is meant for.

    The modes are torch's; the other engines have one mode.

    Raises:
        UserError: a value is not valid, or weights cannot be loaded.
    """
    return [
        Setting(name, *values, engine)
        for name in models
        for engine in engines
        for values in itertools.product(
            sizes or [default_short_side(name)], batches, precisions, modes if engine == "torch" else [ENGINE_MODE]
        )
    ]


def check_task_options(*, photos: bool, train: bool, data: bool, roofline_or_record: bool) -> None:
    """Raise `UserError` if options that exclude each other are given together.

    Args:
        photos, train, data: tell whether the option was given.
        roofline_or_record: tells whether at least one of these two options was given.
    """
    if (photos or train) and roofline_or_record:
        raise UserError("--photos, --train: not with --record or --roofline, which are of 480 x 640 images in inference")
    if (photos and train) or (data and not train):
        raise UserError("--photos are for inference, and --data is for --train, which needs instances to learn from")


def limit_photos(files: Sequence[Path]) -> tuple[Path, ...]:
    """Return the first `MAX_PHOTOS` files, and print a line if others are left out."""
    if len(files) > MAX_PHOTOS:
        print(f"the first {MAX_PHOTOS} of {len(files)} photos are used, because all are held in the device's memory")
    return tuple(files[:MAX_PHOTOS])


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Return the device's name, torch's version and, on a processor, the number of threads."""
    threads = {"threads": torch.get_num_threads()} if device.type == "cpu" else {}
    return {"device": device_name(str(device)), "torch": torch.__version__, **threads}


def measure_row(
    setting: Setting, task: Task, device: torch.device, *, warmup: int, repetitions: int, roofline: bool = False
) -> dict[str, Any]:
    """Measure one setting in a process of its own, and return its row of the table.

    Args:
        roofline: add the key `roofline`, see `roofline_bound`.

    Raises:
        UserError, DataError: the setting cannot be timed.
        RunFailed: the process was killed.
    """
    measured = measure_isolated(setting, task, device, warmup, repetitions)
    row = {
        **asdict(setting),
        **measured,
        "images_per_second": round(1000 * setting.batch / measured["whole_ms"]["mean"], 2),
        "input": measured["size"],
        "size": setting.size,
        "train": task.train,
        "photos": str(task.data) if task.data is not None else len(task.photos) or None,
    }
    if roofline:
        row["roofline"] = roofline_bound(setting, device, row["whole_ms"]["median"])
    return row


def roofline_bound(setting: Setting, device: torch.device, median_ms: float) -> dict[str, Any] | None:
    """Measure the device's peak rates, and return the lower bound of the network's time. None for a peer.

    The keys are `bytes` (memory traffic), `peak` (the measured rates per second), `bound_ms`, and `share` (the bound divided by
    the measured median).
    """
    if is_peer(setting.model):
        return None
    precision: Any = setting.precision
    cost, peak = count_network_cost(load_network(setting)[0], setting.batch), measure_peak(device, precision)
    bound = cost.bound_ms(peak, precision)
    return {
        "bytes": cost.traffic(precision),
        "peak": asdict(peak),
        "bound_ms": round(bound, 3),
        "share": round(bound / median_ms, 3),
    }


def compare_settings(pair: list[Setting], task: Task, device: torch.device, *, warmup: int, repetitions: int) -> dict[str, Any]:
    """Time two settings alternately, and return both with the fields of `Comparison`.

    Raises:
        UserError, DataError: the settings cannot be compared.
        RunFailed: a process was killed.
    """
    if pair[0].batch != pair[1].batch:
        raise UserError(
            f"--compare: the batches are {pair[0].batch} and {pair[1].batch}: a ratio needs as many images at once on both sides"
        )
    comparison = compare_isolated(pair, task, device, warmup, repetitions)
    return {"first": asdict(pair[0]), "second": asdict(pair[1]), **asdict(comparison)}
