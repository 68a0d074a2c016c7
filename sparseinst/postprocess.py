"""Turn raw predictions into scored masks (paper section 3.6). Evaluation, prediction and timing all use this code.

Shapes: B images, N instance maps, K kept instances of one image, H W height and width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from sparseinst.config import InferenceConfig
from sparseinst.models.network import Predictions
from sparseinst.paste import ImageSize, Resize, paste

__all__ = ["ImageSize", "Instances", "ScoredMaps", "class_scores", "instance_maps", "maskness", "postprocess", "score_maps"]


class Instances(NamedTuple):
    """The predicted instances of one image, in the order of their maps."""

    scores: Tensor
    """(K,) float32 in [0, 1]."""
    labels: Tensor
    """(K,) int64: the class of each instance, 0 to classes - 1."""
    masks: Tensor
    """(K, H, W) bool, at the image's original size."""
    maps: Tensor
    """(K,) int64: the instance map of each instance, 0 to N - 1."""


class ScoredMaps(NamedTuple):
    """The instances of one image before their masks are resized."""

    scores: Tensor
    """(K,) float32 in [0, 1]."""
    labels: Tensor
    """(K,) int64."""
    probabilities: Tensor
    """(K, h, w) float32: the masks at the network's resolution."""
    maps: Tensor
    """(K,) int64."""


@torch.no_grad()
def postprocess(
    predictions: Predictions,
    padded: tuple[int, int],
    sizes: Sequence[ImageSize],
    config: InferenceConfig,
    resize: Resize = paste,
) -> list[Instances]:
    """Score the maps, select instances and resize their masks.

    Each map has one class. The instances are not sorted, and there is no NMS.

    Args:
        predictions: the raw output for B images.
        padded: height and width of the network's input.
        sizes: the sizes of B images, without the padding.
        resize: `paste`, or a function with its signature.
    """
    with torch.autocast(predictions.mask_logits.device.type, enabled=False):
        return _postprocess(predictions, padded, sizes, config, resize)


def _postprocess(
    predictions: Predictions, padded: tuple[int, int], sizes: Sequence[ImageSize], config: InferenceConfig, resize: Resize
) -> list[Instances]:
    results = []
    for found, size in zip(score_maps(predictions, config), sizes, strict=True):
        full = resize(found.probabilities, padded, size, config.mask_threshold)
        results.append(Instances(found.scores, found.labels, full, found.maps))
    return results


@torch.no_grad()
def score_maps(predictions: Predictions, config: InferenceConfig) -> Iterator[ScoredMaps]:
    """Yield the instances of each image, in the order of their maps, as `postprocess` selects and scores them."""
    scores, labels = class_scores(predictions, config)  # B N
    for image_scores, image_labels, logits in zip(scores, labels, predictions.mask_logits, strict=True):
        maps = (image_scores > config.score_threshold).nonzero().squeeze(1)  # K
        masks = logits[maps].float().sigmoid()  # K h w
        kept = image_scores[maps]
        if config.maskness:
            kept = kept * maskness(masks, config.mask_threshold)
        yield ScoredMaps(kept, image_labels[maps], masks, maps)


def class_scores(predictions: Predictions, config: InferenceConfig) -> tuple[Tensor, Tensor]:
    """Return each map's score (B, N) in [0, 1], which decides whether the map is kept, and its class (B, N) int64."""
    scores, labels = predictions.class_logits.float().sigmoid().max(dim=-1)
    objectness = predictions.objectness_logits.float().sigmoid() if config.rescore else 1.0
    return (scores * objectness).sqrt(), labels


def maskness(masks: Tensor, threshold: float) -> Tensor:
    """Return the mean probability (K,) of the pixels above the threshold in each mask (K, h, w); zero if there are none."""
    inside = F.threshold(masks.flatten(1), threshold, 0.0)
    return inside.sum(1) / (inside.sign().sum(1) + 1e-6)


def instance_maps(responses: Tensor, num_maps: int) -> Tensor:
    """Normalise each map to a sum of 1, and average the G maps of each instance: (G N, h, w) to (N, h, w)."""
    responses = responses.float()
    normalised = responses / responses.sum((1, 2), keepdim=True).clamp(min=1e-12)
    return normalised.unflatten(0, (-1, num_maps)).mean(0)
