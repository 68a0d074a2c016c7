"""Compose scenes of objects that lie over each other, and write them with their annotations. Imports no torch.

Each mask holds the visible part of its object.

H W height and width of an image in pixels, h w height and width of the box around one object.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image

from sparseinst.data.coco_folder import AnnotatedImage, image_folder, write_annotations

Mask = NDArray[np.bool_]
Owner = NDArray[np.int64]
"""(H, W): the index of the object that is visible at each pixel, -1 for none."""

_MIN_VISIBLE_AREA = 12  # pixels


@dataclass(frozen=True)
class Item:
    """One object, or a crowd: a cluster of tiny objects."""

    category_id: int
    crowd: bool
    box: tuple[slice, slice]
    mask: Mask
    """(h, w): the part of the object that lies inside the image, hidden pixels included."""
    whole_area: int
    """The object's area in pixels, including the part outside the image."""


class Scene(NamedTuple):
    pixels: NDArray[np.uint8]
    """(H, W, 3)"""
    objects: list[Item]
    """The objects from back to front."""
    owner: Owner


def place(
    rng: Generator,
    mask: Mask,
    size: tuple[int, ...],
    category_id: int,
    *,
    crowd: bool = False,
    centre: tuple[float, float] | None = None,
) -> tuple[Item, tuple[slice, slice]]:
    """Place an object in an image of `size`. Return it, and the part of its mask (h, w) that lies inside the image.

    Args:
        centre: row and column of the object's centre, moved into the image if they lie outside; None for a random position.
    """
    if centre is None:
        position = [int(rng.integers(length)) for length in size]
    else:
        position = [min(max(round(coordinate), 0), length - 1) for coordinate, length in zip(centre, size, strict=True)]
    corner = [coordinate - extent // 2 for coordinate, extent in zip(position, mask.shape, strict=True)]
    rows, columns = (
        slice(max(0, start), min(length, start + extent)) for start, length, extent in zip(corner, size, mask.shape, strict=True)
    )
    top, left = corner
    part = slice(rows.start - top, rows.stop - top), slice(columns.start - left, columns.stop - left)
    return Item(category_id, crowd, (rows, columns), mask[part], int(mask.sum())), part


def leaves_enough(item: Item, objects: list[Item], owner: Owner, share: float = 0.3) -> bool:
    """Return whether the new object, and each object that it would partly hide, stays visible enough to be annotated.

    Args:
        share: the fraction of a whole object that must stay visible.
    """
    covered = owner[item.box][item.mask]  # the object that each pixel of the new one would cover
    if len(covered) < max(_MIN_VISIBLE_AREA, share * item.whole_area):
        return False
    hidden = np.bincount(covered + 1, minlength=len(objects) + 1)[1:]
    return all(
        (owner[objects[index].box] == index).sum() - hidden[index] >= max(_MIN_VISIBLE_AREA, share * objects[index].whole_area)
        for index in np.flatnonzero(hidden)
    )


def annotate(objects: list[Item], owner: Owner) -> list[dict[str, Any]]:
    """Return the COCO entries, without ids, of the visible parts of the objects."""
    from pycocotools import mask as coco_mask

    rle: Any = coco_mask  # its functions carry no type annotations
    entries: list[dict[str, Any]] = []
    for index, item in enumerate(objects):
        visible = np.asfortranarray(owner == index)
        encoded = rle.encode(visible.view(np.uint8))
        counts: str | list[int] = encoded["counts"].decode("ascii")
        if item.crowd:  # as in COCO: uncompressed run lengths in column order, starting with the background
            edges = np.flatnonzero(np.diff(visible.ravel(order="F"), prepend=False))
            counts = np.diff(edges, prepend=0, append=visible.size).tolist()
        entry = {"category_id": item.category_id, "iscrowd": int(item.crowd), "area": float(rle.area(encoded))}
        entry["bbox"] = rle.toBbox(encoded).tolist()
        entries.append({**entry, "segmentation": {"size": list(owner.shape), "counts": counts}})
    return entries


def write_split(
    root: Path,
    split: str,
    scenes: Iterable[Scene],
    categories: list[dict[str, Any]],
    info: dict[str, Any],
    licence: tuple[str, str],
) -> None:
    """Write the images of a split as PNG files, and its annotation file.

    Args:
        licence: name and URL.
    """
    image_folder(root, split).mkdir(parents=True)
    write_annotations(root, split, write_images(image_folder(root, split), scenes), categories, info, licence)


def write_images(folder: Path, scenes: Iterable[Scene], first: int = 1) -> list[AnnotatedImage]:
    """Write scenes as PNG files and return their COCO entries. Ids and file names count from `first`."""
    written = []
    for image_id, scene in enumerate(scenes, start=first):
        name = f"{image_id:012}.png"
        Image.fromarray(scene.pixels).save(folder / name, compress_type=zlib.Z_HUFFMAN_ONLY)
        height, width = scene.owner.shape
        image = {"id": image_id, "file_name": name, "height": height, "width": width, "license": 1}
        written.append(AnnotatedImage(image, annotate(scene.objects, scene.owner)))
    return written
