"""Compute the learning rate of each step, and select the parameters that decay (paper section 4, implementation details)."""

from __future__ import annotations

import math
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parameter import Parameter

from sparseinst.config import OptimizerConfig

_NORMS = (_NormBase, nn.LayerNorm, nn.GroupNorm)


def learning_rate_factor(config: OptimizerConfig, iteration: int) -> float:
    """Return the factor of the learning rate in optimiser step `iteration`, counted from 0."""
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


def parameter_groups(model: nn.Module, config: OptimizerConfig, backbone_multiplier: float = 1.0) -> list[dict[str, Any]]:
    """Return the parameter groups for AdamW, each with its base learning rate as `initial_lr` and its weight decay.

    The parameters of norms and patch embeddings do not decay. In `reference` mode, class tokens do not decay either, but norms
    that timm calls `bn` do: the reference goes by names, and those of its DarkNets contain no `norm`. In `weights` mode, no
    parameter with fewer than two dimensions decays.
    """
    without_decay = {
        id(parameter)
        for name, module in model.named_modules()
        if (isinstance(module, _NORMS) and not name.endswith(".bn"))
        or "PatchEmbed" in type(module).__name__
        or "cls_token" in name
        for parameter in module.parameters()
    }
    groups: dict[tuple[float, float], list[Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        in_backbone = name.startswith("backbone.")
        rate = config.learning_rate * (backbone_multiplier if in_backbone else 1.0)
        decays = parameter.ndim > 1 if config.weight_decay_on == "weights" else "cls_token" not in name
        decay = config.weight_decay if decays and id(parameter) not in without_decay else 0.0
        groups.setdefault((rate, decay), []).append(parameter)
    return [
        {"params": parameters, "lr": rate, "initial_lr": rate, "weight_decay": decay}
        for (rate, decay), parameters in groups.items()
    ]
