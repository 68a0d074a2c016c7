"""Records: what came out of each stage, one small JSON file a key. Imports no torch.

Written atomically, never edited. A record's file is there: the stage is done.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel

from sparseinst.errors import UserError
from sparseinst.paths import atomic
from sparseinst.section import Stage

_log = logging.getLogger(__name__)

RESULTS = Path("results")
Kind = Stage | Literal["compare", "peer"]


@dataclass(frozen=True)
class Record:
    kind: Kind
    key: str
    result: dict[str, Any]
    """train: `steps`, `seconds`, `losses`, `parameters`. evaluate: `figures`, `images`. latency: `whole_ms`, `modules_ms`,
    `size`. compare: `baseline` and `other` (evaluate keys), `difference` and `interval` by figure. peer: another
    system's name, `short_side`, and `figures` or `whole_ms`."""
    config: dict[str, Any] = field(default_factory=dict)
    """Every setting, resolved; none for a comparison."""
    provenance: dict[str, Any] = field(default_factory=dict)
    """commit, versions, device, seed, wall time and so on; of an evaluation also, under `trained`, which code made the weights;
    see `provenance`."""


class _Trained(BaseModel):
    """A report reads nothing of it."""


class _Evaluated(BaseModel):
    figures: dict[str, float | None]


class _Timed(BaseModel):
    whole_ms: dict[str, float]
    modules_ms: dict[str, float]


class _Compared(BaseModel):
    standard_error: dict[str, float]


class _Peer(BaseModel):
    peer: str
    short_side: int
    figures: dict[str, float | None] = {}
    whole_ms: dict[str, float] = {}


_CONTENTS: dict[Kind, type[BaseModel]] = {
    "train": _Trained,
    "evaluate": _Evaluated,
    "latency": _Timed,
    "compare": _Compared,
    "peer": _Peer,
}
"""What a report reads of each kind: a record without it is damaged."""


class Store:
    """The records below a results folder. Any number of processes may read and write at once.

    Raises:
        UserError: something other than a folder is there.
    """

    def __init__(self, results: Path = RESULTS) -> None:
        if results.exists() and not results.is_dir():
            raise UserError(f"{results}: is no folder; name another one with --results")
        self.results = results
        self.folder = results / "records"

    def path(self, key: str) -> Path:
        return self.folder / f"{key}.json"

    def has(self, key: str) -> bool:
        return self.path(key).exists()

    def keys(self) -> set[str]:
        """Of all records, from one listing of the folder."""
        return {path.stem for path in self.folder.glob("*.json")} if self.folder.is_dir() else set()

    def load(self, key: str) -> Record | None:
        """None where there is none. A damaged record is set aside with a warning, so that its stage is done again."""
        path = self.path(key)
        try:
            record = Record(**json.loads(path.read_text(encoding="utf-8")))
            _CONTENTS[record.kind].model_validate(record.result)
        except FileNotFoundError:
            return None
        except (ValueError, TypeError, KeyError) as error:
            self._set_aside(path, " ".join(str(error).split()))
            return None
        if record.key != key:
            self._set_aside(path, f"it is of {record.key}")
            return None
        return record

    def write(self, record: Record, check: Callable[[], None] | None = None) -> None:
        """Keep a record; one that is there already stays as it is. What `check` raises prevents it."""
        if not self.has(record.key):
            with atomic(self.path(record.key), check) as temporary:
                temporary.write_text(json.dumps(asdict(record), indent=1, sort_keys=True) + "\n", encoding="utf-8")

    def _set_aside(self, path: Path, why: str) -> None:
        aside = path.with_suffix(".damaged")
        try:
            path.rename(aside)
        except FileNotFoundError:  # another process was first
            return
        _log.warning("%s is damaged (%s): set aside as %s; its stage counts as not done", path, why, aside.name)
