"""Make a trained model fast on its device, with the same outputs. `load_model(..., optimize=...)` uses this module.

Two layers are folded into one in two places. A frozen norm is a scale and a shift, so the preceding convolution takes it over.
The encoder's last 3x3 convolutions and the following 1x1 fusion have no activation between them, so they become one 3x3
convolution a level. docs/optimisations.md lists the gain of each step.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

from sparseinst.config import OptimizeMode, Precision
from sparseinst.device import DTYPES, fast_products, is_native, why_not_native
from sparseinst.errors import UserError
from sparseinst.inference.ahead import CannotCompile, compiled, has_compiler
from sparseinst.inference.export import Network
from sparseinst.inference.memory import keep_freed_memory
from sparseinst.inference.winograd import WinogradConv2d, compile_winograd
from sparseinst.machine import multiplies_bfloat16
from sparseinst.models.backbone import Backbone
from sparseinst.models.encoder import Encoder, resize
from sparseinst.models.network import Predictions
from sparseinst.models.norms import nearly_equal, norms_after_convolutions, probe_image
from sparseinst.models.sparseinst import SparseInst
from sparseinst.nested import nearest

_log = logging.getLogger(__name__)


class OptimizedSparseInst(SparseInst):
    """A copy of a model for inference only, made by `optimize`. It has the model's inputs and outputs.

    Outputs that are sensitive to rounding are float32, so that `postprocess` returns scores and masks of the usual types.
    """

    def __init__(self, model: SparseInst, precision: Precision, compile_with: dict[str, Any] | None) -> None:
        super().__init__(model.backbone, model.encoder, model.decoder)
        self.dtype, self._precision = DTYPES.get(precision, torch.float32), precision
        self._compile_with = compile_with
        self._compiled: Callable[[Tensor], Predictions] | None = None
        self._compiled_for: tuple[str, int] | None = None
        """The device and the number of threads that the compiled network is for."""

    def forward(self, images: Tensor) -> Predictions:
        images = images.to(self.dtype).contiguous(memory_format=torch.channels_last)
        with torch.autocast(images.device.type, enabled=False), fast_products(images.device, self._precision):
            place = (images.device.type, torch.get_num_threads())
            if self._compile_with is not None and self._compiled_for != place:
                self._compiled, self._compiled_for = self._compile(images.device), place
            if self._compiled is not None:
                try:
                    return self._compiled(images)
                except torch._dynamo.exc.TorchDynamoException as error:
                    _log.warning("torch.compile fails (%s); the model runs without it", str(error).strip().splitlines()[0])
                    self._compiled = self._compile_with = None
            return super().forward(images)

    def load_compiled(self) -> None:
        """Load what an earlier process has compiled for this CPU.

        Raises:
            CannotCompile: something is not there, and there is no compiler.
        """
        self._compiled, self._compiled_for = self._compile_ahead(), ("cpu", torch.get_num_threads())

    def _compile(self, device: torch.device) -> Callable[[Tensor], Predictions]:
        """Return the compiled network: on a CPU ahead of time if that is possible, otherwise by torch.compile."""
        if device.type == "cpu":
            try:
                return self._compile_ahead()
            except CannotCompile as error:
                if self._compiled is not None and not has_compiler():
                    _log.warning("%s; the library that was loaded before is used", error)
                    return self._compiled
                _log.warning("the network cannot be compiled ahead of time (%s), so every start compiles it", error)
        assert self._compile_with is not None
        return torch.compile(super().forward, **self._compile_with)

    def _compile_ahead(self) -> Callable[[Tensor], Predictions]:
        if any(isinstance(module, WinogradConv2d) for module in self.modules()):
            try:
                compile_winograd(self.dtype)
            except CannotCompile as error:
                if not has_compiler():
                    raise
                _log.warning("Winograd's convolutions cannot be compiled (%s), so they are slow; mode compiled is faster", error)
        random = torch.Generator().manual_seed(0)

        def images(*shape: int) -> tuple[Tensor]:
            return (torch.randn(shape, generator=random).to(self.dtype, memory_format=torch.channels_last),)

        network = Network(SparseInst(self.backbone, self.encoder, self.decoder)).eval()
        checks = [images(1, 3, 128, 96), images(3, 3, 192, 352)]
        run = compiled(network, images(2, 3, 256, 320), [[0, 2, 3]], checks, "the network")
        return lambda batch: Predictions(*run(batch))


@torch.no_grad()
def optimize(
    model: SparseInst, *, device: torch.device, mode: OptimizeMode = "best", precision: Precision = "fp32"
) -> OptimizedSparseInst:
    """Return a fast copy of a model, in evaluation mode on the device.

    With fp32 and tf32 the raw outputs differ by rounding only. With bf16 and fp16 the weights and features have that type. The
    maps are still normalised in float32, and the scores and masks are computed in float32.

    The first image compiles the model, which takes from seconds to a minute (minutes with `best`). On a CPU the compiled network
    serves all sizes and is kept on the disk, so that the next process only loads it. On a GPU the second image size compiles it
    again for all sizes. If the device or the machine lacks something, a warning says so and the step is left out. On a CPU the
    process keeps freed memory from then on (see `inference.memory`).

    Raises:
        UserError: the model is such a copy, or there is no such mode.
    """
    if mode not in (known := get_args(OptimizeMode)):
        raise UserError(f"optimisation {mode!r} is unknown: expected one of {', '.join(known)}{nearest(mode, known)}")
    if isinstance(model, OptimizedSparseInst):
        raise UserError("the model is optimised already: load it again to optimise it in another way")
    if device.type == "cpu":
        keep_freed_memory()
    options = _compile_options(device, mode)
    if not is_native(device, precision):
        _log.warning("%s%s", why_not_native(precision), "; nothing is compiled" if options is not None else "")
        options = None
    winograd = options is not None and mode == "best" and device.type == "cpu" and _winograd_pays(precision)
    if options is None or device.type != "cpu" or has_compiler():
        return _fast_copy(model, device, precision, options, winograd=winograd)
    for with_winograd in (True, False) if winograd else (False,):
        fast = _fast_copy(model, device, precision, options, winograd=with_winograd)
        try:
            fast.load_compiled()
        except CannotCompile as error:
            reason = error
        else:
            return fast
    _log.warning("%s; the model runs without torch.compile", reason)
    return _fast_copy(model, device, precision, None)


def _fast_copy(
    model: SparseInst, device: torch.device, precision: Precision, compile_with: dict[str, Any] | None, *, winograd: bool = False
) -> OptimizedSparseInst:
    """Return the copy, with Winograd's convolutions where they are faster if `winograd` is set."""
    fast = copy.deepcopy(model).to(device="cpu", dtype=torch.float32).eval()
    fold_norms(fast.backbone)
    if fast.encoder.fusion is not None:
        fast.encoder = MergedEncoder(fast.encoder)  # type: ignore[assignment] # has the same forward
    if winograd:
        _use_winograd(fast)
    fast = fast.requires_grad_(False).to(device=device, dtype=DTYPES.get(precision, torch.float32))
    fast.pixel_mean, fast.pixel_std = model.pixel_mean.to(device), model.pixel_std.to(device)
    optimized = OptimizedSparseInst(fast, precision, compile_with)
    optimized.pixel_mean, optimized.pixel_std = fast.pixel_mean, fast.pixel_std
    return optimized.to(memory_format=torch.channels_last).eval()


def _winograd_pays(precision: Precision) -> bool:
    """Return whether Winograd convolutions are correct and faster in a precision."""
    if precision == "fp16":  # its sums are up to 22 times as large as its inputs, so that fp16 may overflow
        return False
    # With AMX, a product of matrices takes so little time that the sums take longer than the saved products.
    return precision != "bf16" or not multiplies_bfloat16(matrices=True)


def _use_winograd(model: nn.Module) -> None:
    """Replace each convolution for which Winograd is faster, together with a ReLU that follows it in a `Sequential`."""
    for parent in list(model.modules()):
        for (name, child), (after, follower) in pairwise([*parent.named_children(), ("", None)]):
            if isinstance(child, nn.Conv2d) and WinogradConv2d.is_faster_for(child):
                relu = isinstance(parent, nn.Sequential) and isinstance(follower, nn.ReLU)
                setattr(parent, name, WinogradConv2d(child, relu=relu))
                if relu:
                    setattr(parent, after, nn.Identity())


def _compile_options(device: torch.device, mode: OptimizeMode) -> dict[str, Any] | None:
    """Return the arguments of torch.compile, or None if the model is not compiled."""
    if mode == "graph":
        if device.type == "cuda":
            return {"backend": "cudagraphs"}
        _log.warning("there are no CUDA graphs on %s; the model runs without them", device.type)
        return None
    if mode == "folded":
        return None
    options: dict[str, Any] = {"freezing": True}
    if mode == "best" and device.type == "cuda":
        options |= torch._inductor.list_mode_options("max-autotune")
    return {"options": options}


def fold_norms(backbone: Backbone) -> int:
    """Fold each frozen norm into the preceding convolution.

    If the outputs then differ by more than rounding, the backbone is restored and a warning says so.

    Returns:
        The number of folded norms.
    """
    before = copy.deepcopy(backbone.body)
    pairs = norms_after_convolutions(backbone)
    expected = backbone(probe_image())
    for parent, name, conv, norm in pairs:
        weight, bias = fuse_conv_bn_weights(
            conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
        )
        conv.weight, conv.bias = weight, bias
        setattr(parent, name, getattr(norm, "act", None) or nn.Identity())
    if not nearly_equal(backbone(probe_image()), expected):
        _log.warning("the backbone's norms cannot be folded without changing its outputs, so they stay")
        backbone.body = before
        return 0
    return len(pairs)


class MergedEncoder(nn.Module):
    """An encoder whose 3x3 output convolutions and 1x1 fusion are merged into one convolution a level.

    The levels are summed at 1/8 instead of concatenated.
    """

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        assert encoder.fusion is not None
        assert encoder.fusion.bias is not None
        parts = encoder.fusion.weight.double().flatten(1).chunk(len(encoder.outputs), dim=1)  # P3, P4, P5, each E E
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
