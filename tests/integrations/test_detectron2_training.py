"""Check training in detectron2: augmentation, optimiser steps, names of losses, evaluation of masks."""

import copy
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from sparseinst.errors import UserError
from tests.conftest import annotation, box, write_coco
from tests.integrations.reference_configs import reference_cfg, small

pytest.importorskip("detectron2", reason="detectron2 is not installed")

pytestmark = pytest.mark.filterwarnings("ignore")
AUGMENTED = "sparse_inst_r50_giam_aug"


@pytest.fixture
def dataset(tmp_path: Path) -> Iterator[Path]:
    """Register four images with a rectangle each as `tiny`, and return the annotation file."""
    from detectron2.data import DatasetCatalog, MetadataCatalog
    from detectron2.data.datasets import register_coco_instances

    images = [{"id": n, "file_name": f"{n}.png", "width": 90, "height": 64} for n in range(4)]
    things = [annotation(n + 1, n, 7 if n % 2 else 1000, box(10, 10, 30 + n, 20), area=20.0 * (30 + n)) for n in range(4)]
    root = write_coco(tmp_path / "data", images, things)
    file = root / "annotations" / "instances_train2017.json"
    register_coco_instances("tiny", {}, str(file), str(root / "train2017"))
    yield file
    DatasetCatalog.remove("tiny")
    MetadataCatalog.remove("tiny")


def shapely_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    from sparseinst.integrations.detectron2 import data

    monkeypatch.setattr(data, "find_spec", lambda name: None)


def samples(name: str, count: int, size: tuple[int, int]) -> list[dict[str, Any]]:
    """Return what the mapper does to images of this size: the transforms by their kind."""
    from detectron2.data import transforms as T

    from sparseinst.integrations.detectron2 import SparseInstDatasetMapper

    mapper = SparseInstDatasetMapper(reference_cfg(name, INPUT__MASK_FORMAT="bitmask"), is_train=True)
    np.random.seed(0)  # detectron2 draws from numpy's global generator
    found = []
    for _ in range(count):
        image = T.AugInput(np.zeros((*size, 1), np.uint8))
        steps = mapper.augmentations(image).transforms
        resizes = [step for step in steps if isinstance(step, T.ResizeTransform)]
        crops = [step for step in steps if isinstance(step, T.CropTransform)]
        flipped = any(isinstance(step, T.HFlipTransform) for step in steps)
        found.append({"resizes": resizes, "crops": crops, "flipped": flipped, "size": image.image.shape[:2]})
    return found


def test_the_crop_has_the_references_statistics() -> None:
    """500 images of 480 x 1280: half are resized to 400, 500 or 600 and cropped; then all get the usual size and flip."""
    found = samples(AUGMENTED, 500, (480, 1280))
    cropped = [sample for sample in found if sample["crops"]]
    assert 200 < len(cropped) < 300
    assert 200 < sum(sample["flipped"] for sample in found) < 300
    shorter = Counter(sample["resizes"][0].new_h for sample in cropped)
    assert sorted(shorter) == [400, 500, 600]
    assert min(shorter.values()) > len(cropped) / 3 - 40
    assert max(sample["resizes"][0].new_w for sample in cropped) == 1600  # the longer side has no maximum here
    heights = [sample["crops"][0].h for sample in cropped]
    widths = [sample["crops"][0].w for sample in cropped]
    assert min(heights) >= 384
    assert max(heights + widths) <= 600
    assert np.mean(widths) == pytest.approx((384 + 600) / 2, abs=18)
    assert np.mean(heights) == pytest.approx(np.mean([(384 + side) / 2 for side in (400, 500, 600)]), abs=18)
    for sample in cropped:
        crop = sample["crops"][0]
        height, width = sample["size"]
        assert max(height, width) <= 853
        assert height / width == pytest.approx(crop.h / crop.w, rel=0.01)


@pytest.mark.parametrize("name", ["sparse_inst_r50_giam", AUGMENTED])
def test_images_get_one_of_the_eight_sizes(name: str) -> None:
    from sparseinst.data.transforms import short_side_size

    found = [sample for sample in samples(name, 500, (480, 640)) if not sample["crops"]]
    sizes = Counter(sample["size"] for sample in found)
    assert sizes.keys() == {short_side_size(480, 640, short, 853) for short in range(416, 641, 32)}
    assert min(sizes.values()) > len(found) / 8 * 0.5
    assert (len(found) == 500) == (name != AUGMENTED)


def test_cropped_polygons_become_masks(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("shapely", reason="detectron2 crops polygons with shapely, which is not installed")
    from detectron2.data import DatasetCatalog

    from sparseinst.integrations.detectron2 import SparseInstDatasetMapper
    from sparseinst.integrations.detectron2.model import _masks

    cfg = reference_cfg(AUGMENTED)
    mapper = SparseInstDatasetMapper(cfg, is_train=True)
    np.random.seed(0)
    whole = 0
    for entry in DatasetCatalog.get("tiny") * 2:
        mapped = mapper(entry)
        size = tuple(mapped["image"].shape[1:])
        masks = _masks(mapped["instances"], size)
        assert masks.shape == (len(mapped["instances"]), *size)
        assert all(mask.any() for mask in masks)
        whole += len(masks)
    assert whole > 0
    shapely_is_missing(monkeypatch)
    with pytest.raises(UserError, match="pip install shapely"):
        SparseInstDatasetMapper(cfg, is_train=True)
    SparseInstDatasetMapper(cfg, is_train=False)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("MODEL.SPARSE_INST.DATASET_MAPPER", "MyMapper", "DATASET_MAPPER: 'MyMapper' is not one of SparseInstDatasetMapper"),
        ("SOLVER.OPTIMIZER", "SGD", "SOLVER.OPTIMIZER is 'SGD', but only 'ADAMW'"),
        ("SOLVER.BIAS_LR_FACTOR", 2.0, "SOLVER.BIAS_LR_FACTOR is 2.0, but only 1.0"),
    ],
)
def test_a_training_that_would_not_obey_its_config_is_refused(key: str, value: Any, message: str, dataset: Path) -> None:
    from sparseinst.integrations.detectron2 import Trainer

    cfg = small(reference_cfg(DATASETS__TRAIN=("tiny",)))
    cfg.merge_from_list([key, value])
    with pytest.raises(UserError, match=message):
        Trainer(cfg)


@pytest.mark.parametrize("kind", ["full_model", "norm", "value", "nothing"])
def test_gradients_are_clipped_as_the_config_says(kind: str) -> None:
    from sparseinst.integrations.detectron2.trainer import _clipped

    cfg = reference_cfg(SOLVER__CLIP_GRADIENTS__ENABLED=True, SOLVER__CLIP_GRADIENTS__CLIP_VALUE=0.5)
    cfg.SOLVER.CLIP_GRADIENTS.CLIP_TYPE = kind
    weights = [nn.Parameter(torch.zeros(4)), nn.Parameter(torch.zeros(9))]
    optimizer = torch.optim.AdamW([{"params": weights[:1]}, {"params": weights[1:]}])
    if kind == "nothing":
        with pytest.raises(UserError, match="CLIP_TYPE: 'nothing' is not one of full_model, norm, value"):
            _clipped(optimizer, cfg)
        return
    optimizer = _clipped(optimizer, cfg)
    for weight in weights:
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    norms = [float(weight.grad.norm()) for weight in weights if weight.grad is not None]
    expected = {"full_model": [1 / 13**0.5, 1.5 / 13**0.5], "norm": [0.5, 0.5], "value": [1.0, 1.5]}
    assert norms == pytest.approx(expected[kind], rel=1e-4)
    assert all(float(weight.abs().max()) > 0 for weight in weights)


def test_a_training_step_with_evaluation_and_a_prediction(dataset: Path, tmp_path: Path) -> None:
    from detectron2.engine import DefaultPredictor

    from sparseinst.integrations.detectron2 import Trainer

    cfg = small(reference_cfg(output=tmp_path / "output", DATASETS__TRAIN=("tiny",), DATASETS__TEST=("tiny",)))
    cfg.TEST.EVAL_PERIOD = 1
    trainer = Trainer(cfg)
    before = {key: tensor.clone() for key, tensor in trainer.model.state_dict().items()}
    trainer.train()
    after = trainer.model.state_dict()
    assert any(not torch.equal(after[key], tensor) for key, tensor in before.items())
    logged = trainer.storage.histories()
    assert {name for name in logged if name.startswith("loss_")} == {"loss_ce", "loss_mask", "loss_dice", "loss_objectness"}
    assert {"segm/AP", "segm/AP50", "segm/AP-seven"} <= set(logged)
    assert (tmp_path / "output" / "inference" / "coco_instances_results.json").exists()
    cfg.MODEL.WEIGHTS = str(tmp_path / "output" / "model_final.pth")
    predictor = DefaultPredictor(cfg)
    assert all(torch.equal(tensor, after[key]) for key, tensor in predictor.model.state_dict().items())
    found = predictor(np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8))["instances"]
    assert found.pred_masks.shape[1:] == (50, 70)
    assert len(found) == len(found.scores) == len(found.pred_classes) <= 10


class Shifted(nn.Module):
    """A model that finds each rectangle some columns too far to the right, and one that is not there."""

    def forward(self, batch: list[dict[str, Any]]) -> list[dict[str, Any]]:
        from detectron2.structures import Instances

        results = []
        for entry in batch:
            number = entry["image_id"]
            masks = torch.zeros(2, entry["height"], entry["width"], dtype=torch.bool)
            masks[0, 10:30, 10 + 2 * number : 40 + 3 * number] = True
            masks[1, 40:50, :20] = True
            # The contiguous numbers of the categories 7 and 1000 are 0 and 1.
            labels = torch.tensor([0 if number % 2 else 1, 0])
            scores = torch.tensor([0.9 - 0.1 * number, 0.75])
            results.append({"instances": Instances(tuple(masks.shape[1:]), pred_masks=masks, scores=scores, pred_classes=labels)})
        return results


def test_test_computes_the_same_metrics_as_our_evaluation(dataset: Path, tmp_path: Path) -> None:
    from sparseinst.data.masks import encode
    from sparseinst.evaluation.coco_metrics import coco_figures
    from sparseinst.integrations.detectron2 import Trainer

    cfg = small(reference_cfg(output=tmp_path / "output", DATASETS__TEST=("tiny",)))
    found = Trainer.test(cfg, Shifted())["segm"]
    results = []
    for number in range(4):
        [output] = Shifted()([{"image_id": number, "height": 64, "width": 90}])
        instances = output["instances"]
        for mask, label, score in zip(instances.pred_masks, instances.pred_classes, instances.scores, strict=True):
            [runs] = encode(mask[None].numpy())
            category = (7, 1000)[int(label)]
            results.append({"image_id": number, "category_id": category, "score": float(score), "segmentation": runs})
    expected = coco_figures(dataset, copy.deepcopy(results), list(range(4)))
    assert 0 < found["AP"] < 100
    for name in ("AP", "AP50", "AP75", "APs"):
        assert found[name] == pytest.approx(expected[name]), name


def test_data_of_another_evaluator_is_refused(dataset: Path, tmp_path: Path) -> None:
    from detectron2.data import MetadataCatalog

    from sparseinst.integrations.detectron2 import Trainer

    del MetadataCatalog.get("tiny").__dict__["evaluator_type"]
    MetadataCatalog.get("tiny").evaluator_type = "lvis"
    with pytest.raises(UserError, match="tiny is evaluated by lvis, not by COCO"):
        Trainer.build_evaluator(reference_cfg(output=tmp_path), "tiny")
