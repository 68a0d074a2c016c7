"""Define every setting with its default and its valid values, the presets `paper` and `release`, and the named models.

No other module defines a default. The path of an override is the attribute path: `model.decoder.iam.kernel_size` in a spec, on
the command line and in the code. The values come from the paper (CVPR 2022) and its reference implementation.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from sparseinst.nested import merge, nest, parse
from sparseinst.section import Neutral, Only, Operational, Section, Stage, content_hash

Precision = Literal["fp32", "tf32", "bf16", "fp16"]
"""`tf32` is float32 whose factors a GPU may round to 10 bits before it multiplies. On other devices it equals `fp32`."""
OptimizeMode = Literal["folded", "compiled", "graph", "best"]
"""How `inference.optimize` speeds up a trained network. Each mode folds layers and uses channels-last tensors.

`folded` does nothing else. `compiled` also uses torch.compile with frozen weights. `graph` records a CUDA graph for each image
size instead. `best` is the fastest mode and takes minutes to compile. On a GPU it tunes kernels and uses CUDA graphs, for images
of one size. On a CPU it uses Winograd convolutions, except in fp16.
"""
Activation = Literal["sigmoid", "softmax"]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
NonNegative = Annotated[float, Field(ge=0.0)]
Positive = Annotated[float, Field(gt=0.0)]
PositiveInt = Annotated[int, Field(ge=1, le=2**31 - 1)]
Channels = Annotated[int, Field(ge=1, le=16_384)]
Side = Annotated[int, Field(ge=1, le=16_384)]
"""A length of an image in pixels."""
Parts = Annotated[int, Field(ge=1, le=1024)]

SHAPES_VERSION = "3"
"""The version of the embedded data set. It goes up with every change of the content, so that an outdated folder is refused and
results on different versions are not mixed."""

STRIDES = (8, 16, 32)
"""The strides of the backbone's features C3, C4 and C5."""
SIZE_DIVISOR = STRIDES[-1]
"""Images are padded at the right and bottom to a multiple of the deepest feature's stride."""
REFERENCE_BATCH = 64
"""The images per optimiser step in the paper: 8 processes with 8 images each."""


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
    """1: deformable convolutions without modulation, as in the paper; 2: with modulation."""
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
    """The number of instance activation maps: a model finds at most so many instances of an image."""
    kernel_size: Literal[1, 3] = 3
    """The kernel size of the convolutions."""
    convs: Literal[1, 2] = 1
    """The number of convolutions, one after the other."""
    groups: Parts = 1
    """The groups of Group-IAM: each instance has so many maps, whose features are joined."""
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
        if self.iam.kind == "conv":
            if self.width % self.iam.groups:
                raise ValueError(f"iam.groups={self.iam.groups} does not divide width={self.width}")
        elif self.width % self.iam.heads:
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
        return ModelConfig(
            num_classes=self.num_classes,
            backbone=self.backbone,
            encoder=self.encoder.model_copy(update={"channels": scale(self.encoder.channels)}),
            decoder=DecoderConfig.model_validate({**dict(self.decoder), **decoder}),
        )

    def content(self, stage: Stage | None = None) -> dict[str, Any]:
        """Return the content with the channels that are built: 256 with a factor of 0.5 equals 128."""
        return super(ModelConfig, self.scaled()).content(stage)

    @model_validator(mode="after")
    def _scales(self) -> Self:
        if self.width_factor != 1.0:
            self.scaled()
        return self


class LossConfig(Section):
    """The settings of the training loss (paper Eqs. 3 and 4; Tables 5 and 6)."""

    dice: bool = True
    """Use the Dice loss of the masks."""
    pixel: Literal["bce", "focal", "none"] = "bce"
    """The pixel-wise loss of the masks."""
    objectness: Literal["bce", "l1", "none"] = "bce"
    """The loss of the objectness, whose target is the IoU of the predicted mask."""
    class_weight: NonNegative = 2.0
    """The weight of the focal loss of the classes."""
    dice_weight: NonNegative = 2.0
    """The weight of the Dice loss."""
    pixel_weight: NonNegative = 2.0
    """The weight of the pixel-wise loss."""
    objectness_weight: NonNegative = 1.0
    """The weight of the objectness loss."""
    reduction: Literal["per_process", "global"] = "per_process"
    """Average the pixel and objectness losses over the matched pairs of one process, as the reference does, or of all."""
    focal_alpha: Fraction = 0.25
    """The weight of positives in the focal losses."""
    focal_gamma: NonNegative = 2.0
    """The exponent of the focal losses."""
    overfull: Literal["own", "reference"] = "own"
    """The target masks of later images if an image of the batch has more instances than maps: their own masks (`own`), or masks
    of an earlier image, as in the reference (`reference`). With 100 maps, both are the same on COCO."""

    @model_validator(mode="after")
    def _some_mask_loss(self) -> Self:
        if not self.dice and self.pixel == "none":
            raise ValueError("dice is off and pixel is none: without a mask loss the model learns no masks")
        return self


class MatcherConfig(Section):
    """The exponents of the matching score (paper Eq. 1): score = dice^alpha x p(class)^beta."""

    alpha: NonNegative = 0.8
    """The exponent of the Dice similarity."""
    beta: NonNegative = 0.2
    """The exponent of the class probability."""


class ShapesConfig(Section):
    """The size of the embedded data set."""

    train: Annotated[int, Field(ge=1, le=10_000_000)] = 16_000
    """The number of training images. A larger number adds images and keeps the first ones."""
    val: Annotated[int, Field(ge=1, le=10_000_000)] = 2000
    """The number of validation images."""
    side: Annotated[int, Field(ge=32, le=4096)] = 256
    """The side of each image in pixels; the images are square."""


class DataConfig(Section):
    source: Literal["coco", "shapes"] = "coco"
    """`coco` is a folder in COCO format at `root`. `shapes` is the embedded data set, written to `root` if it is missing."""
    root: str = "datasets/coco"
    """The folder that the other paths of the data are relative to."""
    shapes: ShapesConfig = ShapesConfig()
    """Used only if the source is `shapes`."""
    train_images: Annotated[str, Only("pretrain", "train")] = "train2017"
    """The folder of the training images."""
    train_annotations: Annotated[str, Only("pretrain", "train")] = "annotations/instances_train2017.json"
    """The annotation file of the training images, in COCO's format."""
    val_images: Annotated[str, Only("evaluate")] = "val2017"
    """The folder of the validation images."""
    val_annotations: Annotated[str, Only("evaluate")] = "annotations/instances_val2017.json"
    """The annotation file of the validation images, in COCO's format."""
    train_limit: Annotated[PositiveInt | None, Only("pretrain", "train")] = None
    """Use only this many images, the first of the training split."""
    val_limit: Annotated[PositiveInt | None, Only("evaluate")] = None
    """Use only this many images, the first of the validation split."""
    short_sides: Annotated[tuple[Side, ...], Field(min_length=1), Only("pretrain", "train")] = tuple(range(416, 641, 32))
    """The lengths in pixels from which training draws the shorter side of an image."""
    long_side: Annotated[Side, Only("pretrain", "train")] = 853
    """The maximum of the longer side in pixels in training; the paper's text says 864."""
    flip: Annotated[Fraction, Only("pretrain", "train")] = 0.5
    """The probability of a horizontal flip."""
    crop: Annotated[Fraction, Only("pretrain", "train")] = 0.0
    """The probability of the crop augmentation of Table 1."""
    crop_short_sides: Annotated[tuple[Side, ...], Field(min_length=1), Only("pretrain", "train")] = (400, 500, 600)
    """The lengths in pixels from which the shorter side is drawn before a crop."""
    crop_sizes: Annotated[tuple[Side, Side], Only("pretrain", "train")] = (384, 600)
    """The smallest and the largest side of a crop in pixels."""
    crop_limit: Annotated[Literal["none", "long_side"], Only("pretrain", "train"), Neutral("long_side")] = "none"
    """The maximum of the longer side when an image is resized before a crop: `none`, as in the reference, or `long_side`."""
    scale_jitter_min: Annotated[Positive, Only("pretrain", "train"), Neutral(1.0)] = 1.0
    """The smallest factor of the scale jitter, for example 0.5. After its size is drawn, a training image is scaled by a random
    factor between `scale_jitter_min` and `scale_jitter_max`; a larger image is cut to the drawn size, at a random place."""
    scale_jitter_max: Annotated[Positive, Only("pretrain", "train"), Neutral(1.0)] = 1.0
    """The largest factor of the scale jitter, for example 2. If both factors are 1, there is no scale jitter."""
    brightness_jitter: Annotated[NonNegative, Only("pretrain", "train"), Neutral(0.0)] = 0.0
    """Multiply the brightness of each training image by a random factor between 1 - this and 1 + this (torchvision's
    `v2.ColorJitter`); 0 changes nothing."""
    contrast_jitter: Annotated[NonNegative, Only("pretrain", "train"), Neutral(0.0)] = 0.0
    """Multiply the contrast of each training image by such a random factor."""
    saturation_jitter: Annotated[NonNegative, Only("pretrain", "train"), Neutral(0.0)] = 0.0
    """Multiply the saturation of each training image by such a random factor."""
    hue_jitter: Annotated[float, Field(ge=0.0, le=0.5), Only("pretrain", "train"), Neutral(0.0)] = 0.0
    """Turn the hue of each training image by a random part of the colour circle between -this and +this, at most 0.5."""
    copy_paste: Annotated[Fraction, Only("pretrain", "train"), Neutral(0.0)] = 0.0
    """The probability that instances of another training image are pasted into an image (Simple Copy-Paste, CVPR 2021). Each
    instance of the other image is pasted with a chance of one half, and at least one is. They cover the pixels below them."""
    on_bad_image: Literal["error", "skip"] = "error"
    """The reaction to a missing or unreadable image: `error` stops with its name; `skip` leaves it out and counts it."""
    workers: Annotated[int, Field(ge=0, le=256), Operational()] = 2
    """The processes that load images; with 0, the training process loads them."""

    def content(self, stage: Stage | None = None) -> dict[str, Any]:
        """Return the content; for the embedded data set it has the version instead of the folder."""
        data = super().content(stage)
        if self.crop == 0.0:  # without crops, their limit has no effect, and earlier keys stay
            data.pop("crop_limit", None)
        if self.source == "shapes":
            return {**data, "root": f"shapes {SHAPES_VERSION}"}
        return {name: value for name, value in data.items() if name != "shapes"}

    @model_validator(mode="after")
    def _crop_range(self) -> Self:
        if self.crop_sizes[0] > self.crop_sizes[1]:
            raise ValueError(f"crop_sizes={list(self.crop_sizes)}: the smaller value must come first")
        return self

    @model_validator(mode="after")
    def _scale_range(self) -> Self:
        if self.scale_jitter_min > self.scale_jitter_max:
            raise ValueError(f"scale_jitter_min={self.scale_jitter_min:g} is above scale_jitter_max={self.scale_jitter_max:g}")
        return self


WITHOUT_AUGMENTATION: dict[str, float] = {
    "flip": 0.0,
    "crop": 0.0,
    "scale_jitter_min": 1.0,
    "scale_jitter_max": 1.0,
    "brightness_jitter": 0.0,
    "contrast_jitter": 0.0,
    "saturation_jitter": 0.0,
    "hue_jitter": 0.0,
    "copy_paste": 0.0,
}
"""The settings of `DataConfig` with which training images are only resized."""


class InferenceConfig(Section):
    short_side: Side = 640
    """The length in pixels to which the shorter side of an image is resized."""
    long_side: Side = 853
    """The maximum of the longer side in pixels."""
    size_factor: Annotated[float, Field(gt=0.0, le=64.0), Neutral(1.0)] = 1.0
    """Multiply both sides by this factor. In a small experiment, a side of 512 then means 4/5 of 640."""
    score_threshold: Fraction = 0.005
    """Instances with a lower score are left out."""
    mask_threshold: Fraction = 0.45
    """The probability from which a pixel belongs to a mask."""
    rescore: bool = True
    """Multiply the class probability by the objectness (Table 6)."""
    maskness: bool = True
    """Multiply the score by the mean probability of the mask's pixels, as the reference does; the paper does not mention it."""
    precision: Precision = "fp32"
    """The type of numbers in which the network computes."""

    @model_validator(mode="after")
    def _sides_are_in_range(self) -> Self:
        if self.size_factor != 1.0 and max(self.sides()) > 16_384:
            raise ValueError(
                f"size_factor={self.size_factor:g} gives sides of {list(self.sides())} pixels: at most 16384 are possible"
            )
        return self

    def sides(self) -> tuple[int, int]:
        """Return the shorter side of the resized image and the maximum of its longer side, in pixels."""
        return max(1, round(self.short_side * self.size_factor)), max(1, round(self.long_side * self.size_factor))

    def content(self, stage: Stage | None = None) -> dict[str, Any]:
        """Return the content with the final image sides."""
        short, long = self.sides()
        resolved = self.model_copy(update={"short_side": short, "long_side": long, "size_factor": 1.0})
        return super(InferenceConfig, resolved).content(stage)


class OptimizerConfig(Section):
    """The settings that the stages `pretrain` and `train` have in common."""

    iterations: PositiveInt = 270_000
    """The number of optimiser steps."""
    batch_size: Annotated[int, Field(ge=1, le=65_536)] = REFERENCE_BATCH
    """The images per optimiser step, summed over all processes and accumulated parts."""
    learning_rate: Positive = 5e-5
    """The learning rate after the warm-up."""
    weight_decay: NonNegative = 1e-4
    """The weight decay of AdamW."""
    weight_decay_on: Literal["reference", "weights"] = "reference"
    """The parameters that decay. `reference`: all except those of norms, patch embeddings and class tokens. `weights`: only
    matrices and convolution kernels, and again none of norms and patch embeddings."""
    schedule: Literal["step", "cosine"] = "step"
    """After the warm-up, `step` multiplies the learning rate by `decay` at each milestone; `cosine` lowers it to zero."""
    milestones: tuple[Fraction, ...] = (7 / 9, 25 / 27)
    """Fractions of `iterations`; the defaults are steps 210,000 and 250,000 of 270,000."""
    decay: Positive = 0.1
    """The factor by which `step` multiplies the learning rate at each milestone."""
    warmup_iterations: Annotated[int, Field(ge=0)] = 1000
    """The steps in which the learning rate rises linearly from `warmup_factor` to its full value."""
    warmup_factor: Fraction = 1e-3
    """The fraction of the learning rate at the first step."""
    clip_norm: Positive | None = None
    """The maximum gradient norm of the whole model; None does not clip."""
    precision: Precision = "fp32"
    """The type of numbers in which the network computes; the losses are always float32."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """The seed of the initial weights, the order of the images and the augmentation."""
    log_every: Annotated[PositiveInt, Operational()] = 20
    """Write the mean losses each time this many steps are done."""
    checkpoint_every: Annotated[PositiveInt, Operational()] = 5000
    """Save a checkpoint each time this many steps are done."""
    keep_checkpoints: Annotated[PositiveInt, Operational()] = 2
    """The number of checkpoints that are kept."""

    @model_validator(mode="after")
    def _schedule_is_consistent(self) -> Self:
        if self.warmup_iterations >= self.iterations:
            raise ValueError(f"warmup_iterations={self.warmup_iterations} must be below iterations={self.iterations}")
        if list(self.milestones) != sorted(self.milestones):
            raise ValueError(f"milestones={list(self.milestones)} must be in ascending order")
        return self


class PretrainConfig(OptimizerConfig):
    """The settings of the stage `pretrain`, which trains a backbone that has no ImageNet weights.

    The backbone learns to predict, for each cell of its features, the category and the offset to the centre of the cell's object.
    The result depends only on the backbone, the training data and these settings, so all rows of all tables share it.
    """

    enabled: Annotated[bool, Operational()] = False
    """Start the backbone from this stage's weights. Its norms may then be frozen, as with ImageNet weights."""
    iterations: PositiveInt = 8000
    batch_size: Annotated[int, Field(ge=1, le=65_536)] = 8
    learning_rate: Positive = 2e-3
    schedule: Literal["step", "cosine"] = "cosine"
    warmup_iterations: Annotated[int, Field(ge=0)] = 200
    clip_norm: Positive | None = 5.0
    object_weight: Positive = 6.0
    """The weight of an object's cell in the class loss; a background cell has weight 1."""


class TrainConfig(OptimizerConfig):
    accumulate: PositiveInt = 1
    """The forward and backward passes per optimiser step. The loss means treat each pass as one process."""
    backbone_multiplier: NonNegative = 1.0
    """The backbone's learning rate as a multiple of the others'."""
    ema_decay: Annotated[float, Field(gt=0.0, lt=1.0)] | None = None
    """The decay of an exponential moving average of the weights, which is then evaluated and saved; None keeps no average."""
    start: Annotated[str | None, Neutral(None)] = None
    """A weights file of a trained SparseInst model to start from, instead of ImageNet weights. Layers whose shapes differ (the
    class head for other data) keep their random initial weights."""
    compile: Annotated[bool, Neutral(False)] = False
    """Train with torch.compile. It rounds differently and takes minutes to compile at the start."""
    checkpoint_activations: Annotated[bool, Operational()] = False
    """Keep only the outputs of the backbone and the encoder, and recompute the other activations in the backward pass. Training
    then needs less memory and about a third more time, and gives the same weights. It needs frozen norms: the statistics of
    other norms would count each image twice."""
    evaluate_every: Annotated[PositiveInt | None, Operational()] = None
    """Evaluate each time this many steps are done: AP, metrics of the activation maps, and how often objects keep their maps."""
    evaluate_images: Annotated[PositiveInt | None, Operational()] = None
    """Use only this many images, the first of the validation split, in the evaluations during training."""
    loggers: Annotated[tuple[Literal["wandb", "mlflow", "trackio"], ...], Operational()] = ()
    """Also log the losses and metrics to Weights & Biases, MLflow or Trackio, which must be installed (the extra of the same
    name). metrics.jsonl and TensorBoard are always written."""
    log_project: Annotated[str, Operational()] = "sparseinst"
    """The project (of MLflow, the experiment) that the loggers write to. All else comes from each logger's own environment
    variables, such as WANDB_MODE and MLFLOW_TRACKING_URI."""
    patience: Annotated[PositiveInt | None, Neutral(None)] = None
    """End the training when this many evaluations in a row gave no better AP; it needs `evaluate_every`. None never does."""

    def content(self, stage: Stage | None = None) -> dict[str, Any]:
        """Return the content; with `patience`, the evaluations decide when the training ends, so their settings belong to it."""
        evaluations = {name: getattr(self, name) for name in ("evaluate_every", "evaluate_images")} if self.patience else {}
        return {**super().content(stage), **evaluations}

    @model_validator(mode="after")
    def _patience_needs_evaluations(self) -> Self:
        if self.patience is not None and self.evaluate_every is None:
            raise ValueError(f"patience={self.patience} counts evaluations, so set evaluate_every, too")
        return self

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        if self.batch_size % self.accumulate:
            raise ValueError(f"accumulate={self.accumulate} does not divide batch_size={self.batch_size}")
        return self

    def batch_advice(self) -> str | None:
        """Return advice if the batch size differs from the paper's 64 but the learning rate does not; None otherwise."""
        reference = TrainConfig.model_fields["learning_rate"].default
        if self.batch_size == REFERENCE_BATCH or self.learning_rate != reference:
            return None
        scaled = reference * self.batch_size / REFERENCE_BATCH
        return (
            f"train.batch_size={self.batch_size} with the learning rate for a batch of {REFERENCE_BATCH} lowers AP: "
            f"set train.learning_rate={scaled:g}, or train.batch_size={REFERENCE_BATCH} with train.accumulate"
        )


class Config(Section):
    """All settings of an experiment. The defaults are the preset `paper`."""

    model: ModelConfig = ModelConfig()
    loss: LossConfig = LossConfig()
    matcher: MatcherConfig = MatcherConfig()
    data: DataConfig = DataConfig()
    inference: InferenceConfig = InferenceConfig()
    train: TrainConfig = TrainConfig()
    pretrain: PretrainConfig = PretrainConfig()

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
        """Return a copy in which dotted paths have new values, e.g. `{"model.decoder.depth": 2}`.

        Raises:
            UserError: a path does not exist (the message gives the nearest valid path), or its value is not valid.
        """
        return parse(Config, merge(self.model_dump(mode="json"), nest(overrides, Config), Config))

    def to_json(self) -> str:
        return self.model_dump_json(indent=2)

    def to_yaml(self) -> str:
        import io

        from ruamel.yaml import YAML

        stream = io.StringIO()
        YAML(typ="safe").dump(self.model_dump(mode="json"), stream)
        return stream.getvalue()

    def pretrain_content(self) -> dict[str, Any]:
        """Return everything that can change the backbone's weights from the stage `pretrain`."""
        backbone = self.model.backbone
        start = {"name": backbone.name, "pretrained": backbone.pretrained, "weights": backbone.weights}
        parts = {"data": self.data.content("pretrain"), "pretrain": self.pretrain.content("pretrain")}
        return {"stage": "pretrain", "backbone": start, **parts}

    def pretrain_key(self) -> str:
        """Return the key of the stage `pretrain`, which also names its folder."""
        return content_hash(self.pretrain_content())

    def train_content(self) -> dict[str, Any]:
        """Return everything that can change the trained weights."""
        parts = {"model": self.model, "loss": self.loss, "matcher": self.matcher, "data": self.data, "train": self.train}
        start = {"start": self.pretrain_key()} if self.pretrain.enabled else {}
        return {"stage": "train", **{name: part.content("train") for name, part in parts.items()}, **start}

    def train_key(self) -> str:
        """Return the key of the training, which also names its folder. Configs with equal keys share one run."""
        return content_hash(self.train_content())

    def evaluate_key(self, train_key: str | None = None) -> str:
        """Return the key of the evaluation of these weights with these inference settings on these data.

        Args:
            train_key: what `train_key` returns, if the caller has it already.
        """
        parts = {"inference": self.inference.content("evaluate"), "data": self.data.content("evaluate")}
        return content_hash({"stage": "evaluate", "train": train_key or self.train_key(), **parts})

    def latency_key(self, device: str, mode: str = "eager") -> str:
        """Return the key of the timing on the device with this name. It begins with `latency_prefix`."""
        return f"{self.latency_prefix()}-{content_hash({'device': device, 'mode': mode})[:8]}"

    def latency_prefix(self) -> str:
        """Return the hash of what is timed: the model without its weights, the image size, the precision and the thresholds."""
        parts = {"model": self.model.content("latency"), "inference": self.inference.content("latency")}
        return content_hash({"stage": "latency", **parts})


PRESETS: dict[str, dict[str, Any]] = {
    "paper": {},
    "release": {"train.weight_decay": 0.05, "loss.pixel_weight": 5.0},
}
"""`paper` is for Tables 2 to 8; `release` is for Table 1 and the released checkpoints."""

_GIAM = {"model.decoder.iam.groups": 4}
_SOFTMAX = {"model.decoder.iam.activation": "softmax"}
_DCN = {"model.backbone.deformable_stages": [4, 5]}
_TRAINED_NORMS = {"model.backbone.frozen_norm": False}
_DROP_PATH = {"model.backbone.drop_path": 0.1}
MODELS: dict[str, dict[str, Any]] = {
    "r50-iam": {},
    "r50-giam": _GIAM,
    "r50-giam-softmax": {**_GIAM, **_SOFTMAX},
    "r50-dcn-giam": {**_GIAM, **_DCN},
    "r50d-giam": {**_GIAM, "model.backbone.name": "resnet50d.ra2_in1k"},
    "r50d-dcn-giam": {**_GIAM, **_DCN, "model.backbone.name": "resnet50d.ra2_in1k"},
    "r101-giam": {**_GIAM, "model.backbone.name": "resnet101.tv_in1k"},
    "r101-dcn-giam": {**_GIAM, **_DCN, "model.backbone.name": "resnet101.tv_in1k"},
    "cspdarknet53-giam": {**_GIAM, **_TRAINED_NORMS, "model.backbone.name": "cspdarknet53.ra_in1k"},
    "cspdarknet53-giam-softmax": {**_GIAM, **_SOFTMAX, **_TRAINED_NORMS, "model.backbone.name": "cspdarknet53.ra_in1k"},
    "darknet53-giam": {
        **_GIAM,
        **_TRAINED_NORMS,
        "model.backbone.name": "darknet53.c2ns_in1k",
        "model.backbone.pretrained": False,
    },
    "pvtv2-b1-giam": {**_GIAM, **_DROP_PATH, "model.backbone.name": "pvt_v2_b1.in1k"},
    "pvtv2-b2-li-giam": {**_GIAM, **_DROP_PATH, "model.backbone.name": "pvt_v2_b2_li.in1k"},
}
"""The overrides of each released model, by its name. `cspdarknet53-giam` has sigmoid maps; the released one has softmax maps.

As in the reference, DarkNet53 starts from random weights."""
