"""Prepare images for the network: resize them to the test size and pad them into a batch.

Prediction, evaluation and timing all use these functions.

B images, H W height and width of the padded batch in pixels, h w height and width of one resized image.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sparseinst.config import SIZE_DIVISOR, InferenceConfig
from sparseinst.data.tiles import Size, Tile, tile_size, tiles_of
from sparseinst.data.transforms import resize_image, short_side_size


def image_tiles(original: Size, inference: InferenceConfig) -> list[Tile]:
    """Return the tiles of an image that the network sees one by one: without `inference.tile`, the whole image."""
    return tiles_of(original, inference.tile, inference.tile_overlap)


def middle_tile(picture: Image.Image, inference: InferenceConfig) -> Image.Image:
    """Return the tile in the middle of an image, for what looks at one input of the network: timing and calibration."""
    tiles = image_tiles((picture.height, picture.width), inference)
    return cut(picture, tiles[len(tiles) // 2])


def cut(picture: Image.Image, tile: Tile) -> Image.Image:
    """Return a tile of an image; the image itself if the tile covers it."""
    if tile == (0, 0, picture.height, picture.width):
        return picture
    return picture.crop((tile.left, tile.top, tile.left + tile.width, tile.top + tile.height))


def inference_size(original: Size, inference: InferenceConfig) -> Size:
    """Return the height and width of an image or a tile after it is resized for the network, without padding."""
    if inference.tile is not None:
        return tile_size(original, inference.tile, inference.sides()[0])
    return short_side_size(*original, *inference.sides())


def at_test_size(picture: Image.Image, inference: InferenceConfig) -> Tensor:
    """Return an RGB image or tile, resized to its test size, as (3, h, w) uint8."""
    resized = resize_image(picture, inference_size((picture.height, picture.width), inference))
    return torch.from_numpy(np.array(resized)).permute(2, 0, 1)


def padded_size(sizes: Sequence[Size]) -> Size:
    """Return the height and width of a batch of images of these sizes: multiples of the stride of the deepest feature map."""
    height, width = (-(-max(sides) // SIZE_DIVISOR) * SIZE_DIVISOR for sides in zip(*sizes, strict=True))
    return height, width


def pad(images: Sequence[Tensor]) -> Tensor:
    """Return images of (3, h, w) uint8 as one batch (B, 3, H, W), padded with zeros at the right and bottom."""
    height, width = padded_size([(image.shape[1], image.shape[2]) for image in images])
    batch = torch.zeros((len(images), 3, height, width), dtype=torch.uint8)
    for padded, image in zip(batch, images, strict=True):
        padded[:, : image.shape[1], : image.shape[2]] = image
    return batch
