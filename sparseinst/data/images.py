"""Read image files. Imports no torch."""

from __future__ import annotations

import stat
import warnings
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from sparseinst.errors import DataError

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp")
"""The endings of files, in lower case, that count as images in a folder."""


def read_image(path: Path | BinaryIO, size: tuple[int, int] | None = None) -> Image.Image:
    """Read a file as an upright RGB image. Grey, 16-bit, CMYK, palette and transparent images are converted.

    Args:
        path: a file, or its content as a stream.
        size: the (height, width) for which its annotations were made. The image is rotated as its EXIF data says, unless only the
            stored image has this size.

    Raises:
        DataError: the file is missing, truncated, not an image, or has another size; the message names the file.
    """
    try:
        # To open a pipe would wait for a writer, which may never come.
        if isinstance(path, Path) and not stat.S_ISREG(path.stat().st_mode):
            raise DataError(f"{path}: is a folder, a device or a pipe, an image was expected")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # Pillow warns of metadata that we do not read.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # twice the size is an error, reported below
            with Image.open(path) as file:
                file.load()
                stored: Image.Image = file
                scaled = file.mode == "I" and file.format == "PPM"  # Pillow scales the values of these files to 16 bits
                turned = file.getexif().get(ExifTags.Base.Orientation, 1) != 1
                upright = ImageOps.exif_transpose(file) if turned else file
    except FileNotFoundError:
        raise DataError(f"{path}: no such image") from None
    except (OSError, SyntaxError, ValueError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise DataError(f"{path}: truncated or unreadable image ({str(error).splitlines()[0][:100]})") from None
    if size is not None and upright.size != size[::-1]:
        if stored.size != size[::-1]:
            raise DataError(f"{path}: is {stored.width} x {stored.height}, its annotations say {size[1]} x {size[0]}")
        upright = stored
    return as_rgb(upright, str(path), is_16_bit=scaled)


def as_rgb(image: Image.Image, name: str = "the image", *, is_16_bit: bool = False) -> Image.Image:
    """Return an image as RGB. The scale of a 16-bit image does not depend on its values, so that all images are read alike.

    Args:
        name: how messages call the image.
        is_16_bit: the values are those of 16 bits, although the image has a mode for more.

    Raises:
        DataError: its pixels are signed or have 32 bits, so that their range is unknown.
    """
    if image.mode in ("I", "F") and not is_16_bit:
        raise DataError(f"{name}: its pixels are signed or have 32 bits, so their range is unknown: convert it to 8 or 16 bits")
    if is_16_bit or image.mode.startswith("I;16"):  # Pillow would clip the values at 255
        image = Image.fromarray((np.asarray(image, dtype=np.float64) * (255 / 65535)).round().astype(np.uint8))
    return image if image.mode == "RGB" else image.convert("RGB")
