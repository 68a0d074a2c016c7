"""Raw predictions to scored masks (paper section 3.6): the only copy, used by evaluation, prediction and timing.

B images, N instance maps, K kept instances of one image, H W height and width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from sparseinst.config import InferenceConfig
from sparseinst.models.decoder import Predictions


class Instances(NamedTuple):
    """The instances found in one image, in the order of their maps."""

    scores: Tensor
    """(K,) float32 in [0, 1]."""
    labels: Tensor
    """(K,) int64 class, 0 to classes - 1."""
    masks: Tensor
    """(K, H, W) bool at the image's original size."""
    maps: Tensor
    """(K,) int64: which of the N instance maps each came from."""


class ImageSize(NamedTuple):
    """Height and width in pixels, of the image as the network saw it and as it was."""

    resized: tuple[int, int]
    original: tuple[int, int]


@torch.no_grad()
def postprocess(
    predictions: Predictions, padded: tuple[int, int], sizes: Sequence[ImageSize], config: InferenceConfig
) -> list[Instances]:
    """Score, select and resize. One class a map; no sorting, no NMS.

    Args:
        predictions: raw output for B images.
        padded: height and width of the network's input.
        sizes: of B images, without the padding.
    """
    scores, labels = class_scores(predictions, config)  # B N
    results = []
    for image_scores, image_labels, logits, size in zip(scores, labels, predictions.mask_logits, sizes, strict=True):
        maps = (image_scores > config.score_threshold).nonzero().squeeze(1)  # K
        masks = logits[maps].float().sigmoid()  # K h w
        kept = image_scores[maps]
        if config.maskness:
            kept = kept * maskness(masks, config.mask_threshold)
        full = paste(masks, padded, size) > config.mask_threshold
        results.append(Instances(kept, image_labels[maps], full, maps))
    return results


def class_scores(predictions: Predictions, config: InferenceConfig) -> tuple[Tensor, Tensor]:
    """Each map's score, by which it is kept or not, and its class: (B, N) in [0, 1] and (B, N) int64."""
    scores, labels = predictions.class_logits.float().sigmoid().max(dim=-1)
    objectness = predictions.objectness_logits.float().sigmoid() if config.rescore else 1.0
    return (scores * objectness).sqrt(), labels


def maskness(masks: Tensor, threshold: float) -> Tensor:
    """Mean probability over each mask's own pixels: (K, h, w) to (K,); zero for a mask without any."""
    inside = masks > threshold
    return (masks * inside).sum((1, 2)) / (inside.sum((1, 2)) + 1e-6)


def paste(masks: Tensor, padded: tuple[int, int], size: ImageSize) -> Tensor:
    """Probabilities (K, h, w) to (K, H, W) at the original size: bilinear to the padded input, cut, bilinear again."""
    if not len(masks):
        return masks.new_zeros((0, *size.original))
    whole = F.interpolate(masks[None], size=padded, mode="bilinear", align_corners=False)
    image = whole[:, :, : size.resized[0], : size.resized[1]]
    return F.interpolate(image, size=size.original, mode="bilinear", align_corners=False)[0]
