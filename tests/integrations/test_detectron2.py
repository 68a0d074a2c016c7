"""Check the detectron2 adapter with the reference's config, its checkpoint, DefaultTrainer and DefaultPredictor."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.conftest import annotation, box, needs_coco, write_coco

pytest.importorskip("detectron2", reason="detectron2 is not installed")

# detectron2's own modules give warnings about pkg_resources, torch.load and meshgrid.
pytestmark = pytest.mark.filterwarnings("ignore")

BASE = """
MODEL:
  META_ARCHITECTURE: "SparseInst"
  PIXEL_MEAN: [123.675, 116.280, 103.530]
  PIXEL_STD: [58.395, 57.120, 57.375]
  BACKBONE:
    FREEZE_AT: 0
    NAME: "build_resnet_backbone"
  RESNETS:
    NORM: "FrozenBN"
    DEPTH: 50
    STRIDE_IN_1X1: False
    OUT_FEATURES: ["res3", "res4", "res5"]
  SPARSE_INST:
    ENCODER:
      NAME: "InstanceContextEncoder"
    DECODER:
      NAME: "GroupIAMDecoder"
SOLVER:
  IMS_PER_BATCH: 64
  BASE_LR: 0.00005
  STEPS: (210000, 250000)
  MAX_ITER: 270000
  WEIGHT_DECAY: 0.05
INPUT:
  MIN_SIZE_TRAIN: (416, 448, 480, 512, 544, 576, 608, 640)
  MAX_SIZE_TRAIN: 853
  MIN_SIZE_TEST: 640
  MAX_SIZE_TEST: 853
  FORMAT: "RGB"
  MASK_FORMAT: "bitmask"
"""


@pytest.fixture
def cfg(tmp_path: Path) -> Any:
    """Return the reference's R-50 G-IAM config, read from a YAML file."""
    from detectron2.config import get_cfg

    from sparseinst.integrations.detectron2 import add_sparseinst_config

    cfg = get_cfg()
    add_sparseinst_config(cfg)
    (tmp_path / "sparse_inst_r50_giam.yaml").write_text(BASE)
    cfg.merge_from_file(str(tmp_path / "sparse_inst_r50_giam.yaml"))
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.WEIGHTS = ""
    cfg.OUTPUT_DIR = str(tmp_path / "output")
    cfg.DATALOADER.NUM_WORKERS = 0
    return cfg


def small(cfg: Any) -> Any:
    cfg.MODEL.SPARSE_INST.DECODER.NUM_CLASSES = 2
    cfg.MODEL.SPARSE_INST.DECODER.NUM_MASKS = 10
    cfg.INPUT.MIN_SIZE_TRAIN = (64,)
    cfg.INPUT.MIN_SIZE_TEST = 64
    cfg.SOLVER.IMS_PER_BATCH = 2
    cfg.SOLVER.MAX_ITER = 1
    cfg.SOLVER.STEPS = ()
    return cfg


def test_the_references_config_becomes_our_config(cfg: Any) -> None:
    from sparseinst.config import MODELS, PRESETS, Config
    from sparseinst.integrations.detectron2 import from_detectron2

    ours = Config().replace({**PRESETS["release"], **MODELS["r50-giam"], "model.backbone.pretrained": False})
    found = from_detectron2(cfg)
    assert found.model == ours.model
    assert found.loss == ours.loss
    assert found.train.milestones == pytest.approx(ours.train.milestones)
    assert (found.train.learning_rate, found.train.batch_size, found.train.weight_decay) == (5e-5, 64, 0.05)
    assert (found.inference, found.data.short_sides) == (ours.inference, ours.data.short_sides)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("MODEL.SPARSE_INST.DECODER.NAME", "MyDecoder", "'MyDecoder' is not one of BaseIAMDecoder"),
        ("MODEL.BACKBONE.NAME", "build_mit_backbone", "is not one of build_resnet_backbone"),
        ("MODEL.RESNETS.DEPTH", 18, "MODEL.RESNETS.DEPTH: 18 is not one of 50, 101"),
        ("INPUT.FORMAT", "BGR", "the models take RGB"),
    ],
)
def test_settings_that_were_never_released_are_refused(cfg: Any, key: str, value: Any, message: str) -> None:
    from sparseinst.errors import UserError
    from sparseinst.integrations.detectron2 import from_detectron2

    cfg.merge_from_list([key, value])
    with pytest.raises(UserError, match=message):
        from_detectron2(cfg)


def test_a_checkpoint_with_the_references_names_is_loaded(cfg: Any, tmp_path: Path) -> None:
    from detectron2.checkpoint import DetectionCheckpointer
    from detectron2.modeling import build_model

    from sparseinst.integrations.released import import_released
    from tests.integrations.test_released import checkpoint

    model = build_model(cfg).eval()
    theirs, _ = checkpoint("r50-giam")
    assert set(model.state_dict()) == set(theirs)
    random = {key: 0.02 * torch.randn_like(tensor) for key, tensor in theirs.items()}
    random |= {key: tensor.abs() + 0.5 for key, tensor in random.items() if key.endswith("running_var")}
    torch.save({"model": random}, tmp_path / "released.pth")
    DetectionCheckpointer(model).load(str(tmp_path / "released.pth"))
    assert all(torch.equal(tensor, random[key]) for key, tensor in model.state_dict().items())
    ours = import_released(tmp_path / "released.pth")
    assert all(torch.equal(tensor, model.model.state_dict()[key]) for key, tensor in ours.state.items())


def test_one_iteration_of_the_trainer_and_a_prediction(cfg: Any, tmp_path: Path) -> None:
    from detectron2.data import DatasetCatalog, MetadataCatalog
    from detectron2.data.datasets import register_coco_instances
    from detectron2.engine import DefaultPredictor

    from sparseinst.integrations.detectron2 import Trainer

    images = [{"id": n, "file_name": f"{n}.png", "width": 90, "height": 64} for n in range(4)]
    things = [annotation(n + 1, n, 7 if n % 2 else 1000, box(10, 10, 30 + n, 20)) for n in range(4)]
    root = write_coco(tmp_path / "data", images, things)
    register_coco_instances("tiny", {}, str(root / "annotations" / "instances_train2017.json"), str(root / "train2017"))
    try:
        cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("tiny",), ()
        trainer = Trainer(small(cfg))
        assert isinstance(trainer.optimizer, torch.optim.AdamW)
        before = {key: tensor.clone() for key, tensor in trainer.model.state_dict().items()}
        trainer.train()
        after = trainer.model.state_dict()
        assert any(not torch.equal(after[key], tensor) for key, tensor in before.items())
        cfg.MODEL.WEIGHTS = str(Path(cfg.OUTPUT_DIR) / "model_final.pth")
        predictor = DefaultPredictor(cfg)
        loaded = predictor.model.state_dict()
        assert all(torch.equal(loaded[key], tensor) for key, tensor in after.items())
        found = predictor(np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8))["instances"]
        assert found.pred_masks.shape[1:] == (50, 70)
        assert len(found) == len(found.scores) == len(found.pred_classes) <= 10
    finally:
        DatasetCatalog.remove("tiny")
        MetadataCatalog.remove("tiny")


@needs_coco
def test_detectron2s_predictor_equals_ours_on_a_photo(cfg: Any, tmp_path: Path) -> None:
    """With the same weights, both predictors give the same scores, because they share one scoring path."""
    from detectron2.data.detection_utils import read_image
    from detectron2.engine import DefaultPredictor

    from sparseinst.config import Config
    from sparseinst.inference.predict import Predictor
    from sparseinst.integrations.detectron2 import from_detectron2
    from tests.conftest import CPU, REAL_COCO

    torch.manual_seed(0)
    predictor = DefaultPredictor(small(cfg))
    photo = sorted((REAL_COCO / "val2017").glob("*.jpg"))[0]
    config: Config = from_detectron2(cfg)
    theirs = predictor(read_image(str(photo), "BGR"))["instances"]
    from sparseinst.data.coco import Category

    ours = Predictor(predictor.model.model, config, (Category(1, "a"), Category(2, "b")), CPU).predict(photo)
    assert len(theirs) == len(ours.scores) > 0
    np.testing.assert_allclose(np.sort(theirs.scores.numpy())[::-1], ours.scores, atol=1e-4)


def test_a_config_of_the_model_zoo_can_be_a_peer() -> None:
    """Mask R-CNN R-50-FPN with random weights has COCO's class names, gives masks of the photo's size, and can be timed."""
    from sparseinst.bench.benchmark import measure
    from sparseinst.bench.timed import peer_workload
    from sparseinst.errors import UserError
    from sparseinst.integrations.peers import build_peer
    from tests.conftest import CPU

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
