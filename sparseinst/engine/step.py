"""One optimiser step: forward, loss, backward, update. `train` goes from one to the next, `bench --train` times one."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

from sparseinst.config import Config
from sparseinst.criterion import Criterion, count, prepare_targets
from sparseinst.data.coco import CocoSplit
from sparseinst.data.loader import Batch
from sparseinst.engine.device import autocast
from sparseinst.engine.distributed import average_gradients, largest, mean_counts, share_norms
from sparseinst.engine.norms import absorb_norms, keep_types
from sparseinst.engine.schedule import learning_rate_factor, parameter_groups
from sparseinst.errors import UserError
from sparseinst.models.decoder import Predictions
from sparseinst.models.sparseinst import SparseInst

PHASES = ("forward", "loss", "backward", "update")


def _nothing(_: str) -> None:
    pass


class Step:
    """A model in training, and all that a step changes with it: optimiser, gradient scaler, moving average.

    Args:
        model: goes to the device; its frozen norms change how they work in training, see `absorb_norms`.
        stride: of the masks in the batches, see `TrainSet`.
        plain: as the reference trains, with contiguous tensors and torch's default AdamW: what the rest is timed against.
    """

    def __init__(self, model: SparseInst, config: Config, device: torch.device, *, stride: int, plain: bool = False) -> None:
        self.config, self.device, self.stride = config, device, stride
        self.layout = torch.contiguous_format if plain else torch.channels_last
        if config.model.backbone.frozen_norm:
            (keep_types if plain else absorb_norms)(model.backbone)
        self.model = model.to(device).to(memory_format=self.layout).train()
        if config.loss.reduction == "global":
            share_norms(self.model)
        self.network: Callable[[Tensor], Predictions] = self.model
        if config.train.checkpoint_activations:
            self.network = partial(recomputed, self.model)
        if config.train.compile:
            self.network = torch.compile(self.network, dynamic=True)
        self.criterion = Criterion(config.loss, config.matcher)
        groups = parameter_groups(self.model, config.train)
        self.optimizer = torch.optim.AdamW(groups, fused=None if plain else True)
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.train.precision == "fp16")
        decay = config.train.ema_decay
        self.ema = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True) if decay else None

    def gradients(self, parts: list[Batch], passed: Callable[[str], Any] = _nothing) -> dict[str, Tensor]:
        """Gradients of the mean loss of the parts; returns the mean of each weighted loss.

        Args:
            passed: is told which of `PHASES` a part has been through.
        """
        if self.config.loss.reduction == "global":  # padding is part of what the network sees: the same for the whole step
            size = largest([part.padded for part in parts], self.device)
            parts = [part.padded_to(size) for part in parts]
        targets = [
            prepare_targets(
                [labels.to(self.device, non_blocking=True) for labels in part.labels],
                [masks.to(self.device, non_blocking=True) for masks in part.masks],
                part.padded,
                self.model.mask_size(part.padded),
                self.stride,
            )
            for part in parts
        ]
        num_maps = self.config.model.decoder.iam.num_maps
        counts = mean_counts([count(target, num_maps) for target in targets], self.device)
        total: dict[str, Tensor] = {}
        for part, target in zip(parts, targets, strict=True):
            with autocast(self.device, self.config.train.precision):
                images = part.images.to(self.device, non_blocking=True, memory_format=self.layout)
                images = self.model.normalise(images, part.sizes)
                predictions = self.network(images)
            passed("forward")
            losses = self.criterion(predictions, target, counts)
            mean = {name: loss / len(parts) for name, loss in losses.items()}
            passed("loss")
            self.scaler.scale(torch.stack(list(mean.values())).sum()).backward()
            passed("backward")
            for name, loss in mean.items():
                total[name] = total[name] + loss.detach() if name in total else loss.detach()
        return total

    def update(self) -> dict[str, float]:
        """The optimiser's step; returns what is to be told of it."""
        facts = {}
        average_gradients(self.model.parameters())
        if self.config.train.clip_norm is not None:
            self.scaler.unscale_(self.optimizer)
            norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.config.train.clip_norm)
            facts["gradient_norm"] = float(norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.ema is not None:
            self.ema.update_parameters(self.model)
        return facts

    def set_learning_rate(self, iteration: int) -> float:
        factor = learning_rate_factor(self.config.train, iteration)
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
        return self.config.train.learning_rate * factor

    def trained(self) -> SparseInst:
        """The model to evaluate and to keep: the moving average, where there is one."""
        model = self.ema.module if self.ema is not None else self.model
        assert isinstance(model, SparseInst)
        return model

    def state_dict(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "ema": self.ema.state_dict() if self.ema is not None else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])


def recomputed(model: SparseInst, images: Tensor) -> Predictions:
    """The model's output, of whose making only what goes from module to module is kept for the backward pass."""
    x: Any = images
    for module in (model.backbone, model.encoder, model.decoder):
        x = checkpoint(module, x, use_reentrant=False)
    assert isinstance(x, Predictions)
    return x


def check_classes(config: Config, split: CocoSplit) -> None:
    """Raises `UserError` where a model is for other classes than the data."""
    if len(split.categories) != config.model.num_classes:
        raise UserError(
            f"{split.file}: has {len(split.categories)} categories, model.num_classes is {config.model.num_classes}: "
            f"set model.num_classes={len(split.categories)}"
        )
