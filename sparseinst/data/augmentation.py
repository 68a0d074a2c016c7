"""Augment training images and their instances: as the reference's mapper does (paper section 4), and in three more ways.

All random numbers come from the caller's generator, so that an image's augmentation depends on its seed alone.

K instances of one image, H W height and width in pixels.
"""

from __future__ import annotations

import math

import numpy as np

from sparseinst.config import DataConfig
from sparseinst.data.masks import Mask
from sparseinst.data.tiles import tile_size
from sparseinst.data.transforms import Sample, as_mask, crop, flip, rasterise, resize, short_side_size

_PASTED = 0.5  # the chance of each instance to be pasted


def augment(sample: Sample, config: DataConfig, random: np.random.Generator) -> Sample:
    """Return the augmented training sample: random crop (Table 1 only), flip, size with its jitter, and colours.

    With `data.tile`, the sample is a tile of the image, or an image that is smaller than a tile.
    """
    if random.random() < config.crop:
        limit = math.inf if config.crop_limit == "none" else config.long_side
        height, width = sample.image.shape[:2]
        sample = resize(sample, short_side_size(height, width, int(random.choice(config.crop_short_sides)), limit))
        smallest, largest = config.crop_sizes
        height, width = sample.image.shape[:2]
        crop_height = int(random.integers(min(height, smallest), min(height, largest) + 1))
        crop_width = int(random.integers(min(width, smallest), min(width, largest) + 1))
        sample = _random_part(sample, crop_height, crop_width, random)
    if random.random() < config.flip:
        sample = flip(sample)
    height, width = sample.image.shape[:2]
    short = int(random.choice(config.short_sides))
    if config.tile is None:
        size = short_side_size(height, width, short, config.long_side)
    else:
        size = tile_size((height, width), config.tile, short)
    return jitter_colours(resize_with_jitter(sample, size, config, random), config, random)


def _random_part(sample: Sample, height: int, width: int, random: np.random.Generator) -> Sample:
    """Return a part of this size, at a random place."""
    top = int(random.integers(sample.image.shape[0] - height + 1))
    left = int(random.integers(sample.image.shape[1] - width + 1))
    return crop(sample, top, left, height, width)


def resize_with_jitter(sample: Sample, size: tuple[int, int], config: DataConfig, random: np.random.Generator) -> Sample:
    """Resize the sample to `size` (height, width) times a random factor, and cut it to `size` if it is larger.

    `v2.ScaleJitter` is not used, because it needs masks, and polygons stay polygons here. The part is cut before it is
    enlarged, which gives the same picture for less work.
    """
    low, high = config.scale_jitter_min, config.scale_jitter_max
    if low == high == 1.0:
        return resize(sample, size)
    factor = float(random.uniform(low, high))
    if factor <= 1.0:
        return resize(sample, (max(1, round(size[0] * factor)), max(1, round(size[1] * factor))))
    height, width = sample.image.shape[:2]
    part = _random_part(sample, max(1, round(height / factor)), max(1, round(width / factor)), random)
    return resize(part, size)


def jitter_colours(sample: Sample, config: DataConfig, random: np.random.Generator) -> Sample:
    """Return the sample with random brightness, contrast, saturation and hue, in random order."""
    strengths = {
        "brightness": config.brightness_jitter,
        "contrast": config.contrast_jitter,
        "saturation": config.saturation_jitter,
        "hue": config.hue_jitter,
    }
    if not any(strengths.values()):
        return sample
    import torch
    from torchvision.transforms import v2

    pixels = torch.from_numpy(sample.image).permute(2, 0, 1)  # 3 H W
    # torchvision draws from torch's global generator, which belongs to the training if no worker loads the images.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(int(random.integers(2**63)))
        pixels = v2.ColorJitter(**strengths)(pixels)  # type: ignore[attr-defined] # v2 has no __all__
    return Sample(pixels.permute(1, 2, 0).contiguous().numpy(), sample.segments, sample.labels)


def paste(sample: Sample, source: Sample, random: np.random.Generator) -> tuple[Sample, int]:
    """Paste random instances of `source` into the sample, the whole source at one random place (Simple Copy-Paste).

    A smaller source lies inside the sample; of a larger one, a part of the sample's size is used. Pasted instances cover the
    others, whose masks lose these pixels.

    Returns:
        The sample, with the pasted instances last, and their number.
    """
    height, width = sample.image.shape[:2]
    source_size = source.image.shape[:2]
    its_labels, its_masks = rasterise(source)
    chosen = np.flatnonzero(random.random(len(its_labels)) < _PASTED)
    if not len(chosen) and len(its_labels):
        chosen = random.integers(len(its_labels), size=1)
    (to_y, from_y), (to_x, from_x) = (
        _overlap(int(random.integers(min(0, room), max(0, room) + 1)), of, other)
        for room, of, other in (
            (height - source_size[0], height, source_size[0]),
            (width - source_size[1], width, source_size[1]),
        )
    )
    pasted: list[Mask] = []
    labels = []
    for index in chosen.tolist():
        mask = np.zeros((height, width), np.uint8)
        mask[to_y, to_x] = its_masks[index][from_y, from_x]
        if mask.any():
            pasted.append(mask)
            labels.append(its_labels[index])
    if not pasted:
        return sample, 0
    covered = np.logical_or.reduce(pasted)
    image = sample.image.copy()
    image[to_y, to_x][covered[to_y, to_x]] = source.image[from_y, from_x][covered[to_y, to_x]]
    below: list[Mask] = [as_mask(segment, (height, width)) * ~covered for segment in sample.segments]
    return Sample(image, [*below, *pasted], np.concatenate([sample.labels, np.array(labels, np.int64)])), len(pasted)


def _overlap(shift: int, length: int, source_length: int) -> tuple[slice, slice]:
    """Return where a source, moved by `shift`, lies inside `length` pixels, first counted there and then in the source."""
    start, stop = max(0, shift), min(length, shift + source_length)
    return slice(start, stop), slice(start - shift, stop - shift)
