"""Check that the instances of overlapping tiles become those of the image, in predictions and in evaluation."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from sparseinst import load_model
from sparseinst.cli import run_cli
from sparseinst.config import Config
from sparseinst.data.coco import val_split
from sparseinst.data.masks import decode
from sparseinst.data.shapes import write_shapes
from sparseinst.data.tiles import Tile, tiles_of
from sparseinst.evaluation.evaluate import evaluate
from sparseinst.inference import join as join_module
from sparseinst.inference.compact import CompactMasks
from sparseinst.inference.join import CUT, Placed, as_masks, join, place
from sparseinst.inference.predict import Predictor
from sparseinst.models.sparseinst import build_model
from sparseinst.postprocess import Instances
from tests.conftest import CPU

IMAGE = (100, 160)
APART = [Tile(1000 * number, 0, 100, 100) for number in range(9)]
"""Tiles that do not overlap, so that no pieces are united."""


def discs(count: int, radius: int) -> NDArray[np.bool_]:
    """Return masks (count, H, W) of discs that do not touch."""
    random = np.random.default_rng(0)
    rows, columns = np.mgrid[: IMAGE[0], : IMAGE[1]]
    taken = np.zeros(IMAGE, bool)
    masks: list[NDArray[np.bool_]] = []
    while len(masks) < count:
        y, x = random.integers(0, IMAGE[0]), random.integers(0, IMAGE[1])
        mask = (rows - y) ** 2 + (columns - x) ** 2 <= radius**2
        if mask.sum() >= 20 and not (mask & taken).any():
            masks.append(mask)
            taken |= mask
    return np.stack(masks)


def seen(masks: NDArray[np.bool_], tile: Tile, number: int, labels: NDArray[np.int64] | None = None) -> list[Placed]:
    """Return what a perfect model finds in a tile; a part that is cut off has a higher score, to make it hard."""
    parts = masks[:, tile.top : tile.top + tile.height, tile.left : tile.left + tile.width]
    visible = parts.any((1, 2))
    whole = parts.sum((1, 2)) == masks.sum((1, 2))
    scores = torch.from_numpy(np.where(whole, 0.7, 0.9)[visible].astype(np.float32))
    kinds = torch.from_numpy((labels if labels is not None else np.zeros(len(masks), np.int64))[visible])
    found = Instances(scores, kinds, torch.from_numpy(parts[visible].copy()), torch.arange(int(visible.sum())))
    return place(found, tile, number, IMAGE)


def expanded(instances: list[Placed]) -> NDArray[np.bool_]:
    return as_masks(instances, IMAGE).expand()


@pytest.mark.parametrize("side", [40, 64, 99])
def test_objects_smaller_than_the_overlap_are_found_once_and_whole(side: int) -> None:
    masks = discs(25, radius=6)
    tiles = tiles_of(IMAGE, side, 0.4)
    placed = [one for number, tile in enumerate(tiles) for one in seen(masks, tile, number)]
    assert len(placed) > len(masks), "some objects lie in two tiles"
    joined = expanded(join(placed, tiles))
    assert len(joined) == len(masks)
    assert sorted(mask.tobytes() for mask in joined) == sorted(mask.tobytes() for mask in masks)


@pytest.mark.parametrize("side", [40, 64, 100])
def test_the_pieces_of_an_object_larger_than_the_tiles_are_united(side: int) -> None:
    masks = np.zeros((2, *IMAGE), bool)
    masks[0, 20:60, 5:155] = True
    masks[1, 60:90, 30:70] = True  # touches it
    tiles = tiles_of(IMAGE, side, 0.2)
    placed = [one for number, tile in enumerate(tiles) for one in seen(masks, tile, number)]
    assert len(placed) > 2
    joined = expanded(join(placed, tiles))
    assert sorted(mask.tobytes() for mask in joined) == sorted(mask.tobytes() for mask in masks)


def test_pieces_that_disagree_or_are_weak_stay_apart() -> None:
    tiles = [Tile(0, 0, 40, 60), Tile(0, 40, 40, 60)]

    def piece(score: float, tile: int, left: int, right: int) -> Placed:
        return Placed.of((score, 0, 0, tile), 10, left, np.ones((10, right - left), bool), cut=True)

    [united] = join([piece(0.8, 0, 10, 60), piece(0.6, 1, 40, 90)], tiles)
    assert (united.score, united.top, united.left, united.mask.sum()) == (0.8, 10, 8, 800)
    assert len(join([piece(0.8, 0, 10, 60), piece(0.3, 1, 40, 90)], tiles)) == 2, "less than half of the score"
    assert len(join([piece(0.8, 0, 10, 60), piece(0.6, 1, 52, 90)], tiles)) == 2, "they share 8 of the 20 columns that both see"
    three = [Tile(0, 0, 40, 60), Tile(0, 40, 40, 60), Tile(0, 80, 40, 60)]
    ends = [piece(0.9, 0, 10, 60), piece(0.8, 2, 80, 130)]
    [bridged] = join([*ends, piece(0.7, 1, 40, 100)], three)
    assert bridged.mask.sum() == 1200, "the middle piece comes last and unites the ends"
    assert len(join(ends, three)) == 2


def one(score: float, tile: int, left: int, label: int = 0, *, cut: bool = False) -> Placed:
    return Placed.of((score, label, 0, tile), 0, left, np.ones((10, 10), bool), cut=cut)


def test_only_other_tiles_and_the_same_category_suppress() -> None:
    kept = join([one(0.5, 0, 0), one(0.9, 0, 1)], APART)
    assert [instance.score for instance in kept] == [0.9, 0.5], "within a tile nothing is suppressed; the best comes first"
    assert [instance.score for instance in join([one(0.5, 0, 0), one(0.9, 1, 1)], APART)] == [0.9]
    assert len(join([one(0.5, 0, 0), one(0.9, 1, 1, label=1)], APART)) == 2
    assert len(join([one(0.5, 0, 0), one(0.9, 1, 5)], APART)) == 2, "half of the mask is shared, not more"
    assert len(join([one(0.5, 0, 0), one(0.9, 1, 4)], APART)) == 1
    assert join([one(0.9, 0, 0, cut=True), one(0.5, 1, 1)], APART)[0].score == 0.5, "another tile shows the whole object"
    assert join([], APART) == []


def test_the_join_compares_neighbours_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """A large photo has many thousand instances, of which each can share pixels with a few others only."""
    random = np.random.default_rng(0)
    placed = []
    for _ in range(300):
        mask = random.random((int(random.integers(1, 30)), int(random.integers(1, 30)))) < 0.7
        corner, tile, label = random.integers(0, 200, 2).tolist(), int(random.integers(9)), int(random.integers(2))
        about = float(random.random()), label, 0, tile
        placed.append(Placed.of(about, *corner, mask, cut=bool(random.random() < 0.3)))
    masks = as_masks(placed, (230, 230)).expand()
    flat = masks.reshape(300, -1).astype(np.float32)
    shares = flat @ flat.T > 0.5 * np.minimum.outer(flat.sum(1), flat.sum(1))
    kept: list[int] = []
    for index in sorted(range(300), key=lambda index: -placed[index].score * (CUT if placed[index].cut else 1)):
        rivals = [o for o in kept if placed[o].tile != placed[index].tile and placed[o].label == placed[index].label]
        if not shares[index, rivals].any():
            kept.append(index)
    compared = []
    shared = join_module._shared
    monkeypatch.setattr(join_module, "_shared", lambda *pair: compared.append(pair) or shared(*pair))
    assert [id(one) for one in join(placed, APART)] == [id(placed[i]) for i in sorted(kept, key=lambda i: -placed[i].score)]
    assert 100 < len(kept) < 290
    assert len(compared) < 300 * 10


def test_weak_instances_are_dropped_early_but_not_those_that_suppress() -> None:
    random = np.random.default_rng(2)
    tiles = tiles_of(IMAGE, 64, 0.4)
    masks = discs(25, radius=9)
    every: list[Placed] = []
    some: list[Placed] = []
    for number, tile in enumerate(tiles):
        parts = masks[:, tile.top : tile.top + tile.height, tile.left : tile.left + tile.width]
        scores = torch.from_numpy(random.random(25).astype(np.float32))
        found = Instances(scores, torch.zeros(25, dtype=torch.int64), torch.from_numpy(parts.copy()), torch.arange(25))
        every += place(found, tile, number, IMAGE)
        some += place(found, tile, number, IMAGE, score=0.6)
    assert len(some) < len(every)
    expected = [(one.score, one.top, one.left) for one in join(every, tiles) if one.score >= 0.6]
    assert [(one.score, one.top, one.left) for one in join(some, tiles) if one.score >= 0.6] == expected


def test_masks_from_parts_equal_dense_ones() -> None:
    random = np.random.default_rng(1)
    for _ in range(50):
        top, left = random.integers(0, IMAGE[0] - 1), random.integers(0, IMAGE[1] - 1)
        height, width = random.integers(1, IMAGE[0] - top + 1), random.integers(1, IMAGE[1] - left + 1)
        part = random.random((height, width)) < random.choice([0.3, 0.9, 1.0])
        whole = np.zeros((1, *IMAGE), bool)
        whole[0, top : top + height, left : left + width] = part
        found = CompactMasks.from_parts([(int(top), int(left), part)], (1, *IMAGE))
        assert np.array_equal(found.expand(), whole)
        assert np.array_equal(found.column_runs(0), CompactMasks.of(whole).column_runs(0))


def test_predictions_in_tiles(tmp_path: Path) -> None:
    """Four images of shapes beside each other, in tiles of one image, give what each gives by itself."""
    model = load_model("demo", "cpu")
    root = tmp_path / "shapes"
    write_shapes(root, side=256, train=1, val=2)
    pictures = [Image.open(path).convert("RGB") for path in sorted((root / "val2017").iterdir())]
    both = Image.new("RGB", (512, 256))
    both.paste(pictures[0], (0, 0))
    both.paste(pictures[1], (256, 0))
    tiled = load_model("demo", "cpu", tile=256)
    tiled.config = tiled.config.replace({"inference.tile_overlap": 0.0})
    found = tiled.predict(both, 0.4, activations=True)
    alone = [model.predict(picture, 0.4) for picture in pictures]
    assert found.scores.tolist() == sorted((score for one in alone for score in one.scores.tolist()), reverse=True)
    assert found.masks.shape == (len(found.scores), 256, 512)
    assert found.activations is not None
    assert found.activations.shape == (len(found.scores), 32, 64)
    left = sorted(mask[:, :256].tobytes() for mask in found.masks if mask[:, :256].any())
    assert left == sorted(mask.tobytes() for mask in alone[0].masks)
    compact = tiled.predict_compact(both, 0.4, top=3)
    assert np.array_equal(compact.masks.expand(), found.masks[:3])
    assert compact.before_top == len(found.scores)


def test_evaluation_in_tiles_equals_prediction(tiny: Config, tmp_path: Path) -> None:
    config = tiny.replace({"inference.tile": 32, "inference.tile_overlap": 0.25, "inference.score_threshold": 0.0})
    torch.manual_seed(0)
    model = build_model(config.model).eval()
    split = val_split(config.data)
    result = evaluate(model, split, config, device=CPU, progress=False, predictions=tmp_path / "all.json")
    predictor = Predictor(model, config, split.categories, CPU)
    written = json.loads((tmp_path / "all.json").read_text())
    compared = 0
    for image in split.images:
        found = predictor.predict_compact(image.path)
        entries = [entry for entry in written if entry["image_id"] == image.id]
        assert [entry["score"] for entry in entries] == pytest.approx(found.scores.tolist())
        for index, entry in enumerate(entries):
            assert np.array_equal(decode(entry["segmentation"], image.height, image.width), found.masks[index])
        compared += len(entries)
    assert compared
    assert result.images == len(split.images)
    assert result.mechanism["own"] is not None
    assert result.mechanism["neighbours_recall"] is not None or result.mechanism["duplicates"] is not None


def test_commands_with_tiles(shapes_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photo = tmp_path / "photo.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 420, 3), dtype=np.uint8)).save(photo)
    predict = ["predict", str(photo), "--weights", "demo", "--output", str(tmp_path / "out"), "--maps", "--tile"]
    assert run_cli([*predict, "200"]) == 0
    assert (tmp_path / "out/photo.jpg").exists()
    data = ["--data", str(shapes_root)]
    assert run_cli(["evaluate", "--weights", "demo", *data, "-o", "inference.tile=200", "-o", "data.val_limit=3", "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["images"] == 3
    assert run_cli([*predict, "-3"]) == 2
