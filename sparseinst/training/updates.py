"""Update a model's weights from gradients: AdamW, its learning rate, gradient scaling and clipping. Both trainings use this."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn

from sparseinst.config import OptimizerConfig
from sparseinst.device import fast_products, is_native, why_not_native
from sparseinst.distributed import average_gradients
from sparseinst.training.schedule import learning_rate_factor

_log = logging.getLogger(__name__)


class Updates:
    """A model with its optimiser and its gradient scaler.

    Args:
        model: is on the device already.
        optimizer: with the groups of `parameter_groups`.
    """

    def __init__(self, model: nn.Module, settings: OptimizerConfig, optimizer: torch.optim.AdamW, device: torch.device) -> None:
        self.updated, self.settings, self.optimizer, self.device = model, settings, optimizer, device
        if not is_native(device, settings.precision):
            _log.info(why_not_native(settings.precision))
        self.scaler = torch.amp.GradScaler(device.type, enabled=settings.precision == "fp16")

    def set_learning_rate(self, iteration: int) -> float:
        """Set each group's learning rate for a step, and return that of the groups without a multiplier."""
        factor = learning_rate_factor(self.settings, iteration)
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
        return self.settings.learning_rate * factor

    def backward(self, losses: dict[str, Tensor]) -> None:
        """Add the gradients of the losses' sum to those of the parameters."""
        with fast_products(self.device, self.settings.precision):
            self.scaler.scale(torch.stack(list(losses.values())).sum()).backward()

    def update(self) -> dict[str, float]:
        """Update the weights, and return the gradient norm if gradients are clipped.

        With fp16, a gradient can overflow. The scaler then skips the step, which has no norm.
        """
        values: dict[str, float] = {}
        average_gradients(self.updated.parameters())
        if self.settings.clip_norm is not None:
            self.scaler.unscale_(self.optimizer)
            norm = nn.utils.clip_grad_norm_(self.updated.parameters(), self.settings.clip_norm)
            if norm.isfinite() or not self.scaler.is_enabled():
                values["gradient_norm"] = float(norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return values

    def state_dict(self) -> dict[str, Any]:
        """Return the state that a checkpoint needs."""
        parts: dict[str, Any] = {"model": self.updated, "optimizer": self.optimizer, "scaler": self.scaler}
        return {name: part.state_dict() for name, part in parts.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state of a checkpoint."""
        self.updated.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
