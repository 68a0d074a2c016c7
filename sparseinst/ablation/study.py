"""A table of the paper as data: its rows, the settings of each, and the paper's values. Imports no torch.

A spec defines what varies between rows; a profile defines the scale. A row's config is built from the preset, the spec, the row
and the profile, in that order; later ones win.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import AfterValidator, Field, ValidationError, model_validator

from sparseinst.config import PRESETS, Config, NonNegative
from sparseinst.errors import UserError
from sparseinst.nested import flatten, merge, nearest, nest, one_line, parse
from sparseinst.overrides import choose, parse_config, read_layer, stand_in
from sparseinst.section import Section, Stage

EXPERIMENTS = Path("experiments")
SEEDS = range(12)
"""The seeds that a row can have."""

AccuracyFigure = Literal["AP", "AP50", "AP75", "APs", "APm", "APl"]
MechanismFigure = Literal["own", "others", "border", "prefers_own", "peak_on_own", "lift", "duplicates", "neighbours_recall"]
LatencyFigure = Literal["ms", "FPS", "backbone", "encoder", "decoder", "post"]
Figure = AccuracyFigure | MechanismFigure | LatencyFigure
"""The metrics that a column can show: mask AP in percent; mechanism metrics in percent (see `evaluation.mechanism`); the time of
the whole forward pass and of its modules in milliseconds; images per second."""


def _one_line(text: str) -> str:
    if len(text) > _LONGEST_LINE:
        raise ValueError(f"{text[:40]!r} ...: has {len(text)} characters, but at most {_LONGEST_LINE} fit a table")
    if not text.isprintable():
        raise ValueError(f"{text!r} holds a character that cannot be printed, such as a line break")
    return text


def _folder_name(name: str) -> str:
    if not name.strip() or len(name) > _LONGEST_NAME or name.startswith(".") or set(name) & set("/\\\0"):
        raise ValueError(
            f"{name[:40]!r}: pictures are saved under this name, so it must have 1 to {_LONGEST_NAME} characters, "
            "no slash, and no dot at its start"
        )
    return name


_LONGEST_NAME = 100
_LONGEST_LINE = 1000
OneLine = Annotated[str, AfterValidator(_one_line)]
CSV_COLUMNS = (
    *("table", "profile", "row", "figure", "device", "state", "measured", "deviation", "seeds", "paper"),
    *("difference", "low", "high", "confidence", "one_seed", "verdict", "p_sign", "p_equivalence", "more_seeds"),
)
"""The columns that the CSV file of every table has beside those of its labels."""
Labels = dict[str, OneLine | int | float]


class Row(Section):
    name: Annotated[OneLine, AfterValidator(_folder_name)]
    """`--row` searches this name, and the row's pictures are saved under it."""
    labels: Labels
    """The row's labels by column, as in the paper."""
    set: dict[str, Any] = Field(default_factory=dict)
    """Settings of this row, by dotted path; they override the preset and the spec."""
    paper: dict[Figure, float] = Field(default_factory=dict)
    """The paper's values, by metric."""


class Protocol(Section):
    """How quoted values were measured. Values of two protocols are never compared without a mark."""

    device: OneLine
    description: OneLine
    source: OneLine


class Quoted(Section):
    """A row that is quoted, not run: another system's published values."""

    labels: Labels
    figures: dict[Figure, float]
    protocol: str


class Spec(Section):
    """A table or figure of the paper, read from one YAML file."""

    title: OneLine
    columns: tuple[OneLine, ...]
    """The columns of the labels."""
    figures: tuple[Figure, ...]
    """The metrics that the table shows."""
    rows: tuple[Row, ...] = Field(min_length=1)
    reference: str | None = None
    """The name of the row that the others are compared with."""
    margin: NonNegative = 0.5
    """Differences within this many AP points of zero count as equivalent."""
    measures: tuple[Stage, ...] = ()
    """The stages of each row; by default those that its metrics need."""
    preset: str = "paper"
    set: dict[str, Any] = Field(default_factory=dict)
    """Settings that all rows share, by dotted path."""
    quoted: tuple[Quoted, ...] = ()
    protocols: dict[OneLine, Protocol] = Field(default_factory=dict)
    peers: tuple[str, ...] = ()
    """Other systems whose records are shown if they exist, by the names that `bench` and `evaluate` accept."""
    footnotes: tuple[OneLine, ...] = ()

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        for number, column in enumerate(self.columns):
            if column in CSV_COLUMNS:
                raise ValueError(f"columns: {column!r} is a column of every CSV file: choose another name")
            if column in self.columns[:number]:
                raise ValueError(f"columns: two columns are called {column!r}")
        if "evaluate" in self.measures and "train" not in self.measures:
            raise ValueError("measures: evaluate needs the weights of train: add it")
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
        """Return the stages of each row."""
        if self.measures:
            return self.measures
        evaluated = {*get_args(AccuracyFigure), *get_args(MechanismFigure)}
        accuracy: tuple[Stage, ...] = ("train", "evaluate") if set(self.figures) & evaluated else ()
        timing: tuple[Stage, ...] = ("latency",) if set(self.figures) & set(get_args(LatencyFigure)) else ()
        return accuracy + timing


class Table(Section):
    """A spec with its name."""

    name: Annotated[OneLine, AfterValidator(_folder_name)]
    spec: Spec


class Cost(Section):
    """The estimated hours of each kind of stage, used until there are records of the same profile and device."""

    unit: Literal["GPU-hours", "CPU-hours"]
    """A CPU-hour is one hour of a whole machine."""
    pretrain: NonNegative = 0.0
    train: NonNegative
    evaluate: NonNegative
    latency: NonNegative
    source: str


class Profile(Section):
    """A scale: settings that override those of every row."""

    name: str
    settings: dict[str, Any] = Field(default_factory=dict)
    backbones: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """Replacements for the paper's backbones at this scale: settings of `model.backbone`, including `name`, by the name of the
    paper's backbone. If this is empty, rows keep their backbones."""
    cost: Cost | None = None


def list_tables(folder: Path = EXPERIMENTS) -> list[str]:
    """Return the names of all specs, sorted."""
    return sorted(file.stem for file in folder.glob("*.yaml"))


def read_tables(names: Sequence[str], folder: Path = EXPERIMENTS) -> list[Table]:
    """Read specs by name or path, each once; `all`, or an empty list, reads every one.

    Raises:
        UserError: as in `read_spec`; also if two different specs have the same name, or the folder contains none.
    """
    wanted: list[str] = []
    for name in names or ["all"]:
        wanted += list_tables(folder) if name == "all" else [name]
    if not wanted:
        raise UserError(f"{folder}: no spec of a table (*.yaml) was found; run this from the project's folder")
    tables = {name: Table(name=Path(name).stem, spec=read_spec(name, folder)) for name in dict.fromkeys(wanted)}
    by_name: dict[str, Table] = {}
    for path, table in tables.items():
        if by_name.setdefault(table.name, table).spec != table.spec:
            raise UserError(f"{path}: another of these tables is called {table.name!r} too: rename the file")
    return list(by_name.values())


def list_profiles(folder: Path = EXPERIMENTS) -> list[str]:
    """Return the names of the profiles."""
    return list_tables(folder / "profiles")


def all_tables() -> list[Table]:
    """Return all tables of the project; an empty list in a folder without specs."""
    return read_tables(["all"]) if list_tables() else []


def read_spec(table: str, folder: Path = EXPERIMENTS) -> Spec:
    """Read the spec of a table by its name (`table5`) or by a path.

    Raises:
        UserError: there is no such spec, or it contains a mistake; the message names the file, the row and the key.
    """
    path = _find("table", table, folder)
    data = read_layer(path)
    try:
        spec = Spec.model_validate_json(json.dumps(data))
    except ValidationError as error:
        raise UserError(_in_row(one_line(error, str(path), Spec), data)) from None
    for row in spec.rows:
        if "train.seed" in {**spec.set, **row.set}:
            raise UserError(f"{path}: row {row.name!r}: train.seed: seeds are not a row's settings; use --seeds")
        try:
            row_config(spec, row, Profile(name=""))
        except UserError as error:
            raise UserError(f"{path}: row {row.name!r}: {error}") from None
    return spec


def _in_row(message: str, data: dict[str, Any]) -> str:
    """Replace `rows.3.` in a message of pydantic by the row's name."""
    rows = data.get("rows")
    for index, row in reversed(list(enumerate(rows if isinstance(rows, list) else []))):
        if isinstance(row, dict) and "name" in row:
            message = message.replace(f"rows.{index}.", f"row {row['name']!r}: ")
    return message


def read_profile(name: str, folder: Path = EXPERIMENTS) -> Profile:
    """Read a profile by its name (`mini`) or from a file: settings, and under `cost` the hours of each kind of stage.

    Raises:
        UserError: there is no such profile, or it contains a mistake.
    """
    path = _find("profile", name, folder / "profiles")
    settings = read_layer(path)
    own: dict[str, Any] = {name: settings.pop(name) for name in ("cost", "backbones") if name in settings}
    try:
        merge(Config().model_dump(mode="json"), settings, Config)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return parse(Profile, {"name": path.stem, "settings": settings, **own}, str(path))


_ACTING = "{}\\%#[]<>"


def _find(what: str, name: str, folder: Path) -> Path:
    path = Path(name) if name.endswith((".yaml", ".yml")) else folder / f"{name}.yaml"
    if not path.stem.isprintable() or path.stem.startswith("."):
        raise UserError(f"{path.name!r}: results are saved under this name, so it must be printable, with no dot at its start")
    if acting := sorted(set(path.stem) & set(_ACTING)):
        raise UserError(f"{path.name!r}: reports use this name, and {acting[0]} would act in LaTeX or Markdown: rename the file")
    if not path.exists():
        raise UserError(f"no such {what}: {name!r} ({path}){nearest(name, list_tables(folder))}")
    other = folder / f"{path.stem}.yaml"
    if other.exists() and not other.samefile(path):
        raise UserError(
            f"{path}: {other} is called {path.stem!r} too, and the results could not tell them apart: rename the file"
        )
    return path


def row_config(spec: Spec, row: Row, profile: Profile, seed: int | None = None) -> Config:
    """Return the complete config of one row at a profile's scale. Raises `UserError` if the settings do not fit together."""
    layers = spec.preset, spec.set, row.set, profile.settings, profile.backbones
    content = repr(layers)  # a report asks for each row a dozen times, and the layers are dicts, which have no hash
    if content not in _row_configs:
        if len(_row_configs) >= _MOST_KEPT:
            _row_configs.clear()
        _row_configs[content] = _build(spec, row, profile)
    config = _row_configs[content]
    return config if seed is None else config.model_copy(update={"train": config.train.model_copy(update={"seed": seed})})


_row_configs: dict[str, Config] = {}
_MOST_KEPT = 4096


def _build(spec: Spec, row: Row, profile: Profile) -> Config:
    data = Config().model_dump(mode="json")
    for layer in (
        nest(choose("preset", spec.preset, PRESETS), Config),
        nest(spec.set, Config),
        nest(row.set, Config),
        profile.settings,
    ):
        data = merge(data, layer, Config)
    return parse_config(stand_in(data, profile.backbones))


def overruled(spec: Spec, profile: Profile) -> dict[str, list[str]]:
    """Return the settings that a profile replaces with another value, so that the rows' own values have no effect.

    Returns:
        The names of the rows that set it, by the setting's dotted path.
    """
    replaced: dict[str, list[str]] = {}
    scale = flatten(profile.settings)
    for row in spec.rows:
        for path, value in flatten(nest(row.set, Config)).items():
            if path in scale and scale[path] != value:
                replaced.setdefault(path, []).append(row.name)
    return replaced


def select_rows(spec: Spec, text: str | None) -> list[Row]:
    """Return the row of this name, or else the rows whose name contains `text`, ignoring case; all rows for None."""
    if text is None:
        return list(spec.rows)
    exact = [row for row in spec.rows if row.name.casefold() == text.casefold()]
    return exact or [row for row in spec.rows if text.casefold() in row.name.casefold()]
