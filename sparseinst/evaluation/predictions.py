"""Predictions in COCO's result format."""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from typing_extensions import TypedDict

from sparseinst.data.masks import encode
from sparseinst.errors import UserError
from sparseinst.files import atomic, check_is_file
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


class _Runs(TypedDict):
    """A mask as run lengths."""

    size: Annotated[list[int], Field(min_length=2, max_length=2)]
    counts: str | list[int]


class _Instance(TypedDict):
    image_id: int
    category_id: int
    score: Annotated[float, Field(allow_inf_nan=False)]
    segmentation: _Runs


_INSTANCES = TypeAdapter(list[_Instance], config=ConfigDict(strict=True))


def read_predictions(file: Path) -> list[dict[str, Any]]:
    """Read what `write_predictions` wrote. Raises `UserError` if the file cannot be read or holds something else."""
    check_is_file(file)
    try:
        content = file.read_bytes()
        results: list[dict[str, Any]] = json.loads(gzip.decompress(content) if file.suffix == ".gz" else content)
        _INSTANCES.validate_python(results)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"])) or "the file"
        raise UserError(f"{file}: is no list of instances in COCO's result format ({place}: {first['msg']})") from None
    except (OSError, EOFError, zlib.error, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:120]
        raise UserError(f"{file}: cannot be read ({reason})") from None
    return results
