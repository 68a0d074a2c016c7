"""Define the settings of the data and of the augmentation."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from sparseinst.config.types import SHAPES_VERSION, Fraction, NonNegative, Positive, PositiveInt, Side, TileSide
from sparseinst.section import Neutral, Only, Operational, Section, Stage


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
    tile: Annotated[TileSide | None, Only("pretrain", "train"), Neutral(None)] = None
    """Train on square tiles of this side in pixels of the original image, each at a random place of its image. The side becomes
    the drawn one of `short_sides`, so that all tiles have one scale; of an image smaller than this, the whole is used. Evaluation
    and prediction cut tiles if `inference.tile` is set. With None, whole images are used."""
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
    def _tile_or_crop(self) -> Self:
        if self.tile is not None and self.crop > 0:
            raise ValueError(f"tile={self.tile} and crop={self.crop:g} both cut the image: set one of them")
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
