"""Use a trained model on images: plain arrays out."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from sparseinst.config import SIZE_DIVISOR, STRIDES, Config, Precision
from sparseinst.data.coco import Category, read_image
from sparseinst.data.transforms import resize_image, short_side_size
from sparseinst.engine import optimize as optimizing
from sparseinst.engine.checkpoint import load_weights
from sparseinst.engine.device import autocast, pick_device
from sparseinst.errors import DataError
from sparseinst.models.decoder import Predictions
from sparseinst.models.sparseinst import SparseInst
from sparseinst.postprocess import ImageSize, postprocess


@dataclass(frozen=True)
class Prediction:
    """The K instances of one image, best first."""

    scores: NDArray[np.float32]
    """(K,) in [0, 1]."""
    labels: NDArray[np.int64]
    """(K,) index into `Predictor.categories`."""
    masks: NDArray[np.bool_]
    """(K, H, W) at the image's own size."""
    names: list[str]
    """K category names."""
    maps: NDArray[np.int64]
    """(K,) which of the N instance activation maps each came from."""
    activations: NDArray[np.float32] | None = None
    """(K, h, w) of [0, 1]: where each instance's map responds, its groups' mean, over the image without its padding; where
    asked for."""


class Predictor:
    """A model with its config and categories, ready to segment images. Made by `load_model`.

    Attributes:
        model: the network, in evaluation mode.
        config: its config; `config.inference` says sizes and thresholds.
        categories: of the data it was trained on, by label.
    """

    def __init__(self, model: SparseInst, config: Config, categories: tuple[Category, ...], device: torch.device) -> None:
        self.model = model.to(device).eval()
        self.config = config
        self.categories = categories
        self.device = device

    def optimize(self, mode: optimizing.Mode = "compiled", precision: Precision | None = None) -> None:
        """Replace the network by a fast copy of the same outputs; see `engine.optimize`.

        Args:
            precision: None for the config's own, `inference.precision`.
        """
        chosen = precision or self.config.inference.precision
        self.config = self.config.replace({"inference.precision": chosen})
        self.model = optimizing.optimize(self.model, device=self.device, mode=mode, precision=chosen)

    @torch.no_grad()
    def predict(
        self, image: str | Path | Image.Image | NDArray[Any], score: float = 0.0, *, activations: bool = False
    ) -> Prediction:
        """Segment one image.

        Args:
            image: a file, a Pillow image, or (H, W, 3) RGB or (H, W) grey uint8.
            score: leave out instances below this score.
            activations: also give each instance's activation map.

        Raises:
            DataError: a file that is no readable image, or an array of another shape or type.
        """
        picture = as_image(image)
        raw, size, padded = self.forward(picture)
        [found] = postprocess(raw, padded, [ImageSize(size, (picture.height, picture.width))], self.config.inference)
        order = found.scores.argsort(descending=True, stable=True)
        order = order[found.scores[order] >= score]
        labels = found.labels[order].cpu().numpy()
        return Prediction(
            found.scores[order].cpu().numpy(),
            labels,
            found.masks[order].cpu().numpy(),
            [self.categories[label].name for label in labels],
            found.maps[order].cpu().numpy(),
            self._activations(raw, size, found.maps[order]).cpu().numpy() if activations else None,
        )

    def forward(self, picture: Image.Image) -> tuple[Predictions, tuple[int, int], tuple[int, int]]:
        """The raw output for one image, and the network's height and width of it, without and with the padding."""
        size = short_side_size(picture.height, picture.width, *self.config.inference.sides())
        pixels = torch.from_numpy(np.array(resize_image(picture, size))).permute(2, 0, 1)[None]  # 1 3 h w
        height, width = (-(-side // SIZE_DIVISOR) * SIZE_DIVISOR for side in size)
        padded = torch.nn.functional.pad(pixels, (0, width - size[1], 0, height - size[0])).to(self.device)
        with torch.no_grad(), autocast(self.device, self.config.inference.precision):
            raw: Predictions = self.model(self.model.normalise(padded, [size]))
        return raw, size, (height, width)

    def _activations(self, raw: Predictions, size: tuple[int, int], maps: Tensor) -> Tensor:
        responses = instance_responses(raw, self.config.model.decoder.iam.num_maps, size)[maps]  # K h w
        return responses / responses.amax((1, 2), keepdim=True).clamp(min=1e-12)


def instance_responses(raw: Predictions, num_maps: int, size: tuple[int, int]) -> Tensor:
    """Where each instance's map responds in one image, its groups' maps normalised and averaged: (N, h, w) at 1/8.

    Args:
        size: height and width of the image in the network, whose padding is cut off.
    """
    height, width = (-(-side // STRIDES[0]) for side in size)
    responses = raw.responses[0, :, :height, :width].float()  # GN h w
    normalised = responses / responses.sum((1, 2), keepdim=True).clamp(min=1e-12)
    return normalised.unflatten(0, (-1, num_maps)).mean(0)


def load_model(
    path: str | Path,
    device: str | None = None,
    *,
    optimize: optimizing.Mode | None = None,
    precision: Precision | None = None,
) -> Predictor:
    """The model in a weights file (or in the folder of a finished run), ready for `predict`.

    Args:
        device: `cpu`, `cuda`, `cuda:1`; None takes a GPU where there is one.
        optimize: `folded`, `compiled`, `graph` or `best`, for speed; see `engine.optimize`. None leaves the model as it is.
        precision: `fp32`, `tf32`, `bf16` or `fp16`; None for the config's own, `inference.precision`.

    Raises:
        UserError: no such file, or not a weights file of this package.
    """
    model, config, categories = load_weights(Path(path))
    if precision is not None:
        config = config.replace({"inference.precision": precision})
    predictor = Predictor(model, config, categories, pick_device(device))
    if optimize is not None:
        predictor.optimize(optimize)
    return predictor


def as_image(image: str | Path | Image.Image | NDArray[Any]) -> Image.Image:
    """Anything `Predictor.predict` takes, as an RGB image. Raises `DataError`."""
    if isinstance(image, str | Path):
        return read_image(Path(image))
    if isinstance(image, Image.Image):
        return image.convert("RGB")
    if image.dtype != np.uint8 or image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] != 3):
        raise DataError(f"an array of shape {image.shape} and type {image.dtype}: (H, W, 3) or (H, W) uint8 is needed")
    return Image.fromarray(image).convert("RGB")
