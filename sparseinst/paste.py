"""Mask probabilities at the network's resolution to masks at the image's own size: both resizings of the reference in one step.

The reference resizes bilinearly to the padded input, cuts the padding off, and resizes bilinearly again. Both are linear, and the
same along rows and columns, so the whole is one small matrix on either side: out = R_h M R_w^T. The matrices are banded (a few
weights a row), so the image is made strip by strip, of the instances that reach into the strip alone; what lies between, a few
instances' strip in float, stays in the processor's cache.

K instances, h w height and width of the predicted masks, H W those of the image.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

STRIP, BLOCK, GROUP = 64, 64, 24
"""Rows of a strip, columns of a block, and instances at once on a processor; a GPU takes all at once."""


class ImageSize(NamedTuple):
    """Height and width in pixels, of the image as the network saw it and as it was."""

    resized: tuple[int, int]
    original: tuple[int, int]


Resize = Callable[[Tensor, tuple[int, int], ImageSize, float], Tensor]
"""What `paste` is."""


def paste(masks: Tensor, padded: tuple[int, int], size: ImageSize, threshold: float) -> Tensor:
    """Probabilities (K, h, w) to boolean masks (K, H, W): where the resized probability exceeds the threshold.

    Equal to two calls of `interpolate` but for rounding: a pixel within 1e-6 of the threshold may fall on its other side.

    Args:
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
        # A mean exceeds the threshold only where something does that it is the mean of. Asking a GPU would mean to wait for it.
        reached = (strip.amax((1, 2)) > threshold).nonzero().squeeze(1) if on_cpu else None
        if reached is None or len(reached) == len(masks):
            for some, into in zip(strip.split(group), target.split(group), strict=True):
                torch.gt(_resized(some, row, columns), threshold, out=into)
        else:
            for instances in reached.split(group):
                target[instances] = _resized(strip[instances], row, columns) > threshold
    return found


def _resized(masks: Tensor, row: _Block, columns: list[_Block]) -> Tensor:
    """The inputs of a strip, (k, last - first, w), to its probabilities (k, end - start, W)."""
    wide = [masks[:, :, column.first : column.last] @ column.weights.T for column in columns]
    return row.weights @ torch.cat(wide, dim=2)


def paste_by_column(masks: Tensor, padded: tuple[int, int], size: ImageSize, threshold: float) -> Tensor:
    """The same as `paste`, laid out column after column in memory, as COCO's run lengths go."""
    turned = ImageSize(size.resized[::-1], size.original[::-1])
    return paste(masks.transpose(1, 2).contiguous(), padded[::-1], turned, threshold).transpose(1, 2)


def paste_in_two_steps(masks: Tensor, padded: tuple[int, int], size: ImageSize, threshold: float) -> Tensor:
    """The same by the reference's two calls of `interpolate`: what `paste` is tested against, and timed against."""
    if not len(masks):
        return paste(masks, padded, size, threshold)
    whole = F.interpolate(masks[None], size=padded, mode="bilinear", align_corners=False)
    image = whole[:, :, : size.resized[0], : size.resized[1]]
    return F.interpolate(image, size=size.original, mode="bilinear", align_corners=False)[0] > threshold


class _Block(NamedTuple):
    """Some positions of the output along one axis, and the inputs that they are made of."""

    start: int
    end: int
    first: int
    last: int
    weights: Tensor
    """(end - start, last - first)."""


@functools.lru_cache(maxsize=512)
def _blocks(masks: int, padded: int, resized: int, original: int, step: int | None, device: torch.device) -> list[_Block]:
    """Of so many positions each; None for all in one."""
    both = _bilinear(resized, original, device) @ _bilinear(masks, padded, device)[:resized]  # original x masks
    blocks = []
    for start in range(0, original, step or original):
        weights = both[start : start + (step or original)]
        [used] = weights.any(0).nonzero(as_tuple=True)
        first, last = int(used[0]), int(used[-1]) + 1
        # Transposed in memory, as the products are fastest.
        block = weights[:, first:last].T.contiguous().T
        blocks.append(_Block(start, start + len(weights), first, last, block))
    return blocks


def _bilinear(size: int, new: int, device: torch.device) -> Tensor:
    """(new, size): the weights that `interpolate` itself uses on that device, rounding and all."""
    return F.interpolate(torch.eye(size, device=device)[None], size=new, mode="linear", align_corners=False)[0].T
