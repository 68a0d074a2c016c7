"""Give SparseInst the interface of detectron2's models and the reference's names of tensors."""

from __future__ import annotations

from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.structures import BitMasks, ImageList, Instances, PolygonMasks
from timm.layers.norm_act import convert_sync_batchnorm
from torch import Tensor, nn

from sparseinst.config import SIZE_DIVISOR
from sparseinst.criterion import Criterion, count, prepare_targets
from sparseinst.distributed import mean_counts
from sparseinst.errors import UserError
from sparseinst.integrations.detectron2.settings import from_detectron2, synchronised
from sparseinst.integrations.released import COUNTER, SOFTMAX_BIAS, to_our_names, to_reference_names
from sparseinst.models.sparseinst import build_model
from sparseinst.postprocess import ImageSize, postprocess

LOSS_NAMES = {"class": "loss_ce", "dice": "loss_dice", "pixel": "loss_mask", "objectness": "loss_objectness"}
"""The reference's name of each loss."""


@META_ARCH_REGISTRY.register()
class SparseInst(nn.Module):
    """The model with detectron2's interface.

    It takes dictionaries. In training it returns losses, else `Instances` with scores, pred_classes and pred_masks.

    Attributes:
        softmax_bias: (1,), only with softmax maps: the reference's scalar before the softmax. It has no effect, so it is not
            trained; it is there to load and to write the reference's checkpoints completely.
    """

    def __init__(self, cfg: CfgNode) -> None:
        super().__init__()
        self.config = from_detectron2(cfg)
        self.model = build_model(self.config.model, load_pretrained=False)
        if synchronised(cfg):
            self.model.backbone.body = convert_sync_batchnorm(self.model.backbone.body)
        if self.config.model.decoder.iam.activation == "softmax":
            self.register_buffer("softmax_bias", torch.ones(1))
        self.criterion = Criterion(self.config.loss, self.config.matcher)
        mean, std = (torch.tensor(values)[:, None, None] for values in (cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD))
        self.model.pixel_mean, self.model.pixel_std = mean, std
        self.input_format = cfg.INPUT.FORMAT
        self.register_state_dict_post_hook(_use_reference_names)
        self.register_load_state_dict_pre_hook(_use_our_names)
        self.to(cfg.MODEL.DEVICE)

    @property
    def device(self) -> torch.device:
        return self.model.pixel_mean.device

    def forward(self, batched_inputs: list[dict[str, Any]]) -> dict[str, Tensor] | list[dict[str, Instances]]:
        """Return the losses in training, else the instances of each image.

        Args:
            batched_inputs: a dictionary an image: `image` (3, H, W) RGB of 0-255, and in training `instances` with the truth.
        """
        images = [entry["image"].to(self.device) for entry in batched_inputs]
        batch = ImageList.from_tensors(images, SIZE_DIVISOR)
        sizes = [(int(height), int(width)) for height, width in batch.image_sizes]
        padded = (batch.tensor.shape[-2], batch.tensor.shape[-1])
        predictions = self.model(self.model.normalise(batch.tensor, sizes))
        if self.training:
            truth = [entry["instances"].to(self.device) for entry in batched_inputs]
            targets = prepare_targets(
                [instances.gt_classes for instances in truth],
                [_masks(instances, size).to(self.device) for instances, size in zip(truth, sizes, strict=True)],
                padded,
                self.model.mask_size(padded),
            )
            counts = mean_counts([count(targets, self.config.model.decoder.iam.num_maps)], self.device)
            return {LOSS_NAMES[name]: loss for name, loss in self.criterion(predictions, targets, counts).items()}
        original = [
            ImageSize(size, (entry.get("height", size[0]), entry.get("width", size[1])))
            for entry, size in zip(batched_inputs, sizes, strict=True)
        ]
        found = postprocess(predictions, padded, original, self.config.inference)
        return [
            {
                "instances": Instances(
                    size.original, pred_masks=instances.masks, scores=instances.scores, pred_classes=instances.labels
                )
            }
            for instances, size in zip(found, original, strict=True)
        ]

    def reference_names(self) -> dict[str, str]:
        """Return the reference's name of each tensor of `model`, by our name."""
        return to_reference_names(self.model.state_dict())


def _masks(instances: Instances, size: tuple[int, int]) -> Tensor:
    """Return the masks of K annotated instances, (K, H, W)."""
    if not len(instances):
        return torch.zeros((0, *size), dtype=torch.uint8)
    masks = instances.gt_masks
    if isinstance(masks, PolygonMasks):
        masks = BitMasks.from_polygon_masks(masks, *size)
    if isinstance(masks, BitMasks):
        masks = masks.tensor
    return masks.to(torch.uint8)


def _use_reference_names(module: SparseInst, state: dict[str, Any], prefix: str, _metadata: Any) -> None:
    """Rename the tensors of a state dict that is being written, in place."""
    ours = {key: state.pop(key) for key in [key for key in state if key.startswith(f"{prefix}model.")]}
    names = to_reference_names([key.removeprefix(f"{prefix}model.") for key in ours])
    state.update({prefix + names[key.removeprefix(f"{prefix}model.")]: tensor for key, tensor in ours.items()})
    if hasattr(module, "softmax_bias"):
        state[prefix + SOFTMAX_BIAS] = state.pop(f"{prefix}softmax_bias")


def _use_our_names(module: SparseInst, state: dict[str, Any], prefix: str, *_rest: Any) -> None:
    """Rename the tensors of a state dict that is being loaded, in place.

    Tensors outside `backbone`, `encoder` and `decoder` only are a backbone's ImageNet weights with the names of timm or PVT. A
    norm's counter of batches has no effect, so one that is missing or left over is no error.

    Raises:
        UserError: none of the tensors is part of the model.
    """
    theirs = {key.removeprefix(prefix): state.pop(key) for key in [key for key in state if key.startswith(prefix)]}
    if not any(key.startswith(("backbone.", "encoder.", "decoder.")) for key in theirs):
        theirs = {f"backbone.{key}": tensor for key, tensor in theirs.items()}
    own = module.model.state_dict()
    ours = {name: theirs[key] for key, name in to_our_names(theirs).items()}
    if theirs and not ours.keys() & own.keys():
        first = ", ".join(sorted(theirs)[:3])
        raise UserError(
            f"the checkpoint has no tensor of {module.config.model.backbone.name} in SparseInst; its first are {first}"
        )
    counters = {name: tensor for name, tensor in own.items() if name.endswith(COUNTER)}
    ours = counters | {name: tensor for name, tensor in ours.items() if name in own or not name.endswith(COUNTER)}
    state.update({f"{prefix}model.{name}": tensor for name, tensor in ours.items()})
    if SOFTMAX_BIAS in theirs:
        state[f"{prefix}softmax_bias"] = theirs[SOFTMAX_BIAS]
