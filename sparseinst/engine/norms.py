"""Frozen norms and the convolutions before them, which can do their work: a frozen norm is a scale and a shift.

`optimize` folds them for good; in training, `absorb_norms` multiplies the convolution's weights by the scale at each step, which
saves two passes over each feature map forward (on CUDA, where a bias is a pass of its own, one) and one backward. And in half
precision the maps stay in it, as in the reference, where timm's scale and shift in float32 make float32 of them: evaluation in
half precision still does so, and so do the norms after deformable convolutions.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sparseinst.models.backbone import Backbone
from sparseinst.models.layers import DeformableConv2d

_log = logging.getLogger(__name__)

_NORMS = ("running_mean", "running_var", "weight", "bias", "eps")


def probe() -> Tensor:
    """A small image to see a backbone at work."""
    return torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def alike(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> bool:
    """Whether two backbones' features differ by rounding alone."""
    pairs = zip(ours, theirs, strict=True)
    return all(torch.allclose(a, b, rtol=1e-3, atol=1e-3 * float(b.abs().max())) for a, b in pairs)


def norms_after_convolutions(backbone: Backbone) -> list[tuple[nn.Module, str, Any, Any]]:
    """Norms that take just what a convolution gave, seen by watching an image pass: (parent, name, convolution, norm)."""
    made: list[tuple[Tensor, nn.Module]] = []
    found: dict[nn.Module, nn.Module] = {}

    def after_conv(module: nn.Module, _inputs: Any, output: Tensor) -> None:
        made.append((output, module))

    def before_norm(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        for output, conv in made:
            if output is inputs[0]:
                found[module] = conv

    with _hooks(backbone, after_conv, before_norm):
        backbone(probe())
    places = {child: (parent, name) for parent in backbone.modules() for name, child in parent.named_children()}
    return [(*places[norm], conv, norm) for norm, conv in found.items()]


@contextmanager
def _hooks(backbone: Backbone, after_conv: Any, before_norm: Any) -> Iterator[None]:
    handles = []
    for module in backbone.modules():
        if isinstance(module, nn.Conv2d | DeformableConv2d):
            handles.append(module.register_forward_hook(after_conv))
        elif all(hasattr(module, name) for name in _NORMS):
            handles.append(module.register_forward_pre_hook(before_norm))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def absorb_norms(backbone: Backbone) -> int:
    """Let convolutions do the work of the frozen norms after them, while they train; how many do.

    Nothing else changes: parameters and buffers keep their names and values, and in evaluation mode each module works as before.
    Outputs differ by rounding. Should they differ by more, all stays as it was, with a warning.
    """
    if not _frozen_norms(backbone):
        return 0
    before = copy.deepcopy(backbone.body)
    was_training = backbone.training
    try:
        found = norms_after_convolutions(backbone.eval())
        expected = backbone(probe())
    except RuntimeError as error:  # a backbone for images of other sizes alone
        _log.warning("the backbone's norms stay as they are (%s): training is slower", str(error).splitlines()[0])
        backbone.train(was_training)
        return 0
    frozen = _frozen_norms(backbone)
    pairs = [(conv, norm) for _, _, conv, norm in found if type(conv) is nn.Conv2d and norm in frozen]
    for conv, norm in pairs:
        conv.__class__, conv.__dict__["absorbed"] = _AbsorbingConv2d, (norm,)
        norm.__class__ = type(f"Absorbed{type(norm).__name__}", (_Absorbed, type(norm)), {})
        conv.training = norm.training = True
    if not alike(backbone(probe()), expected):
        _log.warning("the backbone's convolutions cannot absorb its norms: training is slower")
        backbone.body, pairs = before, []
    backbone.train(was_training)
    return len(pairs)


def keep_types(backbone: Backbone) -> None:
    """Let frozen norms work in their input's type while they train, as the reference's do: what is timed as `plain`."""
    for norm in _frozen_norms(backbone):
        norm.__class__ = type(f"Plain{type(norm).__name__}", (_InItsType, type(norm)), {})


def _frozen_norms(backbone: Backbone) -> list[Any]:
    norms = (module for module in backbone.modules() if all(hasattr(module, name) for name in _NORMS))
    return [norm for norm in norms if not any(True for _ in norm.parameters())]


class _AbsorbingConv2d(nn.Conv2d):
    absorbed: tuple[Any]
    """The norm; in a tuple, or it would be a part of this module too."""

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        scale, shift = _affine(self.absorbed[0])
        if self.bias is not None:
            shift = shift + self.bias * scale
        return self._conv_forward(input, self.weight * scale[:, None, None, None], shift)


class _Absorbed(nn.Module):
    """A norm of which the activation is left, where it has one."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            whole: Tensor = super().forward(x)
            return whole
        return _activated(self, x)


class _InItsType(nn.Module):
    """A frozen norm that does not make float32 of half precision."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            whole: Tensor = super().forward(x)
            return whole
        scale, shift = (factor.to(x.dtype)[:, None, None] for factor in _affine(self))
        return _activated(self, x * scale + shift)


def _affine(norm: Any) -> tuple[Tensor, Tensor]:
    scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
    return scale, norm.bias - norm.running_mean * scale


def _activated(norm: Any, x: Tensor) -> Tensor:
    activated: Tensor = norm.act(norm.drop(x)) if hasattr(norm, "act") else x
    return activated
