"""Fold frozen BatchNorm into the preceding convolution. A frozen norm is a scale and a shift.

`optimize` folds the norms permanently. In training, `absorb_norms` multiplies the convolution's weights by the scale at each
step. For each feature map this saves two passes forward (one on CUDA, where a bias needs its own pass) and one pass backward.

With half precision the feature maps then stay in half precision, as in the reference. timm's scale and shift are float32 and turn
the maps into float32. That still happens in evaluation, and for norms after deformable convolutions.
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

_NORM_ATTRIBUTES = ("running_mean", "running_var", "weight", "bias", "eps")


def probe_image() -> Tensor:
    """Return a small random image, on which a backbone's outputs are compared before and after a change."""
    return torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def nearly_equal(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> bool:
    """Return whether two backbones' features differ by rounding only."""
    pairs = zip(ours, theirs, strict=True)
    return all(torch.allclose(a, b, rtol=1e-3, atol=1e-3 * float(b.abs().max())) for a, b in pairs)


def norms_after_convolutions(backbone: Backbone) -> list[tuple[nn.Module, str, Any, Any]]:
    """Return each norm whose input is a convolution's output as (parent, name, convolution, norm).

    The pairs are observed while an image passes through the backbone.
    """
    made: list[tuple[Tensor, nn.Module]] = []
    found: dict[nn.Module, nn.Module] = {}

    def after_conv(module: nn.Module, _inputs: Any, output: Tensor) -> None:
        made.append((output, module))

    def before_norm(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        for output, conv in made:
            if output is inputs[0]:
                found[module] = conv

    with _hooks(backbone, after_conv, before_norm):
        backbone(probe_image())
    places = {child: (parent, name) for parent in backbone.modules() for name, child in parent.named_children()}
    return [(*places[norm], conv, norm) for norm, conv in found.items()]


@contextmanager
def _hooks(backbone: Backbone, after_conv: Any, before_norm: Any) -> Iterator[None]:
    """Register the hooks on all convolutions and norms while the block runs."""
    handles = []
    for module in backbone.modules():
        if isinstance(module, nn.Conv2d | DeformableConv2d):
            handles.append(module.register_forward_hook(after_conv))
        elif all(hasattr(module, name) for name in _NORM_ATTRIBUTES):
            handles.append(module.register_forward_pre_hook(before_norm))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def absorb_norms(backbone: Backbone) -> int:
    """Let convolutions do the work of the following frozen norms during training.

    Parameters and buffers keep their names and values, and in evaluation mode each module works as before. Outputs differ by
    rounding. If they differ by more, or if the backbone cannot take a small image, nothing changes and a warning says so.

    Returns:
        The number of norms whose work a convolution does.
    """
    if not frozen_norms(backbone):
        return 0
    before = copy.deepcopy(backbone.body)
    was_training = backbone.training
    try:
        found = norms_after_convolutions(backbone.eval())
        expected = backbone(probe_image())
    except RuntimeError as error:  # the backbone takes only images of other sizes
        _log.warning(
            "the backbone's convolutions do not absorb its norms (%s), so training is slower", str(error).splitlines()[0]
        )
        backbone.train(was_training)
        return 0
    frozen = frozen_norms(backbone)
    pairs = [(conv, norm) for _, _, conv, norm in found if type(conv) is nn.Conv2d and norm in frozen]
    for conv, norm in pairs:
        conv.__class__, conv.__dict__["absorbed"] = _AbsorbingConv2d, (norm,)
        norm.__class__ = type(f"Absorbed{type(norm).__name__}", (_AbsorbedNorm, type(norm)), {})
        conv.training = norm.training = True
    if not nearly_equal(backbone(probe_image()), expected):
        _log.warning("the backbone's convolutions cannot absorb its norms, so training is slower")
        backbone.body, pairs = before, []
    backbone.train(was_training)
    return len(pairs)


def frozen_norms(backbone: Backbone) -> list[Any]:
    """Return the norms without parameters."""
    norms = (module for module in backbone.modules() if all(hasattr(module, name) for name in _NORM_ATTRIBUTES))
    return [norm for norm in norms if not any(True for _ in norm.parameters())]


class _AbsorbingConv2d(nn.Conv2d):
    """A convolution that in training also applies the scale and the shift of the following norm."""

    absorbed: tuple[Any]
    """The norm. It is in a tuple, because as an attribute it would become a submodule."""

    def forward(self, input: Tensor) -> Tensor:
        if not self.training:
            return super().forward(input)
        scale, shift = affine(self.absorbed[0])
        if self.bias is not None:
            shift = shift + self.bias * scale
        return self._conv_forward(input, self.weight * scale[:, None, None, None], shift)


class _AbsorbedNorm(nn.Module):
    """A norm that in training applies only its activation, if it has one."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            whole: Tensor = super().forward(x)
            return whole
        return activated(self, x)


def affine(norm: Any) -> tuple[Tensor, Tensor]:
    """Return the scale and the shift of a frozen norm."""
    scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
    return scale, norm.bias - norm.running_mean * scale


def activated(norm: Any, x: Tensor) -> Tensor:
    """Apply the norm's activation, if it has one."""
    result: Tensor = norm.act(norm.drop(x)) if hasattr(norm, "act") else x
    return result
