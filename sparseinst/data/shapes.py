"""The embedded data set: procedural scenes of geometric shapes in COCO format. Imports no torch.

Tests, examples and ablations use it without a download. A model must separate objects of one category that touch and overlap each
other, with extents from a fourteenth to nine tenths of the image. The shape determines an object's category. The texture usually
matches the category and the hue seldom does, so neither is enough alone.
"""

from __future__ import annotations

import itertools
import json
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from numpy.random import PCG64, Generator, SeedSequence
from numpy.typing import NDArray

from sparseinst.config import SHAPES_VERSION, ShapesConfig
from sparseinst.data.coco_folder import (
    SPLITS,
    AnnotatedImage,
    annotation_file,
    image_folder,
    write_annotations,
    write_new,
)
from sparseinst.data.scenes import write_images
from sparseinst.data.shape_scenes import SHAPES, random_scene
from sparseinst.errors import UserError
from sparseinst.files import write_error
from sparseinst.machine import usable_cores

Floats = NDArray[np.float64]

DESCRIPTION = "sparseinst shapes"
LICENCE = ("MIT License", "https://opensource.org/license/mit")

_DEFAULT = ShapesConfig()
_PART, _MIN_PARALLEL = 100, 1000  # images in one task; images of the smallest set that several processes write
_MIN_SIDE = 32

_UNGUARDED = (
    'several processes write the set, so a script must call this below `if __name__ == "__main__":`; '
    "or write the set first with `sparseinst data shapes`"
)


def write_shapes(
    root: Path,
    *,
    train: int = _DEFAULT.train,
    val: int = _DEFAULT.val,
    side: int = _DEFAULT.side,
    seed: int = 0,
    processes: int | None = None,
) -> None:
    """Write the data set to a new or empty folder; all of it appears at once or nothing does.

    Args:
        root: receives `annotations/instances_{train,val}2017.json`, `train2017` and `val2017`. Two processes may write
            the same root at the same time; one set is kept.
        train: the number of training images. Image i does not depend on this number.
        val: the number of validation images. They use other random streams than the training images.
        side: height and width of every image, in pixels.
        seed: 0 or more.
        processes: the number of processes that share the work; None uses all cores for a large set and one for a small set. The
            set does not depend on this number.

    Raises:
        UserError: `root` is in use or cannot be written, or a number is out of its range.
    """
    if side < _MIN_SIDE or min(train, val) < 1 or seed < 0:
        raise UserError(
            f"shapes: train={train}, val={val}, side={side}, seed={seed}: these must be at least 1, 1, {_MIN_SIDE} and 0"
        )
    categories = [{"id": shape[0], "name": name, "supercategory": "shape"} for name, shape in SHAPES.items()]
    info = {"description": DESCRIPTION, "version": SHAPES_VERSION, "seed": seed, "side": side, "train": train, "val": val}
    if processes is None:
        processes = usable_cores() if train + val >= _MIN_PARALLEL else 1

    def write(new_root: Path) -> None:
        with ExitStack() as stack:
            map_parts: Any = map
            if processes > 1:
                # Not fork, because torch's threads may be running.
                pool = ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn"))
                map_parts = stack.enter_context(pool).map
            for index, (split, number) in enumerate(zip(SPLITS, (train, val), strict=True)):
                folder = image_folder(new_root, split)
                folder.mkdir(parents=True)
                parts = [range(first, min(first + _PART, number)) for first in range(0, number, _PART)]
                written = map_parts(partial(_write_part, folder, (seed, index), side), parts)
                write_annotations(new_root, split, itertools.chain.from_iterable(written), categories, info, LICENCE)

    try:
        write_new(root, write, f"a shapes set of version {SHAPES_VERSION}", _is_complete)
    except BrokenProcessPool:
        raise UserError(f"{root}: {_UNGUARDED}") from None


def _write_part(folder: Path, stream: tuple[int, int], side: int, numbers: range) -> list[AnnotatedImage]:
    """Write some images and return their COCO entries. Each image has its own random stream, whatever their number."""
    generators = (Generator(PCG64(SeedSequence((*stream, number)))) for number in numbers)
    return write_images(folder, (random_scene(generator, side) for generator in generators), numbers.start + 1)


def ensure_shapes(root: Path, config: ShapesConfig) -> None:
    """Write a set to `root` unless it is there already. Several processes may call this at the same time.

    Raises:
        UserError: `root` holds something else, such as a set of another version or size, or it cannot be written.
    """
    root = root.resolve()
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        # This process belongs to a pool and imports the main script again, which would wait for the lock of its own parent.
        raise UserError(f"{root}: {_UNGUARDED}")
    if _holds(root, config):  # Check without the lock first: a finished set may be on a read-only disk.
        return
    try:
        root.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(root.with_name(f".{root.name}.lock")):
            if not _holds(root, config):
                write_shapes(root, train=config.train, val=config.val, side=config.side)
    except OSError as error:
        raise write_error(root, error) or UserError(f"{root}: cannot be written ({error})") from None


def _is_complete(root: Path) -> bool:
    """Return whether a set of this version is at `root`. A set appears all at once, so it is complete."""
    info = _info(root)
    return (info.get("description"), info.get("version")) == (DESCRIPTION, SHAPES_VERSION)


def _holds(root: Path, config: ShapesConfig) -> bool:
    """Return whether the set that a config describes is at `root`. Raises `UserError` if `root` holds a set of another size."""
    if not _is_complete(root):
        return False
    info = _info(root)
    wanted = {"seed": 0, **config.content()}
    found = {name: info.get(name) for name in wanted}
    if found != wanted:
        differing = ", ".join(
            f"{name}={found[name]} instead of {value}" for name, value in wanted.items() if found[name] != value
        )
        raise UserError(f"{root}: holds another shapes set ({differing}); name another folder with data.root, or delete this one")
    return True


def _info(root: Path) -> dict[str, Any]:
    """Return the `info` entry of the set at `root`, or an empty dict if there is none."""
    try:
        info = json.loads(annotation_file(root, "val").read_text(encoding="utf-8"))["info"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return info if isinstance(info, dict) else {}
