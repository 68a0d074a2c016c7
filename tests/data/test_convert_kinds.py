"""Check that each annotation format becomes the same COCO-format folder, and that what is no format is one line."""

import json
from pathlib import Path

import numpy as np
import pytest

from sparseinst.cli import run_cli
from sparseinst.data.check import check_folder
from sparseinst.data.coco import read_split
from sparseinst.data.convert import KINDS, Report, convert
from sparseinst.data.masks import decode
from sparseinst.errors import UserError
from sparseinst.overrides import load_config
from tests.data.layouts import BOXES, HEIGHT, MAKERS, WIDTH, make_label_maps, make_labelme, make_voc, make_yolo, painted, save


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_detected_and_gives_the_same_masks(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    MAKERS[kind](tmp_path / "in")
    assert run_cli(["data", "convert", str(tmp_path / "in"), "--output", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert f"read as {kind}" in printed
    assert "train: 2 images with 4 instances\nval: 1 image with 2 instances\n" in printed
    assert "left out" not in printed
    for split in ("train", "val"):
        found = read_split(tmp_path / f"out/annotations/instances_{split}2017.json", tmp_path / f"out/{split}2017")
        for image in found.images:
            masks = [decode(annotation.segmentation, HEIGHT, WIDTH) for annotation in image.annotations]
            for name, mask in zip(BOXES, sorted(masks, key=lambda mask: int(np.flatnonzero(mask)[0])), strict=True):
                assert np.array_equal(mask, painted({other: int(other == name) for other in BOXES}))
    settings = load_config(overrides={"data.root": str(tmp_path / "out")})
    assert not any(report.problems for report in check_folder(settings.data).values())


@pytest.mark.parametrize("kind", ["voc", "cityscapes", "yolo", "labelme"])
def test_categories_belong_to_their_objects(kind: str, tmp_path: Path) -> None:
    MAKERS[kind](tmp_path / "in")
    convert(tmp_path / "in", tmp_path / "out")
    data = json.loads((tmp_path / "out/annotations/instances_train2017.json").read_text())
    names = {category["id"]: category["name"] for category in data["categories"]}
    found = {names[entry["category_id"]]: entry["bbox"] for entry in data["annotations"]}
    assert found == {name: [x, y, right - x, bottom - y] for name, (x, y, right, bottom) in BOXES.items()}


def test_own_splits_are_kept_unless_a_share_is_given(tmp_path: Path) -> None:
    make_voc(tmp_path / "in")
    convert(tmp_path / "in", tmp_path / "own")
    assert [file.name for file in (tmp_path / "own/val2017").iterdir()] == ["i1.jpg"]
    assert convert(tmp_path / "in", tmp_path / "new", val=0.67).images == {"train": 1, "val": 2}


def test_a_kind_that_does_not_fit_is_a_one_line_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    (tmp_path / "coco/annotations").mkdir(parents=True)
    (tmp_path / "coco/annotations/instances_train2017.json").write_text("{}")
    make_yolo(tmp_path / "both")
    make_labelme(tmp_path / "both")
    make_label_maps(tmp_path / "white")
    for file in (tmp_path / "white/masks").iterdir():
        save(file, painted({"car": 255, "person": 255}))
    make_label_maps(tmp_path / "other")
    (tmp_path / "other/masks").rename(tmp_path / "other/segmaps")
    cases = {
        str(tmp_path / "other"): "segmaps/ holds files with the names of the images: if they are label maps, rename it",
        f"label_maps {tmp_path / 'other'}": "under the same names (segmaps/ may hold them: rename it)",
        str(empty): "fits none of the formats; name the right one: masks, labelme, voc, cityscapes, label_maps, yolo",
        str(tmp_path / "coco"): "is a COCO-format folder, which needs no conversion",
        str(tmp_path / "both"): "fits several formats; name the right one: labelme, yolo",
        str(tmp_path / "none"): "no such folder",
        str(tmp_path / "white"): "0 usable images found, but two are needed, for training and for validation: 3 x an image whose",
        f"yollo {empty}": "unknown kind 'yollo' (did you mean 'yolo'?)",
        f"yolo {empty}": "holds neither data.yaml nor classes.txt",
        f"labelme {empty}": "holds no JSON file",
        f"voc {empty}": "no such folder; Pascal VOC's format needs it",
        f"cityscapes {empty}": "no *_instanceIds.png found",
        f"label_maps {empty}": "no label map found",
        f"a b {empty}": "takes a kind and one folder",
    }
    for arguments, message in cases.items():
        assert run_cli(["data", "convert", *arguments.split(), "--output", str(tmp_path / "out")]) == 2
        printed = capsys.readouterr().err
        assert message in printed
        assert printed.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("train: images/train\n", "needs `names`, a list of the classes"),
        ("path: 3\nnames: [car]\ntrain: 4\n", "4: no such folder or list of images"),
        ("names: {car: 0}\n", "the keys of `names` must be the class ids"),
        ("names: [car]\ntrain: nowhere\n", "nowhere: no such folder or list of images"),
        ("names: [car\n", "data.yaml: line"),
        ("names: [car]\n", "0 usable images found, but two are needed"),
    ],
)
def test_a_broken_data_yaml_is_a_one_line_error(text: str, message: str, tmp_path: Path) -> None:
    make_yolo(tmp_path / "in")
    (tmp_path / "in/data.yaml").write_text(text)
    with pytest.raises(UserError) as error:
        convert(tmp_path / "in", tmp_path / "out")
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_report_keeps_the_first_example() -> None:
    report = Report()
    for name in ("a", "b"):
        report.leave_out("reason", name)
    assert (report.left_out["reason"], report.examples["reason"]) == (2, "a")
