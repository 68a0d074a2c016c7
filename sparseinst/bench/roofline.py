"""Compute the roofline: a lower bound for the time of a network's forward pass on a device.

The bound follows from the arithmetic and the memory traffic of each operator, and from the measured peak rates of the device.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from sparseinst.bench.timed import PHOTO
from sparseinst.config import Config, Precision
from sparseinst.data.network_input import image_tiles, inference_size, padded_size
from sparseinst.device import DTYPES, autocast
from sparseinst.models.sparseinst import build_model


@dataclass(frozen=True)
class NetworkCost:
    """The cost of one forward pass of a batch, without post-processing."""

    operators: tuple[tuple[int, int], ...]
    """For each operator: its FLOPs (a multiply-add counts as two), and the number of elements that it reads or writes."""

    @property
    def flops(self) -> int:
        """The FLOPs of all operators, deformable convolutions included."""
        return sum(flops for flops, _ in self.operators)

    def traffic(self, precision: Precision) -> int:
        """Return the memory traffic in bytes, if each operator reads its inputs once and writes its output once."""
        return sum(elements for _, elements in self.operators) * DTYPES.get(precision, torch.float32).itemsize

    def bound_ms(self, peak: DevicePeak, precision: Precision) -> float:
        """Return the lower bound in milliseconds when operators run one after another.

        An operator takes the time of its arithmetic or of its traffic, whichever is longer. A device can stay below the bound if
        it fuses operators, or if its algorithms need fewer multiplications.
        """
        size = DTYPES.get(precision, torch.float32).itemsize
        return 1000 * sum(max(f / peak.flops, size * elements / peak.bytes) for f, elements in self.operators)


@dataclass(frozen=True)
class DevicePeak:
    """The measured peak rates of a device."""

    flops: float
    """FLOPs per second."""
    bytes: float
    """Bytes per second that are read or written."""


_FREE_OPERATORS = (torch.ops.aten._unsafe_view, torch.ops.aten.empty, torch.ops.aten.empty_like)


class _CostCounter(TorchDispatchMode):
    """Record the FLOPs and the elements of each operator that runs in this context."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: list[tuple[int, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if not (func.is_view or func._overloadpacket in _FREE_OPERATORS):
            formula = _FORMULAS.get(func._overloadpacket)
            flops = int(formula(*args, **(kwargs or {}), out_val=output)) if formula is not None else 0
            self.operators.append((flops, sum(map(_elements, (*args, output)))))
        return output


def _elements(value: Any) -> int:
    """Return the number of elements of a tensor, or of all tensors in a nested list or tuple."""
    if isinstance(value, torch.Tensor):
        return value.numel()
    return sum(map(_elements, value)) if isinstance(value, list | tuple) else 0


def _deformable_flops(_images: Any, weight: torch.Tensor, *_rest: Any, out_val: torch.Tensor, **_more: Any) -> int:
    """Return the FLOPs of the plain convolution of the same shape. The interpolation at the offsets is not counted, as usual."""
    batch, _, height, width = out_val.shape
    return 2 * batch * height * width * weight.numel()


_FORMULAS: dict[Any, Callable[..., int]] = {**flop_registry, torch.ops.torchvision.deform_conv2d: _deformable_flops}


@torch.no_grad()
def count_network_cost(config: Config, batch: int = 1) -> NetworkCost:
    """Return the cost of a forward pass of the config's model on photos of COCO's usual size."""
    network = build_model(config.model, load_pretrained=False).eval()
    height, width = padded_size([inference_size(image_tiles(PHOTO, config.inference)[0].size, config.inference)])
    counter = _CostCounter()
    with counter:
        network(torch.zeros(batch, 3, height, width))
    return NetworkCost(tuple(counter.operators))


def count_parameters(config: Config) -> int:
    """Return the number of parameters of the config's model."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in build_model(config.model, load_pretrained=False).parameters())


@torch.no_grad()
def measure_peak(device: torch.device, precision: Precision, side: int | None = None, repetitions: int = 7) -> DevicePeak:
    """Measure the peak rates of a device, with products of two square matrices and with copies of 256 MiB.

    Args:
        side: side length of the matrices. The default is large enough to keep the device busy.
        repetitions: number of products and of copies. The fastest of each counts.
    """
    side = side or (8192 if device.type == "cuda" else 2048)
    dtype = DTYPES.get(precision, torch.float32)
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    source = torch.empty(2**28 // 4, device=device)
    target = torch.empty_like(source)
    with autocast(device, precision):
        product_seconds = _fastest(lambda: torch.mm(a, b), device, repetitions)
    copy_seconds = _fastest(lambda: target.copy_(source), device, repetitions)
    return DevicePeak(2 * side**3 / product_seconds, 2 * source.numel() * 4 / copy_seconds)


def _fastest(work: Callable[[], Any], device: torch.device, repetitions: int) -> float:
    """Run the work several times, and return the shortest time in seconds."""
    seconds = []
    for _ in range(repetitions):
        began = synchronised_time(device)
        work()
        seconds.append(synchronised_time(device) - began)
    return min(seconds)


def synchronised_time(device: torch.device) -> float:
    """Wait until the device has finished all issued work, and return the time in seconds."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
