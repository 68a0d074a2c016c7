"""Images and videos in, overlays and COCO JSON out."""

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
from sparseinst.engine.video import VIDEO_SUFFIXES, predict_video
from sparseinst.errors import DataError, UserError
from sparseinst.paths import atomic

_log = logging.getLogger(__name__)

IMAGE_SUFFIXES = {".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}


def is_video(file: Path) -> bool:
    return file.suffix.lower() in VIDEO_SUFFIXES


def find_images(inputs: Iterable[Path], *, videos: bool = False) -> list[Path]:
    """The images named, and those in the folders named. Raises `UserError` for what is neither, and where there are none.

    Args:
        videos: find videos, too.
    """
    files: list[Path] = []
    wanted = IMAGE_SUFFIXES | VIDEO_SUFFIXES if videos else IMAGE_SUFFIXES
    for path in inputs:
        if path.is_dir():
            files += sorted(file for file in path.iterdir() if file.suffix.lower() in wanted)
        elif path.is_file():
            files.append(path)
        else:
            raise UserError(f"{path}: no such image or folder")
    if not files:
        raise UserError(f"no image{' or video' if videos else ''} ({', '.join(sorted(wanted))}) in {', '.join(map(str, inputs))}")
    return files


class _Result:
    """What is found, as it is gathered for `predictions.json`."""

    def __init__(self, predictor: Predictor) -> None:
        self.predictor = predictor
        self.data: dict[str, Any] = {"images": [], "annotations": [], "categories": list(map(asdict, predictor.categories))}

    def add(self, prediction: Prediction, size: tuple[int, int], **about: Any) -> None:
        """One image or frame, of (width, height); `about` says which."""
        images, annotations = self.data["images"], self.data["annotations"]
        images.append({"id": len(images) + 1, **about, "height": size[1], "width": size[0]})
        annotations += as_annotations(prediction, images[-1]["id"], self.predictor, len(annotations) + 1)


def predict_files(predictor: Predictor, files: list[Path], output: Path, *, score: float, maps: bool = False) -> int:
    """Write an overlay for each image or video and one `predictions.json` in COCO format for all.

    Args:
        maps: also a sheet of each image's activation maps, `NAME-maps.png`.

    Returns:
        How many files could not be read; each is named in a warning.

    Raises:
        UserError: a video, where PyAV is not installed; an overlay that would replace its own image.
    """
    make_folder(output)
    names = _overlay_names(files)
    for file, name in zip(files, names, strict=True):
        if file.resolve() == (output / name).resolve():
            raise UserError(f"{file}: would be written over: name another folder with --output")
    if maps and any(map(is_video, files)):
        _log.warning("--maps is for images: videos get none")
    result = _Result(predictor)
    failed = 0
    with progress_bar("files") as bar:
        for file, name in zip(bar.track(files, description="predict"), names, strict=True):
            try:
                if is_video(file):
                    _predict_video(predictor, file, output / name, result, score)
                else:
                    _predict_image(predictor, file, output / name, result, score, maps)
            except DataError as error:
                _log.warning("%s", error)
                failed += 1
    with atomic(output / "predictions.json") as temporary:
        temporary.write_text(json.dumps(result.data), encoding="utf-8")
    return failed


def _predict_image(predictor: Predictor, file: Path, drawn: Path, result: _Result, score: float, maps: bool) -> None:
    image = as_image(file)
    prediction = predictor.predict(image, score, activations=maps)
    with atomic(drawn) as temporary:
        overlay(image, prediction).save(temporary, format="JPEG", quality=92)
    if maps:
        with atomic(drawn.with_name(f"{drawn.stem}-maps.png")) as temporary:
            activation_sheet(image, prediction).save(temporary, format="PNG")
    result.add(prediction, image.size, file_name=str(file))


def _predict_video(predictor: Predictor, file: Path, drawn: Path, result: _Result, score: float) -> None:
    def keep(number: int, prediction: Prediction, size: tuple[int, int]) -> None:
        result.add(prediction, size, file_name=str(file), frame=number)

    predict_video(predictor, file, drawn, keep, score=score)


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
        suffix = ".mp4" if is_video(file) else ".jpg"
        name, number = f"{file.stem}{suffix}", 2
        while name in taken:
            name, number = f"{file.stem}-{number}{suffix}", number + 1
        taken.add(name)
        names.append(name)
    return names
