"""From files, named presets and dotted paths to a `Config`; every mistake becomes one line with the nearest valid name."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

from pydantic import ValidationError

from sparseinst.config import MODELS, PRESETS, Config
from sparseinst.errors import UserError
from sparseinst.section import Section


def load_config(
    path: str | Path | None = None,
    *,
    preset: str | None = None,
    model: str | None = None,
    overrides: Mapping[str, Any] | Iterable[str] = (),
) -> Config:
    """Build a config in layers: preset, named model, file, overrides; each wins over the one before.

    Args:
        path: a YAML or JSON file holding any part of the settings, nested as in `Config`; it may name its own `preset` and
            `extends` (another file, relative to it, to start from).
        preset: `paper` (default) or `release`.
        model: one of `MODELS`.
        overrides: dotted paths to values, or strings `path=value` with the value in YAML.

    Raises:
        UserError: anything wrong, in one line.
    """
    file_layer = read_layer(Path(path)) if path is not None else {}
    file_preset = file_layer.pop("preset", None)
    file_layer.pop("cost", None)  # a profile of the tables serves as a config, too
    layers = [
        nest(choose("preset", preset or file_preset or "paper", PRESETS)),
        nest(choose("model", model, MODELS) if model is not None else {}),
        file_layer,
        nest(overrides if isinstance(overrides, Mapping) else dict(map(parse_override, overrides))),
    ]
    data = Config().model_dump(mode="json")
    for index, layer in enumerate(layers):
        where = f"{path}: " if layer is file_layer and index == 2 else ""
        try:
            data = merge(data, layer)
        except UserError as error:
            raise UserError(f"{where}{error}") from None
    return parse_config(data, where=str(path) if path is not None else "")


def parse_config(data: Mapping[str, Any], where: str = "") -> Config:
    """Validate nested plain data. Raises `UserError` that names the key, what is wrong with it, and `where` it stands."""
    try:
        # JSON mode: strict about types, but arrays are tuples and whole numbers are floats, as YAML and JSON write them.
        return Config.model_validate_json(json.dumps(data))
    except ValidationError as error:
        raise UserError(one_line(error, where, Config)) from None
    except (TypeError, ValueError) as error:
        raise UserError(f"{where + ': ' if where else ''}not plain data: {error}") from None


def choose(what: str, name: str, choices: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """The entry called `name`. Raises `UserError` with the nearest valid name."""
    if name not in choices:
        raise UserError(f"unknown {what} {name!r}{nearest(name, choices)}")
    return choices[name]


def parse_override(text: str) -> tuple[str, Any]:
    """`path=value` to the path and the value, read as YAML 1.2 (so `1e-4` is a number and `off` a word)."""
    path, separator, value = text.partition("=")
    if not separator or not path.strip():
        raise UserError(f"override {text!r} is not of the form path=value")
    return path.strip(), parse_yaml(value, f"override {text!r}")


def parse_yaml(text: str, where: str) -> Any:
    """YAML 1.2 to plain data; duplicate keys are refused. Raises `UserError` naming `where` and the line."""
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    try:
        return YAML(typ="safe").load(text)
    except YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}, column {mark.column + 1}" if mark is not None else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise UserError(f"{where}:{line} {problem}") from None


def read_text(path: Path) -> str:
    """The text of a file a user named. Raises `UserError` where it is missing, a folder, or no text."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise UserError(f"{path}: is a folder, a file was expected") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None


def nest(overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted paths to nested dicts. Raises `UserError` with the nearest valid path for one that does not exist."""
    nested: dict[str, Any] = {}
    known = set(leaf_paths(Config))
    for path, value in overrides.items():
        if path not in known:
            raise UserError(f"unknown setting {path!r}{nearest(path, known)}")
        node = nested
        *parents, leaf = path.split(".")
        for name in parents:
            node = node.setdefault(name, {})
        node[leaf] = value
    return nested


def merge(base: Mapping[str, Any], layer: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`base` with the values of `layer`, level by level. Raises `UserError` for a key that `base` does not have."""
    merged = dict(base)
    for key, value in layer.items():
        path = f"{prefix}{key}"
        if key not in base:
            raise UserError(f"unknown setting {path!r}{nearest(path, leaf_paths(Config))}")
        if isinstance(base[key], dict):
            if not isinstance(value, Mapping):
                raise UserError(f"{path}: a group of settings was expected, got {value!r}")
            merged[key] = merge(base[key], value, f"{path}.")
        else:
            merged[key] = value
    return merged


def flatten(data: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as dotted paths and values; the inverse of `nest`."""
    found: dict[str, Any] = {}
    for name, value in data.items():
        found |= flatten(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return found


def leaf_paths(section: type[Section], prefix: str = "") -> Iterator[str]:
    """The dotted path of every setting."""
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            yield from leaf_paths(field.annotation, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def read_layer(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The settings of a file over those of the file it extends."""
    if path.resolve() in seen:
        raise UserError(f"{path}: extends itself")
    data = parse_yaml(read_text(path), str(path))
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise UserError(f"{path}: settings were expected at the top level, found {type(data).__name__}")
    parent = data.pop("extends", None)
    if parent is None:
        return data
    if not isinstance(parent, str):
        raise UserError(f"{path}: extends: a path was expected, got {parent!r}")
    return _overlay(read_layer(path.parent / parent, (*seen, path.resolve())), data)


def _overlay(base: dict[str, Any], layer: dict[str, Any]) -> dict[str, Any]:
    """Like `merge`, for layers that are not complete yet; their keys are checked when they meet the config."""
    result = dict(base)
    for key, value in layer.items():
        both = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = _overlay(result[key], value) if both else value
    return result


def nearest(name: str, known: Iterable[str]) -> str:
    """` (did you mean ...?)`, compared by the whole path and by its last part."""
    names = sorted(known)
    matches = difflib.get_close_matches(name, names, n=1, cutoff=0.75)
    if not matches:
        last = {full.rsplit(".", 1)[-1]: full for full in reversed(names)}
        matches = [last[m] for m in difflib.get_close_matches(name.rsplit(".", 1)[-1], last, n=1, cutoff=0.6)]
    if matches:
        return f" (did you mean {matches[0]!r}?)"
    return f" (valid: {', '.join(names)})" if len(names) <= 20 else ""


def one_line(error: ValidationError, where: str, schema: type[Section]) -> str:
    """The first problem that pydantic found, in one line; the number of others after it."""
    problems = error.errors(include_url=False)
    first = min(problems, key=lambda problem: problem["type"] != "extra_forbidden")  # a misspelt key explains a missing one
    path = ".".join(str(part) for part in first["loc"])
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "extra_forbidden":
        section = _section_at(schema, first["loc"][:-1])
        known = leaf_paths(schema) if section in (schema, None) else section.model_fields
        message = f"unknown setting{nearest(path if section in (schema, None) else str(first['loc'][-1]), known)}"
    elif first["type"] == "missing":
        message = "is missing"
    elif first["type"] not in ("value_error",):
        message = f"{message[0].lower()}{message[1:]}, got {first['input']!r}"
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return f"{where + ': ' if where else ''}{path + ': ' if path else ''}{message}{more}"


def _section_at(schema: type[Section], location: tuple[int | str, ...]) -> type[Section] | None:
    """The section that a location in nested data belongs to, through tuples and dicts of sections; None where there is none."""
    section: type[Section] | None = schema
    for part in location:
        if section is None:
            return None
        if part in section.model_fields:
            section = next(_sections_in(section.model_fields[str(part)].annotation), None)
    return section


def _sections_in(annotation: Any) -> Iterator[type[Section]]:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        yield annotation
    for inner in get_args(annotation):
        yield from _sections_in(inner)
