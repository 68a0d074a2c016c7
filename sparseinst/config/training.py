"""Define the settings of the stages `pretrain` and `train`."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from sparseinst.config.types import REFERENCE_BATCH, Fraction, NonNegative, Positive, PositiveInt, Precision
from sparseinst.section import Neutral, Operational, Section, Stage


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
    matrices and convolution kernels, except those of norms and patch embeddings."""
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
    """The number format in which the network computes; the losses are always float32."""
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
            raise ValueError(
                f"warmup_iterations={self.warmup_iterations} must be below iterations={self.iterations}; "
                f"set it too, such as to {self.iterations // 20}"
            )
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
    """The forward and backward passes per optimiser step. The losses are averaged over each pass, as over one process."""
    backbone_multiplier: NonNegative = 1.0
    """The backbone's learning rate as a multiple of the others'."""
    ema_decay: Annotated[float, Field(gt=0.0, lt=1.0)] | None = None
    """The decay of an exponential moving average of the weights, which is then evaluated and saved; None keeps no average."""
    start: Annotated[str | None, Neutral(None)] = None
    """A weights file of a trained SparseInst model to start from, instead of ImageNet weights. The class head keeps the
    classes with the same names; with another number of maps, the first ones are kept. Other classes and maps start from random
    weights."""
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
    """The project (for MLflow, the experiment) that the loggers write to. Each logger reads its other settings from its own
    environment variables, such as WANDB_MODE and MLFLOW_TRACKING_URI."""
    patience: Annotated[PositiveInt | None, Neutral(None)] = None
    """End the training when this many evaluations in a row gave no better AP. It needs `evaluate_every`. With None, the training
    never ends early."""

    def content(self, stage: Stage | None = None) -> dict[str, Any]:
        """Return the content; with `patience`, the evaluations decide when the training ends, so their settings belong to it."""
        evaluations = {name: getattr(self, name) for name in ("evaluate_every", "evaluate_images")} if self.patience else {}
        return {**super().content(stage), **evaluations}

    def evaluates_after(self, done: int) -> bool:
        """Return whether an evaluation follows when this many steps are done; the one at the end is not part of the training."""
        return self.evaluate_every is not None and 0 < done < self.iterations and done % self.evaluate_every == 0

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
