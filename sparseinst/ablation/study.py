"""A table of the paper as data: its rows, what each sets, and the paper's figures. Imports no torch.

A spec says what varies, a profile at which scale it runs; a row's config is preset, spec, row, profile, in that order.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self, get_args

from pydantic import Field, ValidationError, model_validator

from sparseinst.config import PRESETS, Config, NonNegative
from sparseinst.errors import UserError
from sparseinst.overrides import choose, flatten, merge, nearest, nest, one_line, parse_config, read_layer
from sparseinst.section import Section, Stage

EXPERIMENTS = Path("experiments")

AccuracyFigure = Literal["AP", "AP50", "AP75", "APs", "APm", "APl"]
LatencyFigure = Literal["ms", "FPS", "backbone", "encoder", "decoder", "post"]
Figure = AccuracyFigure | LatencyFigure
"""Columns that hold numbers: mask AP in percent; milliseconds of the whole and of its modules, images a second."""

Labels = dict[str, str | int | float]


class Row(Section):
    name: str
    """How `--row` finds it, and what its pictures are filed under."""
    labels: Labels
    """By column, as in the paper."""
    set: dict[str, Any] = Field(default_factory=dict)
    """Dotted paths and values on top of the preset."""
    paper: dict[Figure, float] = Field(default_factory=dict)
    """The paper's figures."""


class Protocol(Section):
    """How figures that are quoted came about; those of two protocols are never compared without a mark."""

    device: str
    description: str
    source: str


class Quoted(Section):
    """A row that is quoted, not run: another system's published figures."""

    labels: Labels
    figures: dict[Figure, float]
    protocol: str


class Spec(Section):
    """A table or figure: one YAML file."""

    title: str
    columns: tuple[str, ...]
    """Of the labels."""
    figures: tuple[Figure, ...]
    """Which figures the table shows."""
    rows: tuple[Row, ...] = Field(min_length=1)
    reference: str | None = None
    """The row, by name, that the others are compared with."""
    measures: tuple[Stage, ...] = ()
    """What each row is measured by; by default what its figures need."""
    preset: str = "paper"
    set: dict[str, Any] = Field(default_factory=dict)
    """Dotted paths and values that all rows share."""
    quoted: tuple[Quoted, ...] = ()
    protocols: dict[str, Protocol] = Field(default_factory=dict)
    peers: tuple[str, ...] = ()
    """Other systems, by the names that `bench` and `evaluate` take, whose records are shown where there are any."""
    footnotes: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        names = [row.name for row in self.rows]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"two rows are called {twice[0]!r}")
        if self.reference is not None and self.reference not in names:
            raise ValueError(f"reference: no row is called {self.reference!r}{nearest(self.reference, names)}")
        for what, labels in [(f"row {row.name!r}", row.labels) for row in self.rows] + [
            (f"quoted row {number}", row.labels) for number, row in enumerate(self.quoted, 1)
        ]:
            for label in labels:
                if label not in self.columns:
                    raise ValueError(f"{what}: no column is called {label!r}{nearest(label, self.columns)}")
        for number, row in enumerate(self.quoted, 1):
            if row.protocol not in self.protocols:
                raise ValueError(
                    f"quoted row {number}: no such protocol: {row.protocol!r}{nearest(row.protocol, self.protocols)}"
                )
        return self

    def stages(self) -> tuple[Stage, ...]:
        """What each row becomes."""
        if self.measures:
            return self.measures
        accuracy: tuple[Stage, ...] = ("train", "evaluate") if set(self.figures) & set(get_args(AccuracyFigure)) else ()
        timing: tuple[Stage, ...] = ("latency",) if set(self.figures) & set(get_args(LatencyFigure)) else ()
        return accuracy + timing


class Table(Section):
    """A spec with the name people call it by."""

    name: str
    spec: Spec


class Cost(Section):
    """What a stage takes, where no record of the same profile and device tells: an estimate."""

    unit: Literal["GPU-hours", "CPU-hours"]
    """CPU-hours are those of a whole machine."""
    train: NonNegative
    evaluate: NonNegative
    latency: NonNegative
    source: str


class Profile(Section):
    """A scale: settings on top of every row's own."""

    name: str
    settings: dict[str, Any] = Field(default_factory=dict)
    cost: Cost | None = None


def list_tables(folder: Path = EXPERIMENTS) -> list[str]:
    """The names of all specs, in order."""
    return sorted(file.stem for file in folder.glob("*.yaml"))


def read_tables(names: Sequence[str], folder: Path = EXPERIMENTS) -> list[Table]:
    """Specs by name or path, each once; `all` (or no name) for every one. Raises `UserError` as `read_spec` does."""
    wanted: list[str] = []
    for name in names or ["all"]:
        wanted += list_tables(folder) if name == "all" else [name]
    if not wanted:
        raise UserError(f"{folder}: no spec of a table (*.yaml) is there; run this from the project's folder")
    tables = {name: Table(name=Path(name).stem, spec=read_spec(name, folder)) for name in dict.fromkeys(wanted)}
    found: dict[str, Table] = {}
    for path, table in tables.items():
        if found.setdefault(table.name, table).spec != table.spec:
            raise UserError(f"{path}: another of these tables is called {table.name!r} too: rename the file")
    return list(found.values())


def read_spec(table: str, folder: Path = EXPERIMENTS) -> Spec:
    """The spec of a table (`table5`) or at a path.

    Raises:
        UserError: no such spec, or a mistake in it; the message names the file, the row and the key.
    """
    path = _find("table", table, folder)
    data = read_layer(path)
    try:
        spec = Spec.model_validate_json(json.dumps(data))
    except ValidationError as error:
        raise UserError(_in_row(one_line(error, str(path), Spec), data)) from None
    for row in spec.rows:
        if "train.seed" in {**spec.set, **row.set}:
            raise UserError(f"{path}: row {row.name!r}: train.seed: seeds are not a row's, --seeds gives each row several")
        try:
            row_config(spec, row, Profile(name=""))
        except UserError as error:
            raise UserError(f"{path}: row {row.name!r}: {error}") from None
    return spec


def _in_row(message: str, data: dict[str, Any]) -> str:
    """`rows.3.` in a message of pydantic, by the row's name."""
    rows = data.get("rows")
    for index, row in reversed(list(enumerate(rows if isinstance(rows, list) else []))):
        if isinstance(row, dict) and "name" in row:
            message = message.replace(f"rows.{index}.", f"row {row['name']!r}: ")
    return message


def read_profile(name: str, folder: Path = EXPERIMENTS) -> Profile:
    """A profile by name (`mini`), or of a file: settings, and under `cost` what a stage takes. Raises `UserError`."""
    path = _find("profile", name, folder / "profiles")
    settings = read_layer(path)
    cost = settings.pop("cost", None)
    try:
        profile = Profile.model_validate_json(json.dumps({"name": path.stem, "settings": settings, "cost": cost}))
        merge(Config().model_dump(mode="json"), profile.settings)
    except ValidationError as error:
        raise UserError(one_line(error, str(path), Profile)) from None
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return profile


def _find(what: str, name: str, folder: Path) -> Path:
    path = Path(name) if name.endswith((".yaml", ".yml")) else folder / f"{name}.yaml"
    if not path.exists():
        raise UserError(f"no such {what}: {name!r} ({path}){nearest(name, list_tables(folder))}")
    other = folder / f"{path.stem}.yaml"
    if other.exists() and not other.samefile(path):
        raise UserError(f"{path}: {other} is called {path.stem!r} too, and both would be one in the results: rename the file")
    return path


def row_config(spec: Spec, row: Row, profile: Profile, seed: int | None = None) -> Config:
    """The whole config of one row at a profile's scale. Raises `UserError`."""
    data = Config().model_dump(mode="json")
    for layer in (nest(choose("preset", spec.preset, PRESETS)), nest(spec.set), nest(row.set), profile.settings):
        data = merge(data, layer)
    if seed is not None:
        data["train"]["seed"] = seed
    return parse_config(data)


def overruled(spec: Spec, profile: Profile) -> dict[str, list[str]]:
    """What rows set and a profile sets otherwise, so that the rows' values have no effect: names of rows by path."""
    found: dict[str, list[str]] = {}
    scale = flatten(profile.settings)
    for row in spec.rows:
        for path, value in flatten(nest({**spec.set, **row.set})).items():
            if path in row.set and path in scale and scale[path] != value:
                found.setdefault(path, []).append(row.name)
    return found


def select_rows(spec: Spec, text: str | None) -> list[Row]:
    """The rows whose name holds `text` (any case); all of them for None."""
    return [row for row in spec.rows if text is None or text.casefold() in row.name.casefold()]
