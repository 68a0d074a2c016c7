"""3x3 convolutions with a quarter of the products: Winograd's F(4x4, 3x3) (Lavin and Gray, CVPR 2016).

For torch.compile on processors in float32, where the decoder's convolutions otherwise run at the machine's peak: each tile of
6 x 6 inputs gives 4 x 4 outputs by 36 products instead of 144. The sums that this takes cost about a digit: 1e-5 of the largest
output.

B images, C D channels in and out, H W height and width, h w tiles.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

_STEP, _TILE = 4, 6
_INPUT = (
    (4, 0, -5, 0, 1, 0),
    (0, -4, -4, 1, 1, 0),
    (0, 4, -4, -1, 1, 0),
    (0, -2, -1, 2, 1, 0),
    (0, 2, -1, -2, 1, 0),
    (0, 4, 0, -5, 0, 1),
)
_KERNEL = (
    (1 / 4, 0, 0),
    (-1 / 6, -1 / 6, -1 / 6),
    (-1 / 6, 1 / 6, -1 / 6),
    (1 / 24, 1 / 12, 1 / 6),
    (1 / 24, -1 / 12, 1 / 6),
    (0, 0, 1),
)
_OUTPUT = ((1, 1, 1, 1, 1, 0), (0, 1, -1, 2, -2, 0), (0, 1, 1, 4, 4, 0), (0, 1, -1, 8, -8, 1))


class WinogradConv2d(nn.Module):
    """A 3x3 convolution of stride 1 and padding 1, dense, with a bias: (B, C, H, W) to (B, D, H, W)."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        kernel = torch.tensor(_KERNEL, dtype=torch.float64)
        weights = torch.einsum("ui,dcij,vj->uvdc", kernel, conv.weight.detach().double(), kernel)
        self.weights = nn.ParameterList(nn.Parameter(one[:, :, None, None].float()) for one in weights.flatten(0, 1))
        self.bias = conv.bias

    @staticmethod
    def pays_for(conv: nn.Conv2d) -> bool:
        """Whether it can stand for the convolution, and sooner: with few channels, summing takes longer than multiplying."""
        shape = (conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups)
        return shape == ((3, 3), (1, 1), (1, 1), (1, 1), 1) and conv.in_channels >= 256

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[-2:]
        down, across = -(-height // _STEP), -(-width // _STEP)  # h, w
        bottom, right = down * _STEP - height + 1, across * _STEP - width + 1
        x = F.pad(x, (1, right, 1, bottom))  # B C 4h+2 4w+2
        rows = [_mix(row, [x[:, :, k : k + _STEP * down : _STEP] for k in range(_TILE)]) for row in _INPUT]
        products = []
        for u, row in enumerate(rows):  # B C h 4w+2
            parts = [row[..., k : k + _STEP * across : _STEP] for k in range(_TILE)]
            products.append([F.conv2d(_mix(line, parts), self.weights[u * _TILE + v]) for v, line in enumerate(_INPUT)])
        columns = [[_mix(line, [row[v] for row in products]) for v in range(_TILE)] for line in _OUTPUT]
        out = [torch.stack([_mix(line, column) for line in _OUTPUT], dim=-1) for column in columns]  # 4 of B D h w 4
        whole = torch.stack(out, dim=3).flatten(4, 5).flatten(2, 3)  # B D 4h 4w
        whole = whole[:, :, :height, :width]
        return whole if self.bias is None else whole + self.bias[:, None, None]


def _mix(factors: Sequence[float], parts: Sequence[Tensor]) -> Tensor:
    """The sum of parts times factors; those of zero are left out."""
    terms = [part if factor == 1 else factor * part for factor, part in zip(factors, parts, strict=True) if factor]
    return sum(terms[1:], start=terms[0])
