"""Define the settings of prediction and evaluation."""

from __future__ import annotations

from typing import Annotated, Any, Self

from pydantic import Field, model_validator

from sparseinst.config.types import ENGINE_PRECISIONS, EngineName, Fraction, NetworkPrecision, PositiveInt, Side, TileSide
from sparseinst.section import Neutral, Section, Stage


class InferenceConfig(Section):
    short_side: Side = 640
    """The length in pixels to which the shorter side of an image is resized."""
    long_side: Side = 853
    """The maximum of the longer side in pixels."""
    size_factor: Annotated[float, Field(gt=0.0, le=64.0), Neutral(1.0)] = 1.0
    """Multiply both sides by this factor. In a small experiment, a side of 512 then means 4/5 of 640."""
    tile: Annotated[TileSide | None, Neutral(None)] = None
    """Cut an image into overlapping square tiles of this side in pixels of the original image, segment each by itself, resized so
    that this side becomes `short_side`, and join the results. It is for images with many small objects. With None, the image is
    segmented as a whole."""
    tile_overlap: Annotated[float, Field(ge=0.0, le=0.75), Neutral(0.25)] = 0.25
    """The least overlap of two neighbouring tiles, as a fraction of `tile`. It should be as large as a large object, because an
    object that no tile shows as a whole is found in pieces, which are united afterwards."""
    score_threshold: Fraction = 0.005
    """Instances with a lower score are left out. The score of this comparison does not contain the factor of `maskness`."""
    mask_threshold: Fraction = 0.45
    """The probability from which a pixel belongs to a mask."""
    rescore: bool = True
    """Multiply the class probability by the objectness (Table 6)."""
    maskness: bool = True
    """Multiply the score by the mean probability of the mask's pixels, as the reference does; the paper does not mention it."""
    precision: NetworkPrecision = "fp32"
    """The number format in which the network computes. `int8` needs the engine `openvino`."""
    engine: Annotated[EngineName, Neutral("torch")] = "torch"
    """The library that runs the network: `torch`, or `onnxruntime` or `openvino`, which need the extras of the same names."""
    max_drop: Annotated[float, Field(ge=0.0, le=100.0), Neutral(0.5)] = 0.5
    """For int8: the largest loss of AP on the validation data. Parts of the network are turned back to
    float until the loss is small enough."""
    calibration_images: Annotated[PositiveInt, Neutral(300)] = 300
    """For int8: the number of images on which the integer ranges are calibrated, the first of the training split."""

    @model_validator(mode="after")
    def _sides_are_in_range(self) -> Self:
        if self.size_factor != 1.0 and max(self.sides()) > 16_384:
            raise ValueError(
                f"size_factor={self.size_factor:g} gives sides of {list(self.sides())} pixels: at most 16384 are possible"
            )
        return self

    @model_validator(mode="after")
    def _engine_has_the_precision(self) -> Self:
        known = ENGINE_PRECISIONS[self.engine]
        if self.precision not in known:
            able = [name for name, precisions in ENGINE_PRECISIONS.items() if self.precision in precisions]
            raise ValueError(
                f"engine {self.engine} has no precision {self.precision}: it has {', '.join(known)}; "
                f"{self.precision} needs the engine {' or '.join(able)}"
            )
        return self

    def sides(self) -> tuple[int, int]:
        """Return the shorter side of the resized image and the maximum of its longer side, in pixels."""
        return max(1, round(self.short_side * self.size_factor)), max(1, round(self.long_side * self.size_factor))

    def content(self, stage: Stage | None = None) -> dict[str, Any]:
        """Return the content with the final image sides."""
        short, long = self.sides()
        resolved = self.model_copy(update={"short_side": short, "long_side": long, "size_factor": 1.0})
        content = super(InferenceConfig, resolved).content(stage)
        if self.tile is None:
            content.pop("tile_overlap", None)
        if self.precision != "int8":  # only quantisation reads these
            content = {name: value for name, value in content.items() if name not in ("max_drop", "calibration_images")}
        return content
