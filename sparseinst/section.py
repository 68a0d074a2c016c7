"""How a section of settings behaves: it validates itself, refuses what it does not know, and says what can change a result."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

Stage = Literal["train", "evaluate", "latency"]
"""What a row of a table becomes: a training, an evaluation of its weights, and a timing."""


@dataclass(frozen=True)
class Neutral:
    """Marks a field added after results exist: at this value it is left out of the content hash, so that old keys live on."""

    value: Any


@dataclass(frozen=True)
class Operational:
    """Marks a field that cannot change a result (worker counts, how often to log): never part of the content hash."""


@dataclass(frozen=True)
class Only:
    """Marks a field that one stage alone reads."""

    stage: Stage


class Section(BaseModel):
    """Frozen, closed and strict: unknown keys, wrong types, NaN and infinity are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, validate_default=True)

    def content(self, stage: Stage | None = None) -> dict[str, Any]:
        """The resolved values that can change a result, as plain data for `content_hash`.

        Operational fields are left out, and fields at their `Neutral` value.

        Args:
            stage: leave out, too, what only the other stages read.
        """
        data: dict[str, Any] = {}
        for name, field in type(self).model_fields.items():
            value = getattr(self, name)
            if any(_leaves_out(mark, value, stage) for mark in field.metadata):
                continue
            data[name] = value.content(stage) if isinstance(value, Section) else value
        return data


def _leaves_out(mark: Any, value: Any, stage: Stage | None) -> bool:
    if isinstance(mark, Only):
        return stage not in (None, mark.stage)
    return isinstance(mark, Operational) or (isinstance(mark, Neutral) and mark.value == value)


def content_hash(data: Any) -> str:
    """16 hexadecimal digits of SHA-256 over canonical JSON; the same on every machine and Python version."""
    text = json.dumps(data, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
