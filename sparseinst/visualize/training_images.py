"""Show a data set as training sees it: its first augmented images with their masks, and numbers about the instances.

Everything comes from `TrainSet`, in the order and with the random numbers of a training with the same settings.

K instances of one image, H W height and width of an augmented image in pixels.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from sparseinst.config import Config
from sparseinst.data.annotations import MEDIUM, SMALL
from sparseinst.data.coco import CocoSplit, category_names
from sparseinst.data.loader import BatchOrder, Example, TrainSet
from sparseinst.errors import UserError
from sparseinst.files import atomic
from sparseinst.inference.found import FoundInstances
from sparseinst.progress import progress_bar
from sparseinst.visualize.draw import overlay, picture_grid
from sparseinst.words import counted

_CELL = 400, 320  # width and height of a picture in the sheet, in pixels
_COLUMNS = 4
_MOST_NAMES = 15  # an image with more instances is drawn without their names
_TINY = 4.0  # in mask pixels: the area below which an instance counts as tiny
_MARK = (255, 0, 0)


@dataclass
class Numbers:
    """What training sees of its first images."""

    mask_stride: int
    """The image pixels per side of a pixel of the masks that the model learns."""
    num_maps: int
    """The model's number of maps: at most this many instances of an image can be learned."""
    unit: Literal["image", "tile"] = "image"
    """What is an input of the training."""
    images: int = 0
    sizes: list[tuple[int, int]] = field(default_factory=list)
    """The height and width of each augmented image."""
    instances: list[int] = field(default_factory=list)
    """The number of instances of each image."""
    areas: list[int] = field(default_factory=list)
    """The area of each instance in pixels of the augmented image."""
    categories: dict[str, int] = field(default_factory=dict)
    """The number of instances of each category, by name."""
    tiny: int = 0
    """Instances that cover less than 4 pixels of the masks that the model learns, without the vanished ones."""
    vanished: int = 0
    """Instances without any pixel in these masks."""
    lost: int = 0
    """Annotated instances of the image that have no pixel in the augmented one, for example after a crop."""
    pasted: int = 0
    """Instances that `data.copy_paste` pasted from other images."""
    first_vanished: str | None = None
    """The first image with a vanished instance."""
    skipped: list[str] = field(default_factory=list)
    """The unreadable images, if `data.on_bad_image` is `skip`."""


def draw_training_images(
    config: Config, split: CocoSplit, output: Path, *, mask_stride: int, pictures: int = 12, sample: int = 100
) -> Numbers:
    """Write a sheet of the images that a training uses first, and return numbers about these and some more.

    Args:
        split: the training images.
        output: the sheet's file, PNG or JPEG.
        mask_stride: the stride of the masks that the model learns, see `mask_stride`.
        pictures: the number of images in the sheet.
        sample: the number of images that the numbers are about, at least those in the sheet.

    Raises:
        UserError: `output` is of another type.
        DataError: an image or annotation cannot be used.
    """
    if output.suffix.lower() not in (".png", ".jpg", ".jpeg"):
        raise UserError(f"{output}: the sheet is written as .png or .jpg")
    learned = TrainSet(split, config.data, config.train.seed, mask_stride)
    whole = TrainSet(split, config.data, config.train.seed)
    numbers = Numbers(mask_stride, config.model.decoder.iam.num_maps, "image" if config.data.tile is None else "tile")
    names = category_names(split.categories)
    numbers.categories = dict.fromkeys(names, 0)
    cells: list[tuple[str, Image.Image]] = []
    draws = list(islice(_order(whole, config), max(pictures, sample)))
    with progress_bar("images") as bar:
        for [draw] in bar.track(draws, description="look"):
            example, full = learned[draw], whole[draw]
            _count(example, full, names, numbers)
            if len(cells) < pictures:
                cells.append(_cell(example, full, names))
    with atomic(output) as temporary:
        kind = "PNG" if output.suffix.lower() == ".png" else "JPEG"
        picture_grid(cells, columns=min(_COLUMNS, len(cells))).save(temporary, format=kind)
    return numbers


def _order(dataset: TrainSet, config: Config) -> BatchOrder:
    """Return the first epoch of a training, image by image. The batch size changes neither the order nor the random numbers."""
    one = {"train.batch_size": 1, "train.accumulate": 1, "train.iterations": len(dataset), "train.warmup_iterations": 0}
    return BatchOrder(dataset.split, config.replace(one).train)


def _count(example: Example, full: Example, names: list[str], numbers: Numbers) -> None:
    numbers.images += 1
    numbers.sizes.append((full.image.shape[1], full.image.shape[2]))
    numbers.instances.append(len(full.labels))
    numbers.skipped += full.skipped
    numbers.pasted += full.pasted
    numbers.lost += max(0, sum(not a.crowd for a in full.record.annotations) + full.pasted - len(full.labels))
    numbers.areas += full.masks.flatten(1).sum(1).tolist()
    for label in full.labels.tolist():
        numbers.categories[names[label]] += 1
    covered = _covered(example)
    vanished = int((covered == 0).sum())
    numbers.vanished += vanished
    numbers.tiny += int(((covered > 0) & (covered < _TINY)).sum())
    if vanished and numbers.first_vanished is None:
        numbers.first_vanished = full.record.path.name


def _covered(example: Example) -> NDArray[np.float64]:
    """Return the area of each instance (K,) in pixels of the masks that the model learns."""
    return np.asarray(example.masks.flatten(1).sum(1).numpy() / (1 if example.mask_stride == 1 else 4), dtype=np.float64)


def _cell(example: Example, full: Example, names: list[str]) -> tuple[str, Image.Image]:
    """Return a picture of the sheet and its title. A red ring marks an instance that has no pixel in the learned masks."""
    pixels = example.image.permute(1, 2, 0).numpy()  # H W 3
    scale = min(_CELL[0] / pixels.shape[1], _CELL[1] / pixels.shape[0])
    width, height = (max(1, round(side * scale)) for side in (pixels.shape[1], pixels.shape[0]))
    stride, half = example.mask_stride, 1 if example.mask_stride == 1 else 2
    masks = np.zeros((len(example.labels), height, width), np.bool_)
    for index, mask in enumerate(example.masks.numpy()):
        drawn = (mask >= min(half, max(1, int(mask.max(initial=0))))).repeat(stride, 0).repeat(stride, 1)
        drawn = drawn[: pixels.shape[0], : pixels.shape[1]]
        masks[index] = np.asarray(Image.fromarray(drawn).resize((width, height), Image.Resampling.NEAREST))
    labels = example.labels.numpy()
    shown = [names[label] if len(labels) <= _MOST_NAMES else "" for label in labels.tolist()]
    found = FoundInstances(np.ones(len(labels), np.float32), labels, masks, shown, np.arange(len(labels)))
    picture = overlay(Image.fromarray(pixels).resize((width, height)), found, scores=False)
    vanished = np.flatnonzero(_covered(example) == 0).tolist()
    pen = ImageDraw.Draw(picture)
    for index in vanished:
        y, x = np.argwhere(full.masks[index].numpy()).mean(axis=0) * scale
        pen.ellipse((x - 7, y - 7, x + 7, y + 7), outline=_MARK, width=2)
    frame = Image.new("RGB", _CELL, "white")
    frame.paste(picture, (0, 0))
    return _title(example, names, len(vanished)), frame


def _title(example: Example, names: list[str], vanished: int) -> str:
    counts = Counter(names[label] for label in example.labels.tolist())
    content = ", ".join(f"{count} {name}" for name, count in counts.most_common())
    lost = f"; {vanished} vanish" if vanished else ""
    return f"{example.record.path.name}: {content or 'no instance'}{lost}"


def summary(numbers: Numbers) -> dict[str, Any]:
    """Return the numbers as plain data, with quantiles instead of the values of each image and instance."""
    plain = {key: value for key, value in asdict(numbers).items() if key not in ("sizes", "instances", "areas")}
    sides = np.sqrt(numbers.areas) if numbers.areas else np.zeros(1)
    heights, widths = zip(*numbers.sizes, strict=True)
    areas = np.asarray(numbers.areas)
    return {
        **plain,
        "heights": [min(heights), max(heights)],
        "widths": [min(widths), max(widths)],
        "instances": sum(numbers.instances),
        "instances_per_image": np.quantile(numbers.instances, [0, 0.5, 1]).tolist(),
        "over_num_maps": sum(max(0, count - numbers.num_maps) for count in numbers.instances),
        "instance_sides": np.quantile(sides, [0, 0.05, 0.5, 0.95, 1]).round(1).tolist(),
        "by_size": {
            "small": int((areas < SMALL).sum()),
            "medium": int(((areas >= SMALL) & (areas < MEDIUM)).sum()),
            "large": int((areas >= MEDIUM).sum()),
        },
    }


def lines(found: dict[str, Any]) -> list[str]:
    """Return what `summary` returns as lines of text."""
    least, median, most = found["instances_per_image"]
    low, low5, middle, high95, high = found["instance_sides"]
    unit = "an image" if found["unit"] == "image" else "a tile"
    (h1, h2), (w1, w2) = found["heights"], found["widths"]
    total, stride = max(1, found["instances"]), found["mask_stride"]
    text = [
        f"{counted(found['images'], found['unit'])} after augmentation: {_range(w1, w2)} pixels wide, {_range(h1, h2)} high",
        f"{counted(found['instances'], 'instance')}; in {unit} {least:g} to {most:g}, median {median:g}",
        f"sizes (root of the area in pixels): {low:g} to {high:g}, median {middle:g}, 90% from {low5:g} to {high95:g}",
        "by COCO's limits: " + ", ".join(f"{count} {size} ({count / total:.0%})" for size, count in found["by_size"].items()),
        f"categories: {_categories(found['categories'])}",
        f"masks are learned at 1/{stride} of the image: {counted(found['tiny'], 'instance', 'covers', 'cover')} "
        f"less than {_TINY:g} mask pixels",
    ]
    if found["vanished"]:
        text.append(
            f"{counted(found['vanished'], 'more instance', 'has', 'have')} no pixel at this size, "
            f"the first in {found['first_vanished']}"
        )
    if found["lost"] and found["unit"] == "image":
        text.append(f"{counted(found['lost'], 'annotated instance', 'has', 'have')} no pixel in the augmented image")
    if found["pasted"]:
        text.append(f"{counted(found['pasted'], 'instance', 'was', 'were')} pasted from other images (data.copy_paste)")
    if found["over_num_maps"]:
        text.append(
            f"{counted(found['over_num_maps'], 'instance', 'exceeds', 'exceed')} the model's {found['num_maps']} maps; "
            f"set model.decoder.iam.num_maps{', or use smaller tiles' if found['unit'] == 'tile' else ''}"
        )
    if found["skipped"]:
        text.append(
            f"{counted(len(found['skipped']), 'unreadable image', 'was', 'were')} left out, the first: {found['skipped'][0]}"
        )
    return text


def _categories(counts: dict[str, int]) -> str:
    """Return the counts, largest first, and the categories without an instance."""
    used = [f"{count} {name}" for name, count in Counter(counts).most_common() if count]
    unused = [name for name, count in counts.items() if not count]
    more = f" and {len(unused) - 5} more" if len(unused) > 5 else ""
    return ", ".join(used) + (f"; no instance of {', '.join(unused[:5])}{more}" if unused else "")


def _range(low: int, high: int) -> str:
    return f"{low}" if low == high else f"{low} to {high}"
