"""Check augmentation: instances stay where their pixels are, and it repeats with its seed."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hotcoco import mask as hotcoco_mask
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.ndimage import binary_dilation, binary_erosion

from sparseinst.config import Config, DataConfig
from sparseinst.data.augmentation import augment, jitter_colours, paste
from sparseinst.data.coco import train_split
from sparseinst.data.loader import BatchOrder, Draw, TrainSet, collate, train_loader
from sparseinst.data.masks import encode
from sparseinst.data.transforms import Polygon, Sample, as_segment, rasterise
from sparseinst.errors import UserError
from sparseinst.training import preflight
from tests.conftest import annotation, box, write_coco

COLOURS = np.array([(255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 0), (0, 255, 255), (255, 0, 255)])
ALL: dict[str, Any] = {
    "scale_jitter_min": 0.5,
    "scale_jitter_max": 2.0,
    "brightness_jitter": 0.4,
    "contrast_jitter": 0.4,
    "saturation_jitter": 0.4,
    "hue_jitter": 0.1,
    "copy_paste": 0.5,
}


def scene(seed: int, colours: slice) -> Sample:
    """Return an image in which each instance has its own colour. The first is a polygon, the others are masks."""
    random = np.random.default_rng(seed)
    height, width = (int(side) for side in random.integers(60, 130, 2))
    image = np.zeros((height, width, 3), np.uint8)
    segments: list[list[Polygon] | NDArray[np.uint8]] = []
    labels = np.arange(len(COLOURS))[colours]
    for place, label in enumerate(labels):
        wide, high = (int(side) for side in random.integers(12, 18, 2))
        left = place * (width // len(labels)) + 1
        top = int(random.integers(0, height - high))
        mask = np.zeros((height, width), np.uint8)
        mask[top : top + high, left : left + wide] = 1
        image[mask > 0] = COLOURS[label]
        segments.append(as_segment(box(left, top, wide, high), height, width) if place == 0 else mask)
    return Sample(image, segments, labels)


def of_colour(image: NDArray[np.uint8], label: int) -> NDArray[np.bool_]:
    return np.asarray((np.abs(image.astype(int) - COLOURS[label]) < 120).all(2))


def assert_consistent(sample: Sample, blur: int) -> None:
    """Masks and boxes cover the pixels of their colour, but for `blur` pixels at edges; COCO's area is that of the mask."""
    labels, masks = rasterise(sample)
    assert len(set(labels.tolist())) == len(labels)
    assert masks.sum(0).max(initial=0) <= 1, "visible parts do not overlap"
    edges = np.ones((2 * blur + 1, 2 * blur + 1), bool)
    for label, mask in zip(labels.tolist(), masks > 0, strict=True):
        coloured = of_colour(sample.image, label)
        inside = binary_erosion(mask, edges)
        assert coloured[inside].all()
        assert not (coloured & ~binary_dilation(mask, edges)).any()
        if inside.any():
            (rows, columns), (its_rows, its_columns) = np.nonzero(mask), np.nonzero(coloured)
            for values, its_values in ((rows, its_rows), (columns, its_columns)):
                assert abs(int(values.min()) - int(its_values.min())) <= blur + 1
                assert abs(int(values.max()) - int(its_values.max())) <= blur + 1
        [run] = encode(mask[None])
        assert hotcoco_mask.area({**run, "counts": run["counts"].encode()}) == mask.sum()
    for label in set(range(len(COLOURS))) - set(labels.tolist()):
        assert not binary_erosion(of_colour(sample.image, label), edges).any(), "no instance is lost while its pixels stay"


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(st.integers(0, 10**6), st.sampled_from([0.0, 1.0]), st.sampled_from([(1.0, 1.0), (0.4, 0.9), (1.1, 2.5)]), st.booleans())
def test_instances_stay_where_their_pixels_are(seed: int, crop: float, scale: tuple[float, float], pastes: bool) -> None:
    config = DataConfig(
        short_sides=(60, 97), long_side=150, crop=crop, crop_short_sides=(70, 110), crop_sizes=(40, 90),
        scale_jitter_min=scale[0], scale_jitter_max=scale[1],
    )  # fmt: skip
    random = np.random.default_rng(seed)
    sample = augment(scene(seed, slice(0, 3)), config, random)
    if pastes:
        source = augment(scene(seed + 1, slice(3, 6)), config, random)
        before = len(rasterise(source)[0])
        sample, count = paste(sample, source, random)
        assert count <= before
        assert len(sample.labels) == 3 + count
    enlarged = 97 / (40 if crop else 60) * max(1.0, scale[1])
    assert_consistent(sample, 1 + math.ceil(enlarged))


def test_pasted_instances_cover_the_others_and_the_rest_stays() -> None:
    below = Sample(np.full((40, 60, 3), 9, np.uint8), [as_segment(box(0, 0, 60, 40), 40, 60)], np.array([2]))
    mask = np.zeros((40, 60), np.uint8)
    mask[5:15, 10:30] = 1
    source = Sample(np.full((40, 60, 3), 200, np.uint8), [mask], np.array([4]))
    sample, count = paste(below, source, np.random.default_rng(0))
    assert count == 1
    labels, masks = rasterise(sample)
    assert labels.tolist() == [2, 4]
    assert np.array_equal(masks[1], mask)
    assert np.array_equal(masks[0], 1 - mask)
    assert np.array_equal(sample.image[..., 0], np.where(mask, 200, 9))
    assert (below.image == 9).all(), "the images of the caller stay"
    nothing, count = paste(below, Sample(source.image, [], np.zeros(0, np.int64)), np.random.default_rng(0))
    assert (nothing, count) == (below, 0)


def test_sources_of_any_size_lie_inside() -> None:
    below = scene(0, slice(0, 3))
    for height, width in ((10, 10), (300, 20), (20, 300), (300, 300)):
        mask = np.ones((height, width), np.uint8)
        source = Sample(np.full((height, width, 3), 255, np.uint8), [mask], np.array([5]))
        for seed in range(5):
            sample, count = paste(below, source, np.random.default_rng(seed))
            assert count == 1
            _, masks = rasterise(sample)
            assert masks[-1].sum() == min(height, below.image.shape[0]) * min(width, below.image.shape[1])
            assert (sample.image[masks[-1] > 0] == 255).all()


def test_colours_change_within_their_strength_and_leave_torchs_random_numbers_alone() -> None:
    grey = Sample(np.full((8, 8, 3), 100, np.uint8), [], np.zeros(0, np.int64))
    config = DataConfig(brightness_jitter=0.3)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    found = [jitter_colours(grey, config, np.random.default_rng(seed)).image for seed in range(40)]
    assert torch.equal(torch.rand(3), expected)
    values = sorted({int(image[0, 0, 0]) for image in found})
    assert values[0] >= 70
    assert values[-1] <= 130
    assert len(values) > 15
    assert values[0] < 80 < 120 < values[-1]
    assert jitter_colours(grey, DataConfig(), np.random.default_rng(0)) is grey
    red = Sample(np.full((8, 8, 3), (200, 10, 10), np.uint8), [], np.zeros(0, np.int64))
    turned = jitter_colours(red, DataConfig(hue_jitter=0.5), np.random.default_rng(3)).image[0, 0]
    assert turned.argmax() != 0 or turned[1] != turned[2]


def test_runs_without_crops_or_with_their_former_limit_keep_their_keys() -> None:
    config = Config()
    assert config.data.crop_limit == "none"
    former = config.replace({"data.crop_limit": "long_side"})
    assert former.train_key() == config.train_key() == "f6658b6ecf78c55f", "without crops the limit has no effect"
    cropped, same = config.replace({"data.crop": 0.5}), former.replace({"data.crop": 0.5})
    assert "crop_limit" not in same.data.content("train"), "runs with the former limit keep their keys"
    assert cropped.train_key() != same.train_key()


def test_only_the_former_limit_shrinks_a_panorama_before_its_crop() -> None:
    image = Sample(np.zeros((50, 200, 3), np.uint8), [], np.zeros(0, np.int64))
    settings: dict[str, Any] = {"crop": 1.0, "crop_short_sides": (100,), "crop_sizes": (100, 100), "short_sides": (100,)}
    for limit, size in (("none", (100, 100)), ("long_side", (57, 150))):
        config = DataConfig(**settings, long_side=150, crop_limit=limit)
        assert augment(image, config, np.random.default_rng(1)).image.shape[:2] == size


def test_a_range_that_is_turned_around_is_refused() -> None:
    with pytest.raises(UserError, match=r"scale_jitter_min=2 is above scale_jitter_max=1"):
        Config().replace({"data.scale_jitter_min": 2.0})


@pytest.mark.parametrize("workers", [0, 2])
def test_all_augmentations_depend_on_the_draw_alone(tiny: Config, workers: int) -> None:
    data = tiny.data.model_copy(update={**ALL, "workers": workers})
    dataset = TrainSet(train_split(data), data, seed=0)
    torch.manual_seed(workers)
    batches = list(train_loader(dataset, BatchOrder(dataset.split, tiny.train), pin_memory=False))
    direct = [collate([dataset[d] for d in draws]) for draws in BatchOrder(dataset.split, tiny.train)]
    for batch, expected in zip(batches, direct, strict=True):
        assert torch.equal(batch.images, expected.images)
        assert all(torch.equal(a, b) for a, b in zip(batch.masks, expected.masks, strict=True))
    examples = [dataset[Draw(number % len(dataset), number)] for number in range(24)]
    assert 4 < sum(example.pasted > 0 for example in examples) < 20
    assert len({tuple(example.image.shape) for example in examples}) > 10


def test_an_unreadable_source_of_copy_paste_is_left_out(tmp_path: Path) -> None:
    images = [{"id": n, "file_name": f"{n}.png", "height": 40, "width": 60} for n in (1, 2)]
    write_coco(tmp_path, images, [annotation(n, n, 7, box(5, 5, 20, 20)) for n in (1, 2)])
    (tmp_path / "train2017/2.png").write_text("no image")
    config = DataConfig(root=str(tmp_path), short_sides=(40,), copy_paste=1.0, on_bad_image="skip")
    dataset = TrainSet(train_split(config), config, seed=0)
    examples = [dataset[Draw(0, number)] for number in range(12)]
    assert {example.pasted for example in examples} == {0, 1}
    assert all(bool(example.skipped) == (example.pasted == 0) for example in examples)


def test_the_preflight_augments_nothing(tiny: Config, tmp_path: Path) -> None:
    config = tiny.replace({f"data.{name}": value for name, value in ALL.items()})
    plain = preflight._small(tiny, tmp_path / "a.json", "train2017").data
    assert preflight._small(config, tmp_path / "a.json", "train2017").data == plain
