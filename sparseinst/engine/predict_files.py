"""Files in, overlays and COCO JSON out."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from sparseinst.data.coco import encode
from sparseinst.engine.draw import activation_sheet, overlay
from sparseinst.engine.files import make_folder
from sparseinst.engine.monitor import progress_bar
from sparseinst.engine.predict import Prediction, Predictor, as_image
from sparseinst.errors import DataError, UserError
from sparseinst.paths import atomic

_log = logging.getLogger(__name__)

IMAGE_SUFFIXES = {".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}


def find_images(inputs: Iterable[Path]) -> list[Path]:
    """The images named, and those in the folders named. Raises `UserError` for what is neither, and where there are none."""
    files: list[Path] = []
    for path in inputs:
        if path.is_dir():
            files += sorted(file for file in path.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES)
        elif path.is_file():
            files.append(path)
        else:
            raise UserError(f"{path}: no such image or folder")
    if not files:
        raise UserError(f"no image ({', '.join(sorted(IMAGE_SUFFIXES))}) in {', '.join(map(str, inputs))}")
    return files


def predict_files(predictor: Predictor, files: list[Path], output: Path, *, score: float, maps: bool = False) -> int:
    """Write an overlay for each image and one `predictions.json` in COCO format for all.

    Args:
        maps: also a sheet of each image's activation maps, `NAME-maps.png`.

    Returns:
        How many files could not be read; each is named in a warning.
    """
    make_folder(output)
    result: dict[str, Any] = {"images": [], "annotations": [], "categories": list(map(asdict, predictor.categories))}
    failed = 0
    names = _overlay_names(files)
    with progress_bar("images") as bar:
        for number, file in enumerate(bar.track(files, description="predict"), start=1):
            try:
                image = as_image(file)
            except DataError as error:
                _log.warning("%s", error)
                failed += 1
                continue
            prediction = predictor.predict(image, score, activations=maps)
            with atomic(output / names[number - 1]) as temporary:
                overlay(image, prediction).save(temporary, format="JPEG", quality=92)
            if maps:
                with atomic(output / f"{Path(names[number - 1]).stem}-maps.png") as temporary:
                    activation_sheet(image, prediction).save(temporary, format="PNG")
            entry = {"id": number, "file_name": str(file), "height": image.height, "width": image.width}
            result["images"].append(entry)
            result["annotations"] += as_annotations(prediction, number, predictor, len(result["annotations"]) + 1)
    with atomic(output / "predictions.json") as temporary:
        temporary.write_text(json.dumps(result), encoding="utf-8")
    return failed


def as_annotations(prediction: Prediction, image_id: int, predictor: Predictor, first_id: int) -> list[dict[str, Any]]:
    """The instances of one image as COCO annotations, with their score."""
    return [
        {
            "id": first_id + index,
            "image_id": image_id,
            "category_id": predictor.categories[int(label)].id,
            "score": float(score),
            "segmentation": run,
            "area": int(np.count_nonzero(mask)),
            "iscrowd": 0,
        }
        for index, (label, score, mask, run) in enumerate(
            zip(prediction.labels, prediction.scores, prediction.masks, encode(prediction.masks), strict=True)
        )
    ]


def _overlay_names(files: list[Path]) -> list[str]:
    """A name of its own for each overlay, also where folders hold files of one name."""
    names: list[str] = []
    taken: set[str] = set()
    for file in files:
        name, number = f"{file.stem}.jpg", 2
        while name in taken:
            name, number = f"{file.stem}-{number}.jpg", number + 1
        taken.add(name)
        names.append(name)
    return names
