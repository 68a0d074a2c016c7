"""Define the presets `paper` and `release`, and the named models."""

from __future__ import annotations

from typing import Any

PRESETS: dict[str, dict[str, Any]] = {
    "paper": {},
    "release": {"train.weight_decay": 0.05, "loss.pixel_weight": 5.0},
}
"""`paper` is for Tables 2 to 8; `release` is for Table 1 and the released checkpoints."""

_GIAM = {"model.decoder.iam.groups": 4}
_SOFTMAX = {"model.decoder.iam.activation": "softmax"}
_DCN = {"model.backbone.deformable_stages": [4, 5]}
_TRAINED_NORMS = {"model.backbone.frozen_norm": False}
_DROP_PATH = {"model.backbone.drop_path": 0.1}
RELEASED_MODELS: dict[str, dict[str, Any]] = {
    "r50-iam": {},
    "r50-giam": _GIAM,
    "r50-giam-softmax": {**_GIAM, **_SOFTMAX},
    "r50-dcn-giam": {**_GIAM, **_DCN},
    "r50d-giam": {**_GIAM, "model.backbone.name": "resnet50d.ra2_in1k"},
    "r50d-dcn-giam": {**_GIAM, **_DCN, "model.backbone.name": "resnet50d.ra2_in1k"},
    "r101-giam": {**_GIAM, "model.backbone.name": "resnet101.tv_in1k"},
    "r101-dcn-giam": {**_GIAM, **_DCN, "model.backbone.name": "resnet101.tv_in1k"},
    "cspdarknet53-giam": {**_GIAM, **_TRAINED_NORMS, "model.backbone.name": "cspdarknet53.ra_in1k"},
    "cspdarknet53-giam-softmax": {**_GIAM, **_SOFTMAX, **_TRAINED_NORMS, "model.backbone.name": "cspdarknet53.ra_in1k"},
    "darknet53-giam": {
        **_GIAM,
        **_TRAINED_NORMS,
        "model.backbone.name": "darknet53.c2ns_in1k",
        "model.backbone.pretrained": False,
    },
    "pvtv2-b1-giam": {**_GIAM, **_DROP_PATH, "model.backbone.name": "pvt_v2_b1.in1k"},
    "pvtv2-b2-li-giam": {**_GIAM, **_DROP_PATH, "model.backbone.name": "pvt_v2_b2_li.in1k"},
}
"""The overrides of each released model, by its name. `cspdarknet53-giam` has sigmoid maps; the released one has softmax maps.

As in the reference, DarkNet53 starts from random weights."""

_HALF = {"model.width_factor": 0.5}
SMALL_MODELS: dict[str, dict[str, Any]] = {
    "r18-giam": {**_GIAM, "model.backbone.name": "resnet18.tv_in1k"},
    "r34-giam": {**_GIAM, "model.backbone.name": "resnet34.tv_in1k"},
    "mobilenetv3-giam": {**_GIAM, **_TRAINED_NORMS, **_HALF, "model.backbone.name": "mobilenetv3_large_100.ra_in1k"},
    "lite0-giam": {**_GIAM, **_TRAINED_NORMS, **_HALF, "model.backbone.name": "tf_efficientnet_lite0.in1k"},
}
"""The overrides of models for processors, by name. The last two have half of the paper's channels in encoder and decoder. The
paper has no such models, and nobody has released weights for them."""

MODELS: dict[str, dict[str, Any]] = {**RELEASED_MODELS, **SMALL_MODELS}
"""The overrides of all named models."""
