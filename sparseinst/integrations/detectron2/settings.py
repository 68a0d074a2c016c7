"""Translate a detectron2 config of the reference into a config of this package. A value that is not supported is refused."""

from __future__ import annotations

from collections.abc import Mapping
from functools import reduce
from typing import Any

from detectron2.config import CfgNode

from sparseinst.config import Config
from sparseinst.errors import UserError
from sparseinst.integrations.released import training_settings

_RESNETS = ("build_resnet_backbone", "build_resnet_vd_backbone")
_LEVELS = {
    **{kind: ["res3", "res4", "res5"] for kind in _RESNETS},
    "build_cspnet_backbone": ["csp2", "csp3", "csp4"],
    "build_pyramid_vision_transformer": ["p2", "p3", "p4"],
}
"""For each of the reference's backbones, its names of the features at strides 8, 16 and 32."""
_DEPTHS = {
    "build_resnet_backbone": {50: "resnet50.tv_in1k", 101: "resnet101.tv_in1k"},
    "build_resnet_vd_backbone": {50: "resnet50d.ra2_in1k"},
}
_CSPNETS = {"darknet53": "darknet53.c2ns_in1k", "cspdarknet53": "cspdarknet53.ra_in1k"}
_PVTS = {("b1", False): "pvt_v2_b1.in1k", ("b2", True): "pvt_v2_b2_li.in1k"}
_FROZEN = {"FrozenBN": True, "BN": False, "SyncBN": False}
"""For each kind of BatchNorm, whether it is frozen."""

_ONLY: dict[str, Any] = {
    "INPUT.FORMAT": "RGB",
    "MODEL.MASK_ON": True,
    "MODEL.SPARSE_INST.ENCODER.NAME": "InstanceContextEncoder",
    "MODEL.SPARSE_INST.ENCODER.NORM": "",
    "MODEL.SPARSE_INST.DECODER.OUTPUT_IAM": False,
    "MODEL.SPARSE_INST.LOSS.NAME": "SparseInstCriterion",
    "MODEL.SPARSE_INST.MATCHER.NAME": "SparseInstMatcher",
}
"""Keys of which only one value is supported."""
_ONLY_RESNET: dict[str, Any] = {
    "MODEL.RESNETS.STRIDE_IN_1X1": False,
    "MODEL.RESNETS.NUM_GROUPS": 1,
    "MODEL.RESNETS.WIDTH_PER_GROUP": 64,
    "MODEL.RESNETS.STEM_OUT_CHANNELS": 64,
    "MODEL.RESNETS.RES2_OUT_CHANNELS": 256,
    "MODEL.RESNETS.RES5_DILATION": 1,
    "MODEL.RESNETS.DEFORM_NUM_GROUPS": 1,
}
ONLY_IN_TRAINING: dict[str, Any] = {
    "SOLVER.OPTIMIZER": "ADAMW",
    "SOLVER.WEIGHT_DECAY_NORM": 0.0,
    "SOLVER.WEIGHT_DECAY_BIAS": None,
    "SOLVER.BIAS_LR_FACTOR": 1.0,
}
"""Keys of the optimiser of which only one value is supported."""
_MAX_DETECTIONS = 100
CROP_CHANCE = 0.5
"""The chance of an image to be cropped, if `INPUT.CROP` is enabled. The reference's config has no key for it."""


def add_sparseinst_config(cfg: CfgNode) -> None:
    """Add to a detectron2 config the keys that the reference adds, with the reference's values."""
    cfg.MODEL.MASK_ON = True
    node = cfg.MODEL.SPARSE_INST = CfgNode()
    node.CLS_THRESHOLD = 0.005
    node.MASK_THRESHOLD = 0.45
    node.MAX_DETECTIONS = _MAX_DETECTIONS
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

    The sections `data` and `train` describe the training; detectron2 runs it from its own config.

    Raises:
        UserError: a key has a value that the reference does not know or that this package does not support, or the model was
            never released.
    """
    node = cfg.MODEL.SPARSE_INST
    decoder = node.DECODER
    check_only(cfg, _ONLY)
    _check_loss_and_limits(cfg)
    grouped = {"groups": decoder.GROUPS}
    names = {"BaseIAMDecoder": {}, "GroupIAMDecoder": grouped, "GroupIAMSoftDecoder": {**grouped, "activation": "softmax"}}
    iam = choice("MODEL.SPARSE_INST.DECODER.NAME", decoder.NAME, names)
    if (decoder.INST.DIM, decoder.INST.CONVS) != (decoder.MASK.DIM, decoder.MASK.CONVS):
        raise UserError(
            "MODEL.SPARSE_INST.DECODER: INST and MASK differ in DIM or CONVS; this package needs the same values in both"
        )
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
            **{f"model.decoder.iam.{name}": value for name, value in iam.items()},
            "loss.class_weight": float(node.LOSS.CLASS_WEIGHT),
            "loss.pixel_weight": float(node.LOSS.MASK_PIXEL_WEIGHT),
            "loss.dice_weight": float(node.LOSS.MASK_DICE_WEIGHT),
            "loss.objectness_weight": float(node.LOSS.OBJECTNESS_WEIGHT),
            "matcher.alpha": float(node.MATCHER.ALPHA),
            "matcher.beta": float(node.MATCHER.BETA),
            "inference.short_side": cfg.INPUT.MIN_SIZE_TEST,
            "inference.long_side": cfg.INPUT.MAX_SIZE_TEST,
            "inference.score_threshold": float(node.CLS_THRESHOLD),
            "inference.mask_threshold": float(node.MASK_THRESHOLD),
            **_data(cfg),
            **_training(cfg),
        }
    )


def _data(cfg: CfgNode) -> dict[str, Any]:
    """Return the settings below `data`. Only a crop of the type `absolute_range` has settings there."""
    found = {"data.short_sides": list(cfg.INPUT.MIN_SIZE_TRAIN), "data.long_side": cfg.INPUT.MAX_SIZE_TRAIN}
    if cfg.INPUT.CROP.ENABLED and cfg.INPUT.CROP.TYPE == "absolute_range":
        found |= {"data.crop": CROP_CHANCE, "data.crop_sizes": list(cfg.INPUT.CROP.SIZE)}
    return found


def _training(cfg: CfgNode) -> dict[str, Any]:
    """Return the settings below `train`."""
    solver, clip = cfg.SOLVER, cfg.SOLVER.CLIP_GRADIENTS
    return {
        "train.iterations": solver.MAX_ITER,
        "train.batch_size": solver.IMS_PER_BATCH,
        "train.learning_rate": float(solver.BASE_LR),
        "train.backbone_multiplier": float(solver.BACKBONE_MULTIPLIER),
        "train.weight_decay": float(solver.WEIGHT_DECAY),
        "train.milestones": [step / solver.MAX_ITER for step in solver.STEPS if step < solver.MAX_ITER],
        "train.decay": float(solver.GAMMA),
        "train.warmup_iterations": min(solver.WARMUP_ITERS, solver.MAX_ITER - 1),
        "train.warmup_factor": float(solver.WARMUP_FACTOR),
        "train.clip_norm": float(clip.CLIP_VALUE) if clip.ENABLED and clip.CLIP_TYPE == "full_model" else None,
        "train.precision": "fp16" if solver.AMP.ENABLED else "fp32",
    }


def _check_loss_and_limits(cfg: CfgNode) -> None:
    node = cfg.MODEL.SPARSE_INST
    if sorted(node.LOSS.ITEMS) != ["labels", "masks"]:
        raise UserError(
            f"MODEL.SPARSE_INST.LOSS.ITEMS is {tuple(node.LOSS.ITEMS)!r}, but only ('labels', 'masks') is supported; "
            "a weight of 0 switches a loss off"
        )
    if node.MAX_DETECTIONS != _MAX_DETECTIONS and node.MAX_DETECTIONS < node.DECODER.NUM_MASKS:
        raise UserError(
            f"MODEL.SPARSE_INST.MAX_DETECTIONS is {node.MAX_DETECTIONS}, but all instances of the {node.DECODER.NUM_MASKS} maps "
            "are returned; set MODEL.SPARSE_INST.DECODER.NUM_MASKS instead"
        )


def _backbone(cfg: CfgNode) -> dict[str, Any]:
    """Return the settings below `model.backbone`."""
    kind = cfg.MODEL.BACKBONE.NAME
    levels, available = choice("MODEL.BACKBONE.NAME", kind, _LEVELS), _node(cfg).OUT_FEATURES
    if list(cfg.MODEL.SPARSE_INST.ENCODER.IN_FEATURES) != levels:
        raise UserError(
            f"MODEL.SPARSE_INST.ENCODER.IN_FEATURES is {list(cfg.MODEL.SPARSE_INST.ENCODER.IN_FEATURES)}, but the encoder takes "
            f"{levels} of {kind}"
        )
    if not set(levels) <= set(available):
        raise UserError(f"the OUT_FEATURES of {kind} are {list(available)}, but the encoder takes {levels}")
    if cfg.MODEL.BACKBONE.FREEZE_AT and kind not in _RESNETS:
        raise UserError(
            f"MODEL.BACKBONE.FREEZE_AT is {cfg.MODEL.BACKBONE.FREEZE_AT}, but only a ResNet can be frozen in part; set 0"
        )
    if kind == "build_cspnet_backbone":
        name = choice("MODEL.CSPNET.NAME", cfg.MODEL.CSPNET.NAME, _CSPNETS)
    elif kind in _RESNETS:
        check_only(cfg, _ONLY_RESNET)
        name = choice("MODEL.RESNETS.DEPTH", cfg.MODEL.RESNETS.DEPTH, _DEPTHS[kind])
    else:
        name = choice("MODEL.PVT: (NAME, LINEAR)", (cfg.MODEL.PVT.NAME, cfg.MODEL.PVT.LINEAR), _PVTS)
    found = {f"model.backbone.{key}": value for key, value in training_settings(name).items()}
    found |= {"model.backbone.name": name, "model.backbone.pretrained": False}
    found |= {"model.backbone.freeze_at": cfg.MODEL.BACKBONE.FREEZE_AT}
    norm = _norm(cfg)
    if norm is not None:
        found["model.backbone.frozen_norm"] = _FROZEN[norm]
    return {**found, **(_deformable(cfg) if kind in _RESNETS else {})}


def _deformable(cfg: CfgNode) -> dict[str, Any]:
    resnets = cfg.MODEL.RESNETS
    stages = [stage for stage, on in enumerate(resnets.DEFORM_ON_PER_STAGE, 2) if on]
    version = 2 if resnets.DEFORM_MODULATED and stages else 1
    return {"model.backbone.deformable_stages": stages, "model.backbone.deformable_version": version}


def _node(cfg: CfgNode) -> CfgNode:
    """Return the section of the config that describes the backbone."""
    sections = {"build_cspnet_backbone": "CSPNET", "build_pyramid_vision_transformer": "PVT"}
    return getattr(cfg.MODEL, sections.get(cfg.MODEL.BACKBONE.NAME, "RESNETS"))


def _norm(cfg: CfgNode) -> str | None:
    """Return the backbone's kind of BatchNorm, or None if the backbone has none."""
    if cfg.MODEL.BACKBONE.NAME == "build_pyramid_vision_transformer":
        return None
    plain = cfg.MODEL.BACKBONE.NAME == "build_cspnet_backbone" and not cfg.MODEL.CSPNET.NORM  # the reference's default
    norm = "BN" if plain else _node(cfg).NORM
    choice(f"MODEL.{'CSPNET' if cfg.MODEL.BACKBONE.NAME not in _RESNETS else 'RESNETS'}.NORM", norm, _FROZEN)
    return str(norm)


def synchronised(cfg: CfgNode) -> bool:
    """Return whether the backbone's norms compute their statistics over all processes."""
    return _norm(cfg) == "SyncBN"


def check_only(cfg: CfgNode, only: Mapping[str, Any]) -> None:
    """Raise `UserError` if a key's value differs from the only one that is supported."""
    for key, supported in only.items():
        value = reduce(getattr, key.split("."), cfg)
        if value != supported:
            raise UserError(f"{key} is {value!r}, but only {supported!r} is supported")


def choice(key: str, value: Any, choices: Mapping[Any, Any]) -> Any:
    """Return the entry of `choices` for the value of a key. Raises `UserError` if there is none."""
    if value not in choices:
        raise UserError(f"{key}: {value!r} is not one of {', '.join(map(str, choices))}")
    return choices[value]
