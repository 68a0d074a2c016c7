"""A table of the paper as data: its rows, what each sets, and the paper's figures. Imports no torch.

A spec says what varies, a profile at which scale it runs; a row's config is preset, row, profile, in that order.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError

from sparseinst.config import PRESETS, Config, Section
from sparseinst.errors import UserError
from sparseinst.overrides import choose, merge, nearest, nest, one_line, parse_config, read_layer

EXPERIMENTS = Path("experiments")


class Row(Section):
    name: str
    """How `--row` finds it, and what its pictures are filed under."""
    labels: dict[str, str | int]
    """By column, as in the paper."""
    set: dict[str, Any] = Field(default_factory=dict)
    """Dotted paths and values on top of the preset."""
    paper: dict[str, float]
    """The paper's figures, in percent."""


class Spec(Section):
    """A table: one YAML file."""

    title: str
    columns: tuple[str, ...]
    """Of the labels."""
    figures: tuple[str, ...]
    """Which of the evaluation's figures the table shows."""
    rows: tuple[Row, ...]
    preset: str = "paper"
    footnotes: tuple[str, ...] = ()


def read_spec(table: str, folder: Path = EXPERIMENTS) -> Spec:
    """The spec of a table (`table5`) or at a path.

    Raises:
        UserError: no such spec, or a mistake in it; the message names the file, the row and the key.
    """
    path = Path(table) if table.endswith((".yaml", ".yml")) else folder / f"{table}.yaml"
    if not path.exists():
        known = sorted(file.stem for file in folder.glob("*.yaml"))
        raise UserError(f"no such table: {table!r} ({path}){nearest(table, known)}")
    data = read_layer(path)
    try:
        spec = Spec.model_validate_json(json.dumps(data))
    except ValidationError as error:
        raise UserError(one_line(error, str(path), Spec)) from None
    for row in spec.rows:
        try:
            row_config(spec, row, {})
        except UserError as error:
            raise UserError(f"{path}: row {row.name!r}: {error}") from None
    return spec


def read_profile(name: str, folder: Path = EXPERIMENTS) -> dict[str, Any]:
    """The settings of a profile by name (`mini`), or of a file. Raises `UserError`."""
    path = Path(name) if name.endswith((".yaml", ".yml")) else folder / "profiles" / f"{name}.yaml"
    if not path.exists():
        known = sorted(file.stem for file in (folder / "profiles").glob("*.yaml"))
        raise UserError(f"no such profile: {name!r} ({path}){nearest(name, known)}")
    return read_layer(path)


def row_config(spec: Spec, row: Row, profile: dict[str, Any]) -> Config:
    """The whole config of one row at a profile's scale. Raises `UserError`."""
    data = Config().model_dump(mode="json")
    for layer in (nest(choose("preset", spec.preset, PRESETS)), nest(row.set), profile):
        data = merge(data, layer)
    return parse_config(data)


def select_rows(spec: Spec, text: str | None) -> list[Row]:
    """The rows whose name holds `text` (any case); all of them for None. Raises `UserError` where there is none."""
    rows = [row for row in spec.rows if text is None or text.casefold() in row.name.casefold()]
    if not rows:
        raise UserError(f"no row of {spec.title!r} is called {text!r} (rows: {', '.join(row.name for row in spec.rows)})")
    return rows
