"""Draw the activation map of each annotated object on its image, with numbers (as in the paper's Figure 4)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from sparseinst.config import STRIDES
from sparseinst.data.coco import CocoSplit, ImageRecord
from sparseinst.data.images import read_image
from sparseinst.data.masks import Mask
from sparseinst.data.network_input import cut, image_tiles
from sparseinst.data.objects import Objects, fullest_tile, read_segments
from sparseinst.data.transforms import as_mask, resize_segments
from sparseinst.evaluation.mechanism import match_maps, of_maps
from sparseinst.files import atomic, distinct_names, make_folder
from sparseinst.inference.predict import Predictor
from sparseinst.postprocess import ImageSize, postprocess
from sparseinst.visualize.draw import heat, outline, palette

_WIDTH = 200  # pixels, of each picture
_MOST = 8  # objects an image


class ObjectMap(NamedTuple):
    """One annotated object of an image and the map that the matching gives it."""

    name: str
    truth: Mask
    """(H, W)"""
    mask: NDArray[np.bool_]
    """(H, W): the predicted mask of the map's instance."""
    number: int
    """Which of the N maps it is."""
    response: NDArray[np.float32]
    """(h, w) over the image without its padding, its highest value 1."""
    own: float
    others: float
    border: float
    peak: bool
    """Whether the strongest cell lies on the object."""
    prefers: bool | None
    """Whether no other object of the image gets a stronger response per cell; None where there is no other."""


@torch.no_grad()
def object_maps(predictor: Predictor, record: ImageRecord, split: CocoSplit) -> tuple[Image.Image, list[ObjectMap]]:
    """Return the image and the map of each of its objects, the largest objects first; crowds are left out.

    Of an image that is segmented in tiles, the tile with most objects takes the place of the image.

    Raises:
        DataError: an image or an annotation that cannot be read.
    """
    picture = read_image(record.path, (record.height, record.width))
    tiles = image_tiles((record.height, record.width), predictor.config.inference)
    if len(tiles) == 1:
        segments, labels = read_segments(record, split)
        whole = record.height, record.width
    else:
        tile, (_, labels, segments) = fullest_tile(Objects(record, split), tiles)
        picture, whole = cut(picture, tile), tile.size
    raw, size, padded = predictor.forward(picture)
    small = [as_mask(segment, size) for segment in resize_segments(segments, whole, size)]
    if not any(mask.any() for mask in small):
        return picture, []
    matches = match_maps(raw, padded, labels, small, predictor.config, predictor.model.mask_size(padded))
    told = of_maps(matches.responses, matches.covered, matches.objects)
    every = predictor.config.inference.model_copy(update={"score_threshold": 0.0})
    [found] = postprocess(raw, padded, [ImageSize(size, whole)], every)
    masks = dict(zip(found.maps.tolist(), found.masks.cpu().numpy(), strict=True))
    height, width = (-(-side // STRIDES[0]) for side in size)
    rows = []
    for index, (instance, number) in enumerate(zip(matches.objects.tolist(), matches.maps.tolist(), strict=True)):
        response = matches.responses[index, :height, :width]
        truth = as_mask(segments[instance], whole)
        rows.append(
            ObjectMap(
                split.categories[labels[instance]].name,
                truth,
                masks.get(number, np.zeros(whole, dtype=np.bool_)),
                number,
                response / response.max().clip(min=1e-12),
                told.own[index],
                told.others[index],
                told.border[index],
                told.peak[index],
                told.prefers[index] if told.prefers else None,
            )
        )
    return picture, sorted(rows, key=lambda row: -int(row.truth.sum()))


def object_sheet(image: Image.Image, objects: Sequence[ObjectMap]) -> Image.Image:
    """Return a sheet with one column for each object: its map with the object's true outline, above the predicted mask.

    Both lie on a grey copy of the image, because a mask of any colour may look like an object of a strong colour.
    """
    height = max(1, round(image.height * _WIDTH / image.width))
    small = image.resize((_WIDTH, height), Image.Resampling.BILINEAR)
    font = ImageFont.load_default(size=11)
    gap, title = 4, 42
    shown = objects[:_MOST]
    sheet = Image.new("RGB", (max(1, len(shown)) * (_WIDTH + gap) + gap, 2 * (height + gap) + gap + title), "white")
    pen = ImageDraw.Draw(sheet)
    for index, (entry, colour) in enumerate(zip(shown, palette(max(1, len(shown))), strict=False)):
        left = gap + index * (_WIDTH + gap)
        prefers = {None: "the only object", True: "prefers it", False: "prefers another"}[entry.prefers]
        told = f"own {entry.own:.0%}, others {entry.others:.0%}, border {entry.border:.0%}"
        lines = (f"{entry.name}, map {entry.number}", told, f"peak {'on' if entry.peak else 'off'} it, {prefers}")
        pen.multiline_text((left, 1), "\n".join(lines), fill="black", font=font, spacing=1)
        truth = _scaled(entry.truth.astype(np.bool_), height)
        above = np.asarray(heat(small, entry.response)).copy()
        above[outline(truth, 1)] = (255, 255, 255)
        below = np.asarray(small.convert("L").convert("RGB")).astype(np.float32)
        mask = _scaled(entry.mask, height)
        below[mask] = 0.5 * below[mask] + 0.5 * np.array(colour, dtype=np.float32)
        below[outline(truth, 1)] = 255
        sheet.paste(Image.fromarray(above), (left, title))
        sheet.paste(Image.fromarray(below.round().astype(np.uint8)), (left, title + height + gap))
    if not shown:
        pen.text((gap, 2), "no object", fill="black", font=font)
    return sheet


def _scaled(mask: NDArray[np.bool_], height: int) -> NDArray[np.bool_]:
    return np.asarray(Image.fromarray(mask).resize((_WIDTH, height), Image.Resampling.NEAREST))


def write_object_maps(predictor: Predictor, split: CocoSplit, output: Path, images: int) -> list[Path]:
    """Write `objects-NAME.png` for the first images that hold objects.

    Raises:
        DataError: an image or an annotation that cannot be read.
    """
    make_folder(output)
    chosen = split.with_instances().images[:images]
    written = []
    for record, name in zip(chosen, distinct_names([f"objects-{record.path.stem}.png" for record in chosen]), strict=True):
        path = output / name
        with atomic(path) as temporary:
            object_sheet(*object_maps(predictor, record, split)).save(temporary, format="PNG")
        written.append(path)
    return written
