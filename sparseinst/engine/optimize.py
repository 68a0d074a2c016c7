"""Make a trained model fast on its device, with the same outputs: what `load_model(..., optimize=...)` does.

Folded: a frozen norm is a scale and a shift, which the convolution before it takes over; the encoder's last 3x3 convolutions and
the 1x1 fusion after them have no activation between them, so they are one 3x3 convolution each. What that gains, measured one by
one, stands in docs/performance.md.
"""

from __future__ import annotations

import copy
import logging
import shutil
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from sparseinst.config import Precision
from sparseinst.engine.device import DTYPES
from sparseinst.engine.memory import keep_freed_memory
from sparseinst.engine.norms import alike, norms_after_convolutions, probe
from sparseinst.engine.winograd import WinogradConv2d
from sparseinst.models.backbone import Backbone
from sparseinst.models.decoder import Predictions
from sparseinst.models.encoder import Encoder, resize
from sparseinst.models.sparseinst import SparseInst

_log = logging.getLogger(__name__)

Mode = Literal["folded", "compiled", "graph", "best"]
"""`folded`: channels-last, in its precision; `compiled`: by torch.compile as well, with the weights frozen; `graph`: as a CUDA
graph instead, one a size; `best`: what is fastest, and takes minutes to compile: on a GPU with tuned kernels and CUDA graphs,
for images of one size; on a processor with Winograd's convolutions, but in fp16."""


class OptimizedSparseInst(SparseInst):
    """A copy of a model for inference alone. Made by `optimize`; takes and gives what the model does.

    Outputs are float32 where the losses of precision are: scores and masks leave `postprocess` as from the model itself.
    """

    def __init__(self, model: SparseInst, precision: Precision, compile_with: dict[str, Any] | None) -> None:
        super().__init__(model.backbone, model.encoder, model.decoder)
        self.dtype = DTYPES.get(precision, torch.float32)
        self._compiled: Callable[[Tensor], Predictions] | None = None
        if compile_with is not None:
            self._compiled = torch.compile(super().forward, **compile_with)

    def forward(self, images: Tensor) -> Predictions:
        images = images.to(self.dtype, memory_format=torch.channels_last)
        with torch.autocast(images.device.type, enabled=False):
            if self._compiled is not None:
                try:
                    return self._compiled(images)
                except torch._dynamo.exc.TorchDynamoException as error:
                    _log.warning("torch.compile fails (%s): going on without it", str(error).strip().splitlines()[0])
                    self._compiled = None
            return super().forward(images)


@torch.no_grad()
def optimize(
    model: SparseInst, *, device: torch.device, mode: Mode = "best", precision: Precision = "fp32"
) -> OptimizedSparseInst:
    """A fast copy of a model, in evaluation mode on the device.

    With fp32 and tf32 its raw outputs differ by rounding alone. In bf16 and fp16 weights and features have that type; maps are
    normalised, and scores and masks computed, in float32.

    Compiling takes from seconds to a minute at the first image (with `best`, minutes), and again at the second size; from then on
    one version serves all sizes. What the device or the machine lacks is left out, with a warning. On a processor the process
    keeps freed memory from then on (`engine.memory`).
    """
    if device.type == "cpu":
        keep_freed_memory()
    fast = copy.deepcopy(model).to(device="cpu", dtype=torch.float32).eval()
    fold_norms(fast.backbone)
    if fast.encoder.fusion is not None:
        fast.encoder = MergedEncoder(fast.encoder)  # type: ignore[assignment] # called alike
    options = _compile_options(device, mode)
    # Winograd's sums are up to 22 times as large as what they are of, which float16 may not hold.
    if options is not None and mode == "best" and device.type == "cpu" and precision != "fp16":
        _use_winograd(fast)
    fast = fast.requires_grad_(False).to(device=device, dtype=DTYPES.get(precision, torch.float32))
    fast.pixel_mean, fast.pixel_std = model.pixel_mean.to(device), model.pixel_std.to(device)
    optimized = OptimizedSparseInst(fast, precision, options)
    optimized.pixel_mean, optimized.pixel_std = fast.pixel_mean, fast.pixel_std
    return optimized.to(memory_format=torch.channels_last).eval()


def _use_winograd(model: nn.Module) -> None:
    """In place of each convolution that it pays for, and of the ReLU after it in a sequence."""
    for parent in list(model.modules()):
        for (name, child), (after, follower) in pairwise([*parent.named_children(), ("", None)]):
            if isinstance(child, nn.Conv2d) and WinogradConv2d.pays_for(child):
                relu = isinstance(parent, nn.Sequential) and isinstance(follower, nn.ReLU)
                setattr(parent, name, WinogradConv2d(child, relu=relu))
                if relu:
                    setattr(parent, after, nn.Identity())


def _compile_options(device: torch.device, mode: Mode) -> dict[str, Any] | None:
    """Arguments of torch.compile; None for none."""
    if mode == "graph":
        if device.type == "cuda":
            return {"backend": "cudagraphs"}
        _log.warning("there are no CUDA graphs on %s: going on without", device.type)
        return None
    if mode == "folded":
        return None
    if device.type == "cpu" and not any(map(shutil.which, ("g++", "clang++", "c++"))):
        _log.warning("torch.compile needs a C++ compiler on this machine (g++, say): going on without it")
        return None
    options: dict[str, Any] = {"freezing": True}
    if mode == "best" and device.type == "cuda":
        options |= torch._inductor.list_mode_options("max-autotune")
    return {"options": options}


def fold_norms(backbone: Backbone) -> int:
    """Work each frozen norm into the convolution before it; how many there were.

    Should the outputs differ afterwards by more than rounding, the norms stay, with a warning.
    """
    before = copy.deepcopy(backbone.body)
    pairs = norms_after_convolutions(backbone)
    expected = backbone(probe())
    for parent, name, conv, norm in pairs:
        weight, bias = fuse_conv_bn_weights(
            conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
        )
        conv.weight, conv.bias = weight, bias
        setattr(parent, name, getattr(norm, "act", None) or nn.Identity())
    if not alike(backbone(probe()), expected):
        _log.warning("the backbone's norms cannot be folded: they stay")
        backbone.body = before
        return 0
    return len(pairs)


class MergedEncoder(nn.Module):
    """An encoder whose 3x3 outputs and 1x1 fusion are one convolution a level; summed at 1/8 instead of concatenated."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        assert encoder.fusion is not None
        assert encoder.fusion.bias is not None
        parts = encoder.fusion.weight.double().flatten(1).chunk(len(encoder.outputs), dim=1)  # of P3, P4, P5: E E
        for index, output in enumerate(encoder.outputs):  # P5, P4, P3
            assert isinstance(output, nn.Conv2d)
            assert output.bias is not None
            weight, bias = parts[-1 - index], output.bias.double()
            bias = weight @ bias + (encoder.fusion.bias.double() if index == 0 else 0)
            output.weight = nn.Parameter(torch.einsum("oe,eikl->oikl", weight, output.weight.double()).float())
            output.bias = nn.Parameter(bias.float())
        encoder.fusion = None
        self.encoder = encoder

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        levels = zip(self.encoder.outputs, self.encoder.top_down(features), strict=True)
        *deeper, finest = [output(level) for output, level in levels]  # P5, P4, P3
        return finest + sum(resize(level, finest.shape[-2:]) for level in deeper)  # B E H W
