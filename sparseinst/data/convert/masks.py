"""Read `masks`: one folder for each image, in which `images/` holds the image and `masks/` one file for each instance.

The files of the instances are black and white. The 2018 Data Science Bowl (nuclei) uses this format.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np

from sparseinst.data.convert.source import Entry, Instance, Report, Size, Source, SourceImage, images_in
from sparseinst.data.images import read_image
from sparseinst.errors import DataError, UserError


def matches(root: Path) -> bool:
    return any(_folders(root))


def read(root: Path, category: str) -> Source:
    """List the images. Raises `UserError` if there are fewer than two."""
    folders = sorted(_folders(root))
    if len(folders) < 2:
        raise UserError(f"{root}: needs at least two folders (one for each image) with images/ and masks/ in them")
    return Source([Entry(folder.name, partial(_load, folder, category)) for folder in folders], [category])


def _folders(root: Path) -> Iterator[Path]:
    return (folder for folder in root.iterdir() if (folder / "images").is_dir() and (folder / "masks").is_dir())


def _load(folder: Path, category: str, report: Report) -> SourceImage | None:
    files = images_in(folder / "images")
    if len(files) != 1:
        report.leave_out(f"{'no image' if not files else 'several images'} in one folder", folder)
        return None

    def instances(_: Size) -> Iterator[Instance]:
        for file in images_in(folder / "masks"):
            try:
                mask = np.asarray(read_image(file).convert("L")) > 127
            except DataError:
                report.leave_out("an unreadable mask", file)
                continue
            yield Instance(category, mask, str(file))

    return SourceImage(files[0], None, instances)
