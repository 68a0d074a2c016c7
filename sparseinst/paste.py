"""Resize mask probabilities from the network's resolution to the image's own size, in one step.

The reference resizes twice: bilinearly to the padded input, then, without the padding, bilinearly to the image's size. Both steps
are linear and separable, so that together they are one matrix product on each side: out = R_h M R_w^T. Each row of these matrices
has only a few weights, beside each other. The image is therefore computed strip by strip, and only for the instances that reach
into the strip. The intermediate values of a strip are small enough for the CPU's cache.

Shapes: K instances, h w height and width of the predicted masks, H W height and width of the image.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

STRIP, BLOCK, GROUP = 64, 64, 24
"""Rows of a strip, columns of a block, and instances processed at once on a CPU."""
MOST_ON_GPU = 2**28
"""A GPU processes all instances and all columns at once, and as many rows as give at most this number of pixels."""


class ImageSize(NamedTuple):
    """The height and width of an image in pixels, when resized for the network (without padding) and originally."""

    resized: tuple[int, int]
    original: tuple[int, int]


Resize = Callable[[Tensor, tuple[int, int], ImageSize, float], Tensor]
"""The signature of `paste` and its variants."""


def paste(masks: Tensor, padded: tuple[int, int], size: ImageSize, threshold: float) -> Tensor:
    """Return boolean masks (K, H, W): true where the resized probability exceeds the threshold.

    The masks equal those of two calls of `interpolate`, unless a probability is within 1e-6 of the threshold: rounding may then
    move it to the other side.

    Args:
        masks: probabilities (K, h, w).
        padded: height and width of the network's input.
    """
    found = masks.new_zeros((len(masks), *size.original), dtype=torch.bool)
    rows, columns = _both_axes(masks, padded, size)
    for row in rows:
        _paste_strip(masks, row, columns, threshold, found[:, row.start : row.end])
    return found


def paste_strips(masks: Tensor, padded: tuple[int, int], size: ImageSize, threshold: float) -> Iterator[tuple[int, Tensor]]:
    """Yield the masks of `paste`, with the same bits, strip by strip from the top.

    A strip needs a small part of the memory of all masks. Without instances there is no strip.

    Yields:
        The number of the strip's first row, and the strip's boolean masks (K, rows, W), which the next strip overwrites.
    """
    rows, columns = _both_axes(masks, padded, size)
    most = max((row.end - row.start for row in rows), default=0)
    # All strips share one buffer. With a new one each time, a process that keeps freed memory would grow with every strip.
    buffer = masks.new_empty((len(masks) * most * size.original[1],), dtype=torch.bool)
    for row in rows:
        shape = len(masks), row.end - row.start, size.original[1]
        strip = buffer[: math.prod(shape)].view(shape).zero_()
        _paste_strip(masks, row, columns, threshold, strip)
        yield row.start, strip


def _both_axes(masks: Tensor, padded: tuple[int, int], size: ImageSize) -> tuple[list[_Block], list[_Block]]:
    """Return the strips of rows and the blocks of columns; none without instances."""
    if not len(masks):
        return [], []
    height, width = size.original
    if masks.device.type == "cpu":
        steps: tuple[int, int] = STRIP, BLOCK
    else:
        steps = min(height, max(1, MOST_ON_GPU // (len(masks) * width))), width
    rows, columns = (
        _blocks(masks.shape[1 + axis], padded[axis], size.resized[axis], size.original[axis], step, masks.device)
        for axis, step in enumerate(steps)
    )
    return rows, columns


def _paste_strip(masks: Tensor, row: _Block, columns: list[_Block], threshold: float, into: Tensor) -> None:
    """Compute one strip of all masks, and set its pixels in `into` (K, end - start, W), whose pixels are false before."""
    strip = masks[:, row.first : row.last]
    on_cpu = masks.device.type == "cpu"
    group = GROUP if on_cpu else len(masks)
    # An output is a weighted mean of inputs, so it exceeds the threshold only if an input does. On a GPU this test would
    # make the processor wait for the GPU.
    reached = (strip.amax((1, 2)) > threshold).nonzero().squeeze(1) if on_cpu else None
    if reached is None or len(reached) == len(masks):
        for some, part in zip(strip.split(group), into.split(group), strict=True):
            torch.gt(_resized(some, row, columns), threshold, out=part)
    else:
        for instances in reached.split(group):
            into[instances] = _resized(strip[instances], row, columns) > threshold


def _resized(masks: Tensor, row: _Block, columns: list[_Block]) -> Tensor:
    """Resize the inputs of a strip, (k, last - first, w), to its probabilities, (k, end - start, W), for k instances."""
    wide = [masks[:, :, column.first : column.last] @ column.weights.T for column in columns]
    return row.weights @ torch.cat(wide, dim=2)


def paste_by_column(masks: Tensor, padded: tuple[int, int], size: ImageSize, threshold: float) -> Tensor:
    """Return the masks of `paste` in column-major memory layout, which COCO's run lengths need."""
    turned = ImageSize(size.resized[::-1], size.original[::-1])
    return paste(masks.transpose(1, 2).contiguous(), padded[::-1], turned, threshold).transpose(1, 2)


class _Block(NamedTuple):
    """A range of output positions along one axis, and the range of inputs on which they depend."""

    start: int
    end: int
    first: int
    last: int
    weights: Tensor
    """(end - start, last - first): the weight of each input, from `first` on, in each output, from `start` on."""


@functools.lru_cache(maxsize=512)
def _blocks(masks: int, padded: int, resized: int, original: int, step: int, device: torch.device) -> list[_Block]:
    """Split the resizing matrix of one axis into blocks of `step` output positions."""
    both = _bilinear(resized, original, device) @ _bilinear(masks, padded, device)[:resized]  # original x masks
    blocks = []
    for start in range(0, original, step):
        weights = both[start : start + step]
        [used] = weights.any(0).nonzero(as_tuple=True)
        first, last = int(used[0]), int(used[-1]) + 1
        # The block is stored transposed, because the products are then fastest.
        block = weights[:, first:last].T.contiguous().T
        blocks.append(_Block(start, start + len(weights), first, last, block))
    return blocks


def _bilinear(size: int, new: int, device: torch.device) -> Tensor:
    """Return the weights (new, size) that `interpolate` itself uses on this device, with its rounding."""
    return F.interpolate(torch.eye(size, device=device)[None], size=new, mode="linear", align_corners=False)[0].T
