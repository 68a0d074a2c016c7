"""Export a model with its pre- and post-processing as one graph, to ONNX or torch.export.

The graph takes one image of any size and returns scored masks. ONNX needs the extra `export`.
"""

from __future__ import annotations

import copy
import io
import warnings
from pathlib import Path
from typing import Any, Literal

import torch
from timm.layers import Conv2dSame  # type: ignore[attr-defined]
from torch import Tensor, nn

from sparseinst.config import SIZE_DIVISOR, InferenceConfig
from sparseinst.engines.artifact_files import GRAPH, OPSET
from sparseinst.engines.base import INPUT
from sparseinst.engines.base import OUTPUTS as NETWORK_OUTPUTS
from sparseinst.errors import UserError
from sparseinst.files import atomic, check_writable
from sparseinst.inference.onnx_operators import translations
from sparseinst.models.decoder import Coordinates
from sparseinst.models.encoder import resize
from sparseinst.models.layers import DeformableConv2d
from sparseinst.models.network import Predictions
from sparseinst.models.sparseinst import SparseInst
from sparseinst.postprocess import class_scores, maskness
from sparseinst.words import install_extra

_EXAMPLE_SIZE = (250, 330)
"""Height and width of the exporters' example image. They are no multiples of 32, so that the graph contains the padding."""
OUTPUTS = ("scores", "labels", "masks")


class Inference(nn.Module):
    """Find the N instances of one image; the number of outputs never changes, because no instance is left out.

    `forward` takes (1, 3, H, W) in float for any H and W: RGB of 0-255, or a normalised image if `normalise` is false. It returns
    scores (N,), labels (N,) int64, and masks (N, H, W) as booleans or probabilities. `postprocess` leaves out the instances whose
    score before maskness is at most `inference.score_threshold`; here their score is 0.
    """

    def __init__(self, model: SparseInst, config: InferenceConfig, *, normalise: bool, probabilities: bool) -> None:
        super().__init__()
        self.model = _exportable(model)
        self.config, self.normalise, self.probabilities = config, normalise, probabilities
        self.dtype = next(model.parameters()).dtype

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        height, width = image.shape[-2:]
        if self.normalise:
            image = (image - self.model.pixel_mean) / self.model.pixel_std
        padded = _padded(_padded(image.to(self.dtype), 2), 3)
        predictions: Predictions = self.model(padded)
        scores, labels = class_scores(predictions, self.config)  # 1 N
        kept = (scores > self.config.score_threshold).to(scores.dtype)
        masks = predictions.mask_logits[0].float().sigmoid()  # N h w
        scores = scores[0] * kept[0]
        if self.config.maskness:
            scores = scores * maskness(masks, self.config.mask_threshold)
        # `paste` would resize twice. The second step would keep the size of an image that was not resized, so it is left out.
        whole = resize(masks[None], padded.shape[-2:])[0]
        rows, columns = (torch.arange(side, device=whole.device) for side in (height, width))
        whole = whole.index_select(1, rows).index_select(2, columns)
        return scores, labels[0], whole if self.probabilities else whole > self.config.mask_threshold


def _padded(x: Tensor, dim: int) -> Tensor:
    """Pad one dimension with zeros to the next multiple of 32.

    Positions are selected by index, because with `F.pad` the exporters fix whether the image needs padding.
    """
    size = x.shape[dim]
    positions = torch.arange((size + SIZE_DIVISOR - 1) // SIZE_DIVISOR * SIZE_DIVISOR, device=x.device)
    inside = (positions < size).to(x.dtype)
    return x.index_select(dim, positions.clamp(max=size - 1)) * inside.view(-1, *[1] * (3 - dim))


class MatrixPool(nn.Module):
    """Compute `nn.AdaptiveAvgPool2d` by two matrix products, which can be exported for any image size."""

    def __init__(self, bins: int | tuple[int, int]) -> None:
        super().__init__()
        self.bins = bins if isinstance(bins, tuple) else (bins, bins)

    def forward(self, x: Tensor) -> Tensor:  # B C H W
        rows, columns = (_pool_weights(n, side, x.device) for n, side in zip(self.bins, x.shape[-2:], strict=True))
        return (rows @ x.float() @ columns.transpose(0, 1)).to(x.dtype)  # B C bins bins


def _pool_weights(bins: int, size: int, device: torch.device) -> Tensor:
    """Return the weights (bins, size) of a pooling along one side: 1 / n for each of the n positions of a bin."""
    position = torch.arange(size, device=device)
    bin_ = torch.arange(bins, device=device)[:, None]
    start = (bin_ * size) // bins
    end = ((bin_ + 1) * size + bins - 1) // bins
    inside = ((position >= start) & (position < end)).float()
    return inside / inside.sum(1, keepdim=True)


class CountedCoordinates(Coordinates):
    """Compute the coordinates from `arange`, because the exporters turn the number of steps of `linspace` into a constant."""

    def line(self, side: int, like: Tensor) -> Tensor:
        positions = torch.arange(side, device=like.device).float()
        return (positions * 2 / positions[-1] - 1).to(like.dtype)


def _fixed_padding(conv: Conv2dSame) -> nn.Sequential:
    """Return a convolution whose padding does not depend on its input's size, for sides that are multiples of its stride.

    The sides of a network's input are multiples of 32, so those of each layer of stride 2 are even. With formulas for the
    padding, the exporters need minutes.
    """
    across, down = (
        (kernel - 1) * dilation + 1 - stride
        for kernel, dilation, stride in list(zip(conv.kernel_size, conv.dilation, conv.stride, strict=True))[::-1]
    )
    across, down = max(across, 0), max(down, 0)
    conv.__class__ = nn.Conv2d  # type: ignore[assignment] # its padding is 0
    return nn.Sequential(nn.ZeroPad2d((across // 2, across - across // 2, down // 2, down - down // 2)), conv)


def _exportable(model: SparseInst, *, sampled: bool = False) -> SparseInst:
    """Return a copy whose padding, pooling and coordinates can be exported for any image size.

    Args:
        sampled: see `DeformableConv2d.export_sampled`.
    """
    model = copy.deepcopy(model).eval()
    if isinstance(model.decoder.coordinates, Coordinates):
        model.decoder.coordinates = CountedCoordinates()
    for module in list(model.modules()):
        if isinstance(module, DeformableConv2d):
            module.export_sampled = sampled
        for name, child in module.named_children():
            if isinstance(child, Conv2dSame):
                setattr(module, name, _fixed_padding(child))
            if isinstance(child, nn.AdaptiveAvgPool2d):
                bins = child.output_size
                if isinstance(bins, int) or (isinstance(bins, tuple) and all(isinstance(side, int) for side in bins)):
                    setattr(module, name, MatrixPool(bins))  # type: ignore[arg-type]
    return model


def export_model(
    model: SparseInst,
    config: InferenceConfig,
    output: Path,
    *,
    form: Literal["onnx", "torch"] = "onnx",
    normalise: bool = True,
    probabilities: bool = False,
    half: bool = False,
    about: str = "",
) -> None:
    """Write a trained model as a graph.

    Args:
        output: the file to write: `.onnx`, or `.pt2` for torch.export.
        normalise: true if the graph takes pixels of 0-255 and normalises them; false if it takes normalised images.
        probabilities: true if masks are probabilities; false if they are booleans.
        half: true if weights and features are fp16; scores and masks stay float32.
        about: a text for the metadata of an ONNX file, under the name `artifact.GRAPH`.

    Raises:
        UserError: the extra `export` is not installed, or `output` is a folder.
    """
    if form == "onnx":
        check_onnx_packages()
    inference = Inference(model.half() if half else model, config, normalise=normalise, probabilities=probabilities).eval()
    example = torch.zeros(1, 3, *_EXAMPLE_SIZE)
    dynamic = {"image": {2: torch.export.Dim.DYNAMIC, 3: torch.export.Dim.DYNAMIC}}
    check_writable(output)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporters warn about their own code
        if form == "torch":
            exported = torch.export.export(inference, (example,), dynamic_shapes=dynamic)
            archive = io.BytesIO()  # torch's writer ends the process if it cannot write to a file
            torch.export.save(exported, archive)
            with atomic(output) as temporary:
                temporary.write_bytes(archive.getbuffer())
            return
        program: Any = torch.onnx.export(
            inference,
            (example,),
            dynamo=True,
            opset_version=OPSET,
            custom_translation_table=translations(OPSET),
            input_names=["image"],
            output_names=list(OUTPUTS),
            dynamic_shapes=dynamic,
            verbose=False,
        )
        program.model.metadata_props[GRAPH] = about
        with atomic(output) as temporary:
            program.save(temporary)


class Network(nn.Module):
    """The network alone, which the engines run: normalised images (B, 3, H, W) to the four tensors of `Predictions`."""

    def __init__(self, model: SparseInst, *, sampled: bool = False) -> None:
        super().__init__()
        self.model = _exportable(model, sampled=sampled)

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return tuple(self.model(images))


def export_network(model: SparseInst, output: Path, *, sampled: bool = False) -> None:
    """Write the network as ONNX in float32, for any number of images whose sides are multiples of 32.

    Args:
        sampled: compute deformable convolutions by `GridSample` instead of `DeformConv`, which OpenVINO cannot read.

    Raises:
        UserError: the extra `export` is not installed.
    """
    check_onnx_packages()
    network = Network(model, sampled=sampled).cpu().float().eval()
    dynamic = {INPUT: dict.fromkeys((0, 2, 3), torch.export.Dim.DYNAMIC)}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporters warn about their own code
        program: Any = torch.onnx.export(
            network,
            (torch.zeros(2, 3, 256, 320),),
            dynamo=True,
            opset_version=OPSET,
            custom_translation_table=translations(OPSET),
            input_names=[INPUT],
            output_names=list(NETWORK_OUTPUTS),
            dynamic_shapes=dynamic,
            verbose=False,
        )
        program.save(output)


def check_onnx_packages() -> None:
    """Raise `UserError` if a package that the export to ONNX needs is missing."""
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"ONNX needs the extra `export` ({error.name} is missing); install it: {install_extra('export')}"
        ) from None
