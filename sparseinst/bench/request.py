"""Measure what the command `bench` asks for, and return it as plain data for JSON."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from sparseinst.bench.benchmark import percentiles, ratio_of
from sparseinst.bench.engines import compare_engines, engine_settings
from sparseinst.bench.isolated import measure_isolated, race_isolated
from sparseinst.bench.roofline import count_network_cost, measure_peak
from sparseinst.bench.rows import ENGINE_MODE, Setting, Task, apply_changes, default_short_side, load_network
from sparseinst.errors import UserError
from sparseinst.integrations.peers import is_peer
from sparseinst.machine import device_name

MAX_PHOTOS = 64
"""All photos are in the device's memory at once, so their number is limited."""


@dataclass(frozen=True)
class Request:
    """What `bench` measures: every combination of the models and values below. None chooses the default of each case.

    Raises:
        UserError: options exclude each other.
    """

    device: torch.device
    models: Sequence[str] = ("r50-iam",)
    sizes: Sequence[int] | None = None
    """Lengths of the image's shorter side in pixels. None gives each model the size that it is meant for."""
    batches: Sequence[int] = (1,)
    precisions: Sequence[str] | None = None
    modes: Sequence[str] | None = None
    """Modes of torch; the other engines have one mode."""
    engines: Sequence[str] | None = None
    by_turns: bool = False
    """Time the engines by turns with the reference's path, and score each artifact."""
    compare: tuple[str, str] | None = None
    """Time two settings alternately; each text changes the first combination, see `apply_changes`."""
    train: bool = False
    photos: tuple[Path, ...] = ()
    data: Path | None = None
    images: int | None = None
    """With `by_turns`: evaluate only this many validation images."""
    roofline: bool = False
    record: bool = False
    warmup: int = 10
    repetitions: int = 50

    def __post_init__(self) -> None:
        if self.by_turns:
            if self.train or self.compare or self.roofline or self.record:
                raise UserError("--engines cannot be used with --train, --compare, --roofline or --record")
            return
        if self.images is not None:
            raise UserError("--images and --plot need --engines")
        if (self.photos or self.train) and (self.roofline or self.record):
            raise UserError(
                "--photos and --train cannot be used with --record or --roofline, which time inference on 480 x 640 images"
            )
        if (self.photos and self.train) or (self.data is not None and not self.train):
            raise UserError("--photos are for inference, and --data is for --train, which needs instances to learn from")
        if self.record and not all(map(is_peer, self.models)):
            raise UserError("--record is for peers only; `run` records the timings of our own models")
        if self.record and (self.compare or {*(self.engines or ()), *(self.precisions or ())} - {"torch", "fp32"}):
            raise UserError("--record keeps the time of a peer in torch and fp32: leave out --compare, --engine and --precision")

    @property
    def task(self) -> Task:
        return Task(self.train, self.photos, self.data, self.images)

    def settings(self) -> list[Setting]:
        """Return every combination of the values.

        Raises:
            UserError: a value is not valid, weights cannot be loaded, or a combination cannot do the task.
        """
        return [
            Setting(name, *values, engine)
            for name in self.models
            for engine in self.engines or ("torch",)
            for values in itertools.product(
                self.sizes or [default_short_side(name)],
                self.batches,
                self.precisions or ("fp32",),
                (self.modes or ("eager",)) if engine == "torch" else (ENGINE_MODE,),
            )
        ]


def measure_request(request: Request, keep: Callable[[dict[str, Any], str], None] | None = None) -> dict[str, Any]:
    """Measure what a request asks for.

    Args:
        keep: is called with each row and the device's name as soon as the row is measured.

    Returns:
        the machine, and `compare` or `rows`; with `by_turns` the rows of `compare_engines`.

    Raises:
        UserError, DataError: a setting cannot be timed.
        RunFailed: a process was killed.
    """
    found = describe_machine(request.device)
    if request.by_turns:
        return {**found, "rows": _measure_engines(request)}
    settings = request.settings()
    if request.compare is not None:
        settings = [apply_changes(settings[0], text, size_of_model=request.sizes is None) for text in request.compare]
    for setting in settings:
        request.task.check(setting)
    if request.compare is not None:
        return {**found, "compare": _compare_settings(settings, request)}
    found["rows"] = []
    for setting in settings:
        row = _measure_row(setting, request)
        found["rows"].append(row)
        if keep is not None:
            keep(row, found["device"])
    return found


def _measure_engines(request: Request) -> list[dict[str, Any]]:
    """Time and score the engines for each model, size and batch. An engine that is left out is named in a line."""
    rows: list[dict[str, Any]] = []
    for base in replace(request, engines=None, precisions=None, modes=None).settings():
        settings, missing = engine_settings(base, request.engines or ["all"], request.precisions, request.modes or ["eager"])
        for line in missing:
            print(line, file=sys.stderr)
        for setting in settings:
            request.task.check(setting)
        rows += compare_engines(settings, request.task, request.device, warmup=request.warmup, repetitions=request.repetitions)
    return rows


def limit_photos(files: Sequence[Path]) -> tuple[Path, ...]:
    """Return the first `MAX_PHOTOS` files, and print a line if others are left out."""
    if len(files) > MAX_PHOTOS:
        print(f"the first {MAX_PHOTOS} of {len(files)} photos are used, because all are held in the device's memory")
    return tuple(files[:MAX_PHOTOS])


def describe_machine(device: torch.device) -> dict[str, Any]:
    """Return the device's name, torch's version and, on a CPU, the number of threads."""
    threads = {"threads": torch.get_num_threads()} if device.type == "cpu" else {}
    return {"device": device_name(str(device)), "torch": torch.__version__, **threads}


def _measure_row(setting: Setting, request: Request) -> dict[str, Any]:
    """Measure one setting in a process of its own, and return its row of the table."""
    task = request.task
    measured = measure_isolated(setting, task, request.device, request.warmup, request.repetitions)
    row = {
        **asdict(setting),
        **measured,
        "images_per_second": round(1000 * setting.batch / measured["whole_ms"]["mean"], 2),
        "input": measured["size"],
        "size": setting.size,
        "train": task.train,
        "photos": str(task.data) if task.data is not None else len(task.photos) or None,
    }
    if request.roofline:
        row["roofline"] = roofline_bound(setting, request.device, row["whole_ms"]["median"])
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


def _compare_settings(pair: list[Setting], request: Request) -> dict[str, Any]:
    """Time two settings alternately, and return both with the fields of `Comparison`."""
    if pair[0].batch != pair[1].batch:
        raise UserError(
            f"--compare: the batches are {pair[0].batch} and {pair[1].batch}: a ratio needs the same batch size on both sides"
        )
    one, other = race_isolated(pair, request.task, request.device, request.warmup, request.repetitions, post=False)
    return {
        "first": asdict(pair[0]),
        "second": asdict(pair[1]),
        "first_ms": percentiles(one.seconds),
        "second_ms": percentiles(other.seconds),
        "ratio": ratio_of(one.seconds, other.seconds),
        "repetitions": len(one.seconds),
    }
