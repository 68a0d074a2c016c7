"""Check evaluation in tiles on images of all kinds, and what is said about them."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sparseinst.cli import run_cli
from sparseinst.config import Config
from sparseinst.data import loader, objects
from sparseinst.data.coco import val_split
from sparseinst.data.loader import Draw, EvalSet, TrainSet
from sparseinst.data.masks import encode
from sparseinst.data.network_input import image_tiles
from sparseinst.data.objects import Objects
from sparseinst.data.tiles import Tile
from sparseinst.errors import DataError
from sparseinst.evaluation.evaluate import Evaluation, evaluate
from sparseinst.evaluation.examine import TiledImage
from sparseinst.evaluation.weights import evaluate_weights
from sparseinst.inference.predict import Predictor
from sparseinst.models.sparseinst import build_model
from sparseinst.training import preflight
from sparseinst.training.train import train
from tests.conftest import CPU, annotation, box, run, write_coco

SIZES = [(90, 120), (20, 24), (100, 70), (64, 64), (70, 90)]
BAD, EMPTY = 2, 4


def discs(height: int, width: int) -> Any:
    """Return an object as run lengths."""
    rows, columns = np.mgrid[:height, :width]
    return encode(((rows - height / 2) ** 2 + (columns - width / 2) ** 2 < (height / 3) ** 2)[None])[0]


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write images larger and smaller than a tile: one unreadable, one empty; polygons, run lengths, crowds, two categories."""
    root = tmp_path_factory.mktemp("mixed")
    images = [{"id": n, "file_name": f"{n}.png", "height": h, "width": w} for n, (h, w) in enumerate(SIZES, start=1)]
    entries = []
    for number, (height, width) in enumerate(SIZES, start=1):
        if number == EMPTY:
            continue
        crowd = encode(np.ones((1, height, width), np.uint8))[0]
        entries += [
            annotation(10 * number, number, 7, box(2, 3, 12, 12)),
            annotation(10 * number + 1, number, 1000, discs(height, width), area=float(height)),
            annotation(10 * number + 2, number, 7, crowd, iscrowd=1),
        ]
    write_coco(root, images, entries)
    (root / f"val2017/{BAD}.png").write_bytes(b"no image")
    (root / f"val2017/{BAD + 1}.png").write_bytes(b"no image")
    return root


def settings(tiny: Config, mixed: Path, **more: Any) -> Config:
    changes = {"data.root": str(mixed), "data.source": "coco", "data.on_bad_image": "skip", "model.num_classes": 2}
    changes |= {"inference.tile": 40, "inference.score_threshold": 0.0}
    return tiny.replace({**changes, **more})


def evaluated(config: Config, file: Path | None = None) -> Evaluation:
    torch.manual_seed(0)
    model = build_model(config.model).eval()
    return evaluate(model, val_split(config.data), config, device=CPU, predictions=file, progress=False)


def test_all_kinds_of_images_are_evaluated_in_tiles(tiny: Config, mixed: Path, tmp_path: Path) -> None:
    config = settings(tiny, mixed)
    result = evaluated(config, tmp_path / "alone.json")
    assert result.images == 3
    assert result.skipped_images == [BAD, BAD + 1]
    assert len(result.skipped) == 2, "an image is skipped once, not once for each of its tiles"
    with_workers = evaluated(settings(tiny, mixed, **{"data.workers": 2}), tmp_path / "workers.json")
    assert replace(with_workers, seconds=0) == replace(result, seconds=0)
    assert (tmp_path / "alone.json").read_bytes() == (tmp_path / "workers.json").read_bytes()
    assert {entry["category_id"] for entry in json.loads((tmp_path / "alone.json").read_text())} <= {7, 1000}
    assert any(name.startswith("1-1-") for name in result.matches), "the objects of the second tile of image 1 have maps"
    assert evaluated(config).matches == result.matches
    with pytest.raises(DataError, match="on_bad_image=skip leaves such images out"):
        evaluated(settings(tiny, mixed, **{"data.on_bad_image": "error"}))


def test_an_image_that_fails_in_the_middle_counts_as_skipped(tiny: Config, mixed: Path) -> None:
    config = settings(tiny, mixed)
    split = val_split(config.data)
    image = TiledImage(split.images[0], split, config)
    count = len(image_tiles(SIZES[0], config.inference))
    found = [image.skip(["gone"]) for _ in range(count)]
    assert found[:-1] == [None] * (count - 1)
    assert found[-1] is not None
    assert found[-1].skipped == ["gone"]


def test_an_image_is_read_once_for_all_its_tiles(tiny: Config, mixed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = settings(tiny, mixed)
    read: list[str] = []
    real = loader.read_image
    monkeypatch.setattr(loader, "read_image", lambda path, size: read.append(path.name) or real(path, size))
    dataset = EvalSet(val_split(config.data), config.data, config.inference)
    skipped = [dataset[index].skipped for index in range(len(dataset))]
    assert read == [f"{number}.png" for number in range(1, len(SIZES) + 1)], "also an unreadable image is read once"
    assert sum(map(bool, skipped)) == sum(len(image_tiles(SIZES[n], config.inference)) for n in (BAD - 1, BAD))


def test_masks_outside_a_tile_are_not_decoded(tiny: Config, mixed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A large image can have thousands of run lengths; decoded at once, they would need gigabytes."""
    split = val_split(settings(tiny, mixed).data)
    decoded: list[Any] = []
    real = objects.as_segment
    monkeypatch.setattr(objects, "as_segment", lambda segmentation, *size: decoded.append(1) or real(segmentation, *size))
    all_objects = Objects(split.images[0], split)
    assert not decoded
    assert len(all_objects.inside(Tile(0, 0, 10, 10)).segments) == len(decoded) == 1
    assert not all_objects.inside(Tile(0, 115, 5, 5)).segments


def test_a_broken_annotation_is_named_also_in_a_tile(tiny: Config, tmp_path: Path) -> None:
    image = {"id": 1, "file_name": "1.png", "height": 80, "width": 80}
    wrong = {"size": [79, 80], "counts": "0"}
    root = write_coco(tmp_path / "d", [image], [annotation(1, 1, 7, box(2, 3, 12, 12)), annotation(2, 1, 7, wrong)])
    config = settings(tiny, root, **{"data.tile": 32})
    split = val_split(config.data)
    with pytest.raises(DataError, match="annotation 2: segmentation"):
        TrainSet(split, config.data.model_copy(update={"on_bad_image": "error"}), 0)[Draw(0, 0)]
    with pytest.raises(DataError, match="annotation 2: segmentation"):
        Objects(split.images[0], split)


def test_training_with_tiles_measures_stability(tiny: Config, tmp_path: Path) -> None:
    settings = {"data.tile": 40, "inference.tile": 40, "train.evaluate_every": 2, "train.iterations": 6, "data.copy_paste": 0.5}
    train(tiny.replace(settings), tmp_path / "run", device=CPU, progress=False)
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    found = [line["matching_stability"] for line in lines if "AP" in line]
    assert found[0] is None
    assert found[1] is not None


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"data.tile": 64}, "data.tile is set but inference.tile is not"),
        ({"inference.tile": 64}, "inference.tile is set but data.tile is not"),
        ({"data.tile": 64, "inference.tile": 128}, "scaled by 1 in training .* and by 0.5 in inference"),
        ({"data.tile": 64, "inference.tile": 128, "data.scale_jitter_min": 0.5}, None),
        ({"data.tile": 64, "inference.tile": 64}, None),
        ({}, None),
    ],
)
def test_other_tiles_in_training_than_in_inference_are_named(tiny: Config, changes: dict[str, Any], said: str | None) -> None:
    sizes = {"data.short_sides": [64], "inference.short_side": 64, "inference.size_factor": 1.0}
    advice = tiny.replace({**sizes, **changes}).tile_advice()
    if said is None:
        assert advice is None
    else:
        assert advice is not None
        assert re.search(said, advice)


def test_too_few_maps_for_a_tile_are_named(tiny: Config, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A tile that is as large as the image holds all of its instances."""
    config = tiny.replace({"model.decoder.iam.num_maps": 2, "train.iterations": 1, "train.warmup_iterations": 0})
    run(config.replace({"data.tile": 4096, "inference.tile": 4096}), tmp_path / "run")
    assert "have more than model.decoder.iam.num_maps=2 instances in a tile of 4096 pixels on average" in caplog.text
    caplog.clear()
    evaluate_weights(tmp_path / "run", {}, device=CPU)
    assert "have more than model.decoder.iam.num_maps=2 objects in a tile of 4096 pixels on average" in caplog.text
    caplog.clear()
    evaluate_weights(tmp_path / "run", {"inference.tile": None}, device=CPU)
    assert "have more than model.decoder.iam.num_maps=2 objects, up to" in caplog.text
    split = val_split(config.data)
    height, width = split.images[0].height, split.images[0].width
    counts = split.instances_per_image()
    assert split.instances_per_tile(max(height, width)) == counts == split.instances_per_tile(None)
    assert split.instances_per_tile(width // 2)[0] == -(-counts[0] // 4)


def test_the_preflight_learns_one_tile_of_each_image(tiny: Config, mixed: Path, tmp_path: Path) -> None:
    config = settings(tiny, mixed, **{"data.tile": 40, "inference.tile": 80, "data.on_bad_image": "error"})
    folder, file = preflight._eight_tiles(config, 40, tmp_path / "run")
    small = preflight._small(config, file, folder)
    assert small.inference.tile == small.data.tile == 40
    content = json.loads(file.read_text())
    assert [image["file_name"] for image in content["images"]] == ["1.png", "2.png", "3.png", "5.png"]
    split = val_split(small.data)
    for record, source in zip(split.images, (0, 1, 2, 4), strict=True):
        assert (record.height, record.width) == tuple(min(40, side) for side in SIZES[source])
        with Image.open(record.path) as picture:
            assert picture.size == (record.width, record.height)
        assert len(record.annotations) >= 1
    assert len(split.images[1].annotations) == 2, "the small image is used as a whole, without its crowd"


def test_weak_instances_need_no_memory_and_few_maps_are_drawn(tiny: Config) -> None:
    torch.manual_seed(0)
    config = tiny.replace({"inference.tile": 32, "inference.score_threshold": 0.0})
    predictor = Predictor(build_model(config.model), config, val_split(config.data).categories, CPU)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (80, 100, 3), dtype=np.uint8))
    every = predictor.predict(picture, activations=True)
    middle = float(np.median(every.scores))
    best = predictor.predict(picture, middle, activations=3)
    assert best.scores.tolist() == every.scores[every.scores >= middle].tolist()
    assert np.array_equal(best.masks, every.masks[: len(best.masks)])
    assert best.highest == every.highest
    assert best.highest is not None
    assert every.activations is not None
    assert best.activations is not None
    assert len(best.activations) == 3 < len(best.scores)
    assert np.array_equal(best.activations, every.activations[:3])
    assert predictor.predict(picture).activations is None


def test_commands_say_what_is_true_for_tiles(
    shapes_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    photo = tmp_path / "photo.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 110), dtype=np.uint8)).save(photo)
    predict = ["predict", str(photo), "--weights", "demo", "--output", str(tmp_path / "out")]
    assert run_cli([*predict, "--score", "1e-9", "--tile", "64"]) == 0
    assert "objects in a tile than it has maps (model.decoder.iam.num_maps): use a smaller --tile" in " ".join(
        capsys.readouterr().out.split()
    )
    look = ["data", "look", str(shapes_root), "--output", str(tmp_path / "sheet.png"), "--sample", "4"]
    assert run_cli([*look, "-o", "data.tile=40", "-o", "data.short_sides=[64]"]) == 0
    said = capsys.readouterr().out
    assert "tiles after augmentation: 64 pixels wide, 64 high" in said
    assert "no pixel in the augmented image" not in said, "a tile never shows all objects of its image"
    wanted: list[Any] = []

    def note(source: Any, config: Config, **_: Any) -> None:
        wanted.append(config.inference.tile)
        raise DataError("stop here")

    monkeypatch.setattr("sparseinst.evaluation.weights.prepare_network", note)
    for option, tile in (("64", 64), ("0", None)):
        run_cli([*predict, "--engine", "openvino", "--precision", "int8", "--tile", option])
        assert wanted.pop() == tile, "the int8 network that is made is the one that is loaded"
