"""Give the detectron2 configs of the reference's 18 YAML files, as their differences from detectron2's defaults.

`SPARSEINST_REFERENCE_CONFIGS` may name a folder with the files themselves; a test then compares them with these.
"""

from pathlib import Path
from typing import Any

from sparseinst.config import MODELS

BASE: dict[str, Any] = {
    "MODEL.META_ARCHITECTURE": "SparseInst",
    "MODEL.PIXEL_MEAN": [123.675, 116.280, 103.530],
    "MODEL.PIXEL_STD": [58.395, 57.120, 57.375],
    "MODEL.BACKBONE.FREEZE_AT": 0,
    "MODEL.BACKBONE.NAME": "build_resnet_backbone",
    "MODEL.RESNETS.STRIDE_IN_1X1": False,
    "MODEL.RESNETS.OUT_FEATURES": ["res3", "res4", "res5"],
    "MODEL.SPARSE_INST.DECODER.NAME": "GroupIAMDecoder",
    "DATASETS.TRAIN": ("coco_2017_train",),
    "DATASETS.TEST": ("coco_2017_val",),
    "SOLVER.IMS_PER_BATCH": 64,
    "SOLVER.BASE_LR": 0.00005,
    "SOLVER.STEPS": (210000, 250000),
    "SOLVER.MAX_ITER": 270000,
    "SOLVER.WEIGHT_DECAY": 0.05,
    "INPUT.MIN_SIZE_TRAIN": (416, 448, 480, 512, 544, 576, 608, 640),
    "INPUT.MAX_SIZE_TRAIN": 853,
    "INPUT.MIN_SIZE_TEST": 640,
    "INPUT.MAX_SIZE_TEST": 853,
    "INPUT.FORMAT": "RGB",
    "INPUT.MASK_FORMAT": "bitmask",
    "TEST.EVAL_PERIOD": 7330,
    "DATALOADER.NUM_WORKERS": 6,
}

_SIGMOID_IAM = {"MODEL.SPARSE_INST.DECODER.NAME": "BaseIAMDecoder"}
_SOFTMAX = {"MODEL.SPARSE_INST.DECODER.NAME": "GroupIAMSoftDecoder"}
_VD = {"MODEL.BACKBONE.NAME": "build_resnet_vd_backbone"}
_R101 = {"MODEL.RESNETS.DEPTH": 101}
_DCN = {"MODEL.RESNETS.DEFORM_ON_PER_STAGE": [False, False, True, True]}
_CROP = {
    "INPUT.CROP.ENABLED": True,
    "INPUT.CROP.TYPE": "absolute_range",
    "INPUT.CROP.SIZE": (384, 600),
    "INPUT.MASK_FORMAT": "polygon",
}


def _csp(name: str) -> dict[str, Any]:
    levels = ["csp2", "csp3", "csp4"]
    features = {"MODEL.SPARSE_INST.ENCODER.IN_FEATURES": levels, "MODEL.CSPNET.OUT_FEATURES": levels}
    return {"MODEL.BACKBONE.NAME": "build_cspnet_backbone", "MODEL.CSPNET.NAME": name, **features}


def _pvt(name: str, linear: bool) -> dict[str, Any]:
    features = {"MODEL.SPARSE_INST.ENCODER.IN_FEATURES": ["p2", "p3", "p4"]}
    return {
        "MODEL.BACKBONE.NAME": "build_pyramid_vision_transformer",
        "MODEL.PVT.NAME": name,
        "MODEL.PVT.LINEAR": linear,
        **features,
    }


CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "Base-SparseInst": ("r50-giam", {}),
    "sparse_inst_r50_base": ("r50-iam", _SIGMOID_IAM),
    "sparse_inst_r50_giam": ("r50-giam", {}),
    "sparse_inst_r50_giam_soft": ("r50-giam-softmax", _SOFTMAX),
    "sparse_inst_r50_giam_fp16": ("r50-giam", {"SOLVER.AMP.ENABLED": True}),
    "sparse_inst_r50_giam_aug": ("r50-giam", _CROP),
    "sparse_inst_r50_dcn_giam_aug": ("r50-dcn-giam", {**_DCN, **_CROP}),
    "sparse_inst_r50vd_base": ("r50d-iam", {**_VD, **_SIGMOID_IAM}),
    "sparse_inst_r50vd_giam": ("r50d-giam", _VD),
    "sparse_inst_r50vd_giam_aug": ("r50d-giam", {**_VD, **_CROP}),
    "sparse_inst_r50vd_dcn_giam": ("r50d-dcn-giam", {**_VD, **_DCN}),
    "sparse_inst_r50vd_dcn_giam_aug": ("r50d-dcn-giam", {**_VD, **_DCN, **_CROP}),
    "sparse_inst_r101_giam": ("r101-giam", _R101),
    "sparse_inst_r101_dcn_giam": ("r101-dcn-giam", {**_R101, **_DCN}),
    "sparse_inst_cspdarknet53_giam": ("cspdarknet53-giam-softmax", {**_csp("cspdarknet53"), **_SOFTMAX}),
    "sparse_inst_darknet53_giam": ("darknet53-giam", _csp("darknet53")),
    "sparse_inst_pvt_b1_giam": ("pvtv2-b1-giam", _pvt("b1", False)),
    "sparse_inst_pvt_b2_li_giam": ("pvtv2-b2-li-giam", _pvt("b2", True)),
}
"""For each YAML file, the model's name here, and the differences from the base file."""


def settings_of(model: str) -> dict[str, Any]:
    """Return the settings of a model by its name. `r50d-iam` has a config in the reference, but no name here."""
    return {**MODELS["r50d-giam"], "model.decoder.iam.groups": 1} if model == "r50d-iam" else MODELS[model]


def reference_cfg(name: str = "Base-SparseInst", output: Path | None = None, **changes: Any) -> Any:
    """Return the config of a YAML file, for the CPU and without weights. Other keys follow with `__` instead of dots."""
    from detectron2.config import get_cfg

    from sparseinst.integrations.detectron2 import add_sparseinst_config

    cfg = get_cfg()
    add_sparseinst_config(cfg)
    given = {key.replace("__", "."): value for key, value in changes.items()}
    for key, value in {**BASE, **CONFIGS[name][1], "MODEL.DEVICE": "cpu", "MODEL.WEIGHTS": "", **given}.items():
        cfg.merge_from_list([key, value])
    if output is not None:
        cfg.OUTPUT_DIR = str(output)
    return cfg


def small(cfg: Any) -> Any:
    """Shrink a config to two classes, ten maps, images of 64 pixels and one step."""
    changes = {
        "MODEL.SPARSE_INST.DECODER.NUM_CLASSES": 2,
        "MODEL.SPARSE_INST.DECODER.NUM_MASKS": 10,
        "MODEL.SPARSE_INST.ENCODER.NUM_CHANNELS": 16,
        "MODEL.SPARSE_INST.DECODER.INST.DIM": 16,
        "MODEL.SPARSE_INST.DECODER.MASK.DIM": 16,
        "INPUT.MIN_SIZE_TRAIN": (64,),
        "INPUT.MIN_SIZE_TEST": 64,
        "SOLVER.IMS_PER_BATCH": 2,
        "SOLVER.MAX_ITER": 1,
        "SOLVER.STEPS": (),
        "DATALOADER.NUM_WORKERS": 0,
    }
    for key, value in changes.items():
        cfg.merge_from_list([key, value])
    return cfg
