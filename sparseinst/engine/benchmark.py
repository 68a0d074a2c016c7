"""Latency by the paper's protocol (section 4.3, Table 8): batch 1, synchronised, warm-up left out, forward and post-processing.

Decoding, normalisation and padding of the image are not timed.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

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


Mode = Literal["eager", "compiled"]


@torch.inference_mode()
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
    """Time a batch of one image through the model of a config.

    Args:
        model: one with trained weights; random ones serve, since all maps are computed whatever they show.
        mode: `compiled` compiles each module by itself; compilation is part of the warm-up.
    """
    torch.manual_seed(0)
    network = (model or build_model(config.model, load_pretrained=False)).to(device).to(memory_format=torch.channels_last).eval()
    if mode == "compiled":
        for part in (network.backbone, network.encoder, network.decoder):
            part.compile()
    size = short_side_size(*PHOTO, *config.inference.sides())
    height, width = (-(-side // SIZE_DIVISOR) * SIZE_DIVISOR for side in size)
    pixels = torch.randint(0, 256, (batch, 3, height, width), dtype=torch.uint8).to(device)
    image = network.normalise(pixels, [size] * batch).contiguous(memory_format=torch.channels_last)
    sizes = [ImageSize(size, PHOTO)] * batch
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
    return Latency(
        percentiles(whole),
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
    """A batch through all modules, each reported when it is done; the number of instances kept."""
    with autocast(image.device, inference.precision):
        features = model.backbone(image)
        passed("backbone")
        encoded = model.encoder(features)
        passed("encoder")
        predictions = model.decoder(encoded)
        passed("decoder")
    found = postprocess(predictions, padded, sizes, inference)
    passed("post")
    return sum(len(instances.scores) for instances in found)


def percentiles(seconds: Sequence[float]) -> dict[str, float]:
    """`median`, `p5` and `p95` in milliseconds."""
    p5, median, p95 = (round(1000 * float(value), 3) for value in np.percentile(seconds, (5, 50, 95)))
    return {"median": median, "p5": p5, "p95": p95}


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


@torch.inference_mode()
def measure_mask_rcnn(
    sides: tuple[int, int], *, device: torch.device, warmup: int = 5, repetitions: int = 20
) -> dict[str, float]:
    """torchvision's Mask R-CNN R-50-FPN on the same photo, for comparison: the whole path, its own resizing and pasting with it.

    Its 100 detections are all kept, as ours are.

    Args:
        sides: shorter side, and most pixels of the longer one.
    """
    from torchvision.models.detection import maskrcnn_resnet50_fpn

    torch.manual_seed(0)
    model: Any = maskrcnn_resnet50_fpn(
        weights=None, weights_backbone=None, min_size=sides[0], max_size=sides[1], box_score_thresh=0.0
    )
    model = model.to(device).eval()
    photo = torch.rand(3, *PHOTO, device=device)
    seconds = []
    with _plain_fp32():
        for number in range(warmup + repetitions):
            began = _now(device)
            model([photo])
            if number >= warmup:
                seconds.append(_now(device) - began)
    return percentiles(seconds)


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
