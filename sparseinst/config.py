"""Every setting, its default and its valid values; the presets `paper` and `release`; the named models.

This is the only place where a default stands. The path of an override is the attribute path: `model.decoder.iam.kernel_size`
in a spec, on the command line and in the code. Sources of the values: the paper (CVPR 2022) and its reference implementation.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from sparseinst.section import Neutral, Only, Operational, Section, Stage, content_hash

Precision = Literal["fp32", "tf32", "bf16", "fp16"]
"""tf32 is float32 with products rounded to 10 bits on GPUs that can; elsewhere it is fp32."""
Activation = Literal["sigmoid", "softmax"]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
NonNegative = Annotated[float, Field(ge=0.0)]
Positive = Annotated[float, Field(gt=0.0)]
PositiveInt = Annotated[int, Field(ge=1)]

SHAPES_VERSION = "2"
"""Of the embedded data set; goes up with every change of its content, so that a stale folder is refused and results are kept
apart."""

STRIDES = (8, 16, 32)
"""Of the backbone's features C3, C4 and C5."""
SIZE_DIVISOR = STRIDES[-1]
"""Images are padded at the right and bottom to a multiple of the deepest feature's stride."""
REFERENCE_BATCH = 64
"""Images an optimiser step in the paper: 8 processes of 8."""


class BackboneConfig(Section):
    name: str = "resnet50.tv_in1k"
    """Any timm model with features at strides 8, 16 and 32."""
    pretrained: Annotated[bool, Only("train")] = True
    """Start from the weights timm names for `name`, from its cache or, when online, its hub."""
    weights: Annotated[str | None, Only("train")] = None
    """A local file (.safetensors, .pth) with ImageNet weights in timm's names; used in place of timm's cache."""
    frozen_norm: Annotated[bool, Only("train")] = True
    """Freeze statistics and affine of every BatchNorm; needs pretrained weights to make sense in training."""
    freeze_at: Annotated[int, Field(ge=0, le=5), Only("train")] = 0
    """Freeze the stem (1) and the stages up to this one (2-5, ResNet counting); 0 trains everything."""
    deformable_stages: tuple[Literal[2, 3, 4, 5], ...] = ()
    """ResNet stages whose 3x3 convolutions become deformable; the paper's DCN models use (4, 5)."""
    deformable_version: Literal[1, 2] = 1


class EncoderConfig(Section):
    channels: PositiveInt = 256
    ppm: bool = True
    """Pyramid pooling after C5 (Table 2)."""
    fusion: bool = True
    """Fuse P3, P4 and P5 (Table 2); without it the output is P3 alone."""


class IAMConfig(Section):
    """F_iam, the function from features to instance activation maps (Tables 4 and 7)."""

    kind: Literal["conv", "cross_attention"] = "conv"
    num_maps: PositiveInt = 100
    kernel_size: Literal[1, 3] = 3
    convs: Literal[1, 2] = 1
    groups: PositiveInt = 1
    activation: Activation = "sigmoid"
    heads: PositiveInt = 4
    """Attention heads; used by `cross_attention` alone."""

    @model_validator(mode="after")
    def _cross_attention_has_no_convs(self) -> Self:
        if self.kind == "cross_attention" and (self.groups, self.convs, self.activation) != (1, 1, "sigmoid"):
            raise ValueError("kind cross_attention takes no groups, convs or activation: leave them at their defaults")
        return self


class DecoderConfig(Section):
    depth: PositiveInt = 4
    """3x3 convolutions in each of the two branches."""
    width: PositiveInt = 256
    """Channels of the convolutions in both branches."""
    coordinates: bool = True
    deformable: bool = False
    """Make the last 3x3 of each branch deformable (Table 3)."""
    deformable_version: Literal[1, 2] = 1
    kernel_dim: PositiveInt = 128
    """Channels of the mask features and of the mask kernels."""
    mask_scale: Positive = 2.0
    """Bilinear upsampling of the predicted masks from 1/8 of the padded input."""
    iam: IAMConfig = IAMConfig()

    @model_validator(mode="after")
    def _groups_divide(self) -> Self:
        if self.iam.kind == "conv":
            if self.width % self.iam.groups:
                raise ValueError(f"iam.groups={self.iam.groups} does not divide width={self.width}")
        elif self.width % self.iam.heads:
            raise ValueError(f"iam.heads={self.iam.heads} does not divide width={self.width}")
        return self


class ModelConfig(Section):
    num_classes: PositiveInt = 80
    backbone: BackboneConfig = BackboneConfig()
    encoder: EncoderConfig = EncoderConfig()
    decoder: DecoderConfig = DecoderConfig()
    width_factor: Annotated[Positive, Neutral(1.0)] = 1.0
    """Scales the channels of encoder and decoder, so that "width 128 of 256" keeps its meaning in a small model."""

    def scaled(self) -> ModelConfig:
        """The same with `width_factor` worked into the channels. Raises `ValueError` where heads or groups then do not divide."""

        def scale(channels: int) -> int:
            return max(1, round(channels * self.width_factor))

        decoder = {"width": scale(self.decoder.width), "kernel_dim": scale(self.decoder.kernel_dim)}
        return ModelConfig(
            num_classes=self.num_classes,
            backbone=self.backbone,
            encoder=self.encoder.model_copy(update={"channels": scale(self.encoder.channels)}),
            decoder=DecoderConfig.model_validate({**dict(self.decoder), **decoder}),
        )

    def content(self, stage: Stage | None = None) -> dict[str, Any]:
        """Of the channels as they are built: half of 256 is the model with 128."""
        return super(ModelConfig, self.scaled()).content(stage)

    @model_validator(mode="after")
    def _scales(self) -> Self:
        if self.width_factor != 1.0:
            self.scaled()
        return self


class LossConfig(Section):
    """Paper Eqs. 3 and 4; Tables 5 and 6."""

    dice: bool = True
    pixel: Literal["bce", "focal", "none"] = "bce"
    objectness: Literal["bce", "l1", "none"] = "bce"
    class_weight: NonNegative = 2.0
    dice_weight: NonNegative = 2.0
    pixel_weight: NonNegative = 2.0
    objectness_weight: NonNegative = 1.0
    reduction: Literal["per_process", "global"] = "per_process"
    """Pixel and objectness means over one process's matched pairs (the reference) or over all processes' pairs."""
    focal_alpha: Fraction = 0.25
    focal_gamma: NonNegative = 2.0
    overfull: Literal["own", "reference"] = "own"
    """Which masks the pairs take when an image of the batch holds more instances than there are maps: their own, or, as the
    reference's index arithmetic has it, those of an image before. Never matters on COCO with 100 maps."""

    @model_validator(mode="after")
    def _some_mask_loss(self) -> Self:
        if not self.dice and self.pixel == "none":
            raise ValueError("dice is off and pixel is none: without a mask loss no mask is learned")
        return self


class MatcherConfig(Section):
    """Paper Eq. 1: score = dice^alpha x p(class)^beta."""

    alpha: NonNegative = 0.8
    beta: NonNegative = 0.2


class DataConfig(Section):
    source: Literal["coco", "shapes"] = "coco"
    """`coco`: a folder in COCO format at `root`; `shapes`: the embedded set, written to `root` when it is not there yet."""
    root: str = "datasets/coco"
    train_images: Annotated[str, Only("train")] = "train2017"
    train_annotations: Annotated[str, Only("train")] = "annotations/instances_train2017.json"
    val_images: Annotated[str, Only("evaluate")] = "val2017"
    val_annotations: Annotated[str, Only("evaluate")] = "annotations/instances_val2017.json"
    train_limit: Annotated[PositiveInt | None, Only("train")] = None
    """Use the first images of the training split only."""
    val_limit: Annotated[PositiveInt | None, Only("evaluate")] = None
    short_sides: Annotated[tuple[PositiveInt, ...], Field(min_length=1), Only("train")] = tuple(range(416, 641, 32))
    """Training draws the shorter side, in pixels, from these."""
    long_side: Annotated[PositiveInt, Only("train")] = 853
    """Most pixels of the longer side in training; the paper's text says 864."""
    flip: Annotated[Fraction, Only("train")] = 0.5
    crop: Annotated[Fraction, Only("train")] = 0.0
    """Chance of the crop augmentation of Table 1."""
    crop_short_sides: Annotated[tuple[PositiveInt, ...], Field(min_length=1), Only("train")] = (400, 500, 600)
    crop_sizes: Annotated[tuple[PositiveInt, PositiveInt], Only("train")] = (384, 600)
    on_bad_image: Literal["error", "skip"] = "error"
    """A missing, truncated or unreadable image: stop with its name, or leave it out and count it."""
    workers: Annotated[int, Field(ge=0), Operational()] = 2

    def content(self, stage: Stage | None = None) -> dict[str, Any]:
        """Of the embedded set its version counts, not where it lies."""
        data = super().content(stage)
        return {**data, "root": f"shapes {SHAPES_VERSION}"} if self.source == "shapes" else data

    @model_validator(mode="after")
    def _crop_range(self) -> Self:
        if self.crop_sizes[0] > self.crop_sizes[1]:
            raise ValueError(f"crop_sizes={list(self.crop_sizes)}: the smaller comes first")
        return self


class InferenceConfig(Section):
    short_side: PositiveInt = 640
    long_side: PositiveInt = 853
    size_factor: Annotated[Positive, Neutral(1.0)] = 1.0
    """Scales both sides, so that "512 against 640" keeps its meaning in a small experiment."""
    score_threshold: Fraction = 0.005
    mask_threshold: Fraction = 0.45
    rescore: bool = True
    """Multiply the class probability by the objectness (Table 6)."""
    maskness: bool = True
    """Multiply the score by the mean probability of the mask's pixels; in the reference, not in the paper."""
    precision: Precision = "fp32"

    def sides(self) -> tuple[int, int]:
        """Shorter side, and most pixels of the longer one, of the resized image."""
        return max(1, round(self.short_side * self.size_factor)), max(1, round(self.long_side * self.size_factor))

    def content(self, stage: Stage | None = None) -> dict[str, Any]:
        """Of the sides as they are used."""
        short, long = self.sides()
        resolved = self.model_copy(update={"short_side": short, "long_side": long, "size_factor": 1.0})
        return super(InferenceConfig, resolved).content(stage)


class TrainConfig(Section):
    iterations: PositiveInt = 270_000
    """Optimiser steps."""
    batch_size: PositiveInt = REFERENCE_BATCH
    """Images an optimiser step, over all processes and accumulated parts."""
    accumulate: PositiveInt = 1
    """Forward and backward passes an optimiser step; each counts as one process in the loss means."""
    learning_rate: Positive = 5e-5
    backbone_multiplier: NonNegative = 1.0
    weight_decay: NonNegative = 1e-4
    weight_decay_on: Literal["reference", "weights"] = "reference"
    """`reference`: all parameters but those of norms and patch embeddings; `weights`: matrices and kernels alone."""
    schedule: Literal["step", "cosine"] = "step"
    """After the warm-up: times `decay` at each milestone, or half a cosine down to zero."""
    milestones: tuple[Fraction, ...] = (7 / 9, 25 / 27)
    """Fractions of `iterations`: 210,000 and 250,000 of 270,000."""
    decay: Positive = 0.1
    warmup_iterations: Annotated[int, Field(ge=0)] = 1000
    warmup_factor: Fraction = 1e-3
    clip_norm: Positive | None = None
    """Clip the gradient norm of the whole model."""
    ema_decay: Annotated[float, Field(gt=0.0, lt=1.0)] | None = None
    """Keep an exponential moving average of the weights and export that."""
    precision: Precision = "fp32"
    start: Annotated[str | None, Neutral(None)] = None
    """A weights file of ours to start from, in place of ImageNet's; layers of another shape (the class head of other
    data) start afresh."""
    compile: Annotated[bool, Neutral(False)] = False
    """Train through torch.compile: other roundings, minutes to begin with."""
    checkpoint_activations: Annotated[bool, Operational()] = False
    """Keep the activations at the modules' borders alone, and compute the rest again in the backward pass: bigger batches, the
    same numbers, about a third more time. Frozen norms only: others would count each image twice."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    log_every: Annotated[PositiveInt, Operational()] = 20
    checkpoint_every: Annotated[PositiveInt, Operational()] = 5000
    keep_checkpoints: Annotated[PositiveInt, Operational()] = 2
    evaluate_every: Annotated[PositiveInt | None, Operational()] = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.batch_size % self.accumulate:
            raise ValueError(f"accumulate={self.accumulate} does not divide batch_size={self.batch_size}")
        if self.warmup_iterations >= self.iterations:
            raise ValueError(f"warmup_iterations={self.warmup_iterations} must be below iterations={self.iterations}")
        if list(self.milestones) != sorted(self.milestones):
            raise ValueError(f"milestones={list(self.milestones)} must ascend")
        return self

    def batch_advice(self) -> str | None:
        """What to change where the batch differs from the paper's 64 and the learning rate does not; None where all is well."""
        reference = TrainConfig.model_fields["learning_rate"].default
        if self.batch_size == REFERENCE_BATCH or self.learning_rate != reference:
            return None
        scaled = reference * self.batch_size / REFERENCE_BATCH
        return (
            f"train.batch_size={self.batch_size} with the learning rate of batch {REFERENCE_BATCH} loses AP: "
            f"set train.learning_rate={scaled:g}, or train.batch_size={REFERENCE_BATCH} with train.accumulate"
        )


class Config(Section):
    """The whole of an experiment. The defaults are the preset `paper`."""

    model: ModelConfig = ModelConfig()
    loss: LossConfig = LossConfig()
    matcher: MatcherConfig = MatcherConfig()
    data: DataConfig = DataConfig()
    inference: InferenceConfig = InferenceConfig()
    train: TrainConfig = TrainConfig()

    @model_validator(mode="after")
    def _rescoring_needs_objectness(self) -> Self:
        if self.loss.objectness == "none" and self.inference.rescore:
            raise ValueError("loss.objectness is none, so set inference.rescore=false: an untrained objectness cannot rescore")
        return self

    @model_validator(mode="after")
    def _recomputing_needs_frozen_norms(self) -> Self:
        if self.train.checkpoint_activations and not self.model.backbone.frozen_norm:
            raise ValueError("train.checkpoint_activations needs model.backbone.frozen_norm=true: other norms count images twice")
        return self

    def replace(self, overrides: Mapping[str, Any]) -> Config:
        """A copy with dotted paths set, e.g. `{"model.decoder.depth": 2}`.

        Raises:
            UserError: a path that does not exist (with the nearest one that does), or a value it does not take.
        """
        from sparseinst.overrides import merge, nest, parse_config

        return parse_config(merge(self.model_dump(mode="json"), nest(overrides)))

    def to_json(self) -> str:
        return self.model_dump_json(indent=2)

    def to_yaml(self) -> str:
        import io

        from ruamel.yaml import YAML

        stream = io.StringIO()
        YAML(typ="safe").dump(self.model_dump(mode="json"), stream)
        return stream.getvalue()

    def train_content(self) -> dict[str, Any]:
        """All that can change the trained weights."""
        parts = {"model": self.model, "loss": self.loss, "matcher": self.matcher, "data": self.data, "train": self.train}
        return {"stage": "train", **{name: part.content("train") for name, part in parts.items()}}

    def train_key(self) -> str:
        """Names the training, and its folder: equal keys are one run."""
        return content_hash(self.train_content())

    def evaluate_key(self) -> str:
        """Names the evaluation of these weights with these inference settings on these data."""
        parts = {"inference": self.inference.content("evaluate"), "data": self.data.content("evaluate")}
        return content_hash({"stage": "evaluate", "train": self.train_key(), **parts})

    def latency_key(self, device: str, mode: str = "eager") -> str:
        """Names the timing on a device of that name; what is timed comes first, see `latency_prefix`."""
        return f"{self.latency_prefix()}-{content_hash({'device': device, 'mode': mode})[:8]}"

    def latency_prefix(self) -> str:
        """Names what is timed: this model, with any weights, at this size, precision and thresholds."""
        parts = {"model": self.model.content("latency"), "inference": self.inference.content("latency")}
        return content_hash({"stage": "latency", **parts})


PRESETS: dict[str, dict[str, Any]] = {
    "paper": {},
    "release": {"train.weight_decay": 0.05, "loss.pixel_weight": 5.0},
}
"""`paper`: Tables 2-8; `release`: Table 1 and the released checkpoints."""

_GIAM = {"model.decoder.iam.groups": 4}
_DCN = {"model.backbone.deformable_stages": [4, 5]}
MODELS: dict[str, dict[str, Any]] = {
    "r50-iam": {},
    "r50-giam": _GIAM,
    "r50-giam-softmax": {**_GIAM, "model.decoder.iam.activation": "softmax"},
    "r50-dcn-giam": {**_GIAM, **_DCN},
    "r50d-giam": {**_GIAM, "model.backbone.name": "resnet50d.ra2_in1k"},
    "r50d-dcn-giam": {**_GIAM, **_DCN, "model.backbone.name": "resnet50d.ra2_in1k"},
    "r101-giam": {**_GIAM, "model.backbone.name": "resnet101.tv_in1k"},
    "r101-dcn-giam": {**_GIAM, **_DCN, "model.backbone.name": "resnet101.tv_in1k"},
    "cspdarknet53-giam": {**_GIAM, "model.backbone.name": "cspdarknet53.ra_in1k"},
    "darknet53-giam": {**_GIAM, "model.backbone.name": "darknet53.c2ns_in1k"},
    "pvtv2-b1-giam": {**_GIAM, "model.backbone.name": "pvt_v2_b1.in1k"},
    "pvtv2-b2-li-giam": {**_GIAM, "model.backbone.name": "pvt_v2_b2_li.in1k"},
}
"""The released models by name, as overrides."""
