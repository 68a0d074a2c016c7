"""Check the check that comes before a long run."""

import json
import shutil
from pathlib import Path

import pytest

from sparseinst.config import Config
from sparseinst.errors import RunFailed
from sparseinst.training import preflight as module
from sparseinst.training.preflight import preflight
from tests.conftest import CPU


@pytest.fixture(autouse=True)
def _fewer_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "STEPS", 250)
    monkeypatch.setattr(module, "LEAST_RATE", 3e-3)


@pytest.mark.slow
def test_learnable_data_pass(tiny: Config, tmp_path: Path) -> None:
    found = preflight(tiny, tmp_path / "run", device=CPU)
    assert found.ap50 > module.LEAST_AP50
    assert found.loss_after < module.MOST_LEFT * found.loss_before
    assert found.image_seconds > 0


@pytest.mark.slow
def test_masks_of_other_images_fail(tiny: Config, tmp_path: Path) -> None:
    """The masks are moved between images and categories, as by a wrong conversion: nothing in an image tells where they are."""
    root = tmp_path / "data"
    shutil.copytree(tiny.data.root, root)
    file = root / tiny.data.train_annotations
    data = json.loads(file.read_text())
    for number, image in enumerate(data["images"]):
        if 0 < number < module.IMAGES:  # all eight show the same picture, so that only their masks differ
            shutil.copy(root / "train2017" / data["images"][0]["file_name"], root / "train2017" / image["file_name"])
    file.write_text(json.dumps(data))
    wrong = tiny.replace({"data.root": str(root), "data.source": "coco"})
    with pytest.raises(RunFailed, match="preflight: after 250 steps on 8 images"):
        preflight(wrong, tmp_path / "run", device=CPU)
