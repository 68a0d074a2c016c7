"""Use SparseInst in detectron2 with the reference implementation's configs and checkpoints, on a current torch.

    from sparseinst.integrations.detectron2 import Trainer, add_sparseinst_config

    cfg = get_cfg()
    add_sparseinst_config(cfg)
    cfg.merge_from_file("sparse_inst_r50_giam.yaml")

This code registers the meta-architecture `SparseInst`. Its state dict uses the reference's names, so that each side loads the
other's checkpoints, and detectron2's ImageNet weights load as well. detectron2 is optional; no other module of this package
imports this one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer
from detectron2.modeling import META_ARCH_REGISTRY
from detectron2.structures import BitMasks, ImageList, Instances, PolygonMasks
from torch import Tensor, nn

from sparseinst.config import SIZE_DIVISOR, Config
from sparseinst.criterion import Criterion, prepare_targets
from sparseinst.errors import UserError
from sparseinst.integrations.released import to_our_names, to_reference_names
from sparseinst.models.sparseinst import build_model
from sparseinst.postprocess import ImageSize, postprocess

_BACKBONES = {
    "build_resnet_backbone": None,  # MODEL.RESNETS decides
    "build_resnet_vd_backbone": "resnet50d.ra2_in1k",
    "build_cspnet_backbone": None,  # MODEL.CSPNET.NAME decides
    "build_pyramid_vision_transformer": None,  # MODEL.PVT decides
}


def add_sparseinst_config(cfg: CfgNode) -> None:
    """Add to a detectron2 config the keys that the reference adds, with the reference's values."""
    cfg.MODEL.MASK_ON = True
    node = cfg.MODEL.SPARSE_INST = CfgNode()
    node.CLS_THRESHOLD = 0.005
    node.MASK_THRESHOLD = 0.45
    node.MAX_DETECTIONS = 100
    node.ENCODER = CfgNode(
        {"NAME": "InstanceContextEncoder", "NORM": "", "IN_FEATURES": ["res3", "res4", "res5"], "NUM_CHANNELS": 256}
    )
    node.DECODER = CfgNode(
        {
            "NAME": "BaseIAMDecoder", "NUM_MASKS": 100, "NUM_CLASSES": 80, "KERNEL_DIM": 128, "SCALE_FACTOR": 2.0,
            "OUTPUT_IAM": False, "GROUPS": 4, "INST": {"DIM": 256, "CONVS": 4}, "MASK": {"DIM": 256, "CONVS": 4},
        }
    )  # fmt: skip
    node.LOSS = CfgNode(
        {
            "NAME": "SparseInstCriterion", "ITEMS": ("labels", "masks"), "CLASS_WEIGHT": 2.0, "MASK_PIXEL_WEIGHT": 5.0,
            "MASK_DICE_WEIGHT": 2.0, "OBJECTNESS_WEIGHT": 1.0,
        }
    )  # fmt: skip
    node.MATCHER = CfgNode({"NAME": "SparseInstMatcher", "ALPHA": 0.8, "BETA": 0.2})
    node.DATASET_MAPPER = "SparseInstDatasetMapper"
    cfg.SOLVER.OPTIMIZER = "ADAMW"
    cfg.SOLVER.BACKBONE_MULTIPLIER = 1.0
    cfg.SOLVER.AMSGRAD = False
    cfg.MODEL.CSPNET = CfgNode({"NAME": "darknet53", "NORM": "", "OUT_FEATURES": ["csp1", "csp2", "csp3", "csp4"]})
    cfg.MODEL.PVT = CfgNode({"NAME": "b1", "LINEAR": False, "OUT_FEATURES": ["p2", "p3", "p4"]})


def from_detectron2(cfg: CfgNode) -> Config:
    """Translate a detectron2 config of the reference into a config of this package.

    Raises:
        UserError: the config holds a value that the reference does not know either, or a model that was never released.
    """
    node = cfg.MODEL.SPARSE_INST
    decoder = node.DECODER
    names = {"BaseIAMDecoder": {}, "GroupIAMDecoder": {"groups": decoder.GROUPS}}
    names["GroupIAMSoftDecoder"] = {"groups": decoder.GROUPS, "activation": "softmax"}
    if decoder.NAME not in names:
        raise UserError(f"MODEL.SPARSE_INST.DECODER.NAME: {decoder.NAME!r} is not one of {', '.join(names)}")
    if (decoder.INST.DIM, decoder.INST.CONVS) != (decoder.MASK.DIM, decoder.MASK.CONVS):
        raise UserError(
            "MODEL.SPARSE_INST.DECODER: INST and MASK differ in DIM or CONVS; this package needs the same values in both"
        )
    if cfg.INPUT.FORMAT != "RGB":
        raise UserError(f"INPUT.FORMAT is {cfg.INPUT.FORMAT!r}, but the models take RGB")
    sides, longest = tuple(cfg.INPUT.MIN_SIZE_TRAIN), cfg.INPUT.MAX_SIZE_TRAIN
    milestones = [step / cfg.SOLVER.MAX_ITER for step in cfg.SOLVER.STEPS if step < cfg.SOLVER.MAX_ITER]
    return Config().replace(
        {
            **_backbone(cfg),
            "model.num_classes": decoder.NUM_CLASSES,
            "model.encoder.channels": node.ENCODER.NUM_CHANNELS,
            "model.decoder.depth": decoder.INST.CONVS,
            "model.decoder.width": decoder.INST.DIM,
            "model.decoder.kernel_dim": decoder.KERNEL_DIM,
            "model.decoder.mask_scale": float(decoder.SCALE_FACTOR),
            "model.decoder.iam.num_maps": decoder.NUM_MASKS,
            **{f"model.decoder.iam.{name}": value for name, value in names[decoder.NAME].items()},
            "loss.dice": "masks" in node.LOSS.ITEMS,
            "loss.class_weight": float(node.LOSS.CLASS_WEIGHT),
            "loss.pixel_weight": float(node.LOSS.MASK_PIXEL_WEIGHT),
            "loss.dice_weight": float(node.LOSS.MASK_DICE_WEIGHT),
            "loss.objectness_weight": float(node.LOSS.OBJECTNESS_WEIGHT),
            "matcher.alpha": float(node.MATCHER.ALPHA),
            "matcher.beta": float(node.MATCHER.BETA),
            "data.short_sides": list(sides),
            "data.long_side": longest,
            "inference.short_side": cfg.INPUT.MIN_SIZE_TEST,
            "inference.long_side": cfg.INPUT.MAX_SIZE_TEST,
            "inference.score_threshold": float(node.CLS_THRESHOLD),
            "inference.mask_threshold": float(node.MASK_THRESHOLD),
            "train.iterations": cfg.SOLVER.MAX_ITER,
            "train.batch_size": cfg.SOLVER.IMS_PER_BATCH,
            "train.learning_rate": float(cfg.SOLVER.BASE_LR),
            "train.backbone_multiplier": float(cfg.SOLVER.BACKBONE_MULTIPLIER),
            "train.weight_decay": float(cfg.SOLVER.WEIGHT_DECAY),
            "train.milestones": milestones,
            "train.decay": float(cfg.SOLVER.GAMMA),
            "train.warmup_iterations": min(cfg.SOLVER.WARMUP_ITERS, cfg.SOLVER.MAX_ITER - 1),
            "train.warmup_factor": float(cfg.SOLVER.WARMUP_FACTOR),
        }
    )


def _backbone(cfg: CfgNode) -> dict[str, Any]:
    """Return the settings below `model.backbone`."""
    kind, resnets = cfg.MODEL.BACKBONE.NAME, cfg.MODEL.RESNETS
    if kind not in _BACKBONES:
        raise UserError(f"MODEL.BACKBONE.NAME: {kind!r} is not one of {', '.join(_BACKBONES)}")
    found: dict[str, Any] = {"model.backbone.pretrained": False, "model.backbone.freeze_at": cfg.MODEL.BACKBONE.FREEZE_AT}
    if kind == "build_cspnet_backbone":
        csp = {"darknet53": "darknet53.c2ns_in1k", "cspdarknet53": "cspdarknet53.ra_in1k"}
        return {**found, "model.backbone.name": _choice("MODEL.CSPNET.NAME", cfg.MODEL.CSPNET.NAME, csp)}
    if kind == "build_pyramid_vision_transformer":
        name = f"{cfg.MODEL.PVT.NAME}{'_li' if cfg.MODEL.PVT.LINEAR else ''}"
        return {
            **found,
            "model.backbone.name": _choice("MODEL.PVT", name, {"b1": "pvt_v2_b1.in1k", "b2_li": "pvt_v2_b2_li.in1k"}),
        }
    if resnets.STRIDE_IN_1X1:
        raise UserError("MODEL.RESNETS.STRIDE_IN_1X1 must be False: the released models have the stride in the 3x3 convolution")
    stages = [stage for stage, on in enumerate(resnets.DEFORM_ON_PER_STAGE, 2) if on]
    depths = {50: "resnet50.tv_in1k", 101: "resnet101.tv_in1k"}
    return {
        **found,
        "model.backbone.name": _BACKBONES[kind] or _choice("MODEL.RESNETS.DEPTH", resnets.DEPTH, depths),
        "model.backbone.frozen_norm": resnets.NORM == "FrozenBN",
        "model.backbone.deformable_stages": stages,
        "model.backbone.deformable_version": 2 if resnets.DEFORM_MODULATED and stages else 1,
    }


def _choice(key: str, value: Any, choices: Mapping[Any, str]) -> str:
    if value not in choices:
        raise UserError(f"{key}: {value!r} is not one of {', '.join(map(str, choices))}")
    return choices[value]


@META_ARCH_REGISTRY.register()
class SparseInst(nn.Module):
    """The model with detectron2's interface.

    It takes dictionaries. In training it returns losses, else `Instances` with scores, pred_classes and pred_masks.
    """

    def __init__(self, cfg: CfgNode) -> None:
        super().__init__()
        self.config = from_detectron2(cfg)
        self.model = build_model(self.config.model, load_pretrained=False)
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
            return {f"loss_{name}": loss for name, loss in self.criterion(predictions, targets).items()}
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


def _use_reference_names(_module: nn.Module, state: dict[str, Any], prefix: str, _metadata: Any) -> None:
    """Rename the tensors of a state dict that is being written, in place."""
    ours = {key: state.pop(key) for key in [key for key in state if key.startswith(f"{prefix}model.")]}
    names = to_reference_names([key.removeprefix(f"{prefix}model.") for key in ours])
    state.update({prefix + names[key.removeprefix(f"{prefix}model.")]: tensor for key, tensor in ours.items()})


def _use_our_names(_module: nn.Module, state: dict[str, Any], prefix: str, *_rest: Any) -> None:
    """Rename the tensors of a state dict that is being loaded, in place."""
    theirs = {key.removeprefix(prefix): state.pop(key) for key in [key for key in state if key.startswith(prefix)]}
    state.update({f"{prefix}model.{ours}": theirs[key] for key, ours in to_our_names(theirs).items()})


class Trainer(DefaultTrainer):  # type: ignore[misc] # detectron2 has no types
    """detectron2's trainer with the reference's optimiser: AdamW without weight decay for names with `norm` or `patch_embed`."""

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        if cfg.SOLVER.OPTIMIZER != "ADAMW":
            raise UserError(
                f"SOLVER.OPTIMIZER is {cfg.SOLVER.OPTIMIZER!r}, but only ADAMW is supported; the models were trained with it"
            )
        from sparseinst.training.schedule import parameter_groups

        adapter = getattr(model, "module", model)  # the trainer may have wrapped it for several processes
        assert isinstance(adapter, SparseInst)
        train = from_detectron2(cfg).train
        groups = parameter_groups(adapter.model, train, train.backbone_multiplier)
        return torch.optim.AdamW(groups, lr=cfg.SOLVER.BASE_LR, amsgrad=cfg.SOLVER.AMSGRAD)
