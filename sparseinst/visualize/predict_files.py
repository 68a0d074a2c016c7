"""Segment image and video files; write overlays and COCO JSON."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sparseinst.data.coco import encode
from sparseinst.errors import DataError, UserError
from sparseinst.files import atomic, make_folder
from sparseinst.inference.predict import FoundInstances, Predictor, as_image
from sparseinst.progress import progress_bar
from sparseinst.visualize.draw import activation_sheet, overlay
from sparseinst.visualize.video import VIDEO_SUFFIXES, predict_video

_log = logging.getLogger(__name__)

IMAGE_SUFFIXES = {".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}


def is_video(file: Path) -> bool:
    return file.suffix.lower() in VIDEO_SUFFIXES


def find_images(inputs: Iterable[Path], *, videos: bool = False) -> list[Path]:
    """Return the given files and the images in the given folders.

    Args:
        videos: also return videos.

    Raises:
        UserError: an input is neither a file nor a folder, or there is no image.
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


class _CocoResult:
    """The content of `predictions.json`, gathered image by image."""

    def __init__(self, predictor: Predictor) -> None:
        self.predictor = predictor
        self.empty = 0
        """The number of images and frames without an instance."""
        self.highest: float | None = None
        """The highest score in all images, also if it was left out."""
        self.data: dict[str, Any] = {"images": [], "annotations": [], "categories": list(map(asdict, predictor.categories))}

    def add(self, found: FoundInstances, size: tuple[int, int], **about: Any) -> None:
        """Add one image or frame.

        Args:
            size: (width, height).
            about: the file's name and, in a video, the frame's number.
        """
        self.empty += not len(found.scores)
        self.highest = max((value for value in (self.highest, found.highest) if value is not None), default=None)
        images, annotations = self.data["images"], self.data["annotations"]
        images.append({"id": len(images) + 1, **about, "height": size[1], "width": size[0]})
        annotations += as_annotations(found, images[-1]["id"], self.predictor, len(annotations) + 1)


@dataclass(frozen=True)
class Prediction:
    """What `predict_files` found."""

    failed: int
    """The number of files that could not be read. A warning named each of them."""
    images: int
    """The number of images and video frames."""
    empty: int
    """The number of images and frames without an instance."""
    instances: int
    highest: float | None
    """The highest score, also if its instance was left out; None if no image has one."""


def predict_files(
    predictor: Predictor, files: list[Path], output: Path, *, score: float, top: int | None = None, maps: bool = False
) -> Prediction:
    """Write an overlay for each image or video and one `predictions.json` in COCO format for all.

    Args:
        score: instances below this score are left out.
        top: keep only this many instances of an image, those with the highest scores.
        maps: also write a sheet of each image's activation maps, `NAME-maps.png`.

    Raises:
        UserError: there is a video and PyAV is not installed, or an overlay would overwrite its own image.
    """
    make_folder(output)
    names = _overlay_names(files)
    for file, name in zip(files, names, strict=True):
        if file.resolve() == (output / name).resolve():
            raise UserError(f"{file} would be overwritten; name another folder with --output")
    if maps and any(map(is_video, files)):
        _log.warning("--maps draws activation maps for images only; the videos get none")
    result = _CocoResult(predictor)
    failed = 0
    with progress_bar("files") as bar:
        for file, name in zip(bar.track(files, description="predict"), names, strict=True):
            try:
                if is_video(file):
                    _predict_video(predictor, file, output / name, result, score, top)
                else:
                    _predict_image(predictor, file, output / name, result, score, top, maps)
            except DataError as error:
                _log.warning("%s", error)
                failed += 1
    with atomic(output / "predictions.json") as temporary:
        temporary.write_text(json.dumps(result.data), encoding="utf-8")
    return Prediction(failed, len(result.data["images"]), result.empty, len(result.data["annotations"]), result.highest)


def _predict_image(
    predictor: Predictor, file: Path, drawn: Path, result: _CocoResult, score: float, top: int | None, maps: bool
) -> None:
    image = as_image(file)
    found = predictor.predict(image, score, top=top, activations=maps)
    with atomic(drawn) as temporary:
        overlay(image, found).save(temporary, format="JPEG", quality=92)
    if maps:
        with atomic(drawn.with_name(f"{drawn.stem}-maps.png")) as temporary:
            activation_sheet(image, found).save(temporary, format="PNG")
    result.add(found, image.size, file_name=str(file))


def _predict_video(predictor: Predictor, file: Path, drawn: Path, result: _CocoResult, score: float, top: int | None) -> None:
    def keep(number: int, found: FoundInstances, size: tuple[int, int]) -> None:
        result.add(found, size, file_name=str(file), frame=number)

    predict_video(predictor, file, drawn, keep, score=score, top=top)


def as_annotations(found: FoundInstances, image_id: int, predictor: Predictor, first_id: int) -> list[dict[str, Any]]:
    """Return the instances of one image as COCO annotations with scores."""
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
            zip(found.labels, found.scores, found.masks, encode(found.masks), strict=True)
        )
    ]


def _overlay_names(files: list[Path]) -> list[str]:
    """Return a file name for each overlay. The names differ even if files in several folders have the same name."""
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
