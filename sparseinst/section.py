"""Define a section of settings. It validates itself, rejects unknown keys, and returns the values that can change a result."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any, Literal, get_args

from pydantic import BaseModel, ConfigDict

Stage = Literal["pretrain", "train", "evaluate", "latency"]
"""A row of a table has these stages: pretraining of its backbone, training, evaluation of the weights, and timing."""
STAGES: tuple[Stage, ...] = get_args(Stage)
"""All stages, in the order in which they run."""


@dataclass(frozen=True)
class Neutral:
    """Mark a field that was added after results existed. The content hash omits it at this value, so that old keys stay valid."""

    value: Any


@dataclass(frozen=True)
class Operational:
    """Mark a field that cannot change a result (number of workers, logging interval). The content hash always omits it."""


class Only:
    """Mark a field that only these stages read."""

    def __init__(self, *stages: Stage) -> None:
        self.stages = stages


class Section(BaseModel):
    """A frozen and strict section of settings. It rejects unknown keys, wrong types, NaN and infinity."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        allow_inf_nan=False,
        str_max_length=4096,  # no path can be longer
        validate_default=True,
        use_attribute_docstrings=True,
    )

    def content(self, stage: Stage | None = None) -> dict[str, Any]:
        """Return the final values that can change a result, as plain data for `content_hash`.

        The content omits `Operational` fields, and fields at their `Neutral` value.

        Args:
            stage: also omit the fields that only other stages read; None omits none of these.
        """
        data: dict[str, Any] = {}
        for name, field in type(self).model_fields.items():
            value = getattr(self, name)
            if any(_omits(mark, value, stage) for mark in field.metadata):
                continue
            data[name] = value.content(stage) if isinstance(value, Section) else value
        return data


def _omits(mark: Any, value: Any, stage: Stage | None) -> bool:
    """Return whether a mark makes the content omit its field."""
    if isinstance(mark, Only):
        return stage is not None and stage not in mark.stages
    return isinstance(mark, Operational) or (isinstance(mark, Neutral) and mark.value == value)


def content_hash(data: Any) -> str:
    """Return 16 hexadecimal digits of the SHA-256 of canonical JSON. They are the same on every machine and Python version."""
    text = json.dumps(data, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
