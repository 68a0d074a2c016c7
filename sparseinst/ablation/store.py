"""Records hold the results of stages: one small JSON file for each key. Imports no torch.

A record is written atomically and never edited. A stage is done if its record's file exists. The file holds a checksum of its
other fields, so that a changed digit counts as damage; records of earlier versions have none.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from sparseinst.checked import has_checksum, read_checked, with_checksum
from sparseinst.errors import UserError
from sparseinst.files import atomic, check_writable, free_path
from sparseinst.paths import SHIPPED
from sparseinst.section import Stage

_log = logging.getLogger(__name__)

RESULTS = Path("results")
HERE = RESULTS / "here"
"""The results folder of `run --again`, apart from the records that come with the repository."""
Kind = Stage | Literal["peer"]


@dataclass(frozen=True)
class Record:
    kind: Kind
    key: str
    result: dict[str, Any]
    """The content depends on the kind.

    - pretrain: `steps`, `seconds`, `losses`, `cells_right`.
    - train: `steps`, `seconds`, `losses`, `curve` (the losses over the steps), `parameters`, `not_trained` (the reasons why it is
      no evidence; see `gate`), and `history` if it was evaluated during training.
    - evaluate: `figures` (metrics), `mechanism`, `images`, `resampled` (AP metrics in joint resamplings of the images).
    - latency: `whole_ms`, `modules_ms`, `modules_range_ms` (5th and 95th percentiles), `size`.
    - peer: `peer` (another system's name), `short_side`, and `figures` or `whole_ms`.
    """
    config: dict[str, Any] = field(default_factory=dict)
    """The complete config."""
    provenance: dict[str, Any] = field(default_factory=dict)
    """Commit, versions, device, seed, wall time and so on; see `provenance`. For an evaluation, `trained` holds the code that
    trained the weights."""


def _has_median(times: dict[str, float]) -> dict[str, float]:
    if "median" not in times:
        raise ValueError("the median is missing")
    return times


_Finite = Annotated[float, Field(allow_inf_nan=False)]
_Percent = Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)]
_NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
_Times = Annotated[dict[str, Annotated[float, Field(gt=0, allow_inf_nan=False)]], AfterValidator(_has_median)]
"""Times in milliseconds; images per second are their inverse, so that none can be zero."""


_Range = Annotated[list[_NotNegative], Field(min_length=2, max_length=2)]


class _Content(BaseModel):
    model_config = ConfigDict(strict=True)


class _Step(_Content):
    """The metrics of an evaluation during training."""

    iteration: int
    AP: _Percent | None = None


class _Trained(_Content):
    steps: int
    losses: dict[str, float] = {}
    history: list[_Step] = []
    not_trained: list[str] = []


class _Evaluated(_Content):
    figures: dict[str, _Percent | None]
    mechanism: dict[str, _Finite | None] = {}
    images: int | None = None
    resampled: dict[str, list[_Finite | None]] = {}
    """There are thousands of these values, and to check their bounds would take a tenth of the time to read the record."""


class _Timed(_Content):
    whole_ms: _Times
    modules_ms: dict[str, _NotNegative]
    modules_range_ms: dict[str, _Range] = {}


class _Peer(_Content):
    peer: str
    short_side: int
    figures: dict[str, _Percent | None] = {}
    whole_ms: _Times = {}


class _Code(_Content):
    """The code that trained weights."""

    commit: str | None = None
    changes: str | None = None
    versions: dict[str, str] = {}


class _Trainer(_Code):
    earlier: list[_Code] = []


class _Provenance(_Trainer):
    profile: str | None = None
    device: str | None = None
    session: str | None = None
    seed: int | None = None
    data: str | None = None
    weights: str | None = None
    seconds: _NotNegative = 0
    world_size: int = 1
    arithmetic: dict[str, Any] | None = None
    trained: _Trainer = _Trainer()


_CONTENTS: dict[Kind, type[BaseModel]] = {
    "pretrain": _Trained,
    "train": _Trained,
    "evaluate": _Evaluated,
    "latency": _Timed,
    "peer": _Peer,
}
"""The values of each kind that a report reads; a record without them, or with values of other types, counts as damaged."""


_FIELDS = {field.name for field in fields(Record)}
_RETIRED = ("compare",)
"""Kinds that earlier versions wrote; nothing reads them."""


def _shipped(key: str) -> Path:
    return SHIPPED / f"{key}.json"


class Store:
    """The records below a results folder, and those that come with the package.

    Any number of processes may read and write at the same time.

    Raises:
        UserError: the path exists and is not a folder.
    """

    def __init__(self, results: Path = RESULTS) -> None:
        if results.exists() and not results.is_dir():
            raise UserError(f"{results}: is not a folder; choose another one with --results")
        self.results = results
        self.folder = results / "records"

    def check_writable(self) -> None:
        """Check that records can be written, before the work for them is done.

        Raises:
            UserError, RunFailed: no file can be written in the folder, or the disk is full.
        """
        check_writable(self.path("new"))

    def path(self, key: str) -> Path:
        return self.folder / f"{key}.json"

    def has(self, key: str) -> bool:
        return self.path(key).exists() or _shipped(key).exists()

    def keys(self) -> set[str]:
        """Return the keys of all records, from one listing of each folder."""
        # os.listdir takes a fifth of the time of Path.glob.
        names = (name for folder in (self.folder, SHIPPED) if folder.is_dir() for name in os.listdir(folder))  # noqa: PTH208
        return {name.removesuffix(".json") for name in names if name.endswith(".json")}

    def load(self, key: str) -> Record | None:
        """Return the record of a key; None if there is none.

        A damaged record is renamed, with a warning, so that its stage is done again. A record of a newer version that cannot be
        read stays, and its stage counts as done.

        Raises:
            UserError: a record of the package itself is damaged.
        """
        path = self.path(key)
        if not path.exists() and _shipped(key).exists():
            path = _shipped(key)
        try:
            text = path.read_bytes()
            content = read_checked(text)
            if content.get("kind") in _RETIRED:
                return None
            if has_checksum(text) and (content.get("kind") not in _CONTENTS or content.keys() - _FIELDS):
                _log.warning("a newer version of this package wrote %s; use that version to read it", path)
                return None
            record = Record(**content)
            _CONTENTS[record.kind].model_validate(record.result)
            _Provenance.model_validate(record.provenance)
            if not isinstance(record.config, dict):
                raise TypeError("its config is not a group of settings")
        except FileNotFoundError:
            return None
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            self._set_aside(path, " ".join(str(error).split()))
            return None
        if record.key != key:
            self._set_aside(path, f"it belongs to {record.key}")
            return None
        return record

    def write(self, record: Record, check: Callable[[], None] | None = None, *, again: bool = False) -> None:
        """Write a record, unless its key has one already.

        Args:
            check: called just before the file appears; an exception that it raises prevents the write.
            again: replace a record that the key has already.
        """
        if again or not self.has(record.key):
            with atomic(self.path(record.key), check) as temporary:
                temporary.write_text(with_checksum(asdict(record)), encoding="utf-8")

    def retire(self, key: str) -> Path | None:
        """Rename a record to KEY.retired, so that its stage counts as not done. Return the new path; None without a record."""
        path = self.path(key)
        return path.rename(free_path(path.with_suffix(".retired"))) if path.exists() else None

    def reader(self) -> Store:
        """Return a store of the same records that reads each of them once, for a report on their present state."""
        return _Reader(self.results)

    def _set_aside(self, path: Path, why: str) -> None:
        if path.parent == SHIPPED:
            raise UserError(f"{path}: is damaged ({why}); install the package again")
        aside = path.with_suffix(".damaged")
        try:
            path.rename(aside)
        except FileNotFoundError:  # another process was first
            return
        _log.warning("%s is damaged (%s): renamed to %s, and its stage counts as not done", path, why, aside.name)


class _Reader(Store):
    """A store that keeps the records that it has read, without their configs."""

    def __init__(self, results: Path) -> None:
        super().__init__(results)
        self._read: dict[str, Record | None] = {}

    def load(self, key: str) -> Record | None:
        if key not in self._read:
            record = super().load(key)
            self._read[key] = replace(record, config={}) if record is not None else None
        return self._read[key]
