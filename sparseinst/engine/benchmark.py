"""Latency by the paper's protocol (section 4.3, Table 8): batch 1, synchronised, warm-up left out, forward and post-processing.

Decoding, normalisation and padding of the image are not timed.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparseinst.config import SIZE_DIVISOR, Config, InferenceConfig
from sparseinst.data.transforms import short_side_size
from sparseinst.engine.device import autocast
from sparseinst.models.sparseinst import SparseInst, build_model
from sparseinst.postprocess import ImageSize, postprocess

PHOTO = (480, 640)
"""Height and width of the image that is timed: those of most COCO photos."""
MODULES = ("backbone", "encoder", "decoder", "post")


@dataclass(frozen=True)
class Latency:
    whole_ms: dict[str, float]
    """`median`, `p5` and `p95` over the repetitions, one synchronisation each."""
    modules_ms: dict[str, float]
    """Medians, synchronised after each module, so that they sum to more than the whole."""
    size: tuple[int, int]
    """Height and width of the padded input."""
    kept: int
    """Instances that post-processing resized: random weights keep every map, the slowest case."""
    repetitions: int


@torch.inference_mode()
def measure_latency(
    config: Config, *, device: torch.device, warmup: int = 10, repetitions: int = 50, model: SparseInst | None = None
) -> Latency:
    """Time one image through the model of a config.

    Args:
        model: one with trained weights; random ones serve, since all maps are computed whatever they show.
    """
    torch.manual_seed(0)
    network = (model or build_model(config.model, load_pretrained=False)).to(device).to(memory_format=torch.channels_last).eval()
    size = short_side_size(*PHOTO, *config.inference.sides())
    height, width = (-(-side // SIZE_DIVISOR) * SIZE_DIVISOR for side in size)
    pixels = torch.randint(0, 256, (1, 3, height, width), dtype=torch.uint8).to(device)
    image = network.normalise(pixels, [size]).contiguous(memory_format=torch.channels_last)
    sizes = [ImageSize(size, PHOTO)]
    with _plain_fp32():
        parts: dict[str, list[float]] = {name: [] for name in MODULES}
        whole = []
        for number in range(warmup + repetitions):
            began = _now(device)
            kept = _forward(network, image, (height, width), sizes, config.inference, lambda _: None)
            total = _now(device) - began
            marks = {"start": _now(device)}
            _forward(network, image, (height, width), sizes, config.inference, lambda name: marks.update({name: _now(device)}))  # noqa: B023
            if number >= warmup:
                whole.append(total)
                for before, name in zip(("start", *MODULES), MODULES, strict=False):
                    parts[name].append(marks[name] - marks[before])
    p5, median, p95 = (float(value) for value in np.percentile(whole, (5, 50, 95)))
    figures = {"median": median, "p5": p5, "p95": p95}
    return Latency(
        {name: round(1000 * value, 3) for name, value in figures.items()},
        {name: round(1000 * statistics.median(values), 3) for name, values in parts.items()},
        (height, width),
        kept,
        repetitions,
    )


def _forward(
    model: SparseInst,
    image: Tensor,
    padded: tuple[int, int],
    sizes: list[ImageSize],
    inference: InferenceConfig,
    passed: Callable[[str], Any],
) -> int:
    """One image through all modules, each reported when it is done; the number of instances kept."""
    with autocast(image.device, inference.precision):
        features = model.backbone(image)
        passed("backbone")
        encoded = model.encoder(features)
        passed("encoder")
        predictions = model.decoder(encoded)
        passed("decoder")
    [found] = postprocess(predictions, padded, sizes, inference)
    passed("post")
    return len(found.scores)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


@contextmanager
def _plain_fp32() -> Iterator[None]:
    """Without TF32, as the paper's figures are."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before
