"""Winograd's 3x3 convolution F(4x4, 3x3), which needs a quarter of the products (Lavin and Gray, CVPR 2016).

It is meant for compiled networks on CPUs, where direct convolutions already run at the machine's peak. Each tile of 6 x 6 inputs
gives 4 x 4 outputs with 36 products instead of 144. All tiles together are one batch of 36 matrix products.

The precision depends on the points at which the underlying polynomials are multiplied. Among symmetric points with small
denominators, 0, +-2/3, +-3/2 and infinity lose least (Barabasz et al., ACM TOMS 2020, describe the search). The error is 1e-6 of
the outputs' spread in float32 and 1.4 % in bfloat16, which is five times that of the direct convolution. The usual points 0, +-1
and +-2 lose ten times as much in float32.

Shapes: B images, C input channels, D output channels, H W height and width, h w numbers of tiles along them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import cache, partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparseinst.inference.ahead import CannotCompile, compiled

_STEP, _KERNEL = 4, 3
_TILE = _STEP + _KERNEL - 1
_POINTS = (Fraction(0), Fraction(2, 3), Fraction(-2, 3), Fraction(3, 2), Fraction(-3, 2))
"""The finite points. Infinity is the last point and is handled apart."""

_Matrix = tuple[tuple[float, ...], ...]
_Part = Callable[..., Tensor]


def _matrices() -> tuple[_Matrix, _Matrix, _Matrix]:
    """Return the Toom-Cook matrices for inputs (the paper's B, transposed), kernels (G) and outputs (A, transposed)."""
    others = [[point for point in _POINTS if point != own] for own in _POINTS]
    inputs = [[*_coefficients(roots), Fraction(0)] for roots in others] + [_coefficients(_POINTS)]
    kernels = [
        [point**power / math.prod(point - other for other in rest) for power in range(_KERNEL)]
        for point, rest in zip(_POINTS, others, strict=True)
    ]
    kernels.append([Fraction(power == _KERNEL - 1) for power in range(_KERNEL)])
    outputs = [[*(point**power for point in _POINTS), Fraction(power == _STEP - 1)] for power in range(_STEP)]
    to_floats = lambda rows: tuple(tuple(map(float, row)) for row in rows)  # noqa: E731
    return to_floats(inputs), to_floats(kernels), to_floats(outputs)


def _coefficients(roots: Sequence[Fraction]) -> list[Fraction]:
    """Return the coefficients of the product of all (x - root), the constant first."""
    result = [Fraction(1)]
    for root in roots:
        result = [low - root * high for low, high in zip([Fraction(0), *result], [*result, Fraction(0)], strict=True)]
    return result


_INPUTS, _KERNELS, _OUTPUTS = _matrices()


class WinogradConv2d(nn.Module):
    """A dense 3x3 convolution with stride 1 and padding 1, with or without a ReLU after it: (B, C, H, W) to (B, D, H, W).

    Sums are float32 in every precision. In a compiled network the convolution is one operator, whose two parts are compiled
    separately, once for all sizes and numbers of channels. Elsewhere it runs eagerly, which is correct but slow.
    """

    floor: Tensor
    """The smallest possible output: 0 with a ReLU, minus infinity without. Thus one compiled version serves both."""

    def __init__(self, conv: nn.Conv2d, *, relu: bool = False) -> None:
        super().__init__()
        kernels = torch.tensor(_KERNELS, dtype=torch.float64)
        weight = torch.einsum("ui,dcij,vj->uvcd", kernels, conv.weight.detach().double(), kernels)
        self.weight = nn.Parameter(weight.flatten(0, 1).to(conv.weight.dtype))  # 36 C D
        self.bias = nn.Parameter(torch.zeros(conv.out_channels) if conv.bias is None else conv.bias.detach().clone())
        self.register_buffer("floor", torch.tensor([0.0 if relu else -math.inf], dtype=conv.weight.dtype))

    @staticmethod
    def is_faster_for(conv: nn.Conv2d) -> bool:
        """Return whether Winograd can replace the convolution and is faster.

        With few channels the sums take longer than the saved products.
        """
        shape = (conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups)
        return shape == ((3, 3), (1, 1), (1, 1), (1, 1), 1) and min(conv.in_channels, conv.out_channels) >= 100

    def forward(self, x: Tensor) -> Tensor:
        convolve = _operator if torch.compiler.is_compiling() else partial(_convolve, _spread, _gather)
        return convolve(x.permute(0, 2, 3, 1), self.weight, self.bias, self.floor).permute(0, 3, 1, 2)


def _convolve(spread: _Part, gather: _Part, x: Tensor, weight: Tensor, bias: Tensor, floor: Tensor) -> Tensor:
    """Convolve x (B H W C) with weight (36 C D) and bias (D); return B H W D."""
    images, height, width, channels = x.shape
    down, across = -(-height // _STEP), -(-width // _STEP)  # h, w
    x = F.pad(x, (0, 0, 1, across * _STEP - width + 1, 1, down * _STEP - height + 1))  # B 4h+2 4w+2 C
    products = spread(x.contiguous()).view(_TILE**2, -1, channels) @ weight  # 36 Bhw D
    whole = gather(products.view(_TILE**2, images, down, across, -1), bias, floor)  # B h 4 w 4 D
    return whole.view(images, down * _STEP, across * _STEP, -1)[:, :height, :width]


def _spread(x: Tensor) -> Tensor:
    """Transform the overlapping input tiles: B 4h+2 4w+2 C to 36 B h w C."""
    down, across = ((side - 2) // _STEP for side in x.shape[1:3])
    rows, columns = (_STEP * (tiles - 1) + 1 for tiles in (down, across))
    tile = [[x[:, i : i + rows : _STEP, j : j + columns : _STEP].float() for j in range(_TILE)] for i in range(_TILE)]
    return torch.stack([one.to(x.dtype) for row in _both_ways(_INPUTS, tile) for one in row])


def _gather(products: Tensor, bias: Tensor, floor: Tensor) -> Tensor:
    """Transform the products into output tiles: 36 B h w D to B h 4 w 4 D."""
    tile = [[products[_TILE * i + j].float() for j in range(_TILE)] for i in range(_TILE)]
    whole = [[torch.maximum(one + bias.float(), floor.float()) for one in row] for row in _both_ways(_OUTPUTS, tile)]
    return torch.stack([torch.stack([one.to(products.dtype) for one in row], dim=3) for row in whole], dim=2)


def _both_ways(matrix: _Matrix, tile: Sequence[Sequence[Tensor]]) -> list[list[Tensor]]:
    """Apply a matrix to the columns of a tile and then to its rows."""
    columns = [[_mix(line, column) for column in zip(*tile, strict=True)] for line in matrix]
    return [[_mix(line, row) for line in matrix] for row in columns]


def _mix(factors: Sequence[float], parts: Sequence[Tensor]) -> Tensor:
    """Return the sum of factor times part, without the parts whose factor is 0."""
    terms = [part if factor == 1 else factor * part for factor, part in zip(factors, parts, strict=True) if factor]
    return sum(terms[1:], start=terms[0])


class _Spread(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return _spread(x)


class _Gather(nn.Module):
    def forward(self, products: Tensor, bias: Tensor, floor: Tensor) -> Tensor:
        return _gather(products, bias, floor)


_compiled: dict[torch.dtype, tuple[_Part, _Part]] = {}
"""The two parts that the operator runs. Those for another number of threads are correct, too."""


def compile_winograd(dtype: torch.dtype) -> None:
    """Compile or load the two parts for a type of numbers, before a network that needs them runs or is compiled.

    Raises:
        CannotCompile: they cannot be compiled. The operator then runs those of an earlier call or, if there are none, eagerly.
    """
    found = _compile_parts(dtype, torch.get_num_threads())
    if isinstance(found, CannotCompile):
        raise found
    _compiled[dtype] = found


@cache
def _compile_parts(dtype: torch.dtype, threads: int) -> tuple[_Part, _Part] | CannotCompile:  # noqa: ARG001 (the code has as many)
    """Return the two parts, compiled for all sizes and numbers of channels, or why they cannot be compiled."""
    random = torch.Generator().manual_seed(0)

    def inputs(images: int, down: int, across: int, channels: int) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        shapes = [
            (images, _STEP * down + 2, _STEP * across + 2, channels),
            (_TILE**2, images, down, across, channels),
            (channels,),
        ]
        x, products, bias = (torch.randn(shape, generator=random).to(dtype) for shape in shapes)
        return (x,), (products, bias, torch.zeros(1, dtype=dtype))

    [spread, gather], checks = inputs(2, 5, 6, 64), [inputs(1, 1, 3, 48), inputs(3, 8, 4, 20)]
    try:
        return (
            compiled(_Spread(), spread, [[0, 1, 2, 3]], [one for one, _ in checks], "Winograd's convolution, part 1"),
            compiled(_Gather(), gather, [[1, 2, 3, 4], [0], []], [two for _, two in checks], "Winograd's convolution, part 2"),
        )
    except CannotCompile as error:
        return error


@torch.library.custom_op("sparseinst::winograd", mutates_args=())
def _operator(x: Tensor, weight: Tensor, bias: Tensor, floor: Tensor) -> Tensor:
    return _convolve(*_compiled.get(x.dtype, (_spread, _gather)), x, weight, bias, floor).contiguous()


@_operator.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, floor: Tensor) -> Tensor:  # noqa: ARG001 # the operator's signature
    return x.new_empty((*x.shape[:3], weight.shape[2]))
