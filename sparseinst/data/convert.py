"""Convert annotations in other formats to a COCO-format folder, and report what was left out. Imports no torch.

masks    One folder for each image: `images/` holds the image, and `masks/` holds one black-and-white PNG for each instance.
         The 2018 Data Science Bowl (nuclei) uses this format.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from sparseinst.data.coco import encode, read_image
from sparseinst.data.scenes import SPLITS, annotation_file, image_folder, write_new
from sparseinst.errors import DataError, UserError

_SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp")


@dataclass
class Report:
    """The result of a conversion."""

    images: dict[str, int] = field(default_factory=dict)
    """The number of images in each split."""
    instances: dict[str, int] = field(default_factory=dict)
    """The number of instances in each split."""
    left_out: Counter[str] = field(default_factory=Counter)
    """The number of files that were left out, by reason."""
    examples: dict[str, str] = field(default_factory=dict)
    """The first file that was left out, by reason."""

    def leave_out(self, reason: str, file: Path) -> None:
        self.left_out[reason] += 1
        self.examples.setdefault(reason, str(file))


def convert_masks(source: Path, output: Path, *, category: str = "object", val: float = 0.2, seed: int = 0) -> Report:
    """Write a COCO-format folder from folders that hold one mask file for each instance. Return the counts.

    Args:
        source: holds one folder for each image, with `images/` and `masks/` in it.
        output: a new folder.
        category: the name of the only category.
        val: the share of the images in the validation split.
        seed: chooses the validation images, whatever order the file system lists the files in.

    Raises:
        UserError: `source` does not exist or holds fewer than two such folders, or `output` is in use or cannot be written.
        DataError: an image cannot be read.
    """
    all_folders = sorted(_image_folders(source))
    if len(all_folders) < 2:
        raise UserError(f"{source}: needs at least two folders (one for each image) with images/ and masks/ in them")
    val_count = min(max(1, round(val * len(all_folders))), len(all_folders) - 1)
    val_indices = np.random.default_rng(seed).permutation(len(all_folders))[:val_count]
    val_folders = {all_folders[index] for index in val_indices.tolist()}
    report = Report()

    def write(new_root: Path) -> None:
        for split in SPLITS:
            folders = [folder for folder in all_folders if (folder in val_folders) == (split == "val")]
            _write_split(new_root, split, folders, category, report)

    write_new(output, write, "a converted set", lambda root: annotation_file(root, "val").exists())
    return report


def _image_folders(source: Path) -> Iterator[Path]:
    if not source.is_dir():
        raise UserError(f"{source}: no such folder")
    for folder in source.iterdir():
        if (folder / "images").is_dir() and (folder / "masks").is_dir():
            yield folder


def _write_split(root: Path, split: str, folders: list[Path], category: str, report: Report) -> None:
    folder = image_folder(root, split)
    folder.mkdir(parents=True)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for source in folders:
        files = sorted(file for file in (source / "images").iterdir() if file.suffix.lower() in _SUFFIXES)
        if len(files) != 1:
            report.leave_out(f"{'no image' if not files else 'several images'} in one folder", source)
            continue
        picture = read_image(files[0])
        name = f"{source.name}{files[0].suffix.lower()}"
        shutil.copyfile(files[0], folder / name)
        image = {"id": len(images) + 1, "file_name": name, "height": picture.height, "width": picture.width}
        images.append(image)
        for entry in _instances(source / "masks", (picture.height, picture.width), report):
            annotations.append({"id": len(annotations) + 1, "image_id": image["id"], **entry})
    data = {
        "info": {"description": f"converted from {len(folders)} folders of masks"},
        "images": images,
        "annotations": annotations,
        "categories": [{"id": 1, "name": category}],
    }
    file = annotation_file(root, split)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(data), encoding="utf-8")
    report.images[split], report.instances[split] = len(images), len(annotations)


def _instances(folder: Path, size: tuple[int, int], report: Report) -> Iterator[dict[str, Any]]:
    for file in sorted(folder.iterdir()):
        if file.suffix.lower() not in _SUFFIXES:
            continue
        try:
            mask = np.asarray(read_image(file).convert("L")) > 127
        except DataError:
            report.leave_out("an unreadable mask", file)
            continue
        if mask.shape != size:
            report.leave_out("a mask whose size differs from its image", file)
        elif not mask.any():
            report.leave_out("an empty mask", file)
        else:
            rows, columns = np.flatnonzero(mask.any(1)).tolist(), np.flatnonzero(mask.any(0)).tolist()
            box = [columns[0], rows[0], columns[-1] - columns[0] + 1, rows[-1] - rows[0] + 1]
            [run] = encode(mask[None])
            yield {"category_id": 1, "iscrowd": 0, "area": int(mask.sum()), "bbox": box, "segmentation": run}
