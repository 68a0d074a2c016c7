"""Draw instances over their image.

Shapes: H W height and width in pixels, h w height and width of a map.
"""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from scipy.ndimage import binary_erosion

from sparseinst.inference.compact import CompactMasks, Runs, strip_rows
from sparseinst.inference.found import CompactInstances, FoundInstances
from sparseinst.visualize.labels import Box, place_labels

_Font = ImageFont.FreeTypeFont | ImageFont.ImageFont
ColourBy = Literal["instance", "class", "map"]
Colour = tuple[int, int, int]
"""Red, green and blue, 0 to 255."""
MOST_MAPS = 8
"""The largest number of instances in a sheet of activation maps."""


def overlay(
    image: Image.Image,
    found: FoundInstances | CompactInstances,
    *,
    opacity: float = 0.45,
    colour: ColourBy = "instance",
    scores: bool = True,
) -> Image.Image:
    """Return the image with each mask tinted and outlined, and with its name and score beside it.

    The best instances are drawn last. The outline is a line of the instance's colour and a white line around it, so that it is
    visible on objects of any colour.

    Many labels would hide the image. If they would cover more than a tenth of it and all objects have one name, the name is left
    out. If that is not enough, there is no label.

    Args:
        colour: what has a colour of its own: each `instance` of the image by its rank, each `class`, or each instance activation
            `map`. Those of classes and maps are the same in every image.
        scores: write the scores beside the names.
    """
    masks = CompactMasks.of(found.masks)
    line = max(1, round(min(image.size) / 240))
    ranks = {"map": found.maps.tolist(), "class": found.labels.tolist(), "instance": list(range(len(found.scores)))}[colour]
    every = palette(max(ranks, default=0) + 1)
    colours = [every[rank] for rank in ranks]
    order = list(range(len(found.scores)))[::-1]
    drawn = _tinted(image, masks, [(index, colours[index]) for index in order], line, opacity)
    pen = ImageDraw.Draw(drawn)
    font = ImageFont.load_default(size=max(9, min(image.size) / 32))
    numbers = [f"{score:.2f}" if scores else "" for score in found.scores]
    texts = [f"{name} {number}".strip() for name, number in zip(found.names, numbers, strict=True)]
    sizes = _plate_sizes(pen, font, texts)
    if _crowded(sizes, image.size) and len(set(found.names)) == 1:
        texts = numbers
        sizes = _plate_sizes(pen, font, texts)
    if _crowded(sizes, image.size):
        return drawn
    for index, place in enumerate(place_labels(masks, sizes)):
        if place is not None and texts[index]:
            _label(pen, font, texts[index], place, colours[index], _nearest_pixel(masks.runs(index), place))
    return drawn


_FEW = 10
"""So many labels are drawn in any case."""
_MOST_LABELLED = 0.1
"""The largest part of the image that all labels together may cover."""


def _plate_sizes(pen: ImageDraw.ImageDraw, font: _Font, texts: Sequence[str]) -> list[tuple[float, float]]:
    """Return the width and height of each label."""
    boxes = [pen.textbbox((0, 0), text, font=font) for text in texts]
    return [(box[2] - box[0] + 4, box[3] - box[1] + 4) for box in boxes]


def _crowded(plates: Sequence[tuple[float, float]], size: tuple[int, int]) -> bool:
    """Tell whether labels of these sizes would cover too much of an image of this size."""
    return len(plates) > _FEW and sum(width * height for width, height in plates) > _MOST_LABELLED * size[0] * size[1]


def _tinted(
    image: Image.Image, masks: CompactMasks, drawn: Sequence[tuple[int, Colour]], line: int, opacity: float
) -> Image.Image:
    """Return the image with these masks, by index and colour in the order in which they are drawn.

    The colours are mixed in floating point, which takes 12 bytes a pixel, so only a strip is mixed at a time.
    """
    whole = Image.new("RGB", image.size)
    step, room = strip_rows(image.width), line + 1
    boxes = {index: masks.box(index) for index, _ in drawn}
    for start in range(0, image.height, step):
        end = min(image.height, start + step)
        canvas = np.array(image.crop((0, start, image.width, end)), dtype=np.float32)  # rows W 3
        first, last = max(0, start - room), min(image.height, end + room)
        for index, colour in drawn:
            box = boxes[index]
            if box is not None and box[1] < last and box[3] > first:
                left, right = max(0, box[0] - room), min(image.width, box[2] + room)
                part = masks.window(index, (left, first, right, last))
                _tint(canvas[:, left:right], part, colour, line, opacity, above=start - first)
        whole.paste(Image.fromarray(canvas.round().astype(np.uint8)), (0, start))
    return whole


def _tint(
    canvas: NDArray[np.float32], mask: NDArray[np.bool_], colour: Colour, line: int, opacity: float, *, above: int = 0
) -> None:
    """Draw one mask onto the canvas (rows, W, 3). Only the box around the mask is computed.

    Args:
        mask: the rows of the canvas, perhaps with more rows above and below it, since they have a part in the outline.
        above: the number of these rows above the canvas.
    """
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    if not len(rows):
        return
    room = line + 1
    top, bottom = max(0, rows[0] - room), rows[-1] + room + 1
    across = np.s_[max(0, columns[0] - room) : columns[-1] + room + 1]
    first, last = max(top, above), min(bottom, above + len(canvas))  # the rows on the canvas
    if last <= first:
        return
    part, around, shown = canvas[first - above : last - above, across], mask[top:bottom, across], np.s_[first - top : last - top]
    inside = around[shown]
    mixed = (1 - opacity) * part + opacity * np.array(colour, dtype=np.float32)
    np.copyto(part, mixed, where=inside[..., None])  # several times as fast as `part[inside] = ...`
    part[outline(~around, max(1, line // 2), edge=True)[shown]] = 255
    part[outline(around, line)[shown]] = colour


def activation_sheet(
    image: Image.Image, found: FoundInstances | CompactInstances, *, most: int = MOST_MAPS, width: int = 240
) -> Image.Image:
    """Return a sheet with one column for each instance, best first: its activation map over the image, above its mask (Figure 4).

    Args:
        most: the largest number of columns.
        width: the width of a column in pixels.
    """
    assert found.activations is not None
    height = max(1, round(image.height * width / image.width))
    small = image.resize((width, height), Image.Resampling.BILINEAR)
    font = ImageFont.load_default(size=max(9, width / 18))
    shown = min(most, len(found.scores))
    gap, title = 4, round(width / 18) + 8
    rows = 2 if shown else 0
    sheet = Image.new("RGB", (max(1, shown) * (width + gap) + gap, rows * (height + gap) + gap + title), "white")
    colours = palette(max(shown, 1))
    for index in range(shown):
        left = gap + index * (width + gap)
        text = f"{found.names[index]} {found.scores[index]:.2f}, map {found.maps[index]}"
        ImageDraw.Draw(sheet).text((left, 2), text, fill="black", font=font)
        sheet.paste(heat(small, found.activations[index]), (left, title))
        canvas = np.asarray(small, dtype=np.float32).copy()
        mask = Image.fromarray(found.masks[index]).resize((width, height), Image.Resampling.NEAREST)
        _tint(canvas, np.asarray(mask), colours[index], 2, 0.45)
        sheet.paste(Image.fromarray(canvas.round().astype(np.uint8)), (left, title + height + gap))
    if not shown:
        ImageDraw.Draw(sheet).text((gap, 2), "no instance", fill="black", font=font)
    return sheet


def outlined(image: Image.Image, mask: NDArray[np.bool_], width: int) -> Image.Image:
    """Return the image, resized to `width` pixels, with the outline of one mask (H, W)."""
    size = (width, max(1, round(image.height * width / image.width)))
    canvas = np.asarray(image.resize(size), dtype=np.float32).copy()
    _tint(canvas, np.asarray(Image.fromarray(mask).resize(size)), (255, 40, 40), 2, 0.0)
    return Image.fromarray(canvas.round().astype(np.uint8))


def fitted(picture: Image.Image, width: int, height: int) -> Image.Image:
    """Return the picture, scaled to fit into a white frame of this size."""
    scale = min(width / picture.width, height / picture.height)
    small = picture.resize((max(1, round(picture.width * scale)), max(1, round(picture.height * scale))))
    whole = Image.new("RGB", (width, height), "white")
    whole.paste(small, ((width - small.width) // 2, (height - small.height) // 2))
    return whole


def heat(image: Image.Image | None, values: NDArray[np.float32], size: tuple[int, int] | None = None) -> Image.Image:
    """Return values (h, w) in [0, 1] as colours over a grey copy of the image. Larger values are brighter.

    Args:
        image: None returns the colours alone.
        size: (width, height) of the result if there is no image.
    """
    import matplotlib as mpl

    to = image.size if image is not None else size
    assert to is not None
    smooth = np.asarray(Image.fromarray(values).resize(to, Image.Resampling.BILINEAR)).clip(0, 1)
    colours = 255 * mpl.colormaps["inferno"](smooth)[..., :3]
    if image is not None:
        share = 0.35 + 0.65 * smooth[..., None]
        colours = share * colours + (1 - share) * np.asarray(image.convert("L"), dtype=np.float64)[..., None]
    return Image.fromarray(colours.round().astype(np.uint8))


def picture_grid(pictures: Sequence[tuple[str, Image.Image]], *, columns: int) -> Image.Image:
    """Return one image with these pictures, all of one size, in rows. Each picture has its title above it, one line or more."""
    width, height = pictures[0][1].size
    lines = max(text.count("\n") + 1 for text, _ in pictures)
    gap, title = 4, lines * max(12, min(width // 10, 14) + 4)
    rows = -(-len(pictures) // columns)
    whole = Image.new("RGB", (columns * (width + gap) + gap, rows * (height + gap + title) + gap), "white")
    pen, font = ImageDraw.Draw(whole), ImageFont.load_default(size=max(9, min(width / 12, 13)))
    for index, (text, picture) in enumerate(pictures):
        left, top = gap + index % columns * (width + gap), gap + index // columns * (height + gap + title)
        short = [_cut(line, width, font) for line in text.split("\n")]
        pen.multiline_text((left, top), "\n".join(short), fill="black", font=font, spacing=2)
        whole.paste(picture, (left, top + title))
    return whole


def _cut(text: str, width: int, font: _Font) -> str:
    """Return a title that is at most `width` pixels wide: the middle of its first word (a file's name), then its end, is cut."""
    name, separator, rest = text.partition(":")
    while font.getlength(text) > width and len(name) > 16:
        name = f"{name[: len(name) // 2 - 1].rstrip('…')}…{name[len(name) // 2 + 1 :].lstrip('…')}"
        text = f"{name}{separator}{rest}"
    while font.getlength(text) > width and len(text) > 1:
        text = f"{text[:-2]}…"
    return text


def palette(count: int) -> list[Colour]:
    """Return `count` distinct colours: each hue is a golden angle from the last, and two brightnesses alternate."""
    golden = 0.618034
    colours = []
    for index in range(count):
        red, green, blue = colorsys.hsv_to_rgb(index * golden % 1, 0.85, (1.0, 0.75)[index % 2])
        colours.append((round(255 * red), round(255 * green), round(255 * blue)))
    return colours


def outline(mask: NDArray[np.bool_], width: int, *, edge: bool = False) -> NDArray[np.bool_]:
    """Return the pixels of a mask (H, W) that lie within `width` pixels of its edge.

    Args:
        edge: treat the pixels outside the image as part of the mask.
    """
    return mask & ~binary_erosion(mask, iterations=width, border_value=edge)


def _nearest_pixel(runs: Runs, place: Box) -> tuple[float, float] | None:
    """Return the mask's pixel (x, y) that is nearest to a label, or None if the label touches the mask."""
    # In each run the nearest pixel is the one below the label's left end, or the run's own end that lies nearer.
    columns = np.clip(int(np.ceil(place[0])), runs.lefts, runs.rights - 1)
    x, y = columns.clip(place[0], place[2]), runs.rows.clip(place[1], place[3])
    distances = np.hypot(columns - x, runs.rows - y)
    nearest = int(distances.argmin())
    return (float(columns[nearest]), float(runs.rows[nearest])) if distances[nearest] > 3 else None


def _label(
    pen: ImageDraw.ImageDraw,
    font: _Font,
    text: str,
    place: Box,
    colour: Colour,
    target: tuple[float, float] | None,
) -> None:
    """Draw text on a plate of the instance's colour, with a line to the pixel `target` if there is one."""
    if target is not None:
        x, y = min(max(target[0], place[0]), place[2]), min(max(target[1], place[1]), place[3])
        pen.line((x, y, *target), fill=colour, width=1)
    box = pen.textbbox((0, 0), text, font=font)
    pen.rectangle(place, fill=colour)
    light = 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2] > 140
    pen.text((place[0] + 2 - box[0], place[1] + 2 - box[1]), text, fill="black" if light else "white", font=font)
