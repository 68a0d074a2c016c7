"""Check that a folder is split anew without leaks between the groups, and without a copy of an image."""

import json
from pathlib import Path

import pytest

from sparseinst.cli import run_cli
from sparseinst.data.coco import read_split, train_split, val_split
from sparseinst.overrides import load_config
from tests.conftest import annotation, box, write_coco


@pytest.fixture
def clips(tmp_path: Path) -> Path:
    """Write five clips of four frames each, three clips in train and two in val; both files count their ids from 1."""
    root = tmp_path / "data"
    for split, numbers in {"train": (0, 1, 2), "val": (3, 4)}.items():
        images = [
            {"id": 1 + 4 * index + frame, "file_name": f"clip{clip}_{frame}.png", "width": 16, "height": 12, "video_id": clip}
            for index, clip in enumerate(numbers)
            for frame in range(4)
        ]
        annotations = [annotation(image["id"], image["id"], 7, box(1, 1, 5, 5)) for image in images]
        write_coco(tmp_path / split, images, annotations)
        for part in ("annotations", f"{split}2017"):
            (root / part).mkdir(parents=True, exist_ok=True)
            for file in (tmp_path / split / part).iterdir():
                if split in file.name or part != "annotations":
                    file.rename(root / part / file.name)
    return root


def split(root: Path, *options: str) -> int:
    return run_cli(["data", "split", str(root), *options])


def clips_of(root: Path, name: str = "split") -> dict[str, list[str]]:
    settings = load_config(root / f"{name}.yaml", overrides={"data.root": str(root)})
    found = {}
    for part, read in {"train": train_split(settings.data), "val": val_split(settings.data)}.items():
        assert all(image.path.is_file() for image in read.images)
        assert [len(image.annotations) for image in read.images] == [1] * len(read.images)
        found[part] = [image.path.name.split("_")[0] for image in read.images]
    return found


@pytest.mark.parametrize("by", ["field:video_id", "name:clip[0-9]", "name:^(.+)_"])
def test_a_group_is_on_one_side_only(by: str, clips: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pixels = {file: file.stat().st_ino for file in clips.rglob("*.png")}
    assert split(clips, "--by", by, "--val", "0.4") == 0
    assert "train: 12 images in 3 groups with 12 instances\nval: 8 images in 2 groups" in capsys.readouterr().out
    found = clips_of(clips)
    assert not set(found["train"]) & set(found["val"])
    assert sorted(found["train"] + found["val"]) == sorted(f"clip{clip}" for clip in range(5) for _ in range(4))
    assert {file: file.stat().st_ino for file in clips.rglob("*.png")} == pixels, "no image was copied or moved"


def test_by_image_and_the_seed(clips: Path) -> None:
    for name, seed in {"a": "0", "b": "0", "c": "1"}.items():
        assert split(clips, "--name", name, "--seed", seed) == 0
    texts = [(clips / "annotations" / f"{name}_val.json").read_text() for name in "abc"]
    assert texts[0] == texts[1] != texts[2]
    content = json.loads(texts[0])
    assert len(content["images"]) == 4
    assert not any(key.startswith("_") for entry in content["images"] + content["annotations"] for key in entry)


def test_unique_ids_stay(clips: Path) -> None:
    """The ids of the two files are the same, so they change; those of one file stay."""
    assert split(clips) == 0
    both = [json.loads((clips / "annotations" / f"split_{part}.json").read_text()) for part in ("train", "val")]
    assert sorted(image["id"] for content in both for image in content["images"]) == list(range(1, 21))
    assert sorted(entry["id"] for content in both for entry in content["annotations"]) == list(range(1, 21))
    (clips / "annotations/instances_val2017.json").unlink()
    file = clips / "annotations/instances_train2017.json"
    content = json.loads(file.read_text())
    for entry in content["images"]:
        entry["id"] += 500
    for entry in content["annotations"]:
        entry["image_id"] += 500
    file.write_text(json.dumps(content))
    assert split(clips, "--name", "one") == 0
    images = json.loads((clips / "annotations/one_train.json").read_text())["images"]
    assert len(images) == 10
    assert min(image["id"] for image in images) > 500


def test_a_split_can_be_trained_on_and_split_again(clips: Path) -> None:
    assert split(clips, "--by", "field:video_id") == 0
    again = [f"data.{part}_{what}" for part in ("train", "val") for what in ("images", "annotations")]
    values = [".", "annotations/split_train.json", ".", "annotations/split_val.json"]
    overrides = [word for key, value in zip(again, values, strict=True) for word in ("-o", f"{key}={value}")]
    assert split(clips, "--by", "name:(clip[0-9])", "--name", "second", "--seed", "3", *overrides) == 0
    found = clips_of(clips, "second")
    assert not set(found["train"]) & set(found["val"])
    assert run_cli(["data", "check", str(clips), "--config", str(clips / "second.yaml")]) == 0
    assert split(clips, "--name", "third", "--config", str(clips / "second.yaml")) == 0
    assert len(clips_of(clips, "third")["train"]) > 0


def test_a_category_on_one_side_only_is_named(clips: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = clips / "annotations/instances_val2017.json"
    content = json.loads(file.read_text())
    content["annotations"][0]["category_id"] = 1000
    file.write_text(json.dumps(content))
    assert split(clips, "--by", "field:video_id") == 0
    assert ": no instance of thousand; another --seed" in capsys.readouterr().out


def test_mistakes_are_one_line_errors(clips: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert split(clips) == 0
    other = write_coco(tmp_path / "other", [{"id": 1, "file_name": "1.png", "width": 9, "height": 9}], [])
    file = other / "annotations/instances_val2017.json"
    file.write_text(file.read_text().replace("seven", "eight"))
    capsys.readouterr()
    twice = write_coco(tmp_path / "twice", [{"id": 1, "file_name": "1.png", "width": 9, "height": 9}], [])
    cases = [
        (twice, ["-o", "data.val_images=train2017"], "train2017/1.png is listed 2 times"),
        (clips, ["--name", "split"], "exists already; choose another --name"),
        (clips, ["--name", "x", "--by", "group"], "--by group: use image, field:KEY"),
        (clips, ["--name", "x", "--by", "name:("], "not a regular expression"),
        (clips, ["--name", "x", "--by", "field:video"], "finds no group for 20 of 20 images, the first is clip0_0.png"),
        (clips, ["--name", "x", "--by", "name:^clip[0-3]"], "finds no group for 4 of 20 images, the first is clip4_0.png"),
        (clips, ["--name", "x", "--by", "name:clip"], "all 20 images are in one group (clip)"),
        (clips, ["--name", "a/b"], "cannot be used in file names"),
        (other, [], "its categories are not those of"),
        (tmp_path / "none", [], "no such file"),
    ]
    for root, options, message in cases:
        assert split(root, *options) == 2
        printed = capsys.readouterr().err
        assert message in printed
        assert printed.count("\n") == 1
    assert not list(clips.rglob("x*"))


def test_folders_of_images_elsewhere_are_referred_to(clips: Path, tmp_path: Path) -> None:
    (clips / "train2017").rename(tmp_path / "photos")
    (clips / "annotations/instances_val2017.json").unlink()
    overrides = ["-o", "data.train_images=../photos"]
    assert split(clips, "--by", "field:video_id", *overrides) == 0
    read = read_split(clips / "annotations/split_train.json", clips)
    assert read.images[0].path.resolve().parent == tmp_path / "photos"
    assert read.images[0].path.is_file()
