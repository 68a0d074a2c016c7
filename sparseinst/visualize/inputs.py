"""Find the images and videos that a user names. Imports no torch, so that a wrong path is refused at once."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path

from sparseinst.data.images import IMAGE_SUFFIXES
from sparseinst.errors import UserError

_log = logging.getLogger(__name__)

VIDEO_SUFFIXES = {".avi", ".m4v", ".mkv", ".mov", ".mp4", ".webm"}


def is_video(file: Path) -> bool:
    return file.suffix.lower() in VIDEO_SUFFIXES


def find_images(inputs: Iterable[Path], *, videos: bool = False) -> list[Path]:
    """Return the given files and the images in the given folders. What is no file, such as a pipe, is left out with a warning.

    Args:
        videos: also return videos.

    Raises:
        UserError: an input is neither a file nor a folder, or there is no image.
    """
    files: list[Path] = []
    wanted = {*IMAGE_SUFFIXES, *(VIDEO_SUFFIXES if videos else ())}
    for path in inputs:
        if path.is_dir():
            named = sorted(file for file in path.iterdir() if file.suffix.lower() in wanted)
            special = {
                file for file in named if file.exists() and not file.is_file()
            }  # a broken link is reported when it is read
            files += [file for file in named if file not in special]
            for file in sorted(special):
                _log.warning("%s: is a folder, a device or a pipe and left out", file)
        elif path.is_file():
            files.append(path)
        else:
            raise UserError(f"{path}: no such image or folder")
    if not files:
        raise UserError(f"no image{' or video' if videos else ''} ({', '.join(sorted(wanted))}) in {', '.join(map(str, inputs))}")
    return files
