"""Segment images with a trained model; results are numpy arrays."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Generic, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from sparseinst.config import STRIDES, Config, EngineName, NetworkPrecision, OptimizeMode, Precision
from sparseinst.data.coco import Category
from sparseinst.data.images import as_rgb, read_image
from sparseinst.data.network_input import at_test_size, cut, image_tiles, inference_size, pad
from sparseinst.data.tiles import Size, Tile
from sparseinst.device import autocast
from sparseinst.errors import DataError
from sparseinst.inference.checkpoints import find_weights
from sparseinst.inference.compact import CompactMasks, Strip
from sparseinst.inference.engine_network import check_device, device_for, open_source, torch_precision, with_engine
from sparseinst.inference.found import CompactInstances, FoundInstances, M
from sparseinst.inference.join import Placed, as_masks, join, place
from sparseinst.models.network import InstanceNetwork, Predictions
from sparseinst.paste import paste_strips
from sparseinst.postprocess import ImageSize, instance_maps, postprocess, score_maps


class _Form(NamedTuple, Generic[M]):
    """How the masks are kept."""

    from_strips: Callable[[Iterable[Strip], tuple[int, int, int]], M]
    """Makes the masks, of the given shape (K, H, W), from their strips."""
    from_compact: Callable[[CompactMasks], M]


def _selected(strips: Iterable[tuple[int, Tensor]], order: list[int]) -> Iterator[Strip]:
    """Yield the strips of some of the masks, in this order, on the CPU."""
    for start, strip in strips:
        masks = strip.cpu().numpy()
        yield Strip(start, [masks[index] for index in order])


def _as_array(strips: Iterable[Strip], shape: tuple[int, int, int]) -> NDArray[np.bool_]:
    masks = np.zeros(shape, dtype=np.bool_)
    for start, parts in strips:
        for mask, part in zip(masks, parts, strict=True):
            mask[start : start + len(part)] = part
    return masks


_ARRAY = _Form(_as_array, CompactMasks.expand)
_COMPACT = _Form(CompactMasks.from_strips, CompactMasks.of)


class Predictor:
    """A model with its config and categories, ready to segment images. `load_model` makes one.

    Attributes:
        model: the network, in evaluation mode.
        config: the model's config; `config.inference` sets the image size and the thresholds.
        categories: the categories of the training data, indexed by label.
    """

    def __init__(self, model: InstanceNetwork, config: Config, categories: tuple[Category, ...], device: torch.device) -> None:
        self.model = model.to(device).eval()
        self.config = config
        self.categories = categories
        self.device = device

    def optimize(self, mode: OptimizeMode = "compiled", precision: Precision | None = None) -> None:
        """Replace the network by a fast copy with the same outputs; see `inference.optimize`.

        Args:
            precision: the copy's precision; None takes the config's `inference.precision`.

        Raises:
            UserError: the network runs in another engine than torch.
        """
        if self.config.inference.engine != "torch":
            check_device(self.config.inference.engine, self.device, mode)
        from sparseinst.inference import optimize as optimizing
        from sparseinst.models.sparseinst import SparseInst

        assert isinstance(self.model, SparseInst)
        chosen = precision or torch_precision(self.config)
        self.config = self.config.replace({"inference.precision": chosen})
        self.model = optimizing.optimize(self.model, device=self.device, mode=mode, precision=chosen)

    def predict(
        self,
        image: str | Path | Image.Image | NDArray[Any],
        score: float = 0.0,
        *,
        top: int | None = None,
        activations: bool | int = False,
    ) -> FoundInstances:
        """Segment one image. For an image of many megapixels, `predict_compact` needs far less memory.

        Args:
            image: a file, a Pillow image, or (H, W, 3) RGB or (H, W) grey uint8.
            score: instances below this score are left out.
            top: return only this many instances, those with the highest scores.
            activations: also return the activation map of each instance, or of so many of the best ones. An image in many tiles
                has large maps.

        Raises:
            DataError: the file is no readable image, or the array has another shape or type.
        """
        return FoundInstances(**self._find(as_image(image), score, top, activations, _ARRAY))

    def predict_compact(
        self,
        image: str | Path | Image.Image | NDArray[Any],
        score: float = 0.0,
        *,
        top: int | None = None,
        activations: bool | int = False,
    ) -> CompactInstances:
        """Segment one image as `predict` does, with the same masks, but never hold all their pixels in memory."""
        return CompactInstances(**self._find(as_image(image), score, top, activations, _COMPACT))

    @torch.no_grad()
    def _find(
        self, picture: Image.Image, score: float, top: int | None, activations: bool | int, form: _Form[M]
    ) -> dict[str, Any]:
        """Return the fields of `Found`."""
        tiles = image_tiles((picture.height, picture.width), self.config.inference)
        if len(tiles) > 1:
            return self._find_in_tiles(picture, tiles, score, top, activations, form)
        raw, size, padded = self.forward(picture)
        inference = self.config.inference
        whole: tuple[int, int] = (picture.height, picture.width)
        with torch.autocast(self.device.type, enabled=False):
            [found] = score_maps(raw, inference)
            order = found.scores.argsort(descending=True, stable=True)
            highest = float(found.scores[order[0]]) if len(order) else None
            order = order[found.scores[order] >= score]
            before_top, order = len(order), order[:top]
            strips = paste_strips(found.probabilities, padded, ImageSize(size, whole), inference.mask_threshold)
            masks = form.from_strips(_selected(strips, order.tolist()), (len(order), *whole))
        labels = found.labels[order].cpu().numpy()
        shown = found.maps[order[: None if activations is True else activations]]
        return {
            "scores": found.scores[order].cpu().numpy(),
            "labels": labels,
            "masks": masks,
            "names": [self.categories[label].name for label in labels],
            "maps": found.maps[order].cpu().numpy(),
            "activations": self._activations(raw, size, shown).cpu().numpy() if activations else None,
            "highest": highest,
            "before_top": before_top,
            "full": before_top == raw.mask_logits.shape[1],
        }

    def _find_in_tiles(
        self,
        picture: Image.Image,
        tiles: Sequence[Tile],
        score: float,
        top: int | None,
        activations: bool | int,
        form: _Form[M],
    ) -> dict[str, Any]:
        """Segment each tile by itself, and return the fields of `Found` for the joined instances."""
        whole: Size = (picture.height, picture.width)
        placed: list[Placed] = []
        best: list[float] = []
        full = False
        for number, tile in enumerate(tiles):
            raw, size, padded = self.forward(cut(picture, tile))
            [found] = postprocess(raw, padded, [ImageSize(size, tile.size)], self.config.inference)
            responses = self._activations(raw, size, found.maps).cpu().numpy() if activations else None
            full |= int((found.scores >= score).sum()) == raw.mask_logits.shape[1]
            best += found.scores.sort(descending=True).values[:1].tolist()
            placed += place(found, tile, number, whole, responses, score=score)
        chosen = [one for one in join(placed, tiles) if one.score >= score]
        before_top, chosen = len(chosen), chosen[:top]
        shown = chosen[: None if activations is True else activations]
        return {
            "scores": np.array([one.score for one in chosen], dtype=np.float32),
            "labels": np.array([one.label for one in chosen], dtype=np.int64),
            "masks": form.from_compact(as_masks(chosen, whole)),
            "names": [self.categories[one.label].name for one in chosen],
            "maps": np.array([one.map for one in chosen], dtype=np.int64),
            "activations": self._joined_activations(shown, tiles, whole) if activations else None,
            "highest": max(best, default=None),
            "before_top": before_top,
            "full": full,
        }

    def _joined_activations(self, chosen: Sequence[Placed], tiles: Sequence[Tile], whole: Size) -> NDArray[np.float32]:
        """Return the responses over the whole image, (K, h, w): those of each instance in its tile, and zeros elsewhere."""
        height, width = (-(-side // STRIDES[0]) for side in inference_size(whole, self.config.inference))
        responses = np.zeros((len(chosen), height, width), dtype=np.float32)
        for target, one in zip(responses, chosen, strict=True):
            assert one.response is not None
            tile = tiles[one.tile]
            top, left = round(tile.top * height / whole[0]), round(tile.left * width / whole[1])
            part = target[top : top + one.response.shape[0], left : left + one.response.shape[1]]
            part[:] = one.response[: part.shape[0], : part.shape[1]]
        return responses

    def forward(self, picture: Image.Image) -> tuple[Predictions, tuple[int, int], tuple[int, int]]:
        """Run the network on one image or tile.

        Returns:
            The raw output, and the image's (height, width) in the network, first without and then with padding.
        """
        pixels = at_test_size(picture, self.config.inference)  # 3 h w
        size = (pixels.shape[1], pixels.shape[2])
        padded = pad([pixels]).to(self.device)  # 1 3 H W
        with torch.no_grad(), autocast(self.device, self.config.inference.precision):
            raw: Predictions = self.model(self.model.normalise(padded, [size]))
        return raw, size, (padded.shape[2], padded.shape[3])

    def _activations(self, raw: Predictions, size: tuple[int, int], maps: Tensor) -> Tensor:
        """Return the responses (K, h, w) of these maps, each divided by its maximum."""
        responses = instance_responses(raw, self.config.model.decoder.iam.num_maps, size)[maps]  # K h w
        return responses / responses.amax((1, 2), keepdim=True).clamp(min=1e-12)


def instance_responses(raw: Predictions, num_maps: int, size: tuple[int, int]) -> Tensor:
    """Return the response of each instance activation map in one image, (N, h, w) at 1/8.

    The maps of an instance's groups are each normalised to a sum of 1 and then averaged.

    Args:
        size: height and width of the image in the network, without the padding; the padding is cut off.
    """
    height, width = (-(-side // STRIDES[0]) for side in size)
    return instance_maps(raw.responses[0, :, :height, :width], num_maps)


def load_model(
    path: str | Path,
    device: str | None = None,
    *,
    engine: EngineName | None = None,
    optimize: OptimizeMode | None = None,
    precision: NetworkPrecision | None = None,
    checkpoint: str | None = None,
    tile: int | None = None,
) -> Predictor:
    """Load a model from a weights file, the folder of a run, or an engine's artifact (.onnx, .xml), ready for `predict`.

    Args:
        device: `cpu`, `cuda` or `cuda:1`, for example; None takes a GPU if there is one and the engine is torch.
        engine: `torch`, `onnxruntime` or `openvino`, see docs/performance.md; None takes the artifact's or the config's.
        optimize: for torch: `folded`, `compiled`, `graph` or `best` for speed (see `inference.optimize`); None leaves the model
            as it is.
        precision: `fp32`, `tf32`, `bf16`, `fp16` or `int8`; None takes the config's `inference.precision`. An int8 network has to
            be made first, with its AP checked, by `sparseinst export` or `sparseinst evaluate`.
        checkpoint: `last`, `best` or the number of a step, for the folder of a run; see `find_weights`.
        tile: segment images in overlapping tiles of this side in pixels, see `inference.tile`; 0 segments them as a whole, and
            None takes the config's setting.

    Raises:
        UserError: there is no such file or checkpoint, or it is not a weights file of this package. The engine is not installed,
            or it compiled another precision.
    """
    source = open_source(find_weights(Path(path), checkpoint))
    config = with_engine(source.config, engine, precision)
    if tile is not None:
        config = config.replace({"inference.tile": tile or None})
    chosen = device_for(config, device)
    prepared = source.prepare(config, device=chosen, optimize=optimize)
    return Predictor(prepared.network, config, source.categories, chosen)


def as_image(image: str | Path | Image.Image | NDArray[Any]) -> Image.Image:
    """Return any input of `Predictor.predict` as an RGB image. Raises `DataError` if it is not an image."""
    if isinstance(image, str | Path):
        return read_image(Path(image))
    if isinstance(image, Image.Image):
        return as_rgb(image)
    if not isinstance(image, np.ndarray):
        raise DataError(f"an image must be a path, a Pillow image or an array, not {type(image).__name__}; give one at a time")
    if image.dtype != np.uint8 or image.ndim not in (2, 3) or (image.ndim == 3 and image.shape[2] != 3) or not image.size:
        raise DataError(
            "an image array must be (H, W, 3) or (H, W) of type uint8, and not be empty; this one is "
            f"{image.shape} of type {image.dtype}"
        )
    return Image.fromarray(image).convert("RGB")
