"""Label assignment by bipartite matching (paper section 3.5, Eqs. 1 and 2).

B images, N instance maps, K instances of one image, H W mask size.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from sparseinst.config import MatcherConfig
from sparseinst.models.decoder import Predictions

DICE_EPSILON = 1e-4


class Target(NamedTuple):
    """What one image holds, at the size of the predicted masks."""

    labels: Tensor
    """(K,) int64 class of each instance, 0 to classes - 1."""
    masks: Tensor
    """(K, H, W) float32 in [0, 1]."""


class Match(NamedTuple):
    """Matched pairs of one image: prediction `predictions[i]` belongs to instance `instances[i]`; min(N, K) pairs."""

    predictions: Tensor
    instances: Tensor


def pairwise_dice(masks: Tensor, targets: Tensor) -> Tensor:
    """Dice of every mask with every target: (N, P) and (K, P) probabilities over P pixels to (N, K)."""
    overlap = masks @ targets.T
    sizes = masks.square().sum(-1)[:, None] + targets.square().sum(-1)[None, :]
    return 2 * overlap / (sizes + DICE_EPSILON)


@torch.no_grad()
def match(predictions: Predictions, targets: list[Target], config: MatcherConfig) -> list[Match]:
    """The assignment of the highest total score, one image at a time, in float32.

    Args:
        predictions: raw output for B images.
        targets: of B images; an image may hold no instance, or more than there are maps (the best N then find a map).

    Returns:
        B matches, int64, ordered by prediction, on the predictions' device.
    """
    # All scores first: from the first assignment on, the device is waited for.
    scores = [
        _score(logits, masks, target, config)
        for logits, masks, target in zip(predictions.class_logits, predictions.mask_logits, targets, strict=True)
    ]
    return [_assign(score) for score in scores]


def _score(class_logits: Tensor, mask_logits: Tensor, target: Target, config: MatcherConfig) -> Tensor:
    with torch.autocast(class_logits.device.type, enabled=False):
        dice = pairwise_dice(mask_logits.float().sigmoid().flatten(1), target.masks.flatten(1))  # N K
        probability = class_logits.float().sigmoid()[:, target.labels]  # N K
        return dice.pow(config.alpha) * probability.pow(config.beta)  # N K


def _assign(score: Tensor) -> Match:
    # NaN must reach the loss, which names it, not the solver, which does not.
    rows, columns = linear_sum_assignment(score.nan_to_num(0.0).cpu().numpy(), maximize=True)
    return Match(torch.as_tensor(rows, device=score.device), torch.as_tensor(columns, device=score.device))
