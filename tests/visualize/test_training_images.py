"""Check that the sheet and the numbers of `data look` are those of the training's own loader."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sparseinst.cli import run_cli
from sparseinst.config import Config
from sparseinst.data.coco import train_split
from sparseinst.data.loader import BatchOrder, TrainSet
from sparseinst.overrides import load_config
from sparseinst.visualize.training_images import draw_training_images, summary
from tests.conftest import annotation, box, write_coco

PLAIN = {"data.short_sides": [64], "data.long_side": 96, "data.flip": 0.0, "model.backbone.name": "small_resnet"}


def options(**more: object) -> list[str]:
    return [word for key, value in {**PLAIN, **more}.items() for word in ("-o", f"{key}={value}")]


@pytest.fixture
def few(tmp_path: Path) -> Path:
    """Write two images of 96 x 64 pixels: a large object, a tiny one, one that vanishes at 1/4, and a crowd."""
    images = [{"id": n, "file_name": f"{n}.png", "width": 96, "height": 64} for n in (1, 2)]
    annotations = [
        annotation(1, 1, 7, box(20, 20, 40, 40)),
        annotation(2, 1, 1000, box(4, 4, 5, 5)),
        annotation(3, 1, 1000, box(80, 8, 1, 1)),
        annotation(4, 2, 7, box(0, 0, 96, 64)),
        annotation(5, 2, 7, box(0, 0, 50, 50), iscrowd=1),
    ]
    return write_coco(tmp_path / "data", images, annotations)


def test_the_numbers_of_known_objects(few: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["data", "look", str(few), "--output", str(tmp_path / "sheet.png"), *options()]
    assert run_cli([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["images"] == 2
    assert (found["heights"], found["widths"]) == ([64, 64], [96, 96])
    assert (found["instances"], found["instances_per_image"]) == (4, [1, 2, 3])
    assert found["categories"] == {"seven": 2, "thousand": 2}
    assert found["by_size"] == {"small": 2, "medium": 2, "large": 0}
    assert found["instance_sides"][0] == 1
    assert found["instance_sides"][-1] == pytest.approx(np.sqrt(96 * 64), abs=0.1)
    assert (found["mask_stride"], found["tiny"], found["vanished"], found["first_vanished"]) == (4, 1, 1, "1.png")
    assert run_cli(command) == 0
    printed = capsys.readouterr().out
    assert "4 instances; in an image 1 to 3, median 2" in printed
    assert "1 more instance has no pixel at this size, the first in 1.png" in printed
    assert "exceed" not in printed
    assert run_cli([*command, "-o", "model.decoder.iam.num_maps=2"]) == 0
    assert "1 instance exceeds the model's 2 maps" in capsys.readouterr().out


def test_the_mask_stride_is_the_models(few: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["data", "look", str(few), "--output", str(tmp_path / "sheet.jpg"), "--json"]
    assert run_cli([*command, *options(**{"model.decoder.mask_scale": 1.0})]) == 0
    assert json.loads(capsys.readouterr().out)["mask_stride"] == 8


def test_a_ring_marks_the_object_that_vanishes(few: Path, tmp_path: Path) -> None:
    config = load_config(overrides={**PLAIN, "data.root": str(few)})
    draw_training_images(config, train_split(config.data), tmp_path / "sheet.png", mask_stride=4)
    with Image.open(tmp_path / "sheet.png") as sheet:
        picture = np.asarray(sheet.convert("RGB"))
    rows, columns = np.nonzero((picture == (255, 0, 0)).all(-1) & (np.arange(len(picture)) < 100)[:, None])
    assert len(rows) > 20
    assert np.ptp(rows) <= 16
    width = (picture.shape[1] - 4) // 2  # of a column; the object's middle is 80.5 pixels from the left
    assert np.mean((columns - 4) % width) == pytest.approx(80.5 * 400 / 96, abs=4)


def test_augmentation_is_that_of_the_training(tiny: Config, tmp_path: Path) -> None:
    """The first images of the sheet have the sizes of the training's first draws, whatever its batch size."""
    split = train_split(tiny.data)
    numbers = draw_training_images(tiny, split, tmp_path / "sheet.png", mask_stride=4, pictures=3, sample=8)
    dataset = TrainSet(split, tiny.data, tiny.train.seed, 4)
    draws = [draw for batch in BatchOrder(dataset.split, tiny.train) for draw in batch if draw.number < 8]
    assert len(draws) > 4
    for draw in draws:
        example = dataset[draw]
        assert numbers.sizes[draw.number] == example.image.shape[1:]
        assert numbers.instances[draw.number] == len(example.labels)
    assert summary(numbers)["images"] == 8


def test_a_config_file_and_a_split_select_the_data(few: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli(["data", "split", str(few), "--name", "mine", "--val", "0.5"]) == 0
    command = ["data", "look", str(few), "--output", str(tmp_path / "sheet.png"), "--config", str(few / "mine.yaml"), "--json"]
    capsys.readouterr()
    assert run_cli([*command, *options()]) == 0
    assert json.loads(capsys.readouterr().out)["images"] in (1, 2)


def test_cropped_and_unreadable_images_are_counted(few: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (few / "train2017/2.png").write_text("text")
    command = ["data", "look", str(few), "--output", str(tmp_path / "sheet.png")]
    assert run_cli([*command, *options()]) == 2
    assert "2.png: truncated or unreadable image" in capsys.readouterr().err
    crop = {"data.crop": 1.0, "data.crop_short_sides": [64], "data.crop_sizes": [20, 20], "data.on_bad_image": "skip"}
    assert run_cli([*command, *options(**crop)]) == 0
    printed = capsys.readouterr().out
    assert "annotated instances have no pixel in the augmented image" in printed
    assert "unreadable image was left out, the first: " in printed


def test_many_instances_and_mistakes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = [{"id": 1, "file_name": "1.png", "width": 96, "height": 64}]
    crowded = [annotation(n + 1, 1, 7, box(4 * (n % 20), 8 * (n // 20), 3, 5)) for n in range(40)]
    root = write_coco(tmp_path / "data", images, crowded)
    assert run_cli(["data", "look", str(root), "--output", str(tmp_path / "sheet.png"), *options()]) == 0
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.width > 400
    assert run_cli(["data", "look", str(root), "--output", str(tmp_path / "sheet.gif"), *options()]) == 2
    assert "the sheet is written as .png or .jpg" in capsys.readouterr().err
    empty = write_coco(tmp_path / "empty", images, [])
    assert run_cli(["data", "look", str(empty), "--output", str(tmp_path / "sheet.png"), *options()]) == 2
    assert "no image holds an instance to train on" in capsys.readouterr().err
