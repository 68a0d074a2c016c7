"""Define small residual networks as timm models: backbones for experiments that take minutes on a CPU.

They differ as ResNet and ResNet-D do (He et al., "Bag of Tricks for Image Classification with Convolutional Neural Networks",
CVPR 2019, section 4). `small_resnet` has one 7x7 convolution as its stem and strided 1x1 shortcuts. `small_resnetd` has three 3x3
convolutions as its stem, and an average pooling before the 1x1 convolution of each shortcut. They consist of basic blocks, whose
last convolution, `conv2`, becomes deformable in a DCN stage. They have no ImageNet weights; the stage `pretrain` trains them.
"""

from __future__ import annotations

from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.resnet import BasicBlock, ResNet
from torch import nn

default_cfgs = generate_default_cfgs(
    {name: {"first_conv": conv, "classifier": "fc"} for name, conv in (("small_resnet", "conv1"), ("small_resnetd", "conv1.0"))}
)
"""timm looks for this name when it registers a module's models."""

_CHANNELS = (32, 48, 96, 128)
"""The channels of the stages at strides 4, 8, 16 and 32. Each stage has one block."""


class SmallResNet(ResNet):
    """A ResNet of four basic blocks.

    Args:
        deep: use three 3x3 convolutions as the stem, and average pooling in the shortcuts; otherwise one 7x7 convolution with
            stride 2 as the stem, and no average pooling.
    """

    def __init__(self, *, deep: bool, **settings: Any) -> None:
        stem: dict[str, Any] = {"stem_type": "deep", "stem_width": _CHANNELS[0] // 2, "avg_down": deep}
        block: Any = BasicBlock  # timm annotates this argument as an instance
        super().__init__(block, (1, 1, 1, 1), channels=_CHANNELS, **stem, **settings)
        if not deep:
            conv = nn.Conv2d(3, _CHANNELS[0], 7, stride=2, padding=3, bias=False)
            nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
            self.add_module("conv1", conv)


def _create(variant: str, pretrained: bool, settings: dict[str, Any]) -> Any:
    """Return the model with this name, or its feature levels, as timm's settings say."""
    return build_model_with_cfg(SmallResNet, variant, pretrained, **settings)


@register_model
def small_resnet(pretrained: bool = False, **kwargs: Any) -> Any:
    return _create("small_resnet", pretrained, {"deep": False, **kwargs})


@register_model
def small_resnetd(pretrained: bool = False, **kwargs: Any) -> Any:
    return _create("small_resnetd", pretrained, {"deep": True, **kwargs})
