"""How soon a network could be done on a device: its arithmetic and memory traffic, and what the device can do of each."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from sparseinst.config import Config, Precision
from sparseinst.data.transforms import short_side_size
from sparseinst.engine.device import DTYPES, autocast
from sparseinst.engine.timed import PHOTO, padded_size
from sparseinst.models.sparseinst import build_model


@dataclass(frozen=True)
class Work:
    """Of a batch through the network, operator by operator; post-processing is left out."""

    operators: tuple[tuple[int, int], ...]
    """FLOPs (two a multiply-add, deformable convolutions with them) and elements that are read or written, of each."""

    @property
    def flops(self) -> int:
        return sum(flops for flops, _ in self.operators)

    def traffic(self, precision: Precision) -> int:
        """Bytes, where each operator reads its inputs and writes its output once."""
        return sum(elements for _, elements in self.operators) * DTYPES.get(precision, torch.float32).itemsize

    def bound_ms(self, peak: Peak, precision: Precision) -> float:
        """No sooner can a device be done that does one operator after the other: each takes the longer of its arithmetic and
        its traffic. What fuses operators, or multiplies less, can be below."""
        size = DTYPES.get(precision, torch.float32).itemsize
        return 1000 * sum(max(f / peak.flops, size * elements / peak.bytes) for f, elements in self.operators)


@dataclass(frozen=True)
class Peak:
    """What a device does in a second, as measured."""

    flops: float
    bytes: float


_NO_WORK = (torch.ops.aten._unsafe_view, torch.ops.aten.empty, torch.ops.aten.empty_like)


class _Count(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.operators: list[tuple[int, int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if not (func.is_view or func._overloadpacket in _NO_WORK):
            formula = _FORMULAS.get(func._overloadpacket)
            flops = int(formula(*args, **(kwargs or {}), out_val=output)) if formula is not None else 0
            self.operators.append((flops, sum(map(_elements, (*args, output)))))
        return output


def _elements(value: Any) -> int:
    if isinstance(value, torch.Tensor):
        return value.numel()
    return sum(map(_elements, value)) if isinstance(value, list | tuple) else 0


def _deformable_flops(_images: Any, weight: torch.Tensor, *_rest: Any, out_val: torch.Tensor, **_more: Any) -> int:
    """Those of the plain convolution of the same shape; the interpolation at the offsets is not counted, as is usual."""
    batch, _, height, width = out_val.shape
    return 2 * batch * height * width * weight.numel()


_FORMULAS: dict[Any, Callable[..., int]] = {**flop_registry, torch.ops.torchvision.deform_conv2d: _deformable_flops}


@torch.no_grad()
def count_work(config: Config, batch: int = 1) -> Work:
    """Of photos of COCO's usual size."""
    network = build_model(config.model, load_pretrained=False).eval()
    height, width = padded_size([short_side_size(*PHOTO, *config.inference.sides())])
    counting = _Count()
    with counting:
        network(torch.zeros(batch, 3, height, width))
    return Work(tuple(counting.operators))


def count_parameters(config: Config) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in build_model(config.model, load_pretrained=False).parameters())


@torch.no_grad()
def measure_peak(device: torch.device, precision: Precision, side: int | None = None, repetitions: int = 7) -> Peak:
    """The fastest of some products of two square matrices, and of some copies of 256 MiB.

    Args:
        side: of the matrices; by default large enough to keep the device busy.
    """
    side = side or (8192 if device.type == "cuda" else 2048)
    dtype = DTYPES.get(precision, torch.float32)
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    source = torch.empty(2**28 // 4, device=device)
    target = torch.empty_like(source)
    with autocast(device, precision):
        product = min(_times(lambda: torch.mm(a, b), device, repetitions))
    copy = min(_times(lambda: target.copy_(source), device, repetitions))
    return Peak(2 * side**3 / product, 2 * source.numel() * 4 / copy)


def _times(work: Callable[[], Any], device: torch.device, repetitions: int) -> Sequence[float]:
    found = []
    for _ in range(repetitions):
        began = now(device)
        work()
        found.append(now(device) - began)
    return found


def now(device: torch.device) -> float:
    """Seconds, once the device has done all that was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
