"""Define the settings of the model: backbone, encoder, and decoder with its instance activation maps."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from sparseinst.config.types import Activation, Channels, Parts
from sparseinst.section import Neutral, Only, Section, Stage


class BackboneConfig(Section):
    name: str = "resnet50.tv_in1k"
    """The name of any timm model with features at strides 8, 16 and 32."""
    pretrained: Annotated[bool, Only("train")] = True
    """Start from timm's pretrained weights for `name`, which timm reads from its cache or downloads."""
    weights: Annotated[str | None, Only("train")] = None
    """A local file (.safetensors, .pth) whose tensors have timm's names, or the key of pretrained weights that come with the
    package. It replaces timm's pretrained weights."""
    frozen_norm: Annotated[bool, Only("train")] = True
    """Freeze the statistics and the affine parameters of every BatchNorm. Training then needs pretrained weights."""
    freeze_at: Annotated[int, Field(ge=0, le=5), Only("train")] = 0
    """Freeze the stem (1) and the ResNet stages up to this one (2 to 5, for res2 to res5); 0 trains everything."""
    deformable_stages: tuple[Literal[2, 3, 4, 5], ...] = ()
    """The ResNet stages whose 3x3 convolutions become deformable; the paper's DCN models use (4, 5)."""
    deformable_version: Literal[1, 2] = 1
    """1: deformable convolutions without modulation, as in the reference; 2: with modulation, which the paper cites."""
    drop_path: Annotated[float, Field(ge=0.0, lt=1.0), Neutral(0.0), Only("train")] = 0.0
    """The probability with which training skips the last residual block (stochastic depth). It rises linearly from 0 at the first
    block. The PVTv2 models use 0.1."""


class EncoderConfig(Section):
    channels: Channels = 256
    """The channels of all features of the encoder."""
    ppm: bool = True
    """Use pyramid pooling after C5 (Table 2)."""
    fusion: bool = True
    """Fuse P3, P4 and P5 (Table 2); otherwise the output is P3 alone."""


class IAMConfig(Section):
    """The settings of F_iam, which computes the instance activation maps from the features (Tables 4 and 7)."""

    kind: Literal["conv", "cross_attention"] = "conv"
    """Convolutions, or the cross-attention of learned queries (Table 7)."""
    num_maps: Annotated[int, Field(ge=1, le=100_000)] = 100
    """The number of instance activation maps: a model finds at most this many instances in an image."""
    kernel_size: Literal[1, 3] = 3
    """The kernel size of the convolutions."""
    convs: Literal[1, 2] = 1
    """The number of convolutions, one after the other."""
    groups: Parts = 1
    """The number of groups in Group-IAM: each instance has this many maps, and their features are concatenated."""
    activation: Activation = "sigmoid"
    """The function that makes the maps non-negative before each is divided by its sum."""
    heads: Parts = 4
    """The number of attention heads; only `cross_attention` uses it."""

    @model_validator(mode="after")
    def _cross_attention_has_no_convs(self) -> Self:
        if self.kind == "cross_attention" and (self.groups, self.convs, self.activation) != (1, 1, "sigmoid"):
            raise ValueError("kind cross_attention takes no groups, convs or activation: leave them at their defaults")
        return self


class DecoderConfig(Section):
    depth: Annotated[int, Field(ge=1, le=100)] = 4
    """The number of 3x3 convolutions in each of the two branches."""
    width: Channels = 256
    """The channels of the convolutions in both branches."""
    coordinates: bool = True
    """Append the x and y coordinates to the features of both branches."""
    deformable: bool = False
    """Make the last 3x3 convolution of each branch deformable (Table 3)."""
    deformable_version: Literal[1, 2] = 1
    """As `backbone.deformable_version`."""
    kernel_dim: Channels = 128
    """The channels of the mask features and of the mask kernels."""
    mask_scale: Annotated[float, Field(ge=0.125, le=32.0)] = 2.0
    """The factor by which the predicted masks are upsampled bilinearly from 1/8 of the padded input."""
    iam: IAMConfig = IAMConfig()

    @model_validator(mode="after")
    def _groups_divide(self) -> Self:
        if self.iam.kind == "conv" and self.width % self.iam.groups:
            raise ValueError(f"iam.groups={self.iam.groups} does not divide width={self.width}")
        if self.iam.kind == "cross_attention" and self.width % self.iam.heads:
            raise ValueError(f"iam.heads={self.iam.heads} does not divide width={self.width}")
        return self


class ModelConfig(Section):
    num_classes: Annotated[int, Field(ge=1, le=100_000)] = 80
    """The number of object categories."""
    backbone: BackboneConfig = BackboneConfig()
    encoder: EncoderConfig = EncoderConfig()
    decoder: DecoderConfig = DecoderConfig()
    width_factor: Annotated[float, Field(gt=0.0, le=64.0), Neutral(1.0)] = 1.0
    """Multiply the channels of encoder and decoder by this factor. In a small model, a width of 128 then means half of 256."""

    def scaled(self) -> ModelConfig:
        """Return the config with channels multiplied by `width_factor`, and a factor of 1.

        Raises:
            ValueError: the number of groups or heads does not divide the resulting width.
        """

        def scale(channels: int) -> int:
            return max(1, round(channels * self.width_factor))

        decoder = {"width": scale(self.decoder.width), "kernel_dim": scale(self.decoder.kernel_dim)}
        parts = {
            "encoder": self.encoder.model_copy(update={"channels": scale(self.encoder.channels)}),
            "decoder": DecoderConfig.model_validate({**dict(self.decoder), **decoder}),
        }
        return self.model_copy(update={**parts, "width_factor": 1.0})

    def content(self, stage: Stage | None = None) -> dict[str, Any]:
        """Return the content with the channels that are built: 256 with a factor of 0.5 equals 128."""
        return super(ModelConfig, self.scaled()).content(stage)

    @model_validator(mode="after")
    def _scales(self) -> Self:
        if self.width_factor != 1.0:
            self.scaled()
        return self
