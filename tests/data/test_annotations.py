"""Check that mistakes in annotation files are refused before any work, in one line that names the entry."""

import json
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools import mask as reference_mask

from sparseinst.cli import run_cli
from sparseinst.config import DataConfig
from sparseinst.data.annotations import _extent, check_segmentation
from sparseinst.data.check import check_folder
from sparseinst.data.coco import CocoSplit, train_split, val_split
from sparseinst.data.masks import decode, encode
from sparseinst.errors import UserError
from sparseinst.evaluation.coco_metrics import coco_figures
from tests.attacks import wrong
from tests.conftest import annotation, box, write_coco

NAN = float("nan")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    images = [{"id": n, "file_name": f"{n}.png", "height": 64, "width": 64} for n in (1, 2)]
    return write_coco(tmp_path / "coco", images, [annotation(n, n, 7, box(5, 5, 20, 20)) for n in (1, 2)])


def change(folder: Path, split: str, key: tuple[Any, ...], value: Any) -> Path:
    """Put a value into an annotation file."""
    file = folder / "annotations" / f"instances_{split}2017.json"
    content = json.loads(file.read_text())
    node = content
    for part in key[:-1]:
        node = node[part]
    node[key[-1]] = value
    file.write_text(json.dumps(content))
    return file


CASES: dict[str, tuple[tuple[Any, ...], Any, str]] = {
    "NaN": (("annotations", 1, "segmentation"), [[NAN, 1, 2, 3, 4, 5]], "annotation 2 .*the coordinate nan is not between"),
    "infinite": (("annotations", 1, "segmentation"), [[1, 1, 2, float("inf"), 4, 5]], "the coordinate inf is not between"),
    "far away": (("annotations", 1, "segmentation"), [[1, 1, 1e9, 3, 4, 5]], "the coordinate 1000000000.0 is not between"),
    "text as a coordinate": (("annotations", 1, "segmentation"), [["1", 1, 2, 3, 4, 5]], "the coordinate '1' is not a number"),
    "id with a fraction": (("annotations", 0, "id"), 1.5, "annotation 0 .*id is 1.5: write a whole number"),
    "id as text": (("images", 0, "id"), "1", 'id is "1": write a whole number'),
    "no id": (("annotations", 0, "image_id"), None, "image_id is null: write a whole number"),
    "iscrowd in words": (("annotations", 0, "iscrowd"), "no", 'iscrowd is "no": write 0 or 1'),
    "name as a number": (("categories", 0, "name"), 5, "categories 0: name is 5: write a text"),
    "half a surrogate pair": (("categories", 1, "name"), "a\ud800", "half a surrogate pair"),
    "short run lengths": (("annotations", 0, "segmentation"), {"size": [64, 64], "counts": [9, 9]}, "add up to 18 pixels"),
    "negative run lengths": (("annotations", 0, "segmentation"), {"size": [64, 64], "counts": [-1, 4097]}, "one is negative"),
    "damaged run lengths": (("annotations", 0, "segmentation"), {"size": [64, 64], "counts": "zz"}, "damaged or cut off"),
    "size with a fraction": (("annotations", 0, "segmentation"), {"size": [64.0, 64], "counts": [4096]}, "the size .64.0, 64.,"),
    "no segmentation": (("annotations", 0, "segmentation"), None, "polygons or run lengths were expected, got None"),
    "annotations: null": (("annotations",), None, "annotations: a list was expected, got None; without objects, write"),
    "huge image": (("images", 0, "width"), 10**9, "at most .* can be read"),
    "short box": (("annotations", 0, "bbox"), [1, 2], "bbox is .*: write"),
    "area in words": (("annotations", 0, "area"), "big", 'area is "big": write the number of pixels'),
}


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("case", CASES)
def test_a_mistake_is_refused_with_its_place(folder: Path, case: str, split: str) -> None:
    key, value, message = CASES[case]
    file = change(folder, split, key, value)
    config = DataConfig(root=str(folder))
    read = train_split if split == "train" else val_split
    with pytest.raises(UserError, match=message) as caught:
        read(config)
    assert str(caught.value).startswith(str(file))
    assert len(str(caught.value).splitlines()) == 1
    try:
        found = "\n".join(check_folder(config)[split].problems)
    except UserError as error:
        found = str(error)
    assert str(file) in found


@pytest.mark.parametrize("kind", wrong.CHANGES)
def test_no_mistake_of_the_attacks_is_accepted(folder: Path, kind: str) -> None:
    file = folder / "annotations" / "instances_val2017.json"
    whole = file.read_text()
    for seed in range(25):
        content = json.loads(whole)
        wrong.CHANGES[kind](content, random.Random(seed))
        file.write_text(json.dumps(content))
        with pytest.raises(UserError) as caught:
            val_split(DataConfig(root=str(folder)))
        assert len(str(caught.value).splitlines()) == 1, content
        assert len(str(caught.value)) < 700


@pytest.mark.parametrize("number", range(len(wrong.NO_JSON)))
def test_a_file_that_is_no_annotation_file_is_refused(folder: Path, number: int) -> None:
    file = folder / "annotations" / "instances_train2017.json"
    file.write_bytes(wrong.NO_JSON[number])
    with pytest.raises(UserError, match=f"^{file}: ") as caught:
        train_split(DataConfig(root=str(folder)))
    assert len(str(caught.value).splitlines()) == 1


def perfect(split: CocoSplit) -> list[dict[str, Any]]:
    """Return the objects of a split as results."""
    return [
        {
            "image_id": image.id,
            "category_id": split.categories[a.label].id,
            "score": 0.9,
            "segmentation": encode(decode(a.segmentation, image.height, image.width)[None])[0],
        }
        for image in split.images
        for a in image.annotations
        if not a.crowd
    ]


@pytest.mark.parametrize("kind", wrong.HARMLESS)
def test_values_that_nothing_reads_do_not_matter(folder: Path, kind: str) -> None:
    """Roboflow, for example, writes the year as a text."""
    config = DataConfig(root=str(folder))
    file = val_split(config).file
    whole, split = file.read_text(), val_split(config)
    results, ids = perfect(split), [image.id for image in split.images]
    before = coco_figures(file, results, ids)
    assert before["AP"] == pytest.approx(100)
    for seed in range(5):
        content = json.loads(whole)
        wrong.HARMLESS[kind](content, random.Random(seed))
        file.write_text(json.dumps(content))
        assert val_split(config).file == file
        assert not any(report.problems for report in check_folder(config).values())
        assert coco_figures(file, results, ids) == before


@pytest.mark.parametrize("evaluator", ["hotcoco", "pycocotools"])
def test_annotations_with_one_id_are_told_apart(folder: Path, evaluator: Any) -> None:
    """hotcoco would take them for one another, and pycocotools would keep the last one."""
    split = val_split(DataConfig(root=str(folder)))
    results = perfect(split)
    content = json.loads(split.file.read_text())
    assert len(content["annotations"]) > 1
    content["annotations"] = [{**entry, "id": 7} for entry in content["annotations"]]
    split.file.write_text(json.dumps(content))
    found = coco_figures(split.file, results, [image.id for image in split.images], evaluator)
    assert found["AP"] == pytest.approx(100)


def test_an_annotation_with_the_id_0_counts(folder: Path) -> None:
    """Roboflow numbers annotations from 0, which COCO's evaluation reads as "no match"."""
    config = DataConfig(root=str(folder))
    split = val_split(config)
    image = next(image for image in split.images if any(not a.crowd for a in image.annotations))
    truth = next(a for a in image.annotations if not a.crowd)
    file = split.file
    content = json.loads(file.read_text())
    content["annotations"] = [{**entry, "id": 0} for entry in content["annotations"] if entry["id"] == truth.id]
    file.write_text(json.dumps(content))
    mask = encode(decode(truth.segmentation, image.height, image.width)[None])[0]
    found = {"image_id": image.id, "category_id": split.categories[truth.label].id, "segmentation": mask, "score": 0.9}
    for evaluator in ("hotcoco", "pycocotools"):
        assert coco_figures(file, [found], [image.id], evaluator)["AP"] == pytest.approx(100)
    assert not any("id 0" in problem for problem in check_folder(config)["val"].problems)


def test_skipping_bad_images_also_allows_bad_masks(folder: Path) -> None:
    change(folder, "train", ("annotations", 0, "segmentation"), [[1, 2]])
    split = train_split(DataConfig(root=str(folder), on_bad_image="skip"))
    assert len(split.problems) == 1
    assert len(split.images) == 2


def test_compressed_run_lengths_are_measured_as_pycocotools_does() -> None:
    chance = np.random.default_rng(0)
    for _ in range(200):
        height, width = (int(side) for side in chance.integers(1, 300, 2))
        mask = np.asfortranarray(chance.random((height, width)) < chance.choice([0.001, 0.5, 0.999, 0.0, 1.0])).astype(np.uint8)
        counts = reference_mask.encode(mask)["counts"]
        lowest, total = _extent(counts)
        assert lowest >= 0
        assert total == height * width
        check_segmentation({"size": [height, width], "counts": counts.decode()}, height, width)
        with pytest.raises(ValueError, match="size|fill"):
            check_segmentation({"size": [height, width], "counts": counts}, height + 1, width)


def test_data_check_lists_every_mistake(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change(folder, "train", ("annotations", 0, "category_id"), 99)
    file = change(folder, "train", ("annotations", 1, "segmentation"), [])
    with pytest.raises(UserError, match="category_id 99.*and 1 more, which `sparseinst data check` lists"):
        train_split(DataConfig(root=str(folder)))
    assert run_cli(["data", "check", str(folder)]) == 2
    printed = capsys.readouterr()
    assert re.search("^train: .*annotation 0 .*category_id 99 is not among", printed.out, re.MULTILINE)
    assert re.search("^train: .*annotation 2 .*a polygon needs", printed.out, re.MULTILINE)
    assert printed.err == f"error: {folder}: 2 problems found\n"
    assert re.search("│ images +│ 2 +│", printed.out), "the other split is counted"
    assert run_cli(["data", "check", str(folder), "--json"]) == 2
    found = json.loads(capsys.readouterr().out)
    assert [(found[split]["readable"], len(found[split]["problems"])) for split in ("train", "val")] == [(False, 2), (True, 0)]
    change(folder, "train", ("images", 0, "height"), 0)
    change(folder, "train", ("categories", 0, "name"), 5)
    problems = check_folder(DataConfig(root=str(folder)))["train"].problems
    assert len(problems) == 2, "the annotations of such an image or category are not counted as wrong"
    assert all(problem.startswith(str(file)) for problem in problems)


def test_every_id_that_is_shared_is_named(folder: Path) -> None:
    change(folder, "train", ("images", 1, "id"), 1)
    problems = check_folder(DataConfig(root=str(folder)))["train"].problems
    assert any("2 images share the id 1" in problem for problem in problems)
