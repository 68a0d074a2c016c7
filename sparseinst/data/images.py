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
    return _rgb(upright)


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":  # 16 or 32 bits a pixel, which Pillow would clip at 255
        values = np.asarray(image, dtype=np.float64)
        # The scale of a 16-bit image does not depend on its values, so that all images of a folder are read alike.
        scale = 255 / 65535 if image.mode.startswith("I;16") or values.max(initial=0) > 255 else 1.0
        image = Image.fromarray((values * scale).clip(0, 255).round().astype(np.uint8))
    return image if image.mode == "RGB" else image.convert("RGB")
