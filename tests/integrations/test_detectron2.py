"""Check the detectron2 adapter's settings, trained parameters, names of tensors and predictions."""

import os
import pickle
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from sparseinst.config import PRESETS, Config
from sparseinst.errors import UserError
from tests.conftest import needs_coco
from tests.integrations.reference_configs import CONFIGS, reference_cfg, settings_of, small
from tests.integrations.test_released import checkpoint, darknet_names, pvt_names

pytest.importorskip("detectron2", reason="detectron2 is not installed")

# detectron2's own modules give warnings about pkg_resources, torch.load and meshgrid.
pytestmark = pytest.mark.filterwarnings("ignore")

FILES = Path(os.environ.get("SPARSEINST_REFERENCE_CONFIGS", "nowhere"))


@pytest.mark.parametrize("name", CONFIGS)
def test_the_references_configs_become_our_models(name: str) -> None:
    from sparseinst.integrations.detectron2 import from_detectron2

    ours = Config().replace({**PRESETS["release"], **settings_of(CONFIGS[name][0]), "model.backbone.pretrained": False})
    found = from_detectron2(reference_cfg(name))
    assert found.model == ours.model
    assert (found.loss, found.matcher, found.inference) == (ours.loss, ours.matcher, ours.inference)
    assert found.data.content("train") == {**ours.data.content("train"), "crop": 0.5 if name.endswith("_aug") else 0.0}
    assert found.train.milestones == pytest.approx(ours.train.milestones)
    assert (found.train.learning_rate, found.train.batch_size, found.train.weight_decay) == (5e-5, 64, 0.05)
    assert found.train.precision == ("fp16" if name.endswith("fp16") else "fp32")


@pytest.mark.skipif(not FILES.is_dir(), reason="SPARSEINST_REFERENCE_CONFIGS names no folder with the reference's YAML files")
@pytest.mark.parametrize("name", CONFIGS)
def test_the_references_files_hold_these_configs(name: str) -> None:
    from detectron2.config import get_cfg

    from sparseinst.integrations.detectron2 import add_sparseinst_config

    cfg = get_cfg()
    add_sparseinst_config(cfg)
    cfg.merge_from_file(str(FILES / f"{name}.yaml"))
    expected = reference_cfg(name, MODEL__DEVICE=cfg.MODEL.DEVICE, MODEL__WEIGHTS=cfg.MODEL.WEIGHTS, OUTPUT_DIR=cfg.OUTPUT_DIR)
    assert cfg == expected
    assert {path.stem for path in FILES.glob("*.yaml")} == CONFIGS.keys()


SPARSE = "MODEL.SPARSE_INST."


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        (f"{SPARSE}DECODER.NAME", "MyDecoder", "'MyDecoder' is not one of BaseIAMDecoder"),
        (f"{SPARSE}DECODER.OUTPUT_IAM", True, "DECODER.OUTPUT_IAM is True, but only False"),
        (f"{SPARSE}DECODER.INST.DIM", 128, "INST and MASK differ"),
        (f"{SPARSE}ENCODER.NAME", "MyEncoder", "ENCODER.NAME is 'MyEncoder', but only 'InstanceContextEncoder'"),
        (f"{SPARSE}ENCODER.NORM", "BN", "ENCODER.NORM is 'BN', but only ''"),
        (f"{SPARSE}ENCODER.IN_FEATURES", ["res2", "res3", "res4"], "IN_FEATURES is .'res2'.*the encoder takes .'res3'"),
        (f"{SPARSE}LOSS.NAME", "MyCriterion", "LOSS.NAME is 'MyCriterion', but only 'SparseInstCriterion'"),
        (f"{SPARSE}LOSS.ITEMS", ("labels",), "LOSS.ITEMS is .'labels',., but only .'labels', 'masks'."),
        (f"{SPARSE}MATCHER.NAME", "MyMatcher", "MATCHER.NAME is 'MyMatcher', but only 'SparseInstMatcher'"),
        (f"{SPARSE}MAX_DETECTIONS", 50, "MAX_DETECTIONS is 50, but all instances of the 100 maps"),
        ("MODEL.BACKBONE.NAME", "build_mit_backbone", "is not one of build_resnet_backbone"),
        ("MODEL.RESNETS.DEPTH", 18, "MODEL.RESNETS.DEPTH: 18 is not one of 50, 101"),
        ("MODEL.RESNETS.NORM", "GN", "MODEL.RESNETS.NORM: 'GN' is not one of FrozenBN, BN, SyncBN"),
        ("MODEL.RESNETS.STRIDE_IN_1X1", True, "STRIDE_IN_1X1 is True, but only False"),
        ("MODEL.RESNETS.WIDTH_PER_GROUP", 128, "WIDTH_PER_GROUP is 128, but only 64"),
        ("MODEL.RESNETS.OUT_FEATURES", ["res4"], "the OUT_FEATURES of build_resnet_backbone are .'res4'."),
        ("INPUT.FORMAT", "BGR", "INPUT.FORMAT is 'BGR', but only 'RGB'"),
    ],
)
def test_values_that_are_not_obeyed_are_refused(key: str, value: Any, message: str) -> None:
    from sparseinst.integrations.detectron2 import from_detectron2

    cfg = reference_cfg()
    cfg.merge_from_list([key, value])
    with pytest.raises(UserError, match=message) as caught:
        from_detectron2(cfg)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "key", "value", "message"),
    [
        ("sparse_inst_r50vd_giam", "MODEL.RESNETS.DEPTH", 101, "MODEL.RESNETS.DEPTH: 101 is not one of 50"),
        ("sparse_inst_pvt_b1_giam", "MODEL.PVT.LINEAR", True, "MODEL.PVT: .NAME, LINEAR.: .'b1', True. is not one of"),
        ("sparse_inst_pvt_b1_giam", "MODEL.BACKBONE.FREEZE_AT", 2, "only a ResNet can be frozen in part"),
        ("sparse_inst_darknet53_giam", "MODEL.CSPNET.NORM", "LN", "MODEL.CSPNET.NORM: 'LN' is not one of"),
    ],
)
def test_values_that_another_backbone_would_not_obey_are_refused(name: str, key: str, value: Any, message: str) -> None:
    from sparseinst.integrations.detectron2 import from_detectron2

    cfg = reference_cfg(name)
    cfg.merge_from_list([key, value])
    with pytest.raises(UserError, match=message):
        from_detectron2(cfg)


def reference_state_names(model: str) -> set[str]:
    """Return the reference's names of a model's tensors, which `test_released` writes out."""
    if model == "r50d-iam":  # a model without groups has no layer that mixes them
        return {name for name in checkpoint("r50d-giam")[0] if not name.startswith("decoder.inst_branch.fc.")}
    return set(checkpoint(model)[0])


@pytest.mark.parametrize("name", CONFIGS)
def test_parameters_are_trained_and_decay_as_in_the_reference(name: str) -> None:
    """The norms of ResNets are frozen, everything else is trained. Names with norm, patch_embed or cls_token do not decay."""
    from detectron2.modeling import build_model

    from sparseinst.integrations.detectron2 import Trainer

    cfg = reference_cfg(name, MODEL__DEVICE="meta")
    with torch.device("meta"):
        model: Any = build_model(cfg)
    theirs = reference_state_names(CONFIGS[name][0])
    assert set(model.state_dict()) == theirs

    norms = {key.removesuffix("running_mean") for key in theirs if key.endswith(".running_mean")}
    statistics = {prefix + tensor for prefix in norms for tensor in ("running_mean", "running_var", "num_batches_tracked")}
    affine = {prefix + tensor for prefix in norms for tensor in ("weight", "bias")}
    resnet = "r50" in name or "r101" in name or name.startswith("Base")
    frozen = statistics | (affine if resnet else set()) | {"decoder.inst_branch.softmax_bias"}
    assert bool(norms) == ("pvt" not in name)
    names = {parameter: model.reference_names()[ours] for ours, parameter in model.model.named_parameters()}
    assert {key for parameter, key in names.items() if parameter.requires_grad} == theirs - frozen

    optimizer = Trainer.build_optimizer(cfg, model)
    assert type(optimizer) is torch.optim.AdamW
    assert optimizer.defaults["betas"] == (0.9, 0.999)
    found = {names[p]: (group["lr"], group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]}
    without_decay = {key for key in theirs if any(part in key for part in ("norm", "patch_embed", "cls_token"))}
    assert found == {key: (5e-5, 0.0 if key in without_decay else 0.05) for key in theirs - frozen}
    assert bool(without_decay - frozen) == ("pvt" in name)


def test_the_learning_rate_of_the_backbone_is_multiplied() -> None:
    from detectron2.modeling import build_model

    from sparseinst.integrations.detectron2 import Trainer

    cfg = reference_cfg(MODEL__DEVICE="meta", SOLVER__BACKBONE_MULTIPLIER=0.1)
    with torch.device("meta"):
        model: Any = build_model(cfg)
    optimizer = Trainer.build_optimizer(cfg, model)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in model.model.named_parameters():
        assert rates[id(parameter)] == pytest.approx(5e-6 if name.startswith("backbone.") else 5e-5)


def test_norms_are_plain_synchronised_or_frozen_as_the_config_says() -> None:
    from detectron2.modeling import build_model

    def body(name: str, **changes: Any) -> nn.Module:
        with torch.device("meta"):
            return build_model(reference_cfg(name, MODEL__DEVICE="meta", **changes)).model.backbone.body

    plain = body("sparse_inst_r50_giam", MODEL__RESNETS__NORM="BN", MODEL__BACKBONE__FREEZE_AT=2)
    trained = {name.split(".")[0] for name, module in plain.named_modules() if type(module) is nn.BatchNorm2d}
    assert trained == {"layer2", "layer3", "layer4"}  # detectron2 freezes the norms of frozen stages, too
    assert {name.split(".")[0] for name, p in plain.named_parameters() if p.requires_grad} == trained
    for name, key in (("sparse_inst_r50_giam", "MODEL__RESNETS__NORM"), ("sparse_inst_darknet53_giam", "MODEL__CSPNET__NORM")):
        synchronised = body(name, **{key: "SyncBN"})
        norms = [module for module in synchronised.modules() if hasattr(module, "running_mean")]
        assert len(norms) > 50
        assert all(isinstance(module, nn.SyncBatchNorm) for module in norms)
        assert synchronised.state_dict().keys() == body(name, **{key: "BN"}).state_dict().keys()
        frozen = body(name, **{key: "FrozenBN"})
        assert not any(isinstance(module, nn.BatchNorm2d) for module in frozen.modules())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sparse_inst_r50_giam_soft", "sparse_inst_cspdarknet53_giam", "sparse_inst_pvt_b1_giam"])
def test_checkpoints_are_loaded_and_written_completely(name: str, tmp_path: Path) -> None:
    """A checkpoint of the reference loads strictly, and the state dict has again its names and values."""
    from detectron2.checkpoint import DetectionCheckpointer
    from detectron2.modeling import build_model

    from sparseinst.integrations.released import import_released

    model = build_model(reference_cfg(name)).eval()
    theirs, _ = checkpoint(CONFIGS[name][0])
    assert ("decoder.inst_branch.softmax_bias" in theirs) == (name.endswith("soft") or "csp" in name)
    random = {key: tensor if key.endswith("tracked") else 0.02 * torch.randn(tensor.shape) for key, tensor in theirs.items()}
    random |= {key: tensor.abs() + 0.5 for key, tensor in random.items() if key.endswith("running_var")}
    model.load_state_dict(random, strict=True)
    written = model.state_dict()
    assert written.keys() == random.keys()
    assert all(torch.equal(tensor, random[key]) for key, tensor in written.items())
    torch.save({"model": written}, tmp_path / "released.pth")
    other = build_model(reference_cfg(name))
    DetectionCheckpointer(other).load(str(tmp_path / "released.pth"))
    assert all(torch.equal(tensor, random[key]) for key, tensor in other.state_dict().items())
    ours = import_released(tmp_path / "released.pth")
    assert ours.name == CONFIGS[name][0]
    assert all(torch.equal(tensor, model.model.state_dict()[key]) for key, tensor in ours.state.items())
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict({key: tensor for key, tensor in random.items() if "fpn_outputs" not in key})


def test_counters_of_batches_may_be_missing_or_left_over() -> None:
    from detectron2.modeling import build_model

    model = build_model(small(reference_cfg("sparse_inst_darknet53_giam")))
    without = {key: tensor for key, tensor in model.state_dict().items() if not key.endswith("num_batches_tracked")}
    assert len(without) < len(model.state_dict())
    model.load_state_dict(without, strict=True)
    frozen = build_model(small(reference_cfg("sparse_inst_darknet53_giam", MODEL__CSPNET__NORM="FrozenBN")))
    frozen.load_state_dict(model.state_dict(), strict=True)


@pytest.mark.parametrize(
    "name", ["sparse_inst_r50vd_base", "sparse_inst_cspdarknet53_giam", "sparse_inst_pvt_b1_giam", "sparse_inst_r50_giam"]
)
def test_imagenet_weights_become_the_backbone(name: str, tmp_path: Path) -> None:
    """The files that the reference's configs name have no prefix: timm's and PVT's names in .pth, detectron2's in .pkl."""
    from detectron2.checkpoint import DetectionCheckpointer
    from detectron2.modeling import build_model

    model = build_model(small(reference_cfg(name)))
    state = {key: torch.randn(tensor.shape) for key, tensor in model.model.backbone.body.state_dict().items()}
    if name.endswith("r50_giam"):
        names = {ours.removeprefix("backbone.body."): key for ours, key in model.reference_names().items()}
        arrays = {names[key].removeprefix("backbone."): tensor.numpy() for key, tensor in state.items()}
        content = {"model": {**arrays, "stem.fc.weight": np.zeros((1000, 2048))}, "__author__": "torchvision"}
        path = tmp_path / "R-50.pkl"
        path.write_bytes(pickle.dumps({**content, "matching_heuristics": True}))
    else:
        rename = {"csp": darknet_names, "pvt": pvt_names}.get(name.split("_")[2][:3])
        pairs = rename(list(state)) if rename else [(key, key) for key in state]
        path = tmp_path / "imagenet.pth"
        torch.save({**{theirs: state[ours] for theirs, ours in pairs}, "head.fc.weight": torch.zeros(1000, 8)}, path)
    DetectionCheckpointer(model).load(str(path))
    loaded = model.model.backbone.body.state_dict()
    assert all(torch.equal(loaded[key], tensor) for key, tensor in state.items() if not key.endswith("tracked"))


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    from detectron2.checkpoint import DetectionCheckpointer
    from detectron2.modeling import build_model

    torch.save({"model": {"backbone.bottom_up.res2.0.conv1.weight": torch.zeros(1)}}, tmp_path / "other.pth")
    model = build_model(small(reference_cfg()))
    with pytest.raises(UserError, match="no tensor of resnet50.tv_in1k in SparseInst; its first are backbone.bottom_up"):
        DetectionCheckpointer(model).load(str(tmp_path / "other.pth"))


def test_pvt_skips_paths_in_training_only() -> None:
    from detectron2.modeling import build_model
    from timm.layers import DropPath

    model = build_model(small(reference_cfg("sparse_inst_pvt_b1_giam")))
    rates = [module.drop_prob for module in model.modules() if isinstance(module, DropPath)]
    assert max(rates) == pytest.approx(0.1)
    same = torch.rand(1, 3, 64, 64).expand(24, -1, -1, -1)
    torch.manual_seed(0)

    def spread() -> float:
        return float(model.model.backbone(same)[2].detach().std(dim=0).mean())

    trained = spread()
    model.eval()
    assert spread() < 1e-3 * trained


@needs_coco
def test_detectron2s_predictor_equals_ours_on_a_photo() -> None:
    """With the same weights, both predictors give the same scores, because they share one scoring path."""
    from detectron2.data.detection_utils import read_image
    from detectron2.engine import DefaultPredictor

    from sparseinst.data.coco import Category
    from sparseinst.inference.predict import Predictor
    from sparseinst.integrations.detectron2 import from_detectron2
    from tests.conftest import CPU, REAL_COCO

    torch.manual_seed(0)
    cfg = small(reference_cfg())
    predictor = DefaultPredictor(cfg)
    photo = sorted((REAL_COCO / "val2017").glob("*.jpg"))[0]
    theirs = predictor(read_image(str(photo), "BGR"))["instances"]
    config = from_detectron2(cfg)
    ours = Predictor(predictor.model.model, config, (Category(1, "a"), Category(2, "b")), CPU).predict(photo)
    assert len(theirs) == len(ours.scores) > 0
    np.testing.assert_allclose(np.sort(theirs.scores.numpy())[::-1], ours.scores, atol=1e-4)


@pytest.mark.slow
def test_a_config_of_the_model_zoo_can_be_a_peer() -> None:
    """Mask R-CNN R-50-FPN with random weights has COCO's class names, gives masks of the photo's size, and can be timed."""
    from sparseinst.bench.benchmark import measure
    from sparseinst.bench.timed import peer_workload
    from sparseinst.integrations.peers import build_peer
    from tests.conftest import CPU

    pytest.importorskip("pkg_resources", reason="detectron2's model zoo needs pkg_resources: setuptools<81 is not installed")
    name = "detectron2:COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_3x.yaml"
    peer = build_peer(name, device=CPU, sides=(64, 96), pretrained=False)
    assert (peer.name, len(peer.categories), peer.categories[0]) == (name, 80, "person")
    photo = np.random.default_rng(0).integers(0, 256, (48, 72, 3), dtype=np.uint8)
    with torch.no_grad():
        found = peer.segment(peer.prepare(photo))
    assert found.masks.shape == (len(found.scores), 48, 72)
    assert found.masks.dtype == torch.bool
    latency = measure(peer_workload(peer, CPU), device=CPU, warmup=1, repetitions=3)
    assert latency.whole_ms["median"] > 0
    with pytest.raises(UserError, match="no config of detectron2's model zoo"):
        build_peer("detectron2:nothing.yaml", device=CPU)


def test_a_missing_pkg_resources_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from sparseinst.integrations.peers import build_peer
    from tests.conftest import CPU

    for name in ("detectron2.model_zoo", "detectron2.model_zoo.model_zoo"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.delattr("detectron2.model_zoo", raising=False)
    monkeypatch.setitem(sys.modules, "pkg_resources", None)
    with pytest.raises(UserError, match="needs pkg_resources, .*: pip install 'setuptools<81'"):
        build_peer("detectron2:a.yaml", device=CPU)
