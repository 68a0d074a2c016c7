"""Check the variants of each annotation format, and that what cannot be used is left out with a reason."""

import base64
import json
from pathlib import Path

import numpy as np
import pytest

from sparseinst.data.convert import convert, detect
from sparseinst.errors import UserError
from tests.data.layouts import (
    BOXES,
    HEIGHT,
    VOC_IDS,
    WIDTH,
    make_cityscapes,
    make_label_maps,
    make_labelme,
    make_voc,
    make_yolo,
    painted,
    photo,
    png,
    save,
    shape,
    write_json,
)


def left_out(root: Path, output: Path) -> dict[str, int]:
    return dict(convert(root, output, val=0.3).left_out)


def test_labelme_shapes_that_cannot_be_used(tmp_path: Path) -> None:
    root = tmp_path / "in"
    make_labelme(root)
    outside = base64.b64encode(png(np.full((5, 11), 255, np.uint8))).decode()
    bad = [
        shape("car", points=[[1, 1], [5, 5]]),
        shape("car", points=[[1, 1], [5, 5], [300, 1]]),
        shape("car", points=[[1, 1], [5, 5], [9, 9]]),
        shape("car", points=[[1, 1], [5, "x"], [9, 9]]),
        shape("car", shape_type="line", points=[[1, 1], [5, 5]]),
        shape("car", shape_type="mask", points=[[25, 1], [35, 5]], mask=outside),
        {"points": []},
    ]  # fmt: skip
    write_json(root / "i0.json", [shape("car"), *bad])
    write_json(root / "no_image.json", [shape("car")])
    write_json(root / "i1.json", [shape("car")], imageHeight=HEIGHT + 1)
    (root / "broken.json").write_text("{")
    (root / "list.json").write_text("[]")
    photo(root / "more.png")
    write_json(root / "more.json", [])
    assert left_out(root, tmp_path / "out") == {
        "a polygon with fewer than three points": 1,
        "a polygon with coordinates outside the image": 1,
        "a polygon without a pixel": 1,
        "a polygon that cannot be read": 1,
        "a line, which covers no area": 1,
        "a mask that cannot be read": 1,
        "a shape without a label": 1,
        "a missing image": 1,
        "an image whose size differs from its annotations": 1,
        "a broken JSON file": 1,
        "a JSON file without a list of shapes": 1,
    }


def test_labelme_groups_circles_masks_and_stored_images(tmp_path: Path) -> None:
    root = tmp_path / "in"
    stored = base64.b64encode(png(np.full((HEIGHT, WIDTH, 3), 90, np.uint8))).decode()
    part = base64.b64encode(png(np.full((4, 3), 255, np.uint8))).decode()
    shapes = [
        shape("car", group_id=[1]),
        shape("car", group_id=[1], points=[[12, 2], [16, 6]], shape_type="rectangle"),
        shape("car", group_id=2, points=[[25, 10], [25, 13]], shape_type="circle"),
        shape("person", group_id=1, points=[[12, 12], [14, 15]], shape_type="mask", mask=part),
    ]
    for clip in ("a", "b"):
        write_json(root / clip / "1.json", shapes, imagePath="..\\gone.png", imageData=stored)
    assert detect(root) == "labelme"
    report = convert(root, tmp_path / "out", val=0.5)
    assert report.instances == {"train": 3, "val": 3}
    assert not report.left_out
    data = json.loads((tmp_path / "out/annotations/instances_val2017.json").read_text())
    assert data["images"][0]["file_name"] in ("a/1.png", "b/1.png"), "folders stay, so that they can be groups"
    areas = [entry["area"] for entry in data["annotations"]]
    assert areas[0] == 30 + 16
    assert areas[1] == pytest.approx(np.pi * 9, rel=0.15)
    assert areas[2] == 12


def test_yolo_lines_that_cannot_be_used(tmp_path: Path) -> None:
    root = tmp_path / "in"
    make_yolo(root)
    good = "0 0.1 0.1 0.3 0.1 0.3 0.3\n"
    bad = ["7 0.1 0.1 0.3 0.1 0.3 0.3", "0 0.5 0.5 0.1 0.1", "0 0.1 0.1 0.3 0.1 0.3", "0 a b", "0 12 3 14 3 14 9",
           "0 nan 0.1 0.3 0.1 0.3 0.3", "0 0.1 0.1", "0 0.1 0.1 0.1 0.1 0.1 0.1"]  # fmt: skip
    (root / "labels/train/i0.txt").write_text(good + "\n".join(bad))
    (root / "labels/train/i2.txt").unlink()
    report = convert(root, tmp_path / "out")
    assert report.left_out == {
        "an unknown class id": 1,
        "a box without a polygon": 1,
        "a polygon with an odd number of coordinates": 1,
        "a polygon with fewer than three points": 1,
        "a line that is not numbers": 1,
        "a polygon with coordinates outside the image": 1,
        "a polygon with a coordinate that is no number": 1,
        "a polygon without a pixel": 1,
    }
    assert report.examples["an unknown class id"].endswith("i0.txt: line 2: 7")
    assert (report.images, report.instances) == ({"train": 2, "val": 1}, {"train": 1, "val": 2}), "i2 has no object"


def test_points_just_outside_move_to_the_edge(tmp_path: Path) -> None:
    make_yolo(tmp_path / "in")
    (tmp_path / "in/labels/val/i1.txt").write_text("0 -0.01 0 1.01 0 1.01 1 -0.01 1")
    assert not convert(tmp_path / "in", tmp_path / "out").left_out
    [entry] = json.loads((tmp_path / "out/annotations/instances_val2017.json").read_text())["annotations"]
    assert entry["bbox"] == [0, 0, WIDTH, HEIGHT]


def test_other_layouts_of_yolo(tmp_path: Path) -> None:
    """Roboflow's data.yaml, CVAT's lists of images, and classes.txt without a data.yaml."""
    make_yolo(tmp_path / "in")
    (tmp_path / "in/data.yaml").write_text("train: ../images/train\nval: ../images/val\nnames: {0: car, 1: person}\n")
    assert convert(tmp_path / "in", tmp_path / "a").images == {"train": 2, "val": 1}
    (tmp_path / "in/data.yaml").write_text("path: .\ntrain: train.txt\nnames: {0: car, 1: person}\n")
    (tmp_path / "in/train.txt").write_text("images/train/i0.png\nimages/train/i2.png\nimages/train/gone.png\n")
    report = convert(tmp_path / "in", tmp_path / "b", val=0.34)
    assert (report.images, dict(report.left_out)) == ({"train": 1, "val": 1}, {"a missing image": 1})
    (tmp_path / "in/data.yaml").unlink()
    (tmp_path / "in/classes.txt").write_text("car\nperson\n")
    assert convert(tmp_path / "in", tmp_path / "c").images == {"train": 2, "val": 1}


def test_label_maps_that_cannot_be_used(tmp_path: Path) -> None:
    root = tmp_path / "in"
    make_label_maps(root)
    maps = [np.zeros((HEIGHT, WIDTH + 1), np.uint8), np.zeros((HEIGHT, WIDTH, 3), np.uint8), painted({"car": 255, "person": 255})]
    for number, values in enumerate(maps):
        photo(root / "images" / f"bad{number}.png")
        save(root / "masks" / f"bad{number}.png", values)
    photo(root / "images" / "alone.png")
    photo(root / "images" / "unreadable.png")
    (root / "masks" / "unreadable.png").write_text("text")
    (root / "images" / "i0.png").write_text("text")
    photo(root / "images" / "empty.png")
    save(root / "masks" / "empty.png", np.zeros((HEIGHT, WIDTH), np.uint8))
    report = convert(root, tmp_path / "out", val=0.4)
    assert report.left_out == {
        "an image whose size differs from its annotations": 1,
        "an image whose label map is in colour": 1,
        "an image whose map is black and white, so that it separates no instances": 1,
        "an image without a label map": 1,
        "an image with an unreadable label map": 1,
        "an unreadable image": 1,
    }
    assert sum(report.images.values()) == 3
    assert sum(report.instances.values()) == 4


def test_label_maps_beside_their_images(tmp_path: Path) -> None:
    for number in range(2):
        photo(tmp_path / "in" / f"{number}.png")
        save(tmp_path / "in" / f"{number}_masks.png", painted({"car": 1, "person": 2}))
    assert convert(tmp_path / "in", tmp_path / "out", category="cell").instances == {"train": 2, "val": 2}


def test_cityscapes_groups_are_crowds_and_other_classes_are_left_out(tmp_path: Path) -> None:
    root = tmp_path / "in"
    make_cityscapes(root)
    ids = painted({"car": 26, "person": 29001}, np.uint16)
    ids[18:] = 99_000 % 65536  # label id 33 is a bicycle, 999 none
    ids[18:, :5] = 44001
    save(root / "gtFine/val/ulm/ulm_1_gtFine_instanceIds.png", ids)
    (root / "leftImg8bit/train/ulm/ulm_0_leftImg8bit.png").unlink()
    report = convert(root, tmp_path / "out")
    assert report.left_out == {
        "a caravan, which Cityscapes does not evaluate": 1,
        "an object with an unknown label id": 1,
        "a missing image": 1,
    }
    entries = json.loads((tmp_path / "out/annotations/instances_val2017.json").read_text())["annotations"]
    assert [(entry["iscrowd"], entry["category_id"]) for entry in entries] == [(1, 3), (0, 8)]


def test_voc_masks_that_cannot_be_used(tmp_path: Path) -> None:
    root = tmp_path / "in"
    make_voc(root)
    save(root / "SegmentationClass/i0.png", painted({"car": 77, "person": 15}))
    (root / "SegmentationClass/i2.png").unlink()
    save(root / "SegmentationObject/i1.png", np.zeros((HEIGHT, WIDTH - 1), np.uint8))
    for name in ("i3", "i4"):
        photo(root / "JPEGImages" / f"{name}.jpg")
        save(root / "SegmentationObject" / f"{name}.png", painted({"car": 1, "person": 2}))
        save(root / "SegmentationClass" / f"{name}.png", painted(VOC_IDS))
    with (root / "ImageSets/Segmentation/val.txt").open("a") as file:
        file.write("i3\ni4\ngone\n")
    report = convert(root, tmp_path / "out")
    assert report.left_out == {
        "an object without a known class": 1,
        "an image without a label map": 2,
        "an image whose two masks differ in size": 1,
    }
    assert report.instances == {"train": 1, "val": 4}


def test_voc_in_colour_with_a_label_map_of_names(tmp_path: Path) -> None:
    """CVAT writes labelmap.txt, and older versions colour images."""
    root = tmp_path / "in"
    make_voc(root)
    (root / "labelmap.txt").write_text("# label:color_rgb:parts:actions\nbackground:0,0,0::\ncup:250,10,0::\nplate:0,20,250::\n")
    colours = {"car": (250, 10, 0), "person": (0, 20, 250)}
    picture = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    for name, (left, top, right, bottom) in BOXES.items():
        picture[top:bottom, left:right] = colours[name]
    for number in range(3):
        save(root / f"SegmentationClass/i{number}.png", picture)
    convert(root, tmp_path / "out")
    data = json.loads((tmp_path / "out/annotations/instances_val2017.json").read_text())
    assert [category["name"] for category in data["categories"]] == ["cup", "plate"]
    assert [(entry["category_id"], entry["bbox"][:2]) for entry in data["annotations"]] == [(1, [3, 2]), (2, [20, 10])]
    (root / "labelmap.txt").write_text("cup:red\n")
    with pytest.raises(UserError, match=r"labelmap\.txt: line 'cup:red' is not of the form"):
        convert(root, tmp_path / "again")
