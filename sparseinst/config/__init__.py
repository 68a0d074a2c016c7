"""Define every setting with its default and its valid values, the presets `paper` and `release`, and the named models.

No other package defines a default. The path of an override is the attribute path: `model.decoder.iam.kernel_size` in a spec, on
the command line and in the code. The values come from the paper (CVPR 2022) and its reference implementation.
"""

from sparseinst.config.data import WITHOUT_AUGMENTATION, DataConfig, ShapesConfig
from sparseinst.config.experiment import Config
from sparseinst.config.inference import InferenceConfig
from sparseinst.config.loss import LossConfig, MatcherConfig
from sparseinst.config.model import BackboneConfig, DecoderConfig, EncoderConfig, IAMConfig, ModelConfig
from sparseinst.config.presets import MODELS, PRESETS, RELEASED_MODELS, SMALL_MODELS
from sparseinst.config.training import OptimizerConfig, PretrainConfig, TrainConfig
from sparseinst.config.types import (
    ENGINE_PRECISIONS,
    REFERENCE_BATCH,
    SHAPES_VERSION,
    SIZE_DIVISOR,
    STRIDES,
    Activation,
    Channels,
    EngineName,
    Fraction,
    NetworkPrecision,
    NonNegative,
    OptimizeMode,
    Parts,
    Positive,
    PositiveInt,
    Precision,
    Side,
)

__all__ = [
    "ENGINE_PRECISIONS",
    "MODELS",
    "PRESETS",
    "REFERENCE_BATCH",
    "RELEASED_MODELS",
    "SHAPES_VERSION",
    "SIZE_DIVISOR",
    "SMALL_MODELS",
    "STRIDES",
    "WITHOUT_AUGMENTATION",
    "Activation",
    "BackboneConfig",
    "Channels",
    "Config",
    "DataConfig",
    "DecoderConfig",
    "EncoderConfig",
    "EngineName",
    "Fraction",
    "IAMConfig",
    "InferenceConfig",
    "LossConfig",
    "MatcherConfig",
    "ModelConfig",
    "NetworkPrecision",
    "NonNegative",
    "OptimizeMode",
    "OptimizerConfig",
    "Parts",
    "Positive",
    "PositiveInt",
    "Precision",
    "PretrainConfig",
    "ShapesConfig",
    "Side",
    "TrainConfig",
]
