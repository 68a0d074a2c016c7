"""Composed scenes as a data set in COCO format: objects laid over each other, and the masks of what stays visible. No torch.

H W height and width of an image in pixels, h w of the box around one object.
"""

from __future__ import annotations

import json
import tempfile
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray
from PIL import Image

from sparseinst.errors import UserError

Mask = NDArray[np.bool_]
Owner = NDArray[np.int64]
"""(H, W): the index of the object that is visible there, -1 for none."""

SPLITS = ("train", "val")

_MIN_VISIBLE_AREA, _MIN_VISIBLE = 12, 0.3  # pixels, fraction of the whole object


@dataclass(frozen=True)
class Item:
    """One object or, as a crowd, a cluster of tiny ones."""

    category_id: int
    crowd: bool
    box: tuple[slice, slice]
    mask: Mask
    """(h, w), the object inside the image, also where it is hidden."""
    whole_area: int
    """Pixels, with those outside the image."""


class Scene(NamedTuple):
    pixels: NDArray[np.uint8]
    """(H, W, 3)"""
    objects: list[Item]
    """From back to front."""
    owner: Owner


def place(
    rng: Generator, mask: Mask, size: tuple[int, ...], category_id: int, *, crowd: bool = False
) -> tuple[Item, tuple[slice, slice]]:
    """An object somewhere in an image of `size`, its centre inside; and which part of its mask (h, w) is inside."""
    corner = [int(rng.integers(length)) - extent // 2 for length, extent in zip(size, mask.shape, strict=True)]
    rows, columns = (
        slice(max(0, start), min(length, start + extent)) for start, length, extent in zip(corner, size, mask.shape, strict=True)
    )
    top, left = corner
    part = slice(rows.start - top, rows.stop - top), slice(columns.start - left, columns.stop - left)
    return Item(category_id, crowd, (rows, columns), mask[part], int(mask.sum())), part


def leaves_enough(item: Item, objects: list[Item], owner: Owner) -> bool:
    """Whether the object and all that it would partly hide can still be seen well enough to be annotated."""
    below = owner[item.box][item.mask]
    if len(below) < max(_MIN_VISIBLE_AREA, _MIN_VISIBLE * item.whole_area):
        return False
    hidden = np.bincount(below + 1, minlength=len(objects) + 1)[1:]
    return all(
        (owner[objects[index].box] == index).sum() - hidden[index]
        >= max(_MIN_VISIBLE_AREA, _MIN_VISIBLE * objects[index].whole_area)
        for index in np.flatnonzero(hidden)
    )


def annotate(objects: list[Item], owner: Owner) -> list[dict[str, Any]]:
    """COCO entries, still without ids, of what is visible of each object."""
    from pycocotools import mask as coco_mask

    runs: Any = coco_mask  # its functions carry no annotations
    entries: list[dict[str, Any]] = []
    for index, item in enumerate(objects):
        visible = np.asfortranarray(owner == index)
        encoded = runs.encode(visible.view(np.uint8))
        counts: str | list[int] = encoded["counts"].decode("ascii")
        if item.crowd:  # as in COCO: lengths of runs in column order, beginning with the background's
            edges = np.flatnonzero(np.diff(visible.ravel(order="F"), prepend=False))
            counts = np.diff(edges, prepend=0, append=visible.size).tolist()
        entry = {"category_id": item.category_id, "iscrowd": int(item.crowd), "area": float(runs.area(encoded))}
        entry["bbox"] = runs.toBbox(encoded).tolist()
        entries.append({**entry, "segmentation": {"size": list(owner.shape), "counts": counts}})
    return entries


def annotation_file(root: Path, split: str) -> Path:
    return root / "annotations" / f"instances_{split}2017.json"


def image_folder(root: Path, split: str) -> Path:
    return root / f"{split}2017"


def write_split(
    root: Path,
    split: str,
    scenes: Iterable[Scene],
    categories: list[dict[str, Any]],
    info: dict[str, Any],
    licence: tuple[str, str],
) -> None:
    """Images as PNG, and their annotations.

    Args:
        licence: name and address.
    """
    file, folder = annotation_file(root, split), image_folder(root, split)
    file.parent.mkdir(parents=True, exist_ok=True)
    folder.mkdir()
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for image_id, scene in enumerate(scenes, start=1):
        name = f"{image_id:012}.png"
        Image.fromarray(scene.pixels).save(folder / name, compress_type=zlib.Z_HUFFMAN_ONLY)
        height, width = scene.owner.shape
        images.append({"id": image_id, "file_name": name, "height": height, "width": width, "license": 1})
        for entry in annotate(scene.objects, scene.owner):
            annotations.append({"id": len(annotations) + 1, "image_id": image_id, **entry})
    data = {
        "info": info,
        "licenses": [{"id": 1, "name": licence[0], "url": licence[1]}],
        "images": images,
        "annotations": annotations,
        "categories": categories,
    }
    file.write_text(json.dumps(data), encoding="utf-8")


def write_new(root: Path, write: Callable[[Path], None], what: str, is_complete: Callable[[Path], bool]) -> None:
    """Call `write` on a scratch folder and give the result its name: all of it appears at once or nothing does.

    Two processes may write the same root at the same time: one result is kept.

    Args:
        what: in words, with its article.
        is_complete: whether such a thing is at a path.

    Raises:
        UserError: something else is at `root`, or it cannot be written.
    """
    root = root.resolve()
    try:
        if root.exists() and not (root.is_dir() and next(root.iterdir(), None) is None):
            found = f"{what} already" if is_complete(root) else f"something other than {what}"
            raise UserError(f"{root}: holds {found}; name another folder or delete this one")
        root.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{root.name}.", dir=root.parent) as scratch:
            made = Path(scratch) / root.name  # a folder in the scratch folder, whose mode 0700 root shall not get
            write(made)
            try:
                made.rename(root)
            except OSError:
                if not is_complete(root):
                    raise
    except OSError as error:
        raise UserError(f"{root}: cannot be written ({error})") from None
