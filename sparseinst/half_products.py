"""Compute convolutions and matrix products of half precision in float32, where torch has no fast ones.

On a CPU that oneDNN has no bfloat16 for, torch's own loops take ten times as long as float32. Where oneDNN has it, it does the
same as this module: it multiplies bfloat16 numbers, adds the products in float32, and rounds the sums. Fused attention and
products of a matrix and a vector stay as they are, because torch's own ones take only about twice as long.
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


def torch_is_fast(device: torch.device, dtype: torch.dtype) -> bool:
    """Say whether torch's own products of this type are fast on this device. On a CPU, this is so if oneDNN has them.

    oneDNN has bfloat16 on every CPU with AVX-512, and `machine.multiplies_bfloat16` is false for some of them.
    """
    if device.type != "cpu" or dtype not in _ONEDNN_HAS:
        return True
    return torch.backends.mkldnn.is_available() and bool(_ONEDNN_HAS[dtype]())


_ONEDNN_HAS: dict[torch.dtype, Callable[[], bool]] = {
    torch.bfloat16: lambda: torch.ops.mkldnn._is_mkldnn_bf16_supported(),
    torch.float16: lambda: torch.ops.mkldnn._is_mkldnn_fp16_supported(),
}


class InFloat32(TorchDispatchMode):
    """In this context, products of the type `half` get their factors in float32, and their results are rounded.

    torch.compile compiles nothing in it, and gives no warning; torch.export exports the products unchanged.
    """

    def __init__(self, half: torch.dtype) -> None:
        super().__init__()
        self.half = half

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func not in _PRODUCTS:
            return self._parts(func, args, kwargs) if torch.is_inference_mode_enabled() else func(*args, **kwargs)
        # Factors of different types are an error, which torch raises.
        if any(value.dtype != self.half for value in args if isinstance(value, Tensor)):
            return func(*args, **kwargs)
        results = func(*(value.float() if isinstance(value, Tensor) else value for value in args), **kwargs)
        if isinstance(results, Tensor):
            return results.to(self.half)
        return tuple(result.to(self.half) if result is not None else None for result in results)

    def _parts(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Compute an operator by its parts, which may be products. Only in inference mode, torch does not split it before."""
        with self:
            result = func.decompose(*args, **kwargs)
        return func(*args, **kwargs) if result is NotImplemented else result
