"""Check that flips, crops and resizings move image and masks together."""

import numpy as np
import pytest
import torch
from PIL import Image

from sparseinst.config import DataConfig
from sparseinst.criterion import prepare_targets
from sparseinst.data.augmentation import augment
from sparseinst.data.images import read_image
from sparseinst.data.transforms import Sample, as_segment, crop, flip, rasterise, resize, resize_image, shrink
from tests.conftest import REAL_COCO, box


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
