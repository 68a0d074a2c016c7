"""Segment image and video files; write overlays and COCO JSON."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from sparseinst.data.masks import encode_runs
from sparseinst.errors import DataError, UserError
from sparseinst.files import atomic, check_writable, distinct_names
from sparseinst.inference.compact import CompactMasks
from sparseinst.inference.found import CompactInstances, FoundInstances
from sparseinst.inference.predict import Predictor, as_image
from sparseinst.progress import progress_bar
from sparseinst.visualize.contact_sheet import ContactSheets, sheet_names
from sparseinst.visualize.draw import MOST_MAPS, ColourBy, activation_sheet, overlay
from sparseinst.visualize.inputs import is_video
from sparseinst.visualize.video import predict_video

_log = logging.getLogger(__name__)


class _CocoResult:
    """The content of `predictions.json`, gathered image by image."""

    def __init__(self, predictor: Predictor) -> None:
        self.predictor = predictor
        self.empty = 0
        """The number of images and frames without an instance."""
        self.left_out = self.full = 0
        """See `Prediction`."""
        self.highest: float | None = None
        """The highest score in all images, also if it was left out."""
        self.data: dict[str, Any] = {"images": [], "annotations": [], "categories": list(map(asdict, predictor.categories))}

    def add(self, found: CompactInstances, size: tuple[int, int], **about: Any) -> None:
        """Add one image or frame.

        Args:
            size: (width, height).
            about: the file's name and, in a video, the frame's number.
        """
        self.empty += not len(found.scores)
        self.left_out += found.before_top - len(found.scores)
        self.full += found.full
        self.highest = max((value for value in (self.highest, found.highest) if value is not None), default=None)
        images, annotations = self.data["images"], self.data["annotations"]
        images.append({"id": len(images) + 1, **about, "height": size[1], "width": size[0]})
        annotations += as_annotations(found, images[-1]["id"], self.predictor, len(annotations) + 1)

    def write(self, file: Path) -> None:
        """Write the JSON, one annotation after the other, since the masks of large images are long texts."""
        with atomic(file) as temporary, temporary.open("w", encoding="utf-8") as target:
            target.writelines(self._parts())

    def _parts(self) -> Iterator[str]:
        yield f'{{"images": {json.dumps(self.data["images"])}, "annotations": ['
        for number, annotation in enumerate(self.data["annotations"]):
            yield (", " if number else "") + json.dumps(annotation)
        yield f'], "categories": {json.dumps(self.data["categories"])}}}'


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
    left_out: int = 0
    """The number of instances at the score that `top` left out."""
    full: int = 0
    """The number of images and frames in which every map of the model found an instance, in the image or in one of its tiles, so
    that there may be more objects."""
    sheets: tuple[Path, ...] = ()
    """The files of the contact sheets."""


def predict_files(
    predictor: Predictor,
    files: list[Path],
    output: Path,
    *,
    score: float,
    top: int | None = None,
    maps: bool = False,
    sheet: bool = False,
    colour: ColourBy | None = None,
) -> Prediction:
    """Write an overlay for each image or video and one `predictions.json` in COCO format for all.

    Args:
        score: instances below this score are left out.
        top: keep only this many instances of an image, those with the highest scores.
        maps: also write a sheet of each image's activation maps, `NAME-maps.png`.
        sheet: also write contact sheets with all overlays, `sheet-1.jpg` and so on; a video shows its frame with most instances.
        colour: see `overlay`; None gives each instance of an image a colour, and in a video each instance activation map.

    Raises:
        UserError: there is a video and PyAV is not installed, or an overlay would overwrite its own image.
    """
    check_writable(output / "predictions.json")
    sheets = sheet_names(len(files)) if sheet else []
    names = _overlay_names(files, sheets)
    maps_names = [f"{Path(name).stem}-maps.png" for name in names] if maps else []
    written = {(output / name).resolve() for name in (*sheets, *names, *maps_names)}
    for file in files:
        if file.resolve() in written:
            raise UserError(f"{file} would be overwritten; name another folder with --output")
    if maps and any(map(is_video, files)):
        _log.warning("--maps draws activation maps for images only; the videos get none")
    result, contacts = _CocoResult(predictor), ContactSheets(output) if sheet else None
    failed = 0
    with progress_bar("files") as bar:
        for file, name in zip(bar.track(files, description="predict"), names, strict=True):
            try:
                if is_video(file):
                    drawn = _predict_video(predictor, file, output / name, result, score, top, colour or "map")
                else:
                    drawn = _predict_image(predictor, file, output / name, result, score, top, maps, colour or "instance")
                if contacts is not None:
                    contacts.add(file.name, drawn)
                del drawn  # the next image needs the memory
            except DataError as error:
                _log.warning("%s", error)
                failed += 1
    result.write(output / "predictions.json")
    counts = failed, len(result.data["images"]), result.empty, len(result.data["annotations"])
    pages = contacts.finish() if contacts is not None else ()
    return Prediction(*counts, result.highest, result.left_out, result.full, pages)


def _predict_image(
    predictor: Predictor,
    file: Path,
    drawn: Path,
    result: _CocoResult,
    score: float,
    top: int | None,
    maps: bool,
    colour: ColourBy,
) -> Image.Image:
    image = as_image(file)
    found = predictor.predict_compact(image, score, top=top, activations=maps and MOST_MAPS)
    result.add(found, image.size, file_name=str(file))
    picture = overlay(image, found, colour=colour)
    with atomic(drawn) as temporary:
        picture.save(temporary, format="JPEG", quality=92)
    if maps:
        with atomic(drawn.with_name(f"{drawn.stem}-maps.png")) as temporary:
            activation_sheet(image, found).save(temporary, format="PNG")
    return picture


def _predict_video(
    predictor: Predictor, file: Path, drawn: Path, result: _CocoResult, score: float, top: int | None, colour: ColourBy
) -> Image.Image:
    def keep(number: int, found: CompactInstances, size: tuple[int, int]) -> None:
        result.add(found, size, file_name=str(file), frame=number)

    return predict_video(predictor, file, drawn, keep, score=score, top=top, colour=colour)


def as_annotations(
    found: FoundInstances | CompactInstances, image_id: int, predictor: Predictor, first_id: int
) -> list[dict[str, Any]]:
    """Return the instances of one image as COCO annotations with scores."""
    masks = CompactMasks.of(found.masks)
    return [
        {
            "id": first_id + index,
            "image_id": image_id,
            "category_id": predictor.categories[int(label)].id,
            "score": float(score),
            "segmentation": encode_runs(masks.column_runs(index), masks.shape[1:]),
            "area": masks.area(index),
            "iscrowd": 0,
        }
        for index, (label, score) in enumerate(zip(found.labels, found.scores, strict=True))
    ]


def _overlay_names(files: list[Path], reserved: Iterable[str] = ()) -> list[str]:
    """Return a file name for each overlay, none of them reserved. They differ even if files in several folders have one name."""
    return distinct_names([f"{file.stem}{'.mp4' if is_video(file) else '.jpg'}" for file in files], reserved)
