"""Implement the steps that we optimise as the reference does. `bench` times them, and tests compare our results with theirs.

The timing mode `plain` uses them in inference and in training (see `bench.modes`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparseinst.models.backbone import Backbone
from sparseinst.models.norms import activated, affine, frozen_norms
from sparseinst.paste import ImageSize, paste
from sparseinst.training.step import Step


def paste_in_two_steps(masks: Tensor, padded: tuple[int, int], size: ImageSize, threshold: float) -> Tensor:
    """Return the masks of `paste` by the reference's two calls of `interpolate`."""
    if not len(masks):
        return paste(masks, padded, size, threshold)
    whole = F.interpolate(masks[None], size=padded, mode="bilinear", align_corners=False)
    image = whole[:, :, : size.resized[0], : size.resized[1]]
    return F.interpolate(image, size=size.original, mode="bilinear", align_corners=False)[0] > threshold


class ReferenceStep(Step):
    """A step as the reference trains: contiguous tensors, frozen norms as layers of their own, torch's default AdamW."""

    memory_format = torch.contiguous_format

    def _prepare_frozen_norms(self, backbone: Backbone) -> None:
        keep_input_types(backbone)

    def _make_optimizer(self, groups: Sequence[dict[str, Any]]) -> torch.optim.AdamW:
        return torch.optim.AdamW(groups)


def keep_input_types(backbone: Backbone) -> None:
    """Let frozen norms keep their input's type in training, as the reference's norms do, also in half precision."""
    for norm in frozen_norms(backbone):
        norm.__class__ = type(f"TypeKeeping{type(norm).__name__}", (_TypeKeepingNorm, type(norm)), {})


class _TypeKeepingNorm(nn.Module):
    """A frozen norm whose output in training has its input's type."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            whole: Tensor = super().forward(x)
            return whole
        scale, shift = (factor.to(x.dtype)[:, None, None] for factor in affine(self))
        return activated(self, x * scale + shift)
