"""The embedded data set: fixed content, exact masks, and no half-written folder."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from pycocotools import mask as coco_mask

from sparseinst.data import scenes, shapes
from sparseinst.errors import UserError

DIGEST = "fecb7dd3943cb076cdb94280941193f10c50d21a8415c4ffb80187df55f7b6b7"
"""Of `write_shapes(root, train=6, val=4)`. Where it changes on purpose, `SHAPES_VERSION` goes up."""

SIDE = 96


def read(root: Path, split: str) -> Any:
    return json.loads((root / "annotations" / f"instances_{split}2017.json").read_text())


def pixels(root: Path, split: str, entry: dict[str, Any]) -> NDArray[np.uint8]:
    with Image.open(root / f"{split}2017" / entry["file_name"]) as file:
        return np.asarray(file)


def decode(entry: dict[str, Any]) -> NDArray[np.bool_]:
    runs = entry["segmentation"]
    if entry["iscrowd"]:
        runs = coco_mask.frPyObjects(runs, *runs["size"])
    return coco_mask.decode(runs).astype(bool)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data") / "shapes"
    shapes.write_shapes(root, train=150, val=20, side=SIDE)
    return root


def test_content_is_fixed(tmp_path: Path) -> None:
    shapes.write_shapes(tmp_path / "set", train=6, val=4)
    assert shapes.content_digest(tmp_path / "set") == DIGEST


def test_digest_is_of_pixels_not_of_bytes(tmp_path: Path) -> None:
    root = tmp_path / "set"
    shapes.write_shapes(root, train=1, val=1)
    digest = shapes.content_digest(root)
    file = root / "train2017" / "000000000001.png"
    image = Image.fromarray(pixels(root, "train", {"file_name": file.name}))
    image.save(file, compress_level=9)
    assert shapes.content_digest(root) == digest
    image.putpixel((0, 0), (1, 2, 3))
    image.save(file)
    assert shapes.content_digest(root) != digest


def test_images_do_not_depend_on_their_number(root: Path, tmp_path: Path) -> None:
    shapes.write_shapes(tmp_path / "few", train=3, val=2, side=SIDE)
    for split, number in (("train", 3), ("val", 2)):
        many, few = read(root, split), read(tmp_path / "few", split)
        assert few["images"] == many["images"][:number]
        assert few["annotations"] == [a for a in many["annotations"] if a["image_id"] <= number]
        for entry in few["images"]:
            assert np.array_equal(pixels(root, split, entry), pixels(tmp_path / "few", split, entry))


def test_splits_and_seeds_differ(root: Path, tmp_path: Path) -> None:
    shapes.write_shapes(tmp_path / "other", train=1, val=1, side=SIDE, seed=1)
    first = {"file_name": "000000000001.png"}
    images = [pixels(root, "train", first), pixels(root, "val", first), pixels(tmp_path / "other", "train", first)]
    assert len({image.tobytes() for image in images}) == 3


@pytest.mark.parametrize("split", ["train", "val"])
def test_coco_layout(root: Path, split: str) -> None:
    data = read(root, split)
    assert {"info", "licenses", "images", "annotations", "categories"} == set(data)
    ids = [category["id"] for category in data["categories"]]
    assert max(ids) > len(set(ids)) == len(ids) == len(shapes._SHAPES), "distinct, with gaps"
    assert [a["id"] for a in data["annotations"]] == list(range(1, len(data["annotations"]) + 1))
    names = [entry["file_name"] for entry in data["images"]]
    assert sorted(file.name for file in (root / f"{split}2017").iterdir()) == names
    for entry in data["images"]:
        assert pixels(root, split, entry).shape == (entry["height"], entry["width"], 3)
        assert entry["height"] == entry["width"] == SIDE


def test_masks_are_modal_and_match_area_and_box(root: Path) -> None:
    for split in ("train", "val"):
        data = read(root, split)
        sizes = {entry["id"]: (entry["height"], entry["width"]) for entry in data["images"]}
        taken = {key: np.zeros(size, dtype=np.int64) for key, size in sizes.items()}
        for entry in data["annotations"]:
            mask = decode(entry)
            assert mask.shape == sizes[entry["image_id"]]
            assert entry["area"] == mask.sum() >= scenes._MIN_VISIBLE_AREA
            row, column = np.nonzero(mask)
            box = [column.min(), row.min(), np.ptp(column) + 1, np.ptp(row) + 1]
            assert entry["bbox"] == box
            taken[entry["image_id"]] += mask
        assert max(cover.max() for cover in taken.values()) == 1


def test_scenes_are_varied(root: Path) -> None:
    data = read(root, "train")
    objects = [a for a in data["annotations"] if not a["iscrowd"]]
    assert {a["category_id"] for a in objects} == {category["id"] for category in data["categories"]}
    extents = [max(a["bbox"][2:]) for a in objects]
    assert min(extents) <= 0.2 * SIDE
    assert max(extents) >= 0.5 * SIDE
    numbers = np.bincount([a["image_id"] for a in data["annotations"]], minlength=len(data["images"]) + 1)[1:]
    assert 0 in numbers, "some images are empty"


def test_objects_hide_each_other() -> None:
    hidden = 0
    for index in range(20):
        _, objects, owner = shapes._scene(np.random.Generator(np.random.PCG64(index)), SIDE)
        for number, item in enumerate(objects):
            seen = (owner == number).sum()
            assert seen >= max(scenes._MIN_VISIBLE_AREA, scenes._MIN_VISIBLE * item.whole_area)
            hidden += seen < item.mask.sum()
    assert hidden >= 5


def test_a_crowd_is_uncompressed_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(shapes, "_CROWDED", 1.0)
    shapes.write_shapes(tmp_path / "set", train=5, val=1)
    crowds = [a for a in read(tmp_path / "set", "train")["annotations"] if a["iscrowd"]]
    assert crowds
    for entry in crowds:
        counts = entry["segmentation"]["counts"]
        assert sum(counts) == np.prod(entry["segmentation"]["size"])
        assert sum(counts[1::2]) == entry["area"] == decode(entry).sum()


def test_what_is_there_is_refused(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("keep")
    (tmp_path / "file").write_text("keep")
    for name in ("full", "file"):
        for write in (shapes.write_shapes, shapes.ensure_shapes):
            with pytest.raises(UserError, match="something other than a shapes set") as error:
                write(tmp_path / name)
            assert "\n" not in str(error.value)
    assert (tmp_path / "full" / "mine.txt").read_text() == "keep"
    (tmp_path / "empty").mkdir()
    shapes.write_shapes(tmp_path / "empty", train=1, val=1)
    with pytest.raises(UserError, match="a shapes set of version . already"):
        shapes.write_shapes(tmp_path / "empty", train=1, val=1)


@pytest.mark.parametrize("numbers", [{"train": 0}, {"val": 0}, {"side": 16}, {"seed": -1}])
def test_numbers_out_of_range_are_refused(tmp_path: Path, numbers: dict[str, int]) -> None:
    with pytest.raises(UserError):
        shapes.write_shapes(tmp_path / "set", **numbers)


@pytest.mark.parametrize("cause", [KeyboardInterrupt, OSError])
def test_an_interrupted_write_leaves_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, cause: type[BaseException]) -> None:
    def stop(root: Path, split: str, *rest: Any, write: Any = shapes.write_split) -> None:
        write(root, split, *rest)
        if split == "val":
            raise cause("no space left")

    monkeypatch.setattr(shapes, "write_split", stop)
    with pytest.raises(UserError if cause is OSError else cause, match="no space left"):
        shapes.write_shapes(tmp_path / "set", train=1, val=1)
    assert list(tmp_path.iterdir()) == []


def test_the_first_of_two_writers_wins(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rename = Path.rename

    def late(self: Path, target: Path) -> Path:
        monkeypatch.setattr(Path, "rename", rename)
        shapes.write_shapes(target, train=2, val=1)
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", late)
    shapes.write_shapes(tmp_path / "set", train=1, val=1)
    assert len(read(tmp_path / "set", "train")["images"]) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["set"]


def test_ensure_writes_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls = []

    def small(root: Path, write: Any = shapes.write_shapes) -> None:
        calls.append(root)
        write(root, train=1, val=1)

    monkeypatch.setattr(shapes, "write_shapes", small)
    for _ in range(2):
        shapes.ensure_shapes(tmp_path / "deep" / "set")
    assert len(calls) == 1


def test_ensure_refuses_a_set_of_another_version(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    shapes.write_shapes(tmp_path / "set", train=1, val=1)
    monkeypatch.setattr(shapes, "SHAPES_VERSION", "0")
    with pytest.raises(UserError, match="version 0"):
        shapes.ensure_shapes(tmp_path / "set")
