"""Augmentation and sizes (paper section 4; the reference implementation's mapper). Imports no torch.

K instances, H W height and width in pixels, x right and y down from the image's corner.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sparseinst.config import DataConfig
from sparseinst.data.coco import Mask, decode

Polygon = NDArray[np.float64]
"""(points, 2) of x and y."""


@dataclass(frozen=True)
class Sample:
    """An image and its instances on their way through the augmentations.

    Polygons stay polygons until the end, so that small objects are drawn once, at the final size; run lengths are masks.
    """

    image: Image.Image
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
    return int(new[0] + 0.5), int(new[1] + 0.5)


def resize_image(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Pillow's bilinear (which averages when it shrinks) to (height, width), on 8 bits as the reference does."""
    return image.resize(size[::-1], Image.Resampling.BILINEAR)


def resize(sample: Sample, size: tuple[int, int]) -> Sample:
    scale = np.array([size[1] / sample.image.width, size[0] / sample.image.height])
    segments: list[list[Polygon] | Mask] = [
        [points * scale for points in segment] if isinstance(segment, list) else _resize_mask(segment, size)
        for segment in sample.segments
    ]
    return Sample(resize_image(sample.image, size), segments, sample.labels)


def _resize_mask(mask: Mask, size: tuple[int, int]) -> Mask:
    return np.asarray(Image.fromarray(mask).resize(size[::-1], Image.Resampling.NEAREST))


def flip(sample: Sample) -> Sample:
    """Left to right."""
    width = sample.image.width
    segments: list[list[Polygon] | Mask] = [
        [np.stack([width - points[:, 0], points[:, 1]], axis=1) for points in segment]
        if isinstance(segment, list)
        else segment[:, ::-1]
        for segment in sample.segments
    ]
    return Sample(sample.image.transpose(Image.Transpose.FLIP_LEFT_RIGHT), segments, sample.labels)


def crop(sample: Sample, top: int, left: int, height: int, width: int) -> Sample:
    offset = np.array([left, top], dtype=np.float64)
    segments: list[list[Polygon] | Mask] = [
        [points - offset for points in segment] if isinstance(segment, list) else segment[top : top + height, left : left + width]
        for segment in sample.segments
    ]
    return Sample(sample.image.crop((left, top, left + width, top + height)), segments, sample.labels)


def augment(sample: Sample, config: DataConfig, random: np.random.Generator) -> Sample:
    """The training augmentation: crop (Table 1 only), flip, jitter of the shorter side."""
    if random.random() < config.crop:
        sample = _resize_short(sample, int(random.choice(config.crop_short_sides)), config.long_side)
        smallest, largest = config.crop_sizes
        height, width = sample.image.height, sample.image.width
        crop_height = int(random.integers(min(height, smallest), min(height, largest) + 1))
        crop_width = int(random.integers(min(width, smallest), min(width, largest) + 1))
        top = int(random.integers(height - crop_height + 1))
        left = int(random.integers(width - crop_width + 1))
        sample = crop(sample, top, left, crop_height, crop_width)
    if random.random() < config.flip:
        sample = flip(sample)
    return _resize_short(sample, int(random.choice(config.short_sides)), config.long_side)


def _resize_short(sample: Sample, short: int, long: int) -> Sample:
    return resize(sample, short_side_size(sample.image.height, sample.image.width, short, long))


def rasterise(sample: Sample) -> tuple[NDArray[np.int64], Mask]:
    """Labels (K,) and masks (K, H, W) of the instances that still have a pixel in the image."""
    height, width = sample.image.height, sample.image.width
    masks = [
        decode([points.ravel().tolist() for points in segment], height, width) if isinstance(segment, list) else segment
        for segment in sample.segments
    ]
    kept = [index for index, mask in enumerate(masks) if mask.any()]
    stacked = np.stack([masks[index] for index in kept]) if kept else np.zeros((0, height, width), np.uint8)
    return sample.labels[kept], np.ascontiguousarray(stacked)
