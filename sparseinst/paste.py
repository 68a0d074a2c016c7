"""Resize mask probabilities from the network's resolution to the image's own size, in one step.

The reference resizes twice: bilinearly to the padded input, then, without the padding, bilinearly to the image's size. Both steps
are linear and separable, so that together they are one matrix product on each side: out = R_h M R_w^T. Each row of these matrices
has only a few weights, beside each other. The image is therefore computed strip by strip, and only for the instances that reach
into the strip. Of an instance that reaches into a narrow part of the strip, only this part is computed. The intermediate values
of a strip are small enough for the CPU's cache.

Shapes: K instances, h w height and width of the predicted masks, H W height and width of the image.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

STRIP, BLOCK, GROUP = 96, 64, 24
"""Rows of a strip, columns of a block, and instances processed at once on a CPU."""
NARROW = 0.5
"""An instance is computed alone if it reaches into at most this share of a strip's width."""
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


def _both_axes(masks: Tensor, padded: tuple[int, int], size: ImageSize) -> tuple[list[_Block], _Columns]:
    """Return the strips of rows, and the columns; no strips without instances."""
    if not len(masks):
        return [], _Columns([], None)
    height, width = size.original
    on_cpu = masks.device.type == "cpu"
    if on_cpu:
        steps: tuple[int, int] = STRIP, BLOCK
    else:
        steps = min(height, max(1, MOST_ON_GPU // (len(masks) * width))), width
    rows, columns = ((masks.shape[1 + axis], padded[axis], size.resized[axis], size.original[axis]) for axis in range(2))
    reach = _reach(*columns) if on_cpu else None
    return _blocks(*rows, steps[0], masks.device), _Columns(_blocks(*columns, steps[1], masks.device), reach)


def _paste_strip(masks: Tensor, row: _Block, columns: _Columns, threshold: float, into: Tensor) -> None:
    """Compute one strip of all masks, and set its pixels in `into` (K, end - start, W), whose pixels are false before."""
    strip = masks[:, row.first : row.last]
    if columns.reach is None:
        torch.gt(_resized(strip, row, columns.blocks), threshold, out=into)
        return
    wide = []
    for instance, start, end in _reached((strip > threshold).any(1).numpy(), columns.reach):
        if end - start > NARROW * into.shape[2]:
            wide.append(instance)
        else:
            first, last = columns.reach.inputs[start, 0], columns.reach.inputs[end - 1, 1]
            part = strip[instance, :, first:last] @ columns.reach.weights[first:last, start:end]
            torch.gt(row.weights @ part, threshold, out=into[instance, :, start:end])
    if len(wide) == len(masks):
        for some, part in zip(strip.split(GROUP), into.split(GROUP), strict=True):
            torch.gt(_resized(some, row, columns.blocks), threshold, out=part)
    elif wide:
        for instances in torch.tensor(wide).split(GROUP):
            into[instances] = _resized(strip[instances], row, columns.blocks) > threshold


def _reached(above: NDArray[np.bool_], reach: _Reach) -> Iterator[tuple[int, int, int]]:
    """Yield each instance that reaches into a strip, with the first of the columns into which it can reach, and the end of them.

    An output is a weighted mean of inputs, so it exceeds the threshold only if an input does.

    Args:
        above: whether an input exceeds the threshold in each column of each instance, (K, w).
    """
    firsts = above.argmax(1)
    lasts = above.shape[1] - 1 - above[:, ::-1].argmax(1)
    starts, ends = reach.outputs[firsts, 0].tolist(), reach.outputs[lasts, 1].tolist()
    for instance in np.flatnonzero(above.any(1)).tolist():
        yield instance, starts[instance], ends[instance]


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


class _Reach(NamedTuple):
    """The columns that depend on each other."""

    weights: Tensor
    """(w, W): the weight of each input column in each output column."""
    outputs: NDArray[np.int32]
    """(w, 2): for each input column, the first output column that depends on it, and the end of those that do."""
    inputs: NDArray[np.int32]
    """(W, 2): for each output column, the first input column that it depends on, and the end of those."""


class _Columns(NamedTuple):
    blocks: list[_Block]
    reach: _Reach | None
    """None on a GPU: the test of what an instance reaches would make the processor wait for the GPU."""


@functools.lru_cache(maxsize=8)  # the weights of a huge photo take megabytes, and to make them again takes little time
def _reach(masks: int, padded: int, resized: int, original: int) -> _Reach:
    """Return the dependencies of the columns on a CPU."""
    weights = torch.zeros(masks, original)
    for block in _blocks(masks, padded, resized, original, BLOCK, torch.device("cpu")):
        weights[block.first : block.last, block.start : block.end] = block.weights.T
    used = weights.numpy() != 0
    outputs, inputs = (
        np.stack([lines.argmax(1), lines.shape[1] - lines[:, ::-1].argmax(1)], axis=1).astype(np.int32)
        for lines in (used, used.T)
    )
    return _Reach(weights, outputs, inputs)


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
