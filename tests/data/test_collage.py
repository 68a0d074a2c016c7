"""Check scenes of cut-outs: exact masks, splits that share no file, and clear errors."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as coco_mask

from sparseinst.cli import run_cli
from sparseinst.data import collage
from sparseinst.errors import UserError


def save(path: Path, pixels: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(pixels, dtype=np.uint8)).save(path)


@pytest.fixture
def material(tmp_path: Path) -> tuple[Path, Path]:
    """Write cut-outs of two classes, discs and bars, and backgrounds. Each file has its own red or blue value."""
    y, x = np.mgrid[:60, :60] - 30
    for number in range(5):
        for name, inside in (("disc", np.hypot(x, y) < 28), ("bar", (abs(y) < 9) & (abs(x) < 28))):
            pixels = np.zeros((60, 60, 4))
            pixels[inside] = (150 + 20 * number, 250, 0, 255)
            save(tmp_path / "cutouts" / name / "deep" / f"{number}.png", pixels)
        save(tmp_path / "backgrounds" / f"{number}.png", np.full((100, 140, 3), (0, 0, 40 * number)))
    return tmp_path / "cutouts", tmp_path / "backgrounds"


def test_masks_contain_the_visible_pixels(material: tuple[Path, Path], tmp_path: Path) -> None:
    counts = collage.write_collage(tmp_path / "set", *material, train=12, val=4, side=96)
    assert counts == {"bar": 5, "disc": 5}
    for split in ("train", "val"):
        data = json.loads((tmp_path / "set" / "annotations" / f"instances_{split}2017.json").read_text())
        assert [category["name"] for category in data["categories"]] == ["bar", "disc"]
        assert len({a["category_id"] for a in data["annotations"]}) == 2
        for entry in data["images"]:
            pixels = np.asarray(Image.open(tmp_path / "set" / f"{split}2017" / entry["file_name"]))
            masks = [a["segmentation"] for a in data["annotations"] if a["image_id"] == entry["id"]]
            covered = sum(coco_mask.decode(mask).astype(int) for mask in masks)
            assert covered.max() == 1, "masks do not overlap"
            green = pixels[..., 1] > 128
            assert (green != (covered > 0)).mean() < 0.03, "only half-transparent edges may differ"


def test_splits_share_no_file(material: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    used: dict[str, set[Path]] = {"train": set(), "val": set()}
    scene = collage._scene

    def recording_scene(rng: Any, cutouts: Any, backgrounds: Any, side: int) -> Any:
        split = "train" if len(backgrounds) > 2 else "val"
        used[split] |= set(backgrounds) | {file for files in cutouts.values() for file in files}
        return scene(rng, cutouts, backgrounds, side)

    monkeypatch.setattr(collage, "_scene", recording_scene)
    collage.write_collage(tmp_path / "set", *material, train=2, val=2, side=64)
    assert used["train"]
    assert used["val"]
    assert not used["train"] & used["val"]


def test_the_seed_determines_the_images(material: tuple[Path, Path], tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        collage.write_collage(tmp_path / name, *material, train=2, val=1, side=64, seed=seed)
    first, second, other = ((tmp_path / n / "train2017" / "000000000001.png").read_bytes() for n in "abc")
    assert first == second != other


def test_files_that_are_no_cutouts_are_left_out(material: tuple[Path, Path], caplog: pytest.LogCaptureFixture) -> None:
    cutouts, _ = material
    save(cutouts / "disc" / "opaque.png", np.full((60, 60, 4), 255))
    save(cutouts / "disc" / "no alpha.png", np.full((60, 60, 3), 255))
    save(cutouts / "disc" / "tiny.png", np.full((9, 9, 4), 255))
    (cutouts / "disc" / "broken.png").write_bytes(b"\x89PNG\r\n")
    (cutouts / "lonely").mkdir()
    (cutouts / "lonely" / "one.png").write_bytes((cutouts / "bar" / "deep" / "0.png").read_bytes())
    assert {name: len(files) for name, files in collage.find_cutouts(cutouts).items()} == {"bar": 5, "disc": 5}
    assert "left out 4 images that are unreadable" in caplog.text
    assert "broken.png: cannot be read" in caplog.text
    assert "lonely: left out, because the class has 1 usable cut-outs" in caplog.text


def test_mistakes_give_clear_errors(material: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cutouts, backgrounds = material
    with pytest.raises(UserError, match="no such folder"):
        collage.find_cutouts(tmp_path / "nowhere")
    with pytest.raises(UserError, match="no class has two"):
        collage.find_cutouts(backgrounds)
    (tmp_path / "empty").mkdir()
    command = ["data", "collage", "--cutouts", str(cutouts), "--output", str(tmp_path / "set"), "--train", "1", "--val", "1"]
    assert run_cli([*command, "--backgrounds", str(tmp_path / "empty")]) == 2
    assert "two backgrounds are needed" in capsys.readouterr().err
    assert not (tmp_path / "set").exists()
    assert run_cli([*command, "--backgrounds", str(backgrounds)]) == 0
    assert "10 cut-outs in 2 classes" in capsys.readouterr().out
    assert run_cli([*command, "--backgrounds", str(backgrounds)]) == 2
    assert "name another folder" in capsys.readouterr().err
