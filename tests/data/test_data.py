"""Check COCO-format folders, images of all kinds, augmentation and the loading order."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hotcoco import mask as hotcoco_mask
from PIL import Image
from pycocotools import mask as reference_mask

from sparseinst.cli import run_cli
from sparseinst.config import Config, DataConfig, InferenceConfig, TrainConfig
from sparseinst.criterion import prepare_targets
from sparseinst.data import coco, loader
from sparseinst.data.augmentation import augment
from sparseinst.data.check import check_folder
from sparseinst.data.coco import CocoSplit, ImageRecord, read_split, train_split
from sparseinst.data.images import read_image
from sparseinst.data.loader import BatchOrder, Draw, EvalSet, Loader, TrainSet, collate, train_loader
from sparseinst.data.masks import decode, encode
from sparseinst.data.speed import doubled
from sparseinst.data.transforms import Sample, as_segment, crop, flip, rasterise, resize, resize_image, shrink
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


def write_kind(path: Path, kind: str) -> None:
    random = np.random.default_rng(0)
    grey = random.integers(0, 256, (40, 60), dtype=np.uint8)
    if kind == "grey":
        Image.fromarray(grey).save(path)
    elif kind == "16 bit":
        Image.fromarray(grey.astype(np.uint16) * 257).save(path)
    elif kind == "palette":
        Image.fromarray(grey).convert("P").save(path)
    elif kind == "transparent":
        Image.fromarray(np.stack([grey] * 4, axis=2)).save(path)
    elif kind == "cmyk":
        Image.fromarray(grey).convert("CMYK").save(path, format="JPEG", quality=95)


@pytest.mark.parametrize("kind", ["grey", "16 bit", "palette", "transparent", "cmyk"])
def test_images_of_every_kind_become_rgb(tmp_path: Path, kind: str) -> None:
    write_kind(tmp_path / "grey.png", "grey")
    write_kind(tmp_path / "image.png", kind)
    image = read_image(tmp_path / "image.png", (40, 60))
    assert (image.mode, image.size) == ("RGB", (60, 40))
    difference = np.abs(np.asarray(image, dtype=int) - np.asarray(read_image(tmp_path / "grey.png"), dtype=int))
    assert difference.mean() < (4 if kind == "cmyk" else 1)


def test_exif_rotation(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # viewers turn the image by 90 degrees
    Image.new("RGB", (60, 40)).save(tmp_path / "turned.jpg", exif=exif)
    assert read_image(tmp_path / "turned.jpg").size == (40, 60)
    assert read_image(tmp_path / "turned.jpg", (60, 40)).size == (40, 60)
    assert read_image(tmp_path / "turned.jpg", (40, 60)).size == (60, 40), (
        "an image that is annotated as it is stored is not turned"
    )
    with pytest.raises(DataError, match="is 60 x 40, its annotations say 50 x 40"):
        read_image(tmp_path / "turned.jpg", (40, 50))


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
    with pytest.raises(DataError, match="not one of its 1 images can be read"):
        TrainSet(read(folder), config, seed=0)[Draw(0, 0)]


def sample(seed: int = 0) -> Sample:
    random = np.random.default_rng(seed)
    image = random.integers(0, 256, (80, 120, 3), dtype=np.uint8)
    mask = np.zeros((80, 120), dtype=np.uint8)
    mask[20:50, 30:90] = 1
    segments = [as_segment(box(10, 15, 40, 30), 80, 120), mask]
    return Sample(image, segments, np.array([3, 5]))


def test_flip_moves_image_and_masks_together() -> None:
    labels, masks = rasterise(flip(sample()))
    _, before = rasterise(sample())
    assert labels.tolist() == [3, 5]
    assert np.array_equal(masks, before[:, :, ::-1])
    assert np.array_equal(flip(sample()).image, sample().image[:, ::-1])


def test_crop_moves_image_and_masks_together() -> None:
    _, before = rasterise(sample())
    cropped = crop(sample(), 18, 25, 40, 60)
    labels, masks = rasterise(cropped)
    assert np.array_equal(masks, before[:, 18:58, 25:85])
    assert np.array_equal(cropped.image, sample().image[18:58, 25:85])
    assert rasterise(crop(sample(), 60, 95, 20, 25))[0].tolist() == [], "instances outside the crop are dropped"
    assert labels.tolist() == [3, 5]


def test_resize_keeps_areas_in_proportion() -> None:
    _, masks = rasterise(resize(sample(), (160, 240)))
    assert masks.shape == (2, 160, 240)
    assert masks.sum(axis=(1, 2)).tolist() == [4 * 40 * 30, 4 * 60 * 30]


def test_training_resizing_equals_pillow_within_two_grey_levels() -> None:
    image = np.array(read_image(REAL_COCO / "val2017" / "000000000139.jpg")) if REAL_COCO.is_dir() else sample().image
    for size in ((120, 180), (97, 131), (40, 60)):
        fast = resize(Sample(image, [], np.zeros(0, np.int64)), size).image
        exact = np.asarray(resize_image(Image.fromarray(image), size))
        difference = np.abs(fast.astype(int) - exact)
        assert difference.max() <= 2
        assert (difference > 0).mean() < 0.02


@pytest.mark.parametrize("stride", [2, 4, 8])
@pytest.mark.parametrize("size", [(64, 96), (61, 83), (33, 32)])
def test_masks_downsampled_by_the_loader_give_bit_identical_targets(stride: int, size: tuple[int, int]) -> None:
    masks = (np.random.default_rng(0).random((3, *size)) < 0.4).astype(np.uint8)
    padded, labels = (64, 96), torch.arange(3)
    new = (padded[0] // stride, padded[1] // stride)
    [expected] = prepare_targets([labels], [torch.from_numpy(masks)], padded, new)
    small = torch.from_numpy(np.stack([shrink(np.asfortranarray(mask), stride) for mask in masks]))
    [found] = prepare_targets([labels], [small], padded, new, stride)
    assert torch.equal(found.masks, expected.masks)
    assert 0 < found.masks.mean() < 1


def test_augmentation_covers_its_options_and_repeats_with_its_seed() -> None:
    config = DataConfig(short_sides=(64, 96), long_side=130, crop=0.5, crop_short_sides=(50, 100), crop_sizes=(30, 60))
    sizes = set()
    for number in range(60):
        first, second = (augment(sample(), config, np.random.default_rng((0, number))) for _ in range(2))
        assert np.array_equal(first.image, second.image)
        size = first.image.shape[:2]
        assert min(size) in (64, 96) or max(size) == 130
        sizes.add(size)
    assert len(sizes) > 10


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


def wide_and_tall(count: int) -> CocoSplit:
    images = [ImageRecord(i, Path(f"{i}.png"), 40 + 30 * (i % 3 == 0), 60) for i in range(count)]
    return CocoSplit(Path("a.json"), (), tuple(images))


def order(split: CocoSplit, **where: Any) -> list[list[Draw]]:
    config = TrainConfig(iterations=12, batch_size=4, warmup_iterations=0, seed=1)
    return list(BatchOrder(split, config, **where))


def test_order_resumes_exactly_and_groups_orientations() -> None:
    split = wide_and_tall(10)
    whole = order(split)
    assert len(whole) == 12
    for start in range(12):
        assert order(split, start=start) == whole[start:]
    assert order(split) == whole
    for batch in whole:
        assert len({split.images[d.image].width > split.images[d.image].height for d in batch}) == 1
    numbers = [draw.number for batch in whole for draw in batch]
    assert len(set(numbers)) == len(numbers)


def test_processes_and_parts_share_each_batch() -> None:
    split = wide_and_tall(10)
    whole = [set(batch) for batch in order(split)]
    halves = [order(split, parts=2, rank=rank, world_size=2) for rank in range(2)]
    assert [set(a) | set(b) for a, b in zip(*halves, strict=True)] == whole
    parts = order(split, parts=2)
    assert [set(parts[i]) | set(parts[i + 1]) for i in range(0, 24, 2)] == whole
    with pytest.raises(DataError, match="into 4 parts that 3 processes share equally"):
        order(split, parts=4, world_size=3)


def test_all_images_are_used_about_equally_often() -> None:
    split = wide_and_tall(10)
    config = TrainConfig(iterations=50, batch_size=4, warmup_iterations=0)
    used = np.bincount([d.image for batch in BatchOrder(split, config) for d in batch], minlength=10)
    assert used.min() >= 18
    assert used.max() <= 22


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_do_not_depend_on_workers(tiny: Config, workers: int) -> None:
    data = tiny.data.model_copy(update={"workers": workers})
    dataset = TrainSet(train_split(data), data, seed=0)
    batches = list(train_loader(dataset, BatchOrder(dataset.split, tiny.train), pin_memory=False))
    assert len(batches) == 6
    direct = [collate([dataset[d] for d in draws]) for draws in BatchOrder(dataset.split, tiny.train)]
    for batch, expected in zip(batches, direct, strict=True):
        assert torch.equal(batch.images, expected.images)
        assert all(torch.equal(a, b) for a, b in zip(batch.masks, expected.masks, strict=True))
        assert batch.images.shape[2] % 32 == batch.images.shape[3] % 32 == 0


def test_check_folder_counts_instances_and_finds_problems(folder: Path) -> None:
    content = json.loads((folder / "annotations/instances_val2017.json").read_text())
    content["annotations"] += [
        annotation(4, 3, 7, [[1, 1, 2, 2]]),
        annotation(5, 3, 7, {"size": [9, 9], "counts": [81]}),
        annotation(5, 3, 7, box(100, 100, 5, 5)),
        {"id": 0, "image_id": 3, "category_id": 7, "segmentation": box(1, 1, 5, 5)},
    ]
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
        "annotation id 0",
        "2.png: truncated or unreadable",
        "annotation 4 (image 3.png): segmentation: a polygon needs",
        "run lengths of size [9, 9]",
        "no pixel inside the image",
    ):
        assert expected in text


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


def test_dark_16_bit_images_are_read_alike_and_reported(tmp_path: Path) -> None:
    """The values 255 and 256 of 65535 are almost equal, so they must not become white and black."""
    for number, value in enumerate((255, 256, 3200), start=1):
        (tmp_path / "train2017").mkdir(exist_ok=True)
        Image.fromarray(np.full((8, 8), value, np.uint16)).save(tmp_path / "train2017" / f"{number}.png")
    found = [np.asarray(read_image(tmp_path / "train2017" / f"{number}.png")).max() for number in (1, 2, 3)]
    assert found == [1, 1, 12]
    shutil.copytree(tmp_path / "train2017", tmp_path / "val2017")
    images = [{"id": n, "file_name": f"{n}.png", "height": 8, "width": 8} for n in (1, 2, 3)]
    write_coco(tmp_path, images, [annotation(1, 1, 7, box(1, 1, 5, 5))])
    reports = check_folder(DataConfig(root=str(tmp_path)))
    assert "brighter than 12 of 255; if 16-bit files hold 12-bit values" in "".join(reports["train"].problems)


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
