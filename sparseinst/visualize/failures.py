"""Show where a model fails: its worst images, the objects that it missed and the instances that it invented, by size."""

from __future__ import annotations

import contextlib
import io
import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from sparseinst.data.annotations import MEDIUM, SMALL
from sparseinst.data.coco import CocoSplit, ImageRecord
from sparseinst.data.images import read_image
from sparseinst.data.masks import decode
from sparseinst.evaluation.coco_metrics import COCO_LIMIT, pycocotools_truth
from sparseinst.files import atomic, make_folder
from sparseinst.inference.found import FoundInstances
from sparseinst.visualize.draw import fitted, outlined, overlay, picture_grid
from sparseinst.visualize.failure_causes import FOUND, INVENTED, MISSED, Cause, Entry, causes_of_invented, causes_of_missed
from sparseinst.words import counted

SIZES = {"small": (0.0, float(SMALL)), "medium": (float(SMALL), float(MEDIUM)), "large": (float(MEDIUM), float("inf"))}
"""COCO's size classes: the bounds of a mask's area in pixels."""
_WHOLE, _PART = (320, 240), (250, 210)
"""Width and height of a picture in a sheet: a whole photo, and the part around an object."""


@dataclass(frozen=True)
class Case:
    """An annotated object that was missed, or an instance that matches no annotated object."""

    image: int
    """The image's id."""
    name: str
    """The category's name."""
    size: str
    """`small`, `medium` or `large`."""
    area: float
    """The mask's area in pixels."""
    score: float | None
    """The score of an invented instance; None for a missed object."""
    mask: Any
    """The mask's polygons or run lengths."""
    reason: str
    """One of `failure_causes.MISSED` or, for an invented instance, of `INVENTED`."""
    nearest: str | None
    """The category of the object or the instance that the reason is about; None if there is none."""
    nearest_score: float | None
    """Its score, if it is an instance."""
    iou: float | None
    """The mask IoU with it."""


@dataclass(frozen=True)
class Failures:
    """The mistakes of a model on a split."""

    image_ap: dict[int, float]
    """Mask AP in percent of each image that has an object, computed as if the image were the whole data set."""
    missed: list[Case]
    """Missed objects, largest first."""
    invented: list[Case]
    """Invented instances, highest score first."""
    found: dict[str, int]
    """Number of objects found, by size."""
    objects: dict[str, int]
    """Number of annotated objects by size, without crowds."""

    def reasons(self) -> dict[str, dict[str, int]]:
        """Return the numbers of `missed` objects and of `invented` instances by reason, without reasons that no case has."""
        counts = Counter(("missed", case.reason) for case in self.missed) + Counter(
            ("invented", case.reason) for case in self.invented
        )
        lists = {"missed": MISSED, "invented": INVENTED}
        return {kind: {name: counts[kind, name] for name in names if counts[kind, name]} for kind, names in lists.items()}


def find_failures(annotations: Path, results: list[dict[str, Any]], image_ids: Sequence[int], score: float) -> Failures:
    """Match instances to objects as COCO does: within a category, best score first, each object at most once.

    Args:
        results: the instances in COCO's result format.
        image_ids: the ids of the evaluated images.
        score: instances below this score count neither as found nor as invented; an image's AP uses all instances.

    Raises:
        DataError: the annotations hold an invalid polygon.
    """
    with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress
        truth = pycocotools_truth(annotations)
        everything = _loaded(truth, results)
        confident = _loaded(truth, [entry for entry in results if entry["score"] >= score])
        image_ap = {image: ap for image in image_ids if (ap := _image_ap(truth, everything, image)) is not None}
        matched = _evaluated(truth, confident, list(image_ids), [FOUND])
    weak = defaultdict(list)
    for entry in results:
        if entry["score"] < score:
            weak[entry["image_id"]].append(entry)
    names = {category["id"]: category["name"] for category in truth.dataset["categories"]}
    unfound: defaultdict[int, list[Entry]] = defaultdict(list)
    strange: defaultdict[int, list[Entry]] = defaultdict(list)
    right: defaultdict[int, list[Entry]] = defaultdict(list)
    found, objects = dict.fromkeys(SIZES, 0), dict.fromkeys(SIZES, 0)
    for entry in filter(None, matched.evalImgs):
        image = int(entry["image_id"])
        for number, match, ignored in zip(entry["gtIds"], entry["gtMatches"][0], entry["gtIgnore"], strict=True):
            annotation = truth.anns[number]
            size = _size(annotation["area"])
            if not ignored:
                objects[size] += 1
                found[size] += bool(match)
                if not match:
                    unfound[image].append(annotation)
        for number, match, ignored in zip(entry["dtIds"], entry["dtMatches"][0], entry["dtIgnore"][0], strict=True):
            if not ignored:
                (right if match else strange)[image].append(confident.anns[number])
    missed, invented = [], []
    for image in unfound.keys() | strange.keys():
        sides = (truth.imgs[image]["height"], truth.imgs[image]["width"])
        lost, extra = unfound[image], strange[image]
        real = [annotation for annotation in truth.imgToAnns[image] if not annotation.get("iscrowd")]
        causes = causes_of_missed(lost, extra, right[image], weak[image], sides)
        missed += [_case(annotation, cause, names) for annotation, cause in zip(lost, causes, strict=True)]
        causes = causes_of_invented(extra, real, sides)
        invented += [_case(instance, cause, names) for instance, cause in zip(extra, causes, strict=True)]
    missed.sort(key=lambda case: (-case.area, case.image))
    invented.sort(key=lambda case: (-(case.score or 0.0), case.image))
    return Failures(image_ap, missed, invented, found, objects)


def _case(entry: Entry, cause: Cause, names: dict[int, str]) -> Case:
    """Return a missed object (an annotation) or an invented instance (a result) with its cause."""
    nearest = cause.nearest or {}
    return Case(
        image=int(entry["image_id"]),
        name=names[entry["category_id"]],
        size=_size(entry["area"]),
        area=float(entry["area"]),
        score=entry.get("score"),
        mask=entry["segmentation"],
        reason=cause.reason,
        nearest=names.get(nearest.get("category_id", -1)),
        nearest_score=nearest.get("score"),
        iou=cause.iou,
    )


def _loaded(truth: COCO, results: list[dict[str, Any]]) -> COCO:
    # pycocotools changes the entries that it is given, and it fails on an empty list.
    return truth.loadRes([dict(entry) for entry in results]) if results else COCO()


def _size(area: float) -> str:
    return next(name for name, (low, high) in SIZES.items() if low <= area < high)


def _evaluated(truth: COCO, found: COCO, images: list[int], thresholds: list[float] | None = None) -> COCOeval:
    """Return pycocotools' matching with all sizes together; `thresholds` are the IoUs, COCO's ten if None."""
    evaluation = COCOeval(truth, found, "segm")
    evaluation.params.imgIds = images
    evaluation.params.areaRng, evaluation.params.areaRngLbl = [[0, 1e10]], ["all"]
    # An image with more objects than COCO's limit needs a higher one, or found objects would count as missed.
    evaluation.params.maxDets = [max((COCO_LIMIT, *(len(truth.imgToAnns[image]) for image in images)))]
    if thresholds is not None:
        evaluation.params.iouThrs = np.array(thresholds)
    evaluation.evaluate()
    return evaluation


def _image_ap(truth: COCO, found: COCO, image: int) -> float | None:
    """Return one image's mask AP in percent, or None if the image has no object."""
    evaluation = _evaluated(truth, found, [image])
    evaluation.accumulate()
    precision = evaluation.eval["precision"]
    known = precision[precision > -1]
    return 100 * float(known.mean()) if known.size else None


def write_failures(
    failures: Failures, split: CocoSplit, results: list[dict[str, Any]], output: Path, *, score: float, most: int = 12
) -> list[Path]:
    """Write `worst.png`, `missed-SIZE.png`, `invented.png` and, with all of it as data, `failures.json`. Return their paths.

    Args:
        score: draw only instances of at least this score.
        most: the largest number of pictures a sheet.
    """
    make_folder(output)
    by_id = {image.id: image for image in split.images}
    written = []

    def save(name: str, pictures: list[tuple[str, Image.Image]], columns: int) -> None:
        if pictures:
            with atomic(output / name) as temporary:
                picture_grid(pictures, columns=columns).save(temporary, format="PNG")
            written.append(output / name)

    worst = sorted(failures.image_ap, key=lambda image: (failures.image_ap[image], image))[:most]
    pictures = []
    for image in worst:
        record = by_id[image]
        photo = read_image(record.path, (record.height, record.width))
        names = {category.id: category.name for category in split.categories}
        ours = [entry for entry in results if entry["image_id"] == image and entry["score"] >= score]
        theirs = [(split.categories[a.label].name, a.segmentation) for a in record.annotations if not a.crowd]
        truth = _as_instances(photo, [(name, 1.0, segmentation) for name, segmentation in theirs])
        found = _as_instances(photo, [(names[e["category_id"]], e["score"], e["segmentation"]) for e in ours])
        pictures += [
            (f"{record.path.name}: annotated", fitted(overlay(photo, truth, scores=False), *_WHOLE)),
            (f"AP {failures.image_ap[image]:.1f}: {_mistakes(failures, image)}", fitted(overlay(photo, found), *_WHOLE)),
        ]
    save("worst.png", pictures, 4)
    for size in SIZES:
        cases = [case for case in failures.missed if case.size == size][:most]
        save(f"missed-{size}.png", [_picture(case, by_id[case.image]) for case in cases], 4)
    save("invented.png", [_picture(case, by_id[case.image]) for case in failures.invented[:most]], 4)
    numbers = asdict(failures)
    for case in (*numbers["missed"], *numbers["invented"]):
        del case["mask"]
    with atomic(output / "failures.json") as temporary:
        data = {"score": score, "iou": FOUND, "reasons": failures.reasons(), **numbers}
        temporary.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    return [*written, output / "failures.json"]


def _mistakes(failures: Failures, image: int) -> str:
    missed, invented = (sum(case.image == image for case in cases) for cases in (failures.missed, failures.invented))
    return f"{missed} missed, {counted(invented, 'false positive')}"


def _picture(case: Case, record: ImageRecord) -> tuple[str, Image.Image]:
    """Return the title, in two lines, and the picture of a mistake."""
    what = f"{case.name}, {round(case.area)} px" if case.score is None else f"{case.name} {case.score:.2f}"
    why = case.reason
    if case.iou is not None:
        score = f" {case.nearest_score:.2f}" if case.nearest_score is not None else ""
        why += f" ({case.nearest}{score}, IoU {case.iou:.2f})"
    return f"{record.path.name}: {what}\n{why}", _crop(case, record)


def _as_instances(photo: Image.Image, instances: list[tuple[str, float, Any]]) -> FoundInstances:
    """Return (name, score, segmentation) triples in the form that `overlay` draws."""
    masks = [decode(segmentation, photo.height, photo.width).astype(bool) for _, _, segmentation in instances]
    count = len(instances)
    return FoundInstances(
        np.array([score for _, score, _ in instances], dtype=np.float32),
        np.zeros(count, dtype=np.int64),
        np.stack(masks) if masks else np.zeros((0, photo.height, photo.width), dtype=np.bool_),
        [name for name, _, _ in instances],
        np.zeros(count, dtype=np.int64),
    )


def _crop(case: Case, record: ImageRecord) -> Image.Image:
    """Return the part of the photo around an object, with the object outlined."""
    photo = read_image(record.path, (record.height, record.width))
    mask: NDArray[np.bool_] = decode(case.mask, record.height, record.width).astype(bool)
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(rows):
        return fitted(photo, *_PART)
    side = max(48, int(1.8 * max(rows[-1] - rows[0], columns[-1] - columns[0])))
    top, left = (int(ends[0] + ends[-1] - side) // 2 for ends in (rows, columns))
    box = (max(0, left), max(0, top), min(record.width, left + side), min(record.height, top + side))
    part = mask[box[1] : box[3], box[0] : box[2]]
    return fitted(outlined(photo.crop(box), part, _PART[0]), *_PART)
