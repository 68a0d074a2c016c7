"""Compute the training loss (paper section 3.5, Eqs. 3 and 4; Tables 5 and 6).

Shapes: B images, N instance maps, K instances of one image, M matched pairs of the batch, H W mask size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparseinst.config import LossConfig, MatcherConfig
from sparseinst.matcher import DICE_EPSILON, Match, Target, match
from sparseinst.models.network import Predictions

PREDICTION_THRESHOLD = 0.4
TARGET_THRESHOLD = 0.5
"""The thresholds that make predicted and target masks binary. The objectness learns the IoU of these binary masks."""


class Counts(NamedTuple):
    """The divisors of the losses, as means over the processes and accumulated parts of one optimiser step."""

    instances: float
    """The number of instances in the targets. It divides the class and dice losses."""
    pairs: float
    """The number of matched pairs. It divides the objectness loss in `global` reduction."""
    pixels: float
    """The number of pixels of the matched pairs. It divides the pixel loss in `global` reduction."""


def count(targets: Sequence[Target], num_maps: int) -> Counts:
    """Return the counts of one batch. A step with several batches or processes uses their mean."""
    pairs = [min(len(target.labels), num_maps) for target in targets]
    pixels = sum(n * target.masks[0].numel() for n, target in zip(pairs, targets, strict=True) if n)
    return Counts(sum(len(target.labels) for target in targets), sum(pairs), pixels)


def prepare_targets(
    labels: Sequence[Tensor], masks: Sequence[Tensor], padded: tuple[int, int], size: tuple[int, int], stride: int = 1
) -> list[Target]:
    """Return the targets: zero-pad the masks as the images are, then resize them bilinearly to values in [0, 1].

    Args:
        labels: B tensors (K,) int64.
        masks: B tensors (K, h, w) of any type. With stride 1, their values are 0 or 1, and h and w are at most `padded`. With a
            larger stride, `transforms.shrink` has already resized them to the predicted masks' resolution, and their values are
            integers from 0 to 4, in quarters. Both give exactly the same targets.
        padded: height and width of the padded images.
        size: height and width of the predicted masks.
        stride: input pixels per mask pixel, if the masks are already resized.
    """
    bounds = size if stride > 1 else padded
    targets = []
    for label, mask in zip(labels, masks, strict=True):
        height, width = mask.shape[-2:]
        padded_mask = F.pad(mask.float(), (0, bounds[1] - width, 0, bounds[0] - height))  # K H W
        if stride > 1:
            resized = padded_mask / 4
        elif len(mask):
            resized = F.interpolate(padded_mask[None], size=size, mode="bilinear", align_corners=False)[0]
        else:
            resized = padded_mask.new_zeros((0, *size))
        targets.append(Target(label, resized))
    return targets


class Criterion(nn.Module):
    """Compute named, weighted losses from predictions and targets. Their sum is the training loss.

    `forward` takes `Predictions` of B images, B `Target`s, and the step's `Counts` (by default, those of this batch). It returns
    `class` and those of `dice`, `pixel` and `objectness` that the config enables, each a float32 scalar multiplied by its weight.
    The losses are also defined for a batch without instances, and every prediction then still receives a gradient.
    """

    def __init__(self, config: LossConfig, matcher: MatcherConfig) -> None:
        super().__init__()
        self.config = config
        self.matcher = matcher

    def forward(self, predictions: Predictions, targets: list[Target], counts: Counts | None = None) -> dict[str, Tensor]:
        matches = match(predictions, targets, self.matcher)
        counts = counts or count(targets, predictions.class_logits.shape[1])
        with torch.autocast(predictions.class_logits.device.type, enabled=False):
            return self.losses(predictions, targets, matches, counts)

    def losses(self, predictions: Predictions, targets: list[Target], matches: list[Match], counts: Counts) -> dict[str, Tensor]:
        config = self.config
        pairs = list(zip(targets, matches, strict=True))
        masks = torch.cat([p[m.predictions] for p, m in zip(predictions.mask_logits, matches, strict=True)]).float()
        true_masks = MATCHED_MASKS[config.overfull](pairs)
        logits, truth = masks.flatten(1), true_masks.flatten(1)  # M HW
        objectness = torch.cat([o[m.predictions] for o, m in zip(predictions.objectness_logits, matches, strict=True)])
        instances = max(counts.instances, 1.0)
        losses = {"class": config.class_weight * self._class_loss(predictions.class_logits, pairs) / instances}
        if config.dice:
            losses["dice"] = config.dice_weight * dice_loss(logits, truth).sum() / instances
        if config.pixel != "none":
            pixel = PIXEL_LOSSES[config.pixel](logits, truth, config).sum()
            losses["pixel"] = config.pixel_weight * pixel / self._divisor(logits.numel(), counts.pixels)
        if config.objectness != "none":
            loss = OBJECTNESS_LOSSES[config.objectness](objectness.float(), binary_iou(logits, truth)).sum()
            losses["objectness"] = config.objectness_weight * loss / self._divisor(len(logits), counts.pairs)
        # If the batch has no instances, no loss reads the masks. If the objectness loss is off, no loss reads the objectness.
        # Both join the graph here: distributed training needs a gradient for every parameter in every step. The slices are empty,
        # because zero times a NaN would add a NaN to the wrong loss.
        losses["class"] = losses["class"] + predictions.mask_logits[:0].sum() + predictions.objectness_logits[:0].sum()
        return losses

    def _divisor(self, in_batch: int, mean: float) -> float:
        """Return the divisor of a loss, at least 1: the count in this batch, or the mean count in `global` reduction."""
        return max(float(in_batch) if self.config.reduction == "per_process" else mean, 1.0)

    def _class_loss(self, logits: Tensor, pairs: list[tuple[Target, Match]]) -> Tensor:
        """Return the summed focal loss of the class logits (B, N, classes)."""
        truth = torch.zeros_like(logits, dtype=torch.float32)  # B N classes
        for image, (target, matched) in zip(truth, pairs, strict=True):
            image[matched.predictions, target.labels[matched.instances]] = 1.0
        return focal_loss(logits.float(), truth, self.config).sum()


def _own_masks(pairs: list[tuple[Target, Match]]) -> Tensor:
    """Return the target mask of each matched pair."""
    return torch.cat([target.masks[matched.instances] for target, matched in pairs])  # M H W


def _reference_masks(pairs: list[tuple[Target, Match]]) -> Tensor:
    """Return the target masks that the reference selects for the matched pairs.

    The reference adds to each instance's index in its image the number of instances in the earlier images. It adds this offset to
    as many pairs as the image has instances, not matches. If an image has more instances than maps, the pairs of later images
    therefore get masks of earlier images. The golden numbers `criterion_overfull` check this.
    """
    instances = torch.cat([matched.instances for _, matched in pairs])
    offsets = torch.zeros_like(instances)
    start = 0
    for target, _ in pairs:
        offsets[start : start + len(target.labels)] = start
        start += len(target.labels)
    return torch.cat([target.masks for target, _ in pairs])[instances + offsets]  # M H W


MATCHED_MASKS: dict[str, Callable[[list[tuple[Target, Match]]], Tensor]] = {
    "own": _own_masks,
    "reference": _reference_masks,
}


def dice_loss(logits: Tensor, truth: Tensor) -> Tensor:
    """Return 1 - dice of each pair (M,), from logits (M, P) and targets (M, P) in [0, 1]."""
    masks = logits.sigmoid()
    overlap = (masks * truth).sum(-1)
    return 1 - 2 * overlap / (masks.square().sum(-1) + truth.square().sum(-1) + DICE_EPSILON)


def focal_loss(logits: Tensor, truth: Tensor, config: LossConfig) -> Tensor:
    """Return the sigmoid focal loss of each element (Lin et al. 2017, Eq. 5), for targets in [0, 1]."""
    entropy = F.binary_cross_entropy_with_logits(logits, truth, reduction="none")
    probability = logits.sigmoid()
    error = probability * (1 - truth) + (1 - probability) * truth
    alpha = config.focal_alpha * truth + (1 - config.focal_alpha) * (1 - truth)
    return alpha * error.pow(config.focal_gamma) * entropy


@torch.no_grad()
def binary_iou(logits: Tensor, truth: Tensor) -> Tensor:
    """Return the IoU (M,) of each pair's binary masks, from logits (M, P) and targets (M, P) in [0, 1]."""
    masks = logits.sigmoid() >= PREDICTION_THRESHOLD
    objects = truth > TARGET_THRESHOLD
    overlap = (masks & objects).sum(-1)
    return overlap / ((masks | objects).sum(-1) + 1e-6)


def _bce(logits: Tensor, truth: Tensor, config: LossConfig) -> Tensor:  # noqa: ARG001 (has the signature of focal_loss)
    return F.binary_cross_entropy_with_logits(logits, truth, reduction="none")


def _bce_objectness(logits: Tensor, iou: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits, iou, reduction="none")


def _l1_objectness(logits: Tensor, iou: Tensor) -> Tensor:
    return (logits.sigmoid() - iou).abs()


PIXEL_LOSSES: dict[str, Callable[[Tensor, Tensor, LossConfig], Tensor]] = {"bce": _bce, "focal": focal_loss}
OBJECTNESS_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"bce": _bce_objectness, "l1": _l1_objectness}
