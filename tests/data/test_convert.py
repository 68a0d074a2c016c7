"""Check that folders of masks become a COCO-format folder, and the choice of the splits."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sparseinst.cli import run_cli
from sparseinst.data.check import check_folder
from sparseinst.data.coco import read_split
from sparseinst.data.convert import convert, detect
from sparseinst.data.masks import decode
from sparseinst.errors import UserError
from sparseinst.overrides import load_config


def source(root: Path, images: int = 5) -> Path:
    """Write images of 20 x 30 pixels with two rectangular instances each."""
    for number in range(images):
        folder = root / f"image{number}"
        (folder / "images").mkdir(parents=True)
        (folder / "masks").mkdir()
        Image.new("RGBA", (30, 20), (40 * number + 30, 0, 0, 255)).save(folder / "images" / "a.png")
        for index, (top, left) in enumerate([(2, 3), (10, 20)]):
            mask = np.zeros((20, 30), dtype=np.uint8)
            mask[top : top + 5, left : left + 6] = 255
            Image.fromarray(mask).save(folder / "masks" / f"{index}.png")
    return root


def test_masks_become_instances(tmp_path: Path) -> None:
    report = convert(source(tmp_path / "in"), tmp_path / "out", category="nucleus")
    assert report.images == {"train": 4, "val": 1}
    assert report.instances == {"train": 8, "val": 2}
    assert not report.left_out
    split = read_split(tmp_path / "out" / "annotations" / "instances_train2017.json", tmp_path / "out" / "train2017")
    assert [category.name for category in split.categories] == ["nucleus"]
    masks = [decode(annotation.segmentation, 20, 30) for annotation in split.images[0].annotations]
    assert [np.argwhere(mask)[0].tolist() for mask in masks] == [[2, 3], [10, 20]]
    assert [mask.sum() for mask in masks] == [30, 30]
    settings = load_config(overrides={"data.root": str(tmp_path / "out")})
    assert all(not found.problems for found in check_folder(settings.data, read_images=True).values())


def test_a_folder_that_is_in_cocos_format_already_is_named(tmp_path: Path) -> None:
    (tmp_path / "trainset").mkdir()
    (tmp_path / "notes.json").write_text("[]")
    content = {"images": [{"id": 1}], "categories": [{"id": 1}], "annotations": [{"id": 1}]}
    (tmp_path / "trainset" / "labels.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"trainset/labels\.json has COCO's format already: .*-o data\.train_annotations=FILE"):
        detect(tmp_path)
    for folder, place in (("train", "train"), ("valid", "valid/images")):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "1.jpg").touch()
        content["images"] = [{"id": 1, "file_name": "1.jpg"}]
        (tmp_path / folder / "_annotations.coco.json").write_text(json.dumps(content))
    names = "-o data.train_annotations=train/_annotations.coco.json -o data.train_images=train "
    names += "-o data.val_annotations=valid/_annotations.coco.json -o data.val_images=valid/images"
    with pytest.raises(UserError, match=f"name the files of both splits with {names} "):
        detect(tmp_path)
    for file in tmp_path.rglob("*.json"):
        file.write_text("{}")
    with pytest.raises(UserError, match="fits none of the formats"):
        detect(tmp_path)


def test_boxes_and_areas(tmp_path: Path) -> None:
    convert(source(tmp_path / "in"), tmp_path / "out")
    data = json.loads((tmp_path / "out" / "annotations" / "instances_val2017.json").read_text())
    assert [(a["bbox"], a["area"]) for a in data["annotations"]] == [([3, 2, 6, 5], 30), ([20, 10, 6, 5], 30)]


def test_the_splits_share_no_image_and_are_reproducible(tmp_path: Path) -> None:
    root = source(tmp_path / "in", images=10)
    names = []
    for output in ("a", "b"):
        convert(root, tmp_path / output, val=0.3)
        names.append([sorted(file.name for file in (tmp_path / output / f"{split}2017").iterdir()) for split in ("train", "val")])
    assert names[0] == names[1]
    train, val = names[0]
    assert (len(train), len(val)) == (7, 3)
    assert not set(train) & set(val)


def test_left_out_files_are_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = source(tmp_path / "in")
    masks = root / "image0" / "masks"
    Image.new("L", (30, 20)).save(masks / "empty.png")
    Image.new("L", (31, 20), 255).save(masks / "wide.png")
    (masks / "text.png").write_text("no image")
    (masks / "notes.txt").write_text("no mask")
    (root / "image1" / "images" / "a.png").unlink()
    assert run_cli(["data", "convert", "masks", str(root), "--output", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    for reason in ("an empty mask", "a mask whose size differs from its image", "an unreadable mask", "no image in one folder"):
        assert f"left out ({reason}): 1; the first is" in printed


@pytest.mark.parametrize("broken", ["missing", "empty", "used"])
def test_mistakes_give_one_line_errors(tmp_path: Path, broken: str) -> None:
    root = source(tmp_path / "in") if broken == "used" else tmp_path / broken
    if broken == "empty":
        root.mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("keep")
    with pytest.raises(UserError) as error:
        convert(root, tmp_path / "out")
    assert "\n" not in str(error.value)
    assert (tmp_path / "out" / "mine").exists()
