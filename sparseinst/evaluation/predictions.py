"""Predictions in COCO's result format."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from sparseinst.data.masks import encode
from sparseinst.errors import UserError
from sparseinst.files import atomic
from sparseinst.postprocess import Instances


def in_coco_format(image_id: int, instances: Instances, category_ids: Sequence[int | None]) -> list[dict[str, Any]]:
    """Return the instances of one image in COCO's result format.

    Args:
        category_ids: the category id of each label; instances of a label whose id is None are left out.
    """
    runs = encode(instances.masks.cpu().numpy())
    return [
        {"image_id": image_id, "category_id": category, "score": score, "segmentation": run}
        for label, score, run in zip(instances.labels.tolist(), instances.scores.tolist(), runs, strict=True)
        if (category := category_ids[label]) is not None
    ]


def write_predictions(file: Path, results: list[dict[str, Any]], check: Callable[[], None] | None = None) -> None:
    """Write instances in COCO's result format, compressed if the file's name ends in `.gz`.

    If `check` raises an error, the file is not written.
    """
    content = json.dumps(results).encode()
    with atomic(file, check) as temporary:
        temporary.write_bytes(gzip.compress(content, mtime=0) if file.suffix == ".gz" else content)


def read_predictions(file: Path) -> list[dict[str, Any]]:
    """Read what `write_predictions` wrote. Raises `UserError` if the file cannot be read or holds something else."""
    try:
        content = file.read_bytes()
        results = json.loads(gzip.decompress(content) if file.suffix == ".gz" else content)
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise UserError(f"{file}: cannot be read ({' '.join(str(error).split())[:120]})") from None
    if not isinstance(results, list) or not all(isinstance(one, dict) and one.keys() >= _FIELDS for one in results):
        raise UserError(f"{file}: is no list of instances with {', '.join(sorted(_FIELDS))}")
    return results


_FIELDS = {"image_id", "category_id", "score", "segmentation"}
