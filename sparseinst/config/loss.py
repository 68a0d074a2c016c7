"""Define the settings of the training loss, and of the matching of predictions with objects."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import model_validator

from sparseinst.config.types import Fraction, NonNegative
from sparseinst.section import Section


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
    """Average the pixel and objectness losses over the matched pairs of each process (`per_process`, as in the reference) or
    of all processes together (`global`)."""
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
