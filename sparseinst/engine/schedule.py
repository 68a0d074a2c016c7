"""Learning rate over time and which parameters decay (paper section 4, implementation details)."""

from __future__ import annotations

import math
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parameter import Parameter

from sparseinst.config import TrainConfig

_NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm)


def learning_rate_factor(config: TrainConfig, iteration: int) -> float:
    """What the learning rate is multiplied by in optimiser step `iteration`, counted from 0."""
    if config.schedule == "step":
        passed = sum(iteration >= round(m * config.iterations) for m in config.milestones)
        factor = config.decay**passed
    else:
        rest = max(1, config.iterations - config.warmup_iterations)
        factor = 0.5 * (1 + math.cos(math.pi * max(0, iteration - config.warmup_iterations) / rest))
    if iteration < config.warmup_iterations:
        progress = iteration / config.warmup_iterations
        factor *= config.warmup_factor * (1 - progress) + progress
    return factor


def parameter_groups(model: nn.Module, config: TrainConfig) -> list[dict[str, Any]]:
    """Groups for AdamW, each with its base learning rate as `initial_lr` and its weight decay.

    In `reference` mode the parameters of norms, patch embeddings and class tokens do not decay; in `weights` mode no
    parameter of fewer than two dimensions does.
    """
    spared = {
        id(parameter)
        for name, module in model.named_modules()
        if isinstance(module, _NORMS) or "PatchEmbed" in type(module).__name__ or "cls_token" in name
        for parameter in module.parameters()
    }
    groups: dict[tuple[float, float], list[Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        in_backbone = name.startswith("backbone.")
        rate = config.learning_rate * (config.backbone_multiplier if in_backbone else 1.0)
        decays = parameter.ndim > 1 if config.weight_decay_on == "weights" else "cls_token" not in name
        decay = config.weight_decay if decays and id(parameter) not in spared else 0.0
        groups.setdefault((rate, decay), []).append(parameter)
    return [
        {"params": parameters, "lr": rate, "initial_lr": rate, "weight_decay": decay}
        for (rate, decay), parameters in groups.items()
    ]
