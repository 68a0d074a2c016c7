"""Compute convolutions and matrix products of half precision in float32, on processors without instructions for it.

There, torch falls back to loops that take ten times as long as float32. oneDNN does the same as this module where it can: it
multiplies bfloat16 numbers, adds the products in float32, and rounds the sums.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_aten = torch.ops.aten
_PRODUCTS = {
    *(_aten.convolution.default, _aten.convolution_backward.default),
    *(_aten.mm.default, _aten.addmm.default, _aten.bmm.default, _aten.baddbmm.default),
}


def has_instructions(device: torch.device, dtype: torch.dtype) -> bool:
    """Say whether this device multiplies numbers of this type at least as fast as float32."""
    if device.type != "cpu" or dtype not in _SUPPORT:
        return True
    return torch.backends.mkldnn.is_available() and bool(_SUPPORT[dtype]())


_SUPPORT: dict[torch.dtype, Callable[[], bool]] = {
    torch.bfloat16: lambda: torch.ops.mkldnn._is_mkldnn_bf16_supported(),
    torch.float16: lambda: torch.ops.mkldnn._is_mkldnn_fp16_supported(),
}


class InFloat32(TorchDispatchMode):
    """In this context, products of the type `half` get their factors in float32, and their results are rounded."""

    def __init__(self, half: torch.dtype) -> None:
        super().__init__()
        self.half = half

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func not in _PRODUCTS:
            return func(*args, **(kwargs or {}))
        half = self.half
        wide = [value.float() if isinstance(value, Tensor) and value.dtype == half else value for value in args]
        if all(value is before for value, before in zip(wide, args, strict=True)):
            return func(*args, **(kwargs or {}))
        results = func(*wide, **(kwargs or {}))
        if isinstance(results, Tensor):
            return results.to(half)
        return tuple(result.to(half) if result is not None else None for result in results)
