"""Resize mask probabilities from the network's resolution to the image's own size, in one step.

The reference resizes twice: bilinearly to the padded input, then, without the padding, bilinearly to the image's size. Both steps
are linear and separable, so that together they are one matrix product on each side: out = R_h M R_w^T. The matrices are banded (a
few weights a row). The image is therefore computed strip by strip, and only for the instances that reach into the strip. The
intermediate values of a strip are small enough for the CPU's cache.

Shapes: K instances, h w height and width of the predicted masks, H W height and width of the image.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

STRIP, BLOCK, GROUP = 64, 64, 24
"""Rows of a strip, columns of a block, and instances processed at once on a CPU. A GPU processes everything at once."""


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
    if not len(masks):
        return found
    on_cpu = masks.device.type == "cpu"
    group = GROUP if on_cpu else len(masks)
    rows, columns = (
        _blocks(
            masks.shape[1 + axis], padded[axis], size.resized[axis], size.original[axis], step if on_cpu else None, masks.device
        )
        for axis, step in ((0, STRIP), (1, BLOCK))
    )
    for row in rows:
        strip = masks[:, row.first : row.last]
        target = found[:, row.start : row.end]
        # An output is a weighted mean of inputs, so it exceeds the threshold only if an input does. On a GPU this test would
        # have to wait for the result.
        reached = (strip.amax((1, 2)) > threshold).nonzero().squeeze(1) if on_cpu else None
        if reached is None or len(reached) == len(masks):
            for some, into in zip(strip.split(group), target.split(group), strict=True):
                torch.gt(_resized(some, row, columns), threshold, out=into)
        else:
            for instances in reached.split(group):
                target[instances] = _resized(strip[instances], row, columns) > threshold
    return found


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
    """(end - start, last - first): output positions start to end from inputs first to last."""


@functools.lru_cache(maxsize=512)
def _blocks(masks: int, padded: int, resized: int, original: int, step: int | None, device: torch.device) -> list[_Block]:
    """Split the resizing matrix of one axis into blocks of `step` output positions; None makes a single block."""
    both = _bilinear(resized, original, device) @ _bilinear(masks, padded, device)[:resized]  # original x masks
    blocks = []
    for start in range(0, original, step or original):
        weights = both[start : start + (step or original)]
        [used] = weights.any(0).nonzero(as_tuple=True)
        first, last = int(used[0]), int(used[-1]) + 1
        # The block is stored transposed, because the products are then fastest.
        block = weights[:, first:last].T.contiguous().T
        blocks.append(_Block(start, start + len(weights), first, last, block))
    return blocks


def _bilinear(size: int, new: int, device: torch.device) -> Tensor:
    """Return the weights (new, size) that `interpolate` itself uses on this device, with its rounding."""
    return F.interpolate(torch.eye(size, device=device)[None], size=new, mode="linear", align_corners=False)[0].T
