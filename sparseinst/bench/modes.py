"""State the timing modes, which say how a model runs while `bench` times it. This file imports no torch."""

from __future__ import annotations

from typing import Literal, get_args

from sparseinst.config import OptimizeMode

InferenceMode = Literal["plain", "eager", OptimizeMode]
"""`plain` runs the model as the reference does: tensors are contiguous, and masks are resized in two steps. `eager` runs the
model as it is: tensors are channels-last, and masks are resized in one step. The others run the copy that `optimize` makes."""

TrainingMode = Literal["plain", "eager", "compiled", "recomputed"]
"""`plain` trains as the reference does: tensors are contiguous, the step downsamples masks of the image's size, and AdamW has
torch's default implementation. `eager` trains as `train` does. `compiled` sets `train.compile`, and `recomputed` sets
`train.checkpoint_activations`."""

INFERENCE_MODES: tuple[str, ...] = get_args(InferenceMode)
TRAINING_MODES: tuple[str, ...] = get_args(TrainingMode)
