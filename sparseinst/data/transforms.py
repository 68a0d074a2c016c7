"""Augmentation and sizes (paper section 4; the reference implementation's mapper). Imports no torch but to move pixels.

K instances, H W height and width in pixels, x right and y down from the image's corner.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sparseinst.config import DataConfig
from sparseinst.data.coco import Bounds, Mask, decode, decode_with_bounds

Pixels = NDArray[np.uint8]
"""(H, W, 3) RGB."""
Polygon = NDArray[np.float64]
"""(points, 2) of x and y."""


@dataclass(frozen=True)
class Sample:
    """An image and its instances on their way through the augmentations.

    Polygons stay polygons until the end, so that small objects are drawn once, at the final size; run lengths are masks.
    """

    image: Pixels
    """To be written to: torch takes no other."""
    segments: list[list[Polygon] | Mask]
    labels: NDArray[np.int64]


def as_segment(segmentation: Any, height: int, width: int) -> list[Polygon] | Mask:
    """An annotation's segmentation as `Sample` holds it. Raises `ValueError` for what is neither polygons nor run lengths."""
    if isinstance(segmentation, list):
        polygons = [np.asarray(points, dtype=np.float64).reshape(-1, 2) for points in segmentation]
        if not polygons or min(len(points) for points in polygons) < 3:
            raise ValueError("a polygon needs at least three points of x and y")
        return polygons
    return decode(segmentation, height, width)


def short_side_size(height: int, width: int, short: int, long: int) -> tuple[int, int]:
    """Height and width when the shorter side becomes `short` and the longer stays within `long`."""
    scale = short / min(height, width)
    new = (float(short), scale * width) if height < width else (scale * height, float(short))
    if max(new) > long:
        shrink = long / max(new)
        new = (new[0] * shrink, new[1] * shrink)
    return max(1, int(new[0] + 0.5)), max(1, int(new[1] + 0.5))


def resize_image(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Pillow's bilinear (which averages when it shrinks) to (height, width), on 8 bits as the reference does."""
    return image.resize(size[::-1], Image.Resampling.BILINEAR)


def resize(sample: Sample, size: tuple[int, int]) -> Sample:
    """To (height, width), as `resize_image` but for single grey levels here and there: three times as fast, for training."""
    import torch
    from torch.nn import functional as F

    height, width = sample.image.shape[:2]
    if size == (height, width):
        return Sample(sample.image.copy(), sample.segments, sample.labels)  # of its own, no view
    pixels = torch.from_numpy(sample.image).permute(2, 0, 1)[None]  # 1 3 h w, pixel after pixel, as its kernel is fastest
    image = F.interpolate(pixels, size=size, mode="bilinear", antialias=True)[0].permute(1, 2, 0).numpy()
    scale = np.array([size[1] / width, size[0] / height])
    segments: list[list[Polygon] | Mask] = [
        [points * scale for points in segment] if isinstance(segment, list) else _resize_mask(segment, size)
        for segment in sample.segments
    ]
    return Sample(image, segments, sample.labels)


def _resize_mask(mask: Mask, size: tuple[int, int]) -> Mask:
    return np.asarray(Image.fromarray(mask).resize(size[::-1], Image.Resampling.NEAREST))


def flip(sample: Sample) -> Sample:
    """Left to right."""
    import torch

    width = sample.image.shape[1]
    segments: list[list[Polygon] | Mask] = [
        [np.stack([width - points[:, 0], points[:, 1]], axis=1) for points in segment]
        if isinstance(segment, list)
        else segment[:, ::-1]
        for segment in sample.segments
    ]
    image = torch.from_numpy(sample.image).flip(1).numpy()  # many times as fast as a copy by numpy, which goes byte after byte
    return Sample(image, segments, sample.labels)


def crop(sample: Sample, top: int, left: int, height: int, width: int) -> Sample:
    offset = np.array([left, top], dtype=np.float64)
    inside = (slice(top, top + height), slice(left, left + width))
    segments: list[list[Polygon] | Mask] = [
        [points - offset for points in segment] if isinstance(segment, list) else segment[inside] for segment in sample.segments
    ]
    return Sample(sample.image[inside], segments, sample.labels)


def augment(sample: Sample, config: DataConfig, random: np.random.Generator) -> Sample:
    """The training augmentation: crop (Table 1 only), flip, jitter of the shorter side."""
    if random.random() < config.crop:
        sample = _resize_short(sample, int(random.choice(config.crop_short_sides)), config.long_side)
        smallest, largest = config.crop_sizes
        height, width = sample.image.shape[:2]
        crop_height = int(random.integers(min(height, smallest), min(height, largest) + 1))
        crop_width = int(random.integers(min(width, smallest), min(width, largest) + 1))
        top = int(random.integers(height - crop_height + 1))
        left = int(random.integers(width - crop_width + 1))
        sample = crop(sample, top, left, crop_height, crop_width)
    if random.random() < config.flip:
        sample = flip(sample)
    return _resize_short(sample, int(random.choice(config.short_sides)), config.long_side)


def _resize_short(sample: Sample, short: int, long: int) -> Sample:
    height, width = sample.image.shape[:2]
    return resize(sample, short_side_size(height, width, short, long))


def rasterise(sample: Sample, stride: int = 1) -> tuple[NDArray[np.int64], Mask]:
    """Labels (K,) and masks of the instances that still have a pixel in the image.

    Args:
        stride: 1 for masks (K, H, W) of 0 and 1; an even one for `shrink`'s, (K, ceil(H / stride), ceil(W / stride)).
    """
    height, width = sample.image.shape[:2]
    kept, masks = [], []
    for index, segment in enumerate(sample.segments):
        mask, bounds = _drawn(segment, height, width) if isinstance(segment, list) else (segment, _bounds(segment))
        if bounds.bottom > bounds.top:
            kept.append(index)
            masks.append(mask if stride == 1 else shrink(mask, stride, bounds))
    shape = (height, width) if stride == 1 else (-(-height // stride), -(-width // stride))
    stacked = np.stack(masks) if masks else np.zeros((0, *shape), np.uint8)
    return sample.labels[kept], np.ascontiguousarray(stacked)


def _drawn(polygons: list[Polygon], height: int, width: int) -> tuple[Mask, Bounds]:
    return decode_with_bounds([points.ravel().tolist() for points in polygons], height, width)


def _bounds(mask: Mask) -> Bounds:
    rows, columns = (np.flatnonzero(mask.any(axis)).tolist() or [0, -1] for axis in (1, 0))
    return Bounds(rows[0], columns[0], rows[-1] + 1, columns[-1] + 1)


def shrink(mask: Mask, stride: int, bounds: Bounds | None = None) -> Mask:
    """What bilinear interpolation to 1 / stride makes of a mask, in quarters: (H, W) to (ceil(H / stride), ceil(W / stride)).

    For an even stride a new pixel lies in the middle between four, so that it is their mean: 0, 1, 2, 3 or 4 quarters, without
    any rounding. What lies outside the mask is 0, as in a padded image.

    Args:
        bounds: of what is not 0; no more is looked at.
    """
    height, width = mask.shape
    whole = np.zeros((-(-height // stride), -(-width // stride)), np.uint8)
    top, left, bottom, right = bounds or Bounds(0, 0, height, width)
    top, left, bottom, right = top // stride, left // stride, -(-bottom // stride), -(-right // stride)
    part = mask[top * stride : bottom * stride, left * stride : right * stride]
    by_column = _pairs(part.T, stride)  # decoded masks lie column after column
    whole[top:bottom, left:right] = _pairs(by_column.T, stride)
    return whole


def _pairs(lines: Mask, stride: int) -> Mask:
    """The sums of the two lines in the middle of every `stride`."""
    before, after = lines[stride // 2 - 1 :: stride], lines[stride // 2 :: stride]
    count = -(-len(lines) // stride)
    if len(after) == count:
        return before + after
    sums = np.zeros((count, lines.shape[1]), np.uint8)
    sums[: len(before)] = before
    sums[: len(after)] += after
    return sums
