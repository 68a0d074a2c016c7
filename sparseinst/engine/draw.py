"""Instances drawn over their image.

K instances, H W height and width in pixels.
"""

from __future__ import annotations

import colorsys

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from sparseinst.engine.predict import Prediction


def overlay(image: Image.Image, prediction: Prediction, *, opacity: float = 0.5) -> Image.Image:
    """The image with each mask tinted and outlined, and its name and score at its top; best instances drawn last."""
    canvas = np.asarray(image, dtype=np.float32).copy()  # H W 3
    line = max(1, round(min(image.size) / 240))
    colours = palette(len(prediction.scores))
    order = list(range(len(prediction.scores)))[::-1]
    for index in order:
        mask, colour = prediction.masks[index], np.array(colours[index], dtype=np.float32)
        canvas[mask] = (1 - opacity) * canvas[mask] + opacity * colour
        canvas[outline(mask, line)] = colour
    drawn = Image.fromarray(canvas.round().astype(np.uint8))
    pen = ImageDraw.Draw(drawn)
    font = ImageFont.load_default(size=max(9, min(image.size) / 32))
    for index in order:
        if prediction.masks[index].any():
            text = f"{prediction.names[index]} {prediction.scores[index]:.2f}"
            _label(pen, font, text, prediction.masks[index], colours[index], image.size)
    return drawn


def palette(count: int) -> list[tuple[int, int, int]]:
    """`count` colours that stay apart: hues a golden angle from one to the next, at two brightnesses by turns."""
    golden = 0.618034
    colours = []
    for index in range(count):
        red, green, blue = colorsys.hsv_to_rgb(index * golden % 1, 0.85, (1.0, 0.75)[index % 2])
        colours.append((round(255 * red), round(255 * green), round(255 * blue)))
    return colours


def outline(mask: NDArray[np.bool_], width: int) -> NDArray[np.bool_]:
    """The pixels of a mask (H, W) within `width` of its edge."""
    inner = mask
    for _ in range(width):
        padded = np.pad(inner, 1, constant_values=False)
        inner = padded[1:-1, 1:-1] & padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return mask & ~inner


def _label(
    pen: ImageDraw.ImageDraw,
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
    text: str,
    mask: NDArray[np.bool_],
    colour: tuple[int, int, int],
    size: tuple[int, int],
) -> None:
    """Text on a plate of the instance's colour, at the mask's topmost pixels, kept inside the image."""
    top = int(mask.any(axis=1).argmax())
    left = int(np.flatnonzero(mask[top]).mean())
    box = pen.textbbox((0, 0), text, font=font)
    width, height = box[2] - box[0] + 4, box[3] - box[1] + 4
    x = min(max(0, left - width / 2), max(0, size[0] - width))
    y = min(max(0, top - height), max(0, size[1] - height))
    pen.rectangle((x, y, x + width, y + height), fill=colour)
    light = 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2] > 140
    pen.text((x + 2 - box[0], y + 2 - box[1]), text, fill="black" if light else "white", font=font)
