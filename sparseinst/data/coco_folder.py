"""Write a new data set as a COCO-format folder, all of it at once. Imports no torch."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from sparseinst.errors import UserError
from sparseinst.files import write_error

SPLITS = ("train", "val")


class AnnotatedImage(NamedTuple):
    """The COCO entry of an image, and the entries of its objects, which have no ids yet."""

    image: dict[str, Any]
    entries: list[dict[str, Any]]


def annotation_file(root: Path, split: str) -> Path:
    return root / "annotations" / f"instances_{split}2017.json"


def image_folder(root: Path, split: str) -> Path:
    return root / f"{split}2017"


def write_annotations(
    root: Path,
    split: str,
    written: Iterable[AnnotatedImage],
    categories: list[dict[str, Any]],
    info: dict[str, Any],
    licence: tuple[str, str] | None = None,
) -> None:
    """Write the annotation file of a split. The annotations are numbered from 1.

    Args:
        licence: name and URL of the images' licence, whose id is 1; None leaves licences out.
    """
    file = annotation_file(root, split)
    file.parent.mkdir(parents=True, exist_ok=True)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for image, entries in written:
        images.append(image)
        for entry in entries:
            annotations.append({"id": len(annotations) + 1, "image_id": image["id"], **entry})
    licences = {} if licence is None else {"licenses": [{"id": 1, "name": licence[0], "url": licence[1]}]}
    data = {
        "info": info,
        **licences,
        "images": images,
        "annotations": annotations,
        "categories": categories,
    }
    file.write_text(json.dumps(data), encoding="utf-8")


def write_new(root: Path, write: Callable[[Path], None], what: str, is_complete: Callable[[Path], bool]) -> None:
    """Call `write` with a temporary path, then rename the result to `root`: all of it appears at once or nothing does.

    Two processes may write the same root at the same time; one result is kept.

    Args:
        what: names the result in messages, with its article ("a collage").
        is_complete: returns whether a complete result is at a path.

    Raises:
        UserError: `root` is in use or cannot be written.
    """
    root = root.resolve()
    try:
        if root.exists() and not (root.is_dir() and next(root.iterdir(), None) is None):
            content = f"{what} already" if is_complete(root) else f"something other than {what}"
            raise UserError(f"{root}: holds {content}; name another folder or delete this one")
        root.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{root.name}.", dir=root.parent) as scratch:
            new_root = Path(scratch) / root.name  # not the scratch folder itself, because of its mode 0700
            write(new_root)
            try:
                new_root.rename(root)
            except OSError:
                if not is_complete(root):
                    raise
    except OSError as error:
        raise write_error(root, error) or UserError(f"{root}: cannot be written ({error})") from None
