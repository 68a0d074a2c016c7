"""Match predictions with instances by bipartite matching (paper section 3.5, Eqs. 1 and 2).

Shapes: B images, N instance maps, K instances of one image, H W mask size.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from sparseinst.config import MatcherConfig
from sparseinst.models.network import Predictions

DICE_EPSILON = 1e-4


class Target(NamedTuple):
    """The instances of one image, at the size of the predicted masks."""

    labels: Tensor
    """(K,) int64: the class of each instance, 0 to classes - 1."""
    masks: Tensor
    """(K, H, W) float32 in [0, 1]."""


class Match(NamedTuple):
    """The min(N, K) matched pairs of one image: prediction `predictions[i]` belongs to instance `instances[i]`."""

    predictions: Tensor
    instances: Tensor


def pairwise_dice(masks: Tensor, targets: Tensor) -> Tensor:
    """Return the dice (N, K) of every mask with every target, from probabilities (N, P) and (K, P) over P pixels."""
    overlap = masks @ targets.T
    sizes = masks.square().sum(-1)[:, None] + targets.square().sum(-1)[None, :]
    return 2 * overlap / (sizes + DICE_EPSILON)


@torch.no_grad()
def match(predictions: Predictions, targets: list[Target], config: MatcherConfig) -> list[Match]:
    """Return the assignment with the highest total score for each image. The scores are computed in float32.

    Args:
        predictions: the raw output for B images.
        targets: the targets of B images. An image may have no instances, or more than maps. Then the best N are matched.

    Returns:
        B matches of int64, ordered by prediction, on the predictions' device.
    """
    # All scores are queued on the device first, because the first assignment waits for the device.
    scores = [
        _score(logits, masks, target, config)
        for logits, masks, target in zip(predictions.class_logits, predictions.mask_logits, targets, strict=True)
    ]
    return [_assign(score) for score in scores]


def _score(class_logits: Tensor, mask_logits: Tensor, target: Target, config: MatcherConfig) -> Tensor:
    """Return the score (N, K) of every prediction with every instance of one image (Eq. 1)."""
    with torch.autocast(class_logits.device.type, enabled=False):
        dice = pairwise_dice(mask_logits.float().sigmoid().flatten(1), target.masks.flatten(1))  # N K
        probability = class_logits.float().sigmoid()[:, target.labels]  # N K
        return dice.pow(config.alpha) * probability.pow(config.beta)  # N K


def _assign(score: Tensor) -> Match:
    """Return the pairs with the highest total score (Eq. 2)."""
    # The solver fails on NaN. Without it here, the loss becomes NaN, and the error message then names that loss.
    rows, columns = linear_sum_assignment(score.nan_to_num(0.0).cpu().numpy(), maximize=True)
    return Match(torch.as_tensor(rows, device=score.device), torch.as_tensor(columns, device=score.device))
