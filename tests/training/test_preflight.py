"""Check the check that comes before a long run."""

import json
import shutil
from pathlib import Path

import pytest

from sparseinst.config import Config
from sparseinst.data.coco import val_split
from sparseinst.errors import DataError, RunFailed
from sparseinst.training import preflight as module
from sparseinst.training.preflight import preflight
from tests.conftest import CPU


@pytest.fixture(autouse=True)
def _fewer_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "STEPS", 250)
    monkeypatch.setattr(module, "LEAST_RATE", 3e-3)


@pytest.mark.parametrize(
    "settings",
    [
        {"train.evaluate_every": 2, "train.patience": 3},
        {"model.backbone.frozen_norm": True, "pretrain.enabled": True, "train.checkpoint_activations": True},
    ],
)
def test_settings_of_a_long_run_do_not_prevent_its_check(settings: dict[str, object], tiny: Config) -> None:
    small = module._small(tiny.replace(settings), Path("eight_images.json"), "train2017")
    assert small.train.patience is None
    assert not small.train.checkpoint_activations


def test_the_estimate_counts_every_evaluation(tiny: Config) -> None:
    images = len(val_split(tiny.data).images)
    settings = {"train.iterations": 8, "train.evaluate_every": 2, "train.evaluate_images": images - 1}
    assert module._evaluated_inputs(tiny) == [images]
    assert module._evaluated_inputs(tiny.replace(settings)) == [images - 1] * 3 + [images], "the last one is at the end"
    image = val_split(tiny.data).images[0]
    assert image.height == image.width
    in_tiles = tiny.replace({"inference.tile": image.width * 3 // 4, "inference.tile_overlap": 0.0})
    assert module._evaluated_inputs(in_tiles) == [4 * images]
    assert module.evaluation_hours([100, 200], one=3.0, eight=10.0) == pytest.approx((2 * 2 + 300) / 3600)
    assert module.evaluation_hours([100, 200], one=3.0, eight=2.9) == pytest.approx(2 * 3 / 3600), "a noisy clock"


def test_validation_data_that_cannot_be_read_fail_before_the_steps(tiny: Config, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="missing.json"):
        preflight(tiny.replace({"data.source": "coco", "data.val_annotations": "missing.json"}), tmp_path / "run", device=CPU)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_learnable_data_pass(tiny: Config, tmp_path: Path) -> None:
    found = preflight(tiny, tmp_path / "run", device=CPU)
    assert found.ap50 > module.LEAST_AP50
    assert found.loss_after < module.MOST_LEFT * found.loss_before
    assert found.image_seconds > 0
    images = tiny.train.batch_size * tiny.train.iterations
    assert found.training_hours == pytest.approx(found.image_seconds * images / 3600)
    assert found.evaluation_hours > 0


@pytest.mark.slow
def test_masks_of_other_images_fail(tiny: Config, tmp_path: Path) -> None:
    """All eight images show the same picture, but each has masks of its own: nothing in an image tells where its masks are."""
    root = tmp_path / "data"
    shutil.copytree(tiny.data.root, root)
    first, *others = json.loads((root / tiny.data.train_annotations).read_text())["images"][: module.IMAGES]
    for image in others:
        shutil.copy(root / "train2017" / first["file_name"], root / "train2017" / image["file_name"])
    wrong = tiny.replace({"data.root": str(root), "data.source": "coco"})
    with pytest.raises(RunFailed, match="preflight: after 250 steps on 8 images"):
        preflight(wrong, tmp_path / "run", device=CPU)
