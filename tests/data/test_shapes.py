"""Check the embedded data set: fixed content, exact masks, and no half-written folder."""

import hashlib
import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from pycocotools import mask as coco_mask
from scipy.ndimage import label
from scipy.spatial import cKDTree

from sparseinst.config import ShapesConfig
from sparseinst.data import coco_folder, scenes, shape_scenes, shapes
from sparseinst.data.masks import encode
from sparseinst.errors import UserError
from sparseinst.evaluation.coco_metrics import coco_figures
from sparseinst.evaluation.mechanism import touching

DIGEST = "96b1d7f689416b11601c3d6cd71184239ab2336e14d9c5906b911e877b412ccc"
"""The digest of `write_shapes(root, train=6, val=4)`. If it changes on purpose, `SHAPES_VERSION` must increase."""

SIDE = 96


def read(root: Path, split: str) -> Any:
    return json.loads((root / "annotations" / f"instances_{split}2017.json").read_text())


def content_digest(root: Path) -> str:
    """Return the SHA-256 of the decoded pixels and the annotations in hexadecimal, whatever the encoding as PNG and JSON."""
    digest = hashlib.sha256()
    for split in coco_folder.SPLITS:
        data = json.loads(coco_folder.annotation_file(root, split).read_text(encoding="utf-8"))
        content = {key: data[key] for key in ("images", "annotations", "categories")}
        digest.update(json.dumps(content, sort_keys=True, separators=(",", ":")).encode())
        for entry in data["images"]:
            with Image.open(coco_folder.image_folder(root, split) / entry["file_name"]) as file:
                digest.update(np.asarray(file.convert("RGB")).tobytes())
    return digest.hexdigest()


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
    assert content_digest(tmp_path / "set") == DIGEST


def test_the_digest_depends_on_pixels_not_on_file_bytes(tmp_path: Path) -> None:
    root = tmp_path / "set"
    shapes.write_shapes(root, train=1, val=1)
    digest = content_digest(root)
    file = root / "train2017" / "000000000001.png"
    image = Image.fromarray(pixels(root, "train", {"file_name": file.name}))
    image.save(file, compress_level=9)
    assert content_digest(root) == digest
    image.putpixel((0, 0), (1, 2, 3))
    image.save(file)
    assert content_digest(root) != digest


def test_images_do_not_depend_on_the_size_of_the_set(root: Path, tmp_path: Path) -> None:
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
    assert max(ids) > len(set(ids)) == len(ids) == len(shape_scenes.SHAPES), "the ids are distinct and have gaps"
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
    assert min(extents) <= 0.15 * SIDE
    assert max(extents) >= 0.6 * SIDE
    numbers = np.bincount([a["image_id"] for a in data["annotations"]], minlength=len(data["images"]) + 1)[1:]
    assert 0 in numbers, "some images are empty"


def test_objects_hide_each_other() -> None:
    hidden = 0
    for index in range(20):
        _, objects, owner = shape_scenes.random_scene(np.random.Generator(np.random.PCG64(index)), SIDE)
        for number, item in enumerate(objects):
            seen = (owner == number).sum()
            assert seen >= max(scenes._MIN_VISIBLE_AREA, shape_scenes.MIN_VISIBLE * item.whole_area)
            hidden += seen < item.mask.sum()
    assert hidden >= 5


def test_crowds_are_stored_as_uncompressed_run_lengths(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(shape_scenes, "_CROWDED", 1.0)
    shapes.write_shapes(tmp_path / "set", train=5, val=1)
    crowds = [a for a in read(tmp_path / "set", "train")["annotations"] if a["iscrowd"]]
    assert crowds
    for entry in crowds:
        counts = entry["segmentation"]["counts"]
        assert sum(counts) == np.prod(entry["segmentation"]["size"])
        assert sum(counts[1::2]) == entry["area"] == decode(entry).sum()


def test_existing_content_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("keep")
    (tmp_path / "file").write_text("keep")
    for name in ("full", "file"):
        for write in (shapes.write_shapes, partial(shapes.ensure_shapes, config=ShapesConfig())):
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
    def stop(root: Path, split: str, *rest: Any, write: Any = shapes.write_annotations) -> None:
        write(root, split, *rest)
        if split == "val":
            raise cause("no space left")

    monkeypatch.setattr(shapes, "write_annotations", stop)
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


FEW = ShapesConfig(train=2, val=1, side=64)


def test_ensure_writes_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls = []

    def counted(root: Path, write: Any = shapes.write_shapes, **size: int) -> None:
        calls.append(root)
        write(root, **size)

    monkeypatch.setattr(shapes, "write_shapes", counted)
    for _ in range(2):
        shapes.ensure_shapes(tmp_path / "deep" / "set", FEW)
    assert len(calls) == 1
    assert len(read(tmp_path / "deep" / "set", "train")["images"]) == 2


def test_ensure_refuses_a_set_of_another_version(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    shapes.ensure_shapes(tmp_path / "set", FEW)
    monkeypatch.setattr(shapes, "SHAPES_VERSION", "0")
    with pytest.raises(UserError, match="version 0"):
        shapes.ensure_shapes(tmp_path / "set", FEW)


def test_ensure_refuses_a_set_of_another_size(tmp_path: Path) -> None:
    shapes.ensure_shapes(tmp_path / "set", FEW)
    with pytest.raises(UserError, match="another shapes set .side=64 instead of 96.; name another folder"):
        shapes.ensure_shapes(tmp_path / "set", FEW.model_copy(update={"side": 96}))


def test_processes_write_the_same_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shapes, "_PART", 2)
    digests = set()
    for processes in (1, 2):
        shapes.write_shapes(tmp_path / str(processes), train=5, val=3, side=64, processes=processes)
        digests.add(content_digest(tmp_path / str(processes)))
    assert len(digests) == 1


@pytest.mark.slow
def test_a_script_without_a_guard_gets_an_error(tmp_path: Path) -> None:
    """Each process of the pool imports the script again; it must neither wait for the lock of its parent nor start a pool."""
    script = tmp_path / "script.py"
    script.write_text(
        "from pathlib import Path\n"
        "from sparseinst.config import ShapesConfig\n"
        "from sparseinst.data import shapes\n"
        "shapes.usable_cores = lambda: 2\n"
        "shapes._MIN_PARALLEL = 2\n"
        "shapes.ensure_shapes(Path('set'), ShapesConfig(train=2, val=1, side=64))\n"
    )
    done = subprocess.run([sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 1
    assert 'must call this below `if __name__ == "__main__":`' in done.stderr.splitlines()[-1]


class Objects(NamedTuple):
    """The properties that the tests of the set's difficulty use, with one entry for each object."""

    areas: NDArray[np.int64]
    categories: NDArray[np.int64]
    colours: NDArray[np.float64]
    """(objects, 3): the mean over the object's pixels."""
    beside: NDArray[np.bool_]
    """Whether the object touches another one of its category."""
    images: NDArray[np.int64]


@pytest.fixture(scope="module")
def sample() -> list[scenes.Scene]:
    streams = (np.random.Generator(np.random.PCG64(np.random.SeedSequence((0, 0, number)))) for number in range(300))
    return [shape_scenes.random_scene(stream, ShapesConfig().side) for stream in streams]


@pytest.fixture(scope="module")
def objects(sample: list[scenes.Scene]) -> Objects:
    rows = []
    for image, scene in enumerate(sample):
        kept = [number for number, item in enumerate(scene.objects) if not item.crowd]
        masks = [(scene.owner == number).astype(np.uint8) for number in kept]
        categories = np.array([scene.objects[number].category_id for number in kept], dtype=np.int64)
        pairs = {number for pair in touching(categories, masks) for number in pair}
        for index, (mask, category) in enumerate(zip(masks, categories.tolist(), strict=True)):
            rows.append((mask.sum(), category, scene.pixels[mask.astype(bool)].mean(0), index in pairs, image))
    return Objects(*(np.array(column) for column in zip(*rows, strict=True)))


def test_the_mean_colour_does_not_predict_the_category(objects: Objects) -> None:
    """A model must see the shape: the 15 nearest neighbours in colour give the right category for at most half of the objects."""
    half = len(objects.colours) // 2
    _, nearest = cKDTree(objects.colours[:half]).query(objects.colours[half:], k=15)
    voted = [np.bincount(objects.categories[:half][row]).argmax() for row in nearest]
    assert np.mean(voted == objects.categories[half:]) <= 0.5


def test_most_images_hold_touching_objects_of_one_category(objects: Objects) -> None:
    assert len(set(objects.images[objects.beside].tolist())) >= 0.5 * 300


def test_objects_come_in_all_sizes(objects: Objects) -> None:
    small, large = objects.areas < 32**2, objects.areas >= 96**2
    assert large.mean() >= 0.1
    assert small.mean() >= 0.25
    assert (~small & ~large).mean() >= 0.25


def test_connected_components_do_not_separate_touching_objects(sample: list[scenes.Scene], tmp_path: Path) -> None:
    """The test cuts the true category map into components. A model with a higher AP separates touching objects."""
    images: list[dict[str, Any]] = []
    truth: list[dict[str, Any]] = []
    found: list[dict[str, Any]] = []
    for number, scene in enumerate(sample[:150], start=1):
        height, width = scene.owner.shape
        images.append({"id": number, "file_name": "-", "height": height, "width": width})
        for entry in scenes.annotate(scene.objects, scene.owner):
            truth.append({"id": len(truth) + 1, "image_id": number, **entry})
        categories = np.array([0, *(item.category_id for item in scene.objects)])[scene.owner + 1]
        for category in set(categories.ravel().tolist()) - {0}:
            labelled, count = label(categories == category)
            for run in encode(np.stack([labelled == component for component in range(1, count + 1)])):
                found.append({"image_id": number, "category_id": category, "score": 1.0, "segmentation": run})
    file = tmp_path / "truth.json"
    names = [{"id": shape[0], "name": name} for name, shape in shape_scenes.SHAPES.items()]
    file.write_text(json.dumps({"images": images, "annotations": truth, "categories": names}))
    ap = coco_figures(file, found, [image["id"] for image in images])["AP"]
    assert ap is not None
    assert 15 <= ap <= 40
