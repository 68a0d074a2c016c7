"""Check that tiles cover their image, and that training and evaluation cut the same tiles."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from sparseinst.bench.timed_training import random_batches
from sparseinst.config import Config, DataConfig, InferenceConfig
from sparseinst.data.coco import Annotation, Category, CocoSplit, ImageRecord, val_split
from sparseinst.data.loader import Draw, EvalSet, TrainSet
from sparseinst.data.masks import encode
from sparseinst.data.network_input import image_tiles, inference_size
from sparseinst.data.objects import Objects, read_segments
from sparseinst.data.tiles import Tile, tile_size, tiles_of
from sparseinst.data.transforms import as_mask
from sparseinst.errors import UserError
from sparseinst.overrides import load_config
from sparseinst.publish import card

SIDES = st.integers(1, 400)


@given(SIDES, SIDES, st.integers(16, 300), st.floats(0, 0.75))
def test_tiles_cover_the_image_and_overlap(height: int, width: int, side: int, overlap: float) -> None:
    tiles = tiles_of((height, width), side, overlap)
    for length, starts, tile_side in (
        (height, sorted({tile.top for tile in tiles}), min(side, height)),
        (width, sorted({tile.left for tile in tiles}), min(side, width)),
    ):
        assert starts[0] == 0
        assert starts[-1] + tile_side == length
        steps = np.diff(starts)
        assert (steps <= max(1, np.ceil(side * (1 - overlap)))).all(), "neighbours share at least the overlap, but for rounding"
    assert all(tile.size == (min(side, height), min(side, width)) for tile in tiles)
    assert len(tiles) == len({tile.top for tile in tiles}) * len({tile.left for tile in tiles})


def test_an_image_without_tiles_is_one_tile() -> None:
    assert tiles_of((30, 50), None) == [Tile(0, 0, 30, 50)] == tiles_of((30, 50), 64, 0.5)


def test_all_tiles_have_one_scale() -> None:
    assert tile_size((128, 128), 128, 256) == (256, 256)
    assert tile_size((40, 128), 128, 256) == (80, 256), "the short side of a flat image is not enlarged further"
    inference = InferenceConfig(tile=100, short_side=200)
    assert {inference_size(tile.size, inference) for tile in image_tiles((90, 350), inference)} == {(180, 200)}


@pytest.mark.parametrize("kind", ["polygons", "run lengths"])
def test_training_cuts_a_tile_of_the_original_image(kind: str, tmp_path: Path) -> None:
    """Each pixel's colour is its place, so that the tile's place and scale can be read from its pixels."""
    rows, columns = np.mgrid[:200, :240]
    image = np.stack([rows, columns, np.zeros_like(rows)], axis=2).astype(np.uint8)
    Image.fromarray(image).save(tmp_path / "image.png")
    mask = np.zeros((200, 240), np.uint8)
    mask[90:110, 100:130] = 1
    square: Any = [[100, 90, 130, 90, 130, 110, 100, 110]] if kind == "polygons" else encode(mask[None])[0]
    crowd: Any = encode(np.ones((1, 200, 240), np.uint8))[0]
    annotations = [Annotation(1, 0, crowd=False, segmentation=square), Annotation(2, 0, crowd=True, segmentation=crowd)]
    record = ImageRecord(1, tmp_path / "image.png", 200, 240, annotations)
    split = CocoSplit(tmp_path / "a.json", (Category(1, "square"),), [record])
    config = DataConfig(tile=64, short_sides=(128,), flip=0.0)
    dataset, places, without = TrainSet(split, config, seed=0), set(), 0
    for number in range(40):
        found = dataset[Draw(0, number)]
        assert found.image.shape == (3, 128, 128)
        top, left = found.image[:2, 0, 0].tolist()
        places.add((top, left))
        assert int(found.image[0, -1, 0]) - top == 63
        expected = mask[top : top + 64, left : left + 64]
        without += not expected.any()
        assert len(found.labels) == int(expected.any()), "crowds, and objects outside the tile, are left out"
        for part in found.masks.numpy():
            assert np.array_equal(part[::2, ::2], expected)
    assert len(places) > 30
    assert 0 < without < 40
    whole = TrainSet(split, config.model_copy(update={"tile": 400}), seed=0)[Draw(0, 0)]
    assert whole.image.shape[1:] == (64, 77), "a smaller image has the scale of all tiles"


def test_a_tile_holds_the_same_instances_as_a_crop_of_the_image(tiny: Config) -> None:
    split = val_split(tiny.data)
    for record in split.images[:3]:
        objects = Objects(record, split)
        segments, labels = read_segments(record, split)
        whole = [as_mask(segment, (record.height, record.width)) for segment in segments]
        assert np.array_equal(np.stack(list(objects.masks())), np.stack(whole))
        for tile in tiles_of((record.height, record.width), 24, 0.3):
            part = objects.inside(tile)
            inside = {index: as_mask(segment, tile.size) for index, segment in zip(part.indices, part.segments, strict=True)}
            assert np.array_equal(part.labels, labels[part.indices])
            for index, mask in enumerate(whole):
                expected = mask[tile.top : tile.top + tile.height, tile.left : tile.left + tile.width]
                assert np.array_equal(inside.get(index, np.zeros(tile.size, np.uint8)), expected)


def test_evaluation_reads_every_tile_once(tiny: Config) -> None:
    split = val_split(tiny.data)
    whole = EvalSet(split, tiny.data, tiny.inference)
    inference = tiny.inference.model_copy(update={"tile": 32, "tile_overlap": 0.25})
    tiled = EvalSet(split, tiny.data, inference)
    assert len(whole) == len(split.images)
    assert len(tiled) == sum(len(image_tiles((image.height, image.width), inference)) for image in split.images) > len(whole)
    first = split.images[0]
    assert [tiled[index].tile for index in range(len(image_tiles((first.height, first.width), inference)))] == image_tiles(
        (first.height, first.width), inference
    )


def test_settings_that_contradict_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="tile=64 and crop=0.5 both cut the image"):
        load_config(overrides={"data.tile": 64, "data.crop": 0.5})
    with pytest.raises(UserError, match="tile_overlap"):
        load_config(overrides={"inference.tile": 64, "inference.tile_overlap": 0.9})
    with pytest.raises(UserError, match="tile"):
        load_config(overrides={"inference.tile": 3})


def test_tiles_do_not_change_the_keys_of_other_configs() -> None:
    plain = Config()
    assert "tile" not in str(plain.data.content()) + str(plain.inference.content())
    assert plain.replace({"inference.tile_overlap": 0.5}).evaluate_key() == plain.evaluate_key(), "no tile, no overlap"
    assert plain.replace({"inference.tile": 64}).evaluate_key() != plain.evaluate_key()
    assert plain.replace({"inference.tile": 64}).train_key() == plain.train_key()
    assert plain.replace({"data.tile": 64}).train_key() != plain.train_key()


def test_the_timed_training_step_has_the_size_of_a_tile(tiny: Config) -> None:
    changes = {"data.tile": 128, "data.short_sides": [64], "train.batch_size": 2}
    assert {batch.padded for batch in random_batches(tiny.replace(changes), 4)} == {(64, 64)}
    assert random_batches(tiny.replace({**changes, "data.tile": None}), 4)[0].padded != (64, 64)


def test_a_card_describes_the_tiles(tiny: Config) -> None:
    about = SimpleNamespace(name="cells")
    facts: Any = SimpleNamespace(about=about, config=tiny.replace({"inference.tile": 96}), progress="It is done.")
    text = card._head(facts)
    assert "instances of a tile. Images are cut into overlapping tiles of 96 pixels" in text
    assert text.endswith("It is done.")
    facts.config = tiny
    assert "instances of an image. Images are resized to a shorter side of" in card._head(facts)
