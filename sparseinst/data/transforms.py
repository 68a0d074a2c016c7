"""Resize, flip, crop and rasterise images and their instances.

Only the functions that resize and flip training images import torch.

K instances, H W height and width in pixels, x right and y down from the image's corner.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from sparseinst.data.annotations import check_segmentation
from sparseinst.data.masks import Bounds, Mask, decode, decode_with_bounds

Pixels = NDArray[np.uint8]
"""(H, W, 3) RGB."""
Polygon = NDArray[np.float64]
"""(points, 2) of x and y."""


@dataclass(frozen=True)
class Sample:
    """An image and its instances during augmentation.

    Polygons stay polygons until the end, so that small objects are rasterised once, at the final size. Run lengths become masks.
    """

    image: Pixels
    """A writable array, because torch warns about any other."""
    segments: list[list[Polygon] | Mask]
    labels: NDArray[np.int64]


def as_segment(segmentation: Any, height: int, width: int) -> list[Polygon] | Mask:
    """Return an annotation's segmentation as `Sample` holds it. Raises `ValueError` if it is neither polygons nor run lengths."""
    if isinstance(segmentation, list):
        check_segmentation(segmentation, height, width)
        return [np.asarray(points, dtype=np.float64).reshape(-1, 2) for points in segmentation]
    return decode(segmentation, height, width)


def short_side_size(height: int, width: int, short: int, long: float) -> tuple[int, int]:
    """Return the height and width after scaling the shorter side to `short`, with the longer side at most `long`."""
    scale = short / min(height, width)
    new = (float(short), scale * width) if height < width else (scale * height, float(short))
    if max(new) > long:
        shrink = long / max(new)
        new = (new[0] * shrink, new[1] * shrink)
    return max(1, int(new[0] + 0.5)), max(1, int(new[1] + 0.5))


def resize_image(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """Resize the image to (height, width) with Pillow's bilinear filter on 8 bits, as the reference does.

    The filter is antialiased when the image becomes smaller.
    """
    return image.resize(size[::-1], Image.Resampling.BILINEAR)


def resize(sample: Sample, size: tuple[int, int]) -> Sample:
    """Resize the sample to (height, width), three times as fast as `resize_image`; a few values differ by up to two levels."""
    import torch
    from torch.nn import functional as F

    height, width = sample.image.shape[:2]
    if size == (height, width):
        return Sample(sample.image.copy(), sample.segments, sample.labels)  # a copy, not a view
    pixels = torch.from_numpy(sample.image).permute(2, 0, 1)[None]  # (1, 3, h, w), channels-last in memory, which is fastest
    image = F.interpolate(pixels, size=size, mode="bilinear", antialias=True)[0].permute(1, 2, 0).numpy()
    return Sample(image, resize_segments(sample.segments, (height, width), size), sample.labels)


def resize_segments(
    segments: Sequence[list[Polygon] | Mask], before: tuple[int, int], size: tuple[int, int]
) -> list[list[Polygon] | Mask]:
    """Return the segments of an image of size `before`, scaled to `size`; both are (height, width)."""
    if before == size:
        return list(segments)
    scale = np.array([size[1] / before[1], size[0] / before[0]])
    return [
        [points * scale for points in segment] if isinstance(segment, list) else _resize_mask(segment, size)
        for segment in segments
    ]


def _resize_mask(mask: Mask, size: tuple[int, int]) -> Mask:
    return np.asarray(Image.fromarray(mask).resize(size[::-1], Image.Resampling.NEAREST))


def flip(sample: Sample) -> Sample:
    """Return the sample mirrored left to right."""
    import torch

    width = sample.image.shape[1]
    segments: list[list[Polygon] | Mask] = [
        [np.stack([width - points[:, 0], points[:, 1]], axis=1) for points in segment]
        if isinstance(segment, list)
        else segment[:, ::-1]
        for segment in sample.segments
    ]
    image = torch.from_numpy(sample.image).flip(1).numpy()  # many times faster than numpy, which copies byte by byte
    return Sample(image, segments, sample.labels)


def crop(sample: Sample, top: int, left: int, height: int, width: int) -> Sample:
    """Return the part of the sample inside a box, which is given in pixels."""
    segments = crop_segments(sample.segments, top, left, height, width)
    return Sample(sample.image[top : top + height, left : left + width], segments, sample.labels)


def crop_segments(
    segments: Sequence[list[Polygon] | Mask], top: int, left: int, height: int, width: int
) -> list[list[Polygon] | Mask]:
    """Return the parts of the segments inside a box; polygons are not cut at its sides, and may lie outside."""
    offset = np.array([left, top], dtype=np.float64)
    inside = (slice(top, top + height), slice(left, left + width))
    return [[points - offset for points in segment] if isinstance(segment, list) else segment[inside] for segment in segments]


def rasterise(sample: Sample, stride: int = 1) -> tuple[NDArray[np.int64], Mask]:
    """Return the labels (K,) and masks of the instances that still have a pixel in the image.

    Args:
        stride: 1 returns masks (K, H, W) of 0 and 1. An even stride returns the masks of `shrink`, (K, ceil(H / stride),
            ceil(W / stride)).
    """
    height, width = sample.image.shape[:2]
    kept, masks = [], []
    for index, segment in enumerate(sample.segments):
        mask, bounds = _draw_polygons(segment, height, width) if isinstance(segment, list) else (segment, _mask_bounds(segment))
        if bounds.bottom > bounds.top:
            kept.append(index)
            masks.append(mask if stride == 1 else shrink(mask, stride, bounds))
    shape = (height, width) if stride == 1 else (-(-height // stride), -(-width // stride))
    stacked = np.stack(masks) if masks else np.zeros((0, *shape), np.uint8)
    return sample.labels[kept], np.ascontiguousarray(stacked)


def as_mask(segment: list[Polygon] | Mask, size: tuple[int, int]) -> Mask:
    """Return a segment as a mask (height, width) of 0 and 1."""
    return _draw_polygons(segment, *size)[0] if isinstance(segment, list) else segment


def _draw_polygons(polygons: list[Polygon], height: int, width: int) -> tuple[Mask, Bounds]:
    return decode_with_bounds([points.ravel().tolist() for points in polygons], height, width)


def _mask_bounds(mask: Mask) -> Bounds:
    rows, columns = (np.flatnonzero(mask.any(axis)).tolist() or [0, -1] for axis in (1, 0))
    return Bounds(rows[0], columns[0], rows[-1] + 1, columns[-1] + 1)


def shrink(mask: Mask, stride: int, bounds: Bounds | None = None) -> Mask:
    """Downsample a mask by bilinear interpolation: (H, W) to (ceil(H / stride), ceil(W / stride)), in quarters, 0 to 4.

    For an even stride, a new pixel lies in the middle of four old ones and is their mean: 0, 1, 2, 3 or 4 quarters, without
    rounding. Pixels outside the mask count as 0, as in a padded image.

    Args:
        bounds: a box that holds all pixels that are not 0. Only this box is read.
    """
    height, width = mask.shape
    shrunk = np.zeros((-(-height // stride), -(-width // stride)), np.uint8)
    top, left, bottom, right = bounds or Bounds(0, 0, height, width)
    top, left, bottom, right = top // stride, left // stride, -(-bottom // stride), -(-right // stride)
    part = mask[top * stride : bottom * stride, left * stride : right * stride]
    by_column = _middle_sums(part.T, stride)  # decoded masks are stored column by column
    shrunk[top:bottom, left:right] = _middle_sums(by_column.T, stride)
    return shrunk


def _middle_sums(lines: Mask, stride: int) -> Mask:
    """Return the sum of the two middle lines of each group of `stride` lines."""
    before, after = lines[stride // 2 - 1 :: stride], lines[stride // 2 :: stride]
    count = -(-len(lines) // stride)
    if len(after) == count:
        return before + after
    sums = np.zeros((count, lines.shape[1]), np.uint8)
    sums[: len(before)] = before
    sums[: len(after)] += after
    return sums
