"""Check COCO-format folders, images of all kinds, augmentation and the loading order."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hotcoco import mask as hotcoco_mask
from pycocotools import mask as reference_mask

from sparseinst.cli import run_cli
from sparseinst.config import Config, DataConfig, InferenceConfig
from sparseinst.data import coco, loader
from sparseinst.data.check import check_folder
from sparseinst.data.coco import CocoSplit, read_split, train_split
from sparseinst.data.loader import BatchOrder, Draw, EvalSet, Loader, TrainSet, train_loader
from sparseinst.data.masks import decode, encode
from sparseinst.data.speed import doubled
from sparseinst.errors import DataError
from tests.conftest import REAL_COCO, annotation, box, needs_coco, write_coco


def image_entry(number: int, height: int = 40, width: int = 60, name: str | None = None) -> dict[str, Any]:
    return {"id": number, "file_name": name or f"{number}.png", "height": height, "width": width}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Write two categories, 7 and 1000. Image 1 has a polygon and run lengths, image 2 only a crowd, and image 3 nothing."""
    mask = np.zeros((40, 60), dtype=np.uint8)
    mask[5:15, 20:50] = 1
    runs = {"size": [40, 60], "counts": hotcoco_mask.encode(np.asfortranarray(mask))["counts"].decode()}
    crowd = {"size": [40, 60], "counts": [100, 50, 2250]}
    annotations = [
        annotation(1, 1, 1000, box(10, 10, 20, 8)),
        annotation(2, 1, 7, runs),
        annotation(3, 2, 7, crowd, iscrowd=1),
    ]
    return write_coco(tmp_path / "coco", [image_entry(i) for i in (1, 2, 3)], annotations)


def read(folder: Path, limit: int | None = None) -> CocoSplit:
    return read_split(folder / "annotations/instances_train2017.json", folder / "train2017", limit)


def test_read_split(folder: Path) -> None:
    split = read(folder)
    assert [c.id for c in split.categories] == [7, 1000]
    assert [len(image.annotations) for image in split.images] == [2, 1, 0]
    assert [a.label for a in split.images[0].annotations] == [1, 0]
    assert [image.id for image in split.with_instances().images] == [1]
    assert [image.id for image in read(folder, limit=2).images] == [1, 2]


def test_training_images_and_masks(folder: Path) -> None:
    config = DataConfig(root=str(folder), short_sides=(40,), flip=0.0)
    example = TrainSet(read(folder), config, seed=0)[Draw(0, 0)]
    assert example.image.shape == (3, 40, 60)
    assert example.labels.tolist() == [1, 0]
    assert example.masks.sum(dim=(1, 2)).tolist() == [160, 300]
    assert example.masks[1, 5:15, 20:50].all()


@needs_coco
def test_decode_equals_pycocotools_on_coco() -> None:
    split = read_split(REAL_COCO / "annotations/instances_val2017.json", REAL_COCO / "val2017")
    checked = 0
    for image in split.images[:40]:
        for entry in image.annotations:
            ours = decode(entry.segmentation, image.height, image.width)
            runs = reference_mask.frPyObjects(entry.segmentation, image.height, image.width)
            theirs = reference_mask.decode(reference_mask.merge(runs) if isinstance(runs, list) else runs)
            assert np.array_equal(ours, theirs)
            [run] = encode(ours[None])
            assert np.array_equal(reference_mask.decode({**run, "counts": run["counts"].encode()}), theirs)
            checked += 1
    assert checked > 200


@pytest.mark.parametrize("damage", ["truncated", "empty", "text", "missing"])
def test_damaged_images_are_named_or_skipped(folder: Path, damage: str) -> None:
    content = json.loads((folder / "annotations/instances_train2017.json").read_text())
    content["annotations"].append(annotation(4, 2, 7, box(3, 3, 9, 9)))
    (folder / "annotations/instances_train2017.json").write_text(json.dumps(content))
    path = folder / "train2017" / "1.png"
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes({"truncated": path.read_bytes()[:900], "empty": b"", "text": b"no image at all"}[damage])
    config = DataConfig(root=str(folder), short_sides=(40,))
    with pytest.raises(DataError, match=r"1\.png: (truncated|no such image).*on_bad_image=skip"):
        TrainSet(read(folder), config, seed=0)[Draw(0, 0)]
    skipping = config.model_copy(update={"on_bad_image": "skip"})
    example = TrainSet(read(folder), skipping, seed=0)[Draw(0, 0)]
    assert example.record.id == 2
    assert "1.png" in example.skipped[0]
    evaluated = EvalSet(read(folder), skipping, InferenceConfig())
    assert "1.png" in evaluated[0].skipped[0]
    with pytest.raises(DataError, match="1.png"):
        EvalSet(read(folder), config, InferenceConfig())[0]


def test_a_folder_without_readable_images_is_an_error_even_when_skipping(folder: Path) -> None:
    for path in (folder / "train2017").iterdir():
        path.write_bytes(b"")
    config = DataConfig(root=str(folder), on_bad_image="skip")
    with pytest.raises(DataError, match="none of its 1 images can be read"):
        TrainSet(read(folder), config, seed=0)[Draw(0, 0)]


def test_an_annotation_file_is_read_once_unless_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_coco(tmp_path, [image_entry(1), image_entry(2)], [annotation(1, 1, 7, box(1, 1, 9, 9))])
    config = DataConfig(root=str(tmp_path))
    read_files: list[Path] = []
    read_json = coco.read_content
    monkeypatch.setattr(coco, "read_content", lambda file: (read_files.append(file), read_json(file))[1])
    coco._read_whole.cache_clear()
    whole, limited = coco.train_split(config), coco.train_split(config.model_copy(update={"train_limit": 1}))
    assert (len(whole.images), len(limited.images), len(read_files)) == (2, 1, 1)
    write_coco(tmp_path, [image_entry(1), image_entry(2)], [annotation(1, 1, 1000, box(1, 1, 9, 9))])
    assert coco.train_split(config).images[0].annotations[0].label == 1
    assert len(read_files) == 2


def test_check_folder_counts_instances_and_finds_problems(folder: Path) -> None:
    content = json.loads((folder / "annotations/instances_val2017.json").read_text())
    content["annotations"] += [
        annotation(4, 3, 7, [[1, 1, 2, 2]]),
        annotation(5, 3, 7, {"size": [9, 9], "counts": [81]}),
        annotation(5, 3, 7, box(100, 100, 5, 5)),
    ]
    content["categories"][1]["name"] = content["categories"][0]["name"]
    (folder / "annotations/instances_val2017.json").write_text(json.dumps(content))
    (folder / "val2017" / "2.png").write_bytes(b"broken")
    reports = check_folder(DataConfig(root=str(folder)))
    train = reports["train"]
    assert (train.images, train.without_instances, train.instances, train.crowds) == (3, 2, 2, 1)
    assert dict(train.categories) == {"seven": 1, "thousand": 1}
    assert not train.problems
    text = "\n".join(reports["val"].problems)
    for expected in (
        "id 5 is used 2 times",
        "2.png: truncated or unreadable",
        "annotation 4 (image 3.png): segmentation: a polygon needs",
        "run lengths have the size [9, 9]",
        "no pixel inside the image",
        "several categories have the name 'seven'",
    ):
        assert expected in text


def test_a_wrong_folder_of_images_is_one_problem(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = folder / "annotations" / "instances_train2017.json"
    data = json.loads(file.read_text())
    for image in data["images"]:
        image["file_name"] = f"photos/{image['file_name']}"
    file.write_text(json.dumps(data))
    for read in (True, False):
        problems = check_folder(DataConfig(root=str(folder)), read_images=read)["train"].problems
        [problem] = [problem for problem in problems if "photos" in problem]
        assert f"none of its {len(data['images'])} images exists, the first is" in problem
        assert "set data.train_images" in problem


@needs_coco
def test_check_folder_on_real_photos() -> None:
    reports = check_folder(DataConfig(root=str(REAL_COCO)), read_images=False)
    assert [(r.images, r.instances + r.crowds, r.crowds) for r in reports.values()] == [(208, 1678, 18), (79, 624, 5)]
    assert not any(r.problems for r in reports.values())


def test_loading_speed(tiny: Config, capsys: pytest.CaptureFixture[str]) -> None:
    assert [list(doubled(most)) for most in (1, 2, 6, 16)] == [[0, 1], [0, 1, 2], [0, 1, 2, 4, 6], [0, 1, 2, 4, 8, 16]]
    command = ["data", "speed", tiny.data.root, "--images", "16", "-o", "data.short_sides=[64]"]
    assert run_cli([*command, "--workers", "0", "--workers", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [row["workers"] for row in found["rows"]] == [0, 2]
    assert all(10 < row["images_per_second"] < 1e5 for row in found["rows"])
    assert run_cli([*command, "--workers", "1"]) == 0
    assert "1 worker: " in capsys.readouterr().out
    assert run_cli(["data", "speed", "nowhere"]) == 2
    assert "nowhere" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("command", ["train", "data speed"])
def test_an_unreadable_image_ends_the_process_with_a_one_line_error(command: str, tmp_path: Path) -> None:
    """A worker reads the image: the process must neither hang nor print torch's traceback."""
    write_coco(
        tmp_path,
        [{"id": n, "file_name": f"{n}.png", "height": 32, "width": 32} for n in range(1, 5)],
        [annotation(n, n, 7, box(1, 1, 20, 20)) for n in range(1, 5)],
    )
    (tmp_path / "train2017" / "3.png").write_bytes(b"broken")
    size = ["-o", "data.short_sides=[32]"]
    arguments = {
        "train": ["train", "--data", str(tmp_path), "--output", str(tmp_path / "run"), "-o", "data.workers=1", *size,
                  "-o", "model.backbone.name=resnet10t", "-o", "model.backbone.pretrained=false", "-o", "train.batch_size=2",
                  "-o", "model.backbone.frozen_norm=false", "-o", "train.iterations=4", "-o", "train.warmup_iterations=0"],
        "data speed": ["data", "speed", str(tmp_path), "--workers", "1", "--images", "8", *size],
    }[command]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "sparseinst", *arguments], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.splitlines()[-1].startswith(f"error: {tmp_path}/train2017/3.png: truncated or unreadable image")
    assert "Traceback" not in done.stderr


def test_a_signal_that_arrives_while_a_worker_starts_does_not_run_the_main_handler(
    tiny: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = loader._start_worker

    def start_late(number: int) -> None:
        os.kill(os.getpid(), signal.SIGUSR2)
        start(number)

    handled = tmp_path / "handled"
    monkeypatch.setattr(loader, "_start_worker", start_late)
    before = signal.signal(signal.SIGUSR2, lambda *_: handled.write_text(str(os.getpid())))
    try:
        config = tiny.replace({"data.workers": 1})
        dataset = TrainSet(train_split(config.data), config.data, seed=0)
        order = BatchOrder(dataset.split, config.train)
        assert next(iter(train_loader(dataset, order, pin_memory=False))).images.ndim == 4
        assert not handled.exists()
        os.kill(os.getpid(), signal.SIGUSR2)  # the main process still handles it
        assert handled.read_text() == str(os.getpid())
    finally:
        signal.signal(signal.SIGUSR2, before)


def test_a_programming_error_in_a_worker_shows_its_traceback(tiny: Config) -> None:
    config = tiny.replace({"data.workers": 1})
    dataset = TrainSet(train_split(config.data), config.data, 0, 4)
    dataset.config = None  # type: ignore[assignment] # this causes an AttributeError
    order = BatchOrder(dataset.split, config.train)
    loader = Loader(dataset, 1, False, batch_sampler=order)
    with pytest.raises(RuntimeError, match=r"(?s)Traceback.*AttributeError"):
        next(iter(loader))
