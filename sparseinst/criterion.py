"""The training loss (paper section 3.5, Eqs. 3 and 4; Tables 5 and 6).

B images, N instance maps, K instances of one image, M matched pairs of the batch, H W mask size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparseinst.config import LossConfig, MatcherConfig
from sparseinst.matcher import DICE_EPSILON, Match, Target, match
from sparseinst.models.decoder import Predictions

PREDICTION_THRESHOLD = 0.4
TARGET_THRESHOLD = 0.5
"""Where predicted and true masks are made binary to measure the IoU that objectness learns."""


class Counts(NamedTuple):
    """What the losses are divided by, as means over the processes (and accumulated parts) of one optimiser step."""

    instances: float
    """Instances in the targets; divides class and dice losses."""
    pairs: float
    """Matched pairs; divides the objectness loss in `global` reduction."""
    pixels: float
    """Pixels of matched pairs; divides the pixel loss in `global` reduction."""


def count(targets: Sequence[Target], num_maps: int) -> Counts:
    """The counts of one batch. A step of several batches or processes takes their mean."""
    pairs = [min(len(target.labels), num_maps) for target in targets]
    pixels = sum(n * target.masks[0].numel() for n, target in zip(pairs, targets, strict=True) if n)
    return Counts(sum(len(target.labels) for target in targets), sum(pairs), pixels)


def prepare_targets(
    labels: Sequence[Tensor], masks: Sequence[Tensor], padded: tuple[int, int], size: tuple[int, int], stride: int = 1
) -> list[Target]:
    """Ground truth at the predicted masks' size: zero-padded as the images are, then bilinear, soft in [0, 1].

    Args:
        labels: B of (K,) int64.
        masks: B of (K, h, w), any type, 0 or 1, each at most `padded` high and wide; or, with a stride, in quarters and at the
            predicted masks' resolution already (`transforms.shrink`), which gives the same targets to the bit.
        padded: height and width of the padded images.
        size: height and width of the predicted masks.
    """
    bounds = size if stride > 1 else padded
    targets = []
    for label, mask in zip(labels, masks, strict=True):
        height, width = mask.shape[-2:]
        whole = F.pad(mask.float(), (0, bounds[1] - width, 0, bounds[0] - height))  # K H W
        if stride > 1:
            small = whole / 4
        elif len(mask):
            small = F.interpolate(whole[None], size=size, mode="bilinear", align_corners=False)[0]
        else:
            small = whole.new_zeros((0, *size))
        targets.append(Target(label, small))
    return targets


class Criterion(nn.Module):
    """Predictions and targets to named, weighted losses; their sum is the training loss.

    Forward takes `Predictions` of B images, B `Target`s and, where the step has several parts or processes, its `Counts`
    (default: this batch's). It gives `class`, and of `dice`, `pixel`, `objectness` those that are on, each a float32 scalar
    multiplied by its weight. All are defined, and connected to every prediction, for batches without any instance.
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
        # What no loss reads (an objectness that is off, masks of a batch without instances) still takes part in the graph:
        # every parameter has a gradient, if zero, in every step, as distributed training wants. (Empty slices: zero times a
        # value would carry its NaN into the wrong loss.)
        losses["class"] = losses["class"] + predictions.mask_logits[:0].sum() + predictions.objectness_logits[:0].sum()
        return losses

    def _divisor(self, own: int, mean: float) -> float:
        return max(float(own) if self.config.reduction == "per_process" else mean, 1.0)

    def _class_loss(self, logits: Tensor, pairs: list[tuple[Target, Match]]) -> Tensor:
        truth = torch.zeros_like(logits, dtype=torch.float32)  # B N classes
        for image, (target, matched) in zip(truth, pairs, strict=True):
            image[matched.predictions, target.labels[matched.instances]] = 1.0
        return focal_loss(logits.float(), truth, self.config).sum()


def _own_masks(pairs: list[tuple[Target, Match]]) -> Tensor:
    return torch.cat([target.masks[matched.instances] for target, matched in pairs])  # M H W


def _reference_masks(pairs: list[tuple[Target, Match]]) -> Tensor:
    """As the reference finds them: by each instance's index in its image, plus how many instances the images before hold.

    It applies those offsets to as many pairs as an image has instances, not matches. Once an image has more instances than
    maps, the pairs of later images so read masks of earlier ones; `criterion_overfull` in the golden numbers holds it.
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
    """1 - dice of each pair: (M, P) logits and (M, P) targets in [0, 1] to (M,)."""
    masks = logits.sigmoid()
    overlap = (masks * truth).sum(-1)
    return 1 - 2 * overlap / (masks.square().sum(-1) + truth.square().sum(-1) + DICE_EPSILON)


def focal_loss(logits: Tensor, truth: Tensor, config: LossConfig) -> Tensor:
    """Sigmoid focal loss of each element (Lin et al. 2017, Eq. 5), for targets in [0, 1]."""
    entropy = F.binary_cross_entropy_with_logits(logits, truth, reduction="none")
    probability = logits.sigmoid()
    missed = probability * (1 - truth) + (1 - probability) * truth
    alpha = config.focal_alpha * truth + (1 - config.focal_alpha) * (1 - truth)
    return alpha * missed.pow(config.focal_gamma) * entropy


@torch.no_grad()
def binary_iou(logits: Tensor, truth: Tensor) -> Tensor:
    """IoU of each pair, both made binary: (M, P) logits and (M, P) targets in [0, 1] to (M,)."""
    masks = logits.sigmoid() >= PREDICTION_THRESHOLD
    objects = truth > TARGET_THRESHOLD
    overlap = (masks & objects).sum(-1)
    return overlap / ((masks | objects).sum(-1) + 1e-6)


def _bce(logits: Tensor, truth: Tensor, config: LossConfig) -> Tensor:  # noqa: ARG001 (called like focal_loss)
    return F.binary_cross_entropy_with_logits(logits, truth, reduction="none")


def _bce_objectness(logits: Tensor, iou: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits, iou, reduction="none")


def _l1_objectness(logits: Tensor, iou: Tensor) -> Tensor:
    return (logits.sigmoid() - iou).abs()


PIXEL_LOSSES: dict[str, Callable[[Tensor, Tensor, LossConfig], Tensor]] = {"bce": _bce, "focal": focal_loss}
OBJECTNESS_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"bce": _bce_objectness, "l1": _l1_objectness}
