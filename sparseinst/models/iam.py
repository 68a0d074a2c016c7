"""Define F_iam, which computes instance activation maps and gathers instance features (paper sections 3.1, 3.4 and 4.4).

Shapes: B images, N instance maps, G groups, D channels, H W height and width at 1/8.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sparseinst.config import Activation, IAMConfig
from sparseinst.models.layers import FOCAL_PRIOR_BIAS, kaiming_normal, kaiming_uniform, normal


class Activated(NamedTuple):
    """The output of F_iam."""

    features: Tensor
    """(B, N, out_channels): the instance features."""
    responses: Tensor
    """(B, G N, H, W): the maps before normalisation. They are not negative. Map g N + i belongs to group g of instance i."""


def _exponential(logits: Tensor) -> Tensor:
    """Return exp(logits) up to a factor for each map. The normalisation removes this factor, and the reference's learned bias."""
    return (logits - logits.amax(dim=(-2, -1), keepdim=True)).exp()


ACTIVATIONS: dict[Activation, Callable[[Tensor], Tensor]] = {"sigmoid": torch.sigmoid, "softmax": _exponential}
"""The function f of the paper's section 4.2: a map is f(x_i) / sum_k f(x_k) over positions k. It keeps the shape (B, M, H, W)."""


def normalise(responses: Tensor) -> Tensor:
    """Return maps (B, M, HW) whose sum over the positions is 1, from responses (B, M, H, W).

    This must come before the product with the features. In half precision a sum of products can overflow; a mean does not.
    """
    flat = responses.flatten(2)
    return flat / flat.sum(dim=-1, keepdim=True).clamp(min=1e-6)


class ConvIAM(nn.Module):
    """Compute the maps by one or two convolutions, 3x3 or 1x1, with one map or a group of maps per instance (Table 4).

    In Group-IAM, the features of an instance's groups are concatenated and mixed by a fully connected layer.
    """

    def __init__(self, config: IAMConfig, channels: int) -> None:
        super().__init__()
        self.groups = config.groups
        self.activation = ACTIVATIONS[config.activation]
        self.out_channels = channels * config.groups
        kernel, padding = config.kernel_size, config.kernel_size // 2
        hidden = [nn.Conv2d(channels, channels, kernel, padding=padding) for _ in range(config.convs - 1)]
        self.hidden = nn.Sequential(*(layer for conv in hidden for layer in (conv, nn.ReLU())))
        self.conv = nn.Conv2d(channels, config.num_maps * config.groups, kernel, padding=padding, groups=config.groups)
        self.mix = nn.Linear(self.out_channels, self.out_channels) if config.groups > 1 else None
        kaiming_normal(self.hidden)
        normal(self.conv, FOCAL_PRIOR_BIAS)
        if self.mix is not None:
            kaiming_uniform(self.mix)

    def forward(self, x: Tensor) -> Activated:  # B D H W
        responses = self.activation(self.conv(self.hidden(x)).float())  # B GN H W
        maps = normalise(responses).to(x.dtype)  # B GN HW
        gathered = maps @ x.flatten(2).transpose(1, 2)  # B GN D
        if self.mix is None:
            return Activated(gathered, responses)
        grouped = gathered.unflatten(1, (self.groups, -1)).transpose(1, 2).flatten(2)  # B N GD
        return Activated(self.mix(grouped).relu(), responses)


class CrossAttentionIAM(nn.Module):
    """Let N learned queries attend to the features in one multi-head attention, whose weights are the maps (Table 7)."""

    def __init__(self, config: IAMConfig, channels: int) -> None:
        super().__init__()
        self.out_channels = channels
        self.queries = nn.Parameter(torch.empty(config.num_maps, channels))
        self.attention = nn.MultiheadAttention(channels, config.heads, batch_first=True)
        nn.init.normal_(self.queries)

    def forward(self, x: Tensor) -> Activated:  # B D H W
        positions = x.flatten(2).transpose(1, 2)  # B HW D
        queries = self.queries.to(x.dtype).expand(len(x), -1, -1)  # B N D
        features, weights = self.attention(queries, positions, positions)  # B N D, B N HW
        return Activated(features, weights.unflatten(2, x.shape[-2:]))


KINDS: dict[str, Callable[[IAMConfig, int], ConvIAM | CrossAttentionIAM]] = {
    "conv": ConvIAM,
    "cross_attention": CrossAttentionIAM,
}
