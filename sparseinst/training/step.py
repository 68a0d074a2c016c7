"""Do one optimiser step: forward pass, loss, backward pass, update. `train` repeats it; `bench --train` times it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

from sparseinst.config import REFERENCE_BATCH, Config
from sparseinst.criterion import Criterion, count, prepare_targets
from sparseinst.data.coco import CocoSplit
from sparseinst.data.loader import Batch
from sparseinst.device import autocast, is_native
from sparseinst.distributed import largest, mean_counts, share_norms
from sparseinst.errors import UserError
from sparseinst.machine import machine_memory
from sparseinst.models.backbone import Backbone
from sparseinst.models.network import Predictions
from sparseinst.models.norms import absorb_norms
from sparseinst.models.sparseinst import SparseInst, build_model
from sparseinst.training.schedule import parameter_groups
from sparseinst.training.updates import Updates

_log = logging.getLogger(__name__)

PHASES = ("forward", "loss", "backward", "update")


def _nothing(_: str) -> None:
    pass


class Step(Updates):
    """A model in training, with everything that a step changes: optimiser, gradient scaler, moving average of the weights.

    Args:
        model: is moved to the device, and its convolutions absorb its frozen norms, see `absorb_norms`.
    """

    memory_format = torch.channels_last

    def __init__(self, model: SparseInst, config: Config, device: torch.device) -> None:
        self.config = config
        if config.model.backbone.frozen_norm:
            self._prepare_frozen_norms(model.backbone)
        self.model = model.to(device).to(memory_format=self.memory_format).train()
        if config.loss.reduction == "global":
            share_norms(self.model)
        self.network: Callable[[Tensor], Predictions] = self.model
        if config.train.checkpoint_activations:
            self.network = partial(recomputed, self.model)
        if config.train.compile and is_native(device, config.train.precision):
            self.network = torch.compile(self.network, dynamic=True)
        elif config.train.compile:
            _log.warning("train.compile has no effect, because torch has no fast %s on this CPU", config.train.precision)
        self.criterion = Criterion(config.loss, config.matcher)
        groups = parameter_groups(self.model, config.train, config.train.backbone_multiplier)
        super().__init__(self.model, config.train, self._make_optimizer(groups), device)
        decay = config.train.ema_decay
        self.ema = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True) if decay else None

    def _prepare_frozen_norms(self, backbone: Backbone) -> None:
        """Make the backbone's convolutions absorb its frozen norms in training."""
        absorb_norms(backbone)

    def _make_optimizer(self, groups: Sequence[dict[str, Any]]) -> torch.optim.AdamW:
        """Return the optimiser for these parameter groups."""
        return torch.optim.AdamW(groups, fused=True)

    def gradients(
        self, parts: list[Batch], phase_done: Callable[[str], Any] = _nothing, *, seeds: Sequence[int] | None = None
    ) -> dict[str, Tensor]:
        """Compute the gradients of the parts' mean loss, and return the mean of each weighted loss.

        Args:
            phase_done: is called with a phase of `PHASES` each time a part has finished it.
            seeds: a seed for the random numbers of each part (drop path), which then depend on nothing else. None leaves torch's
                generators as they are.
        """
        if self.config.loss.reduction == "global":  # the padding changes the result, so all parts need the same padding
            size = largest([part.padded for part in parts], self.device)
            parts = [part.padded_to(size) for part in parts]
        targets = [
            prepare_targets(
                [labels.to(self.device, non_blocking=True) for labels in part.labels],
                [masks.to(self.device, non_blocking=True) for masks in part.masks],
                part.padded,
                self.model.mask_size(part.padded),
                part.mask_stride,
            )
            for part in parts
        ]
        num_maps = self.config.model.decoder.iam.num_maps
        counts = mean_counts([count(target, num_maps) for target in targets], self.device)
        total: dict[str, Tensor] = {}
        for index, (part, target) in enumerate(zip(parts, targets, strict=True)):
            if seeds is not None:
                torch.manual_seed(seeds[index])
            with autocast(self.device, self.config.train.precision):
                images = part.images.to(self.device, non_blocking=True, memory_format=self.memory_format)
                images = self.model.normalise(images, part.sizes)
                predictions = self.network(images)
            phase_done("forward")
            losses = self.criterion(predictions, target, counts)
            mean = {name: loss / len(parts) for name, loss in losses.items()}
            phase_done("loss")
            self.backward(mean)
            phase_done("backward")
            for name, loss in mean.items():
                total[name] = total[name] + loss.detach() if name in total else loss.detach()
        return total

    def update(self) -> dict[str, float]:
        """Update the weights and their moving average, and return the gradient norm if gradients are clipped."""
        values = super().update()
        if self.ema is not None:
            self.ema.update_parameters(self.model)
        return values

    def trained(self) -> SparseInst:
        """Return the model to evaluate and to save: the moving average, if there is one."""
        model = self.ema.module if self.ema is not None else self.model
        assert isinstance(model, SparseInst)
        return model

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "ema": self.ema.state_dict() if self.ema is not None else None}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])


def recomputed(model: SparseInst, images: Tensor) -> Predictions:
    """Return the model's output. Only the tensors between its modules are kept; the backward pass computes the others again."""
    x: Any = images
    for module in (model.backbone, model.encoder, model.decoder):
        x = checkpoint(module, x, use_reentrant=False)
    assert isinstance(x, Predictions)
    return x


def check_batch(name: str, batch_size: int, images: int) -> None:
    """Check a batch size. Up to the paper's 64, it may exceed the number of images; a batch then uses images more than once.

    Args:
        name: the setting.
        images: the number of training images with instances.

    Raises:
        UserError: it exceeds both.
    """
    if batch_size > max(images, REFERENCE_BATCH):
        raise UserError(
            f"{name}={batch_size}: there are only {images} training images with instances: set {name}={images} or lower"
        )


def check_memory(config: Config, device: torch.device) -> None:
    """Check that the weights, gradients and AdamW's two means of a model fit the device. The model is built without memory.

    Raises:
        UserError: they do not. The message says what to lower.
    """
    with torch.device("meta"):
        model = build_model(config.model, load_pretrained=False)
    needed = 16 * sum(parameter.numel() for parameter in model.parameters())
    have = torch.cuda.mem_get_info(device)[1] if device.type == "cuda" else machine_memory()
    if needed > have:
        raise UserError(
            f"the model has {needed // 16 / 1e9:.1f} billion parameters, and training it needs {needed / 2**30:.0f} GiB; "
            f"{device} has {have / 2**30:.0f} GiB: {LOWER_MODEL}"
        )


LOWER_MODEL = "lower model.decoder.width, model.decoder.depth, model.encoder.channels or model.decoder.iam.num_maps"
LOWER_TRAINING = (
    "lower train.batch_size, data.short_sides or data.long_side, raise train.accumulate, or set "
    "train.checkpoint_activations=true; the checkpoints are kept"
)


def check_classes(config: Config, split: CocoSplit) -> None:
    """Check that a model has as many classes as the data.

    Raises:
        UserError: the numbers differ.
    """
    if len(split.categories) != config.model.num_classes:
        raise UserError(
            f"{split.file}: has {len(split.categories)} categories, but model.num_classes is {config.model.num_classes}: "
            f"set model.num_classes={len(split.categories)}"
        )
