"""Translate the operators that torch's exporter does not know to ONNX."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torchvision  # noqa: F401 (registers its operators)


def translations(opset: int) -> dict[Callable[..., Any], Callable[..., Any]]:
    """Return the argument `custom_translation_table` of `torch.onnx.export` for this operator set, 19 or later."""
    import onnxscript

    operators: Any = getattr(onnxscript, f"opset{opset}")

    def deform_conv2d(
        x: Any, weight: Any, offset: Any, mask: Any, bias: Any,
        stride_h: int, stride_w: int, pad_h: int, pad_w: int, dilation_h: int, dilation_w: int,
        groups: int, offset_groups: int, use_mask: bool,
    ) -> Any:  # fmt: skip
        # Both operators order the offsets by kernel position and then y before x.
        return operators.DeformConv(
            x,
            weight,
            offset,
            bias,
            mask if use_mask else None,
            strides=[stride_h, stride_w],
            pads=[pad_h, pad_w, pad_h, pad_w],
            dilations=[dilation_h, dilation_w],
            group=groups,
            offset_group=offset_groups,
        )

    return {torch.ops.torchvision.deform_conv2d.default: deform_conv2d}
