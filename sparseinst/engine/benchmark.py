"""Latency by the paper's protocol (section 4.3, Table 8): synchronised, warm-up left out, forward and post-processing.

Decoding, resizing, normalisation and padding of the image are not timed.
"""

from __future__ import annotations

import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from sparseinst.config import SIZE_DIVISOR, Config
from sparseinst.data.transforms import short_side_size
from sparseinst.engine import optimize as optimizing
from sparseinst.engine.device import autocast
from sparseinst.models.sparseinst import SparseInst, build_model
from sparseinst.paste import paste, paste_in_two_steps
from sparseinst.postprocess import ImageSize, postprocess

PHOTO = (480, 640)
"""Height and width of the image that is timed: those of most COCO photos."""
PHOTOS = 4
"""Different images that take turns, so that no cache holds the only one."""
MODULES = ("backbone", "encoder", "decoder", "post")

Mode = Literal["plain", "eager"] | optimizing.Mode
"""`plain`: as the reference runs, contiguous tensors and masks resized in two steps; `eager`: the model as it is, channels-last,
masks resized in one; the others: see `optimize`."""
Passed = Callable[[str], Any]


@dataclass(frozen=True)
class Timed:
    """Something to be timed."""

    run: Callable[[int, Passed], int]
    """Segments the n-th batch, tells which module is done, and gives how many instances were kept."""
    modules: tuple[str, ...]
    """What `run` tells; empty for what runs as one."""
    size: tuple[int, int] | None = None
    """Height and width of the padded input."""


@dataclass(frozen=True)
class Latency:
    whole_ms: dict[str, float]
    """`median`, `p5` and `p95` over the repetitions, one synchronisation each."""
    modules_ms: dict[str, float]
    """Medians, synchronised after each module, so that they sum to more than the whole; empty for what runs as one."""
    size: tuple[int, int] | None
    """Height and width of the padded input."""
    kept: int
    """Instances that post-processing resized: random weights keep every map, the slowest case."""
    repetitions: int
    drift: float = 1.0
    """Median of the last third of the repetitions over that of the first: well above 1 where the device was throttled."""
    peak_memory_mb: int | None = None
    """Of the GPU's memory; None on a processor."""
    clocks: str | None = None
    """What the GPU's driver says of clocks, temperature and throttling, before and after; None on a processor."""


def network_to_time(
    config: Config, *, device: torch.device, model: SparseInst | None = None, batch: int = 1, mode: Mode = "eager"
) -> Timed:
    """A model on random images of COCO's usual size.

    Args:
        model: one with trained weights; random ones serve, since all maps are computed whatever they show.
    """
    torch.manual_seed(0)
    network = (model or build_model(config.model, load_pretrained=False)).to(device).eval()
    inference = config.inference
    layout = torch.contiguous_format if mode == "plain" else torch.channels_last
    if mode not in ("plain", "eager"):
        network = optimizing.optimize(network, device=device, mode=cast(optimizing.Mode, mode), precision=inference.precision)
    network = network.to(memory_format=layout)
    resize = paste_in_two_steps if mode == "plain" else paste
    size = short_side_size(*PHOTO, *inference.sides())
    height, width = (-(-side // SIZE_DIVISOR) * SIZE_DIVISOR for side in size)
    pixels = torch.randint(0, 256, (PHOTOS, batch, 3, height, width), dtype=torch.uint8)
    images = [network.normalise(each.to(device), [size] * batch).contiguous(memory_format=layout) for each in pixels]
    sizes = [ImageSize(size, PHOTO)] * batch
    as_one = mode not in ("plain", "eager", "folded")

    def run(number: int, passed: Passed) -> int:
        image = images[number % PHOTOS]
        with autocast(device, inference.precision):
            predictions = network(image) if as_one else _by_modules(network, image, passed)
        found = postprocess(predictions, (height, width), sizes, inference, resize)
        passed("post")
        return sum(len(instances.scores) for instances in found)

    return Timed(run, () if as_one else MODULES, (height, width))


def _by_modules(network: SparseInst, image: Tensor, passed: Passed) -> Any:
    network_input = image.to(network.dtype) if isinstance(network, optimizing.OptimizedSparseInst) else image
    features = network.backbone(network_input)
    passed("backbone")
    encoded = network.encoder(features)
    passed("encoder")
    predictions = network.decoder(encoded)
    passed("decoder")
    return predictions


@torch.no_grad()
def measure(timed: Timed, *, device: torch.device, warmup: int = 10, repetitions: int = 50) -> Latency:
    """Time it: the unbroken whole, and then, by itself, each module."""
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
            marks = {"start": _now(device)}
            timed.run(number, lambda name: marks.update({name: _now(device)}))  # noqa: B023
            for earlier, name in zip(("start", *timed.modules), timed.modules, strict=False):
                parts[name].append(marks[name] - marks[earlier])
    after = gpu_clocks(device)
    third = max(1, repetitions // 3)
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


def measure_latency(
    config: Config,
    *,
    device: torch.device,
    warmup: int = 10,
    repetitions: int = 50,
    model: SparseInst | None = None,
    batch: int = 1,
    mode: Mode = "eager",
) -> Latency:
    """`measure` of `network_to_time`."""
    timed = network_to_time(config, device=device, model=model, batch=batch, mode=mode)
    return measure(timed, device=device, warmup=warmup, repetitions=repetitions)


@dataclass(frozen=True)
class Comparison:
    first_ms: dict[str, float]
    second_ms: dict[str, float]
    """`median`, `p5` and `p95` each."""
    ratio: dict[str, float]
    """First over second of each turn: `median`, `p5` and `p95`. Over 1: the second is faster."""


@torch.no_grad()
def compare(first: Timed, second: Timed, *, device: torch.device, warmup: int = 10, repetitions: int = 50) -> Comparison:
    """Time two things by turns, so that what else the machine does falls on both."""
    for number in range(warmup):
        for timed in (first, second):
            timed.run(number, lambda _: None)
    pairs = [tuple(_seconds(timed, number, device) for timed in (first, second)) for number in range(repetitions)]
    ratios = np.percentile([a / b for a, b in pairs], (50, 5, 95))
    return Comparison(
        percentiles([a for a, _ in pairs]),
        percentiles([b for _, b in pairs]),
        {name: round(float(value), 3) for name, value in zip(("median", "p5", "p95"), ratios, strict=True)},
    )


def _seconds(timed: Timed, number: int, device: torch.device) -> float:
    began = _now(device)
    timed.run(number, lambda _: None)
    return _now(device) - began


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def percentiles(seconds: Sequence[float]) -> dict[str, float]:
    """`median`, `p5` and `p95` in milliseconds."""
    median, p5, p95 = (round(1000 * float(value), 3) for value in np.percentile(seconds, (50, 5, 95)))
    return {"median": median, "p5": p5, "p95": p95}


def gpu_clocks(device: torch.device) -> str | None:
    """Clocks, temperature and active reasons for throttling, as nvidia-smi tells them; None without a GPU or without it."""
    command = shutil.which("nvidia-smi") if device.type == "cuda" else None
    if command is None:
        return None
    fields = "clocks.sm,clocks.mem,temperature.gpu,clocks_throttle_reasons.active"
    query = [command, f"--query-gpu={fields}", "--format=csv,noheader", f"--id={device.index or 0}"]
    asked = subprocess.run(query, capture_output=True, text=True, check=False)
    return asked.stdout.strip() if asked.returncode == 0 else None


@torch.inference_mode()
def count_flops(config: Config) -> int:
    """Multiply-adds times two of one image through the network, deformable convolutions with them; post-processing left out."""
    network = build_model(config.model, load_pretrained=False).eval()
    height, width = (-(-side // SIZE_DIVISOR) * SIZE_DIVISOR for side in short_side_size(*PHOTO, *config.inference.sides()))
    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.torchvision.deform_conv2d: _deformable_flops})
    with counter:
        network(torch.zeros(1, 3, height, width))
    return int(counter.get_total_flops())


def _deformable_flops(_images: Any, weight: Sequence[int], *_rest: Any, out_shape: Sequence[int], **_more: Any) -> int:
    """Those of the plain convolution of the same shape; the interpolation at the offsets is not counted, as is usual."""
    batch, _, height, width = out_shape
    return 2 * batch * height * width * int(np.prod(weight))


def count_parameters(config: Config) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in build_model(config.model, load_pretrained=False).parameters())


def peer_to_time(peer: Any, device: torch.device) -> Timed:
    """Another system (`integrations.peers.Peer`) on random photos of the same size, in float32 without TF32."""
    random = np.random.default_rng(0)
    photos: list[NDArray[np.uint8]] = [random.integers(0, 256, (*PHOTO, 3), dtype=np.uint8) for _ in range(PHOTOS)]
    inputs = [peer.prepare(photo) for photo in photos]

    def run(number: int, passed: Passed) -> int:
        with autocast(device, "fp32"):
            found = peer.segment(inputs[number % PHOTOS])
        passed("whole")
        return len(found.scores)

    return Timed(run, ())
