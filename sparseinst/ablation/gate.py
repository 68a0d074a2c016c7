"""Decide from a training's log whether it was long enough to count as evidence. Imports no torch.

A row that collapsed, or that would still improve, says little about the method that it stands for. The thresholds are
deliberately loose: a training fails only if nobody would call it finished.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

LEAST_AP = 1.0
"""A model below this AP has not learned the task."""
MOST_RISE = 3.0
"""AP may rise by this much in the last tenth of the steps. (The default row of `small` rises by about 2.)"""
MOST_FALL = 0.05
"""The loss may fall by this share of itself from the last tenth but one to the last tenth of the steps."""
CEILING = 0.95
"""A Dice loss above this share of its maximum means that the masks do not match their objects at all."""
_POINTS = 50


def curve(steps: Sequence[Mapping[str, float]]) -> dict[str, list[float]]:
    """Return the means of each loss over at most 50 equal parts of a training.

    Args:
        steps: the lines of the log that hold losses.

    Returns:
        `iteration`, the last step of each part, and for each loss (`loss` is their sum) as many means.
    """
    total = int(steps[-1]["iteration"])
    parts: dict[int, list[Mapping[str, float]]] = {}
    for line in steps:
        parts.setdefault(min(int(line["iteration"] - 1) * _POINTS // total, _POINTS - 1), []).append(line)
    names = [name for name in steps[-1] if name.startswith("loss")]
    means = {name: [round(sum(line[name] for line in part) / len(part), 5) for part in parts.values()] for name in names}
    return {"iteration": [int(part[-1]["iteration"]) for part in parts.values()], **means}


def not_trained(result: Mapping[str, Any], config: Mapping[str, Any]) -> list[str]:
    """Return the reasons why a training is no evidence; an empty list if there is none.

    Args:
        result: the training's record: `steps`, and if they are known `curve` and `history`.
        config: its config.
    """
    reasons = []
    steps = result["steps"]
    losses = result.get("curve")
    if losses is not None and len(losses["iteration"]) >= 20:
        before, after = (_mean(losses, "loss", steps, *part) for part in ((0.8, 0.9), (0.9, 1.0)))
        if before > 0 and (fall := 1 - after / before) > MOST_FALL:
            reasons.append(f"the loss still falls by {100 * fall:.1f} % in the last tenth of the steps")
        if "loss_dice" in losses and config["loss"]["dice_weight"] > 0:
            share = _mean(losses, "loss_dice", steps, 0.9, 1.0) / config["loss"]["dice_weight"]
            if share > CEILING:
                reasons.append(f"the Dice loss ends at {100 * share:.0f} % of its maximum")
    history = [entry for entry in result.get("history", []) if entry.get("AP") is not None]
    late = [entry for entry in history if entry["iteration"] >= 0.75 * steps]
    if len(late) > 1:
        first, last = late[-2], late[-1]
        rise = (last["AP"] - first["AP"]) * 0.1 * steps / (last["iteration"] - first["iteration"])
        if rise > MOST_RISE:
            reasons.append(f"AP still rises by {rise:.1f} in a tenth of the steps")
    return reasons


def untrained_ap(ap: float | None) -> list[str]:
    """Return the reason why a model with this AP is no evidence; an empty list if its AP is not near zero."""
    return [f"AP {ap:.1f} is near zero"] if ap is not None and ap < LEAST_AP else []


def _mean(losses: Mapping[str, Sequence[float]], name: str, steps: int, start: float, end: float) -> float:
    values = [value for at, value in zip(losses["iteration"], losses[name], strict=True) if start * steps < at <= end * steps]
    return sum(values) / len(values) if values else 0.0
