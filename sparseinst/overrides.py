"""Build a `Config` from files, named presets and dotted paths. Each error is one line with the nearest valid name."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from sparseinst.config import MODELS, PRESETS, Config
from sparseinst.errors import UserError
from sparseinst.files import check_is_file, read_text, state_of_file
from sparseinst.nested import merge, nearest, nest, parse
from sparseinst.plain import MOST_CHARACTERS, parse_yaml
from sparseinst.words import shorten


def load_config(
    path: str | Path | None = None,
    *,
    preset: str | None = None,
    model: str | None = None,
    overrides: Mapping[str, Any] | Iterable[str] = (),
) -> Config:
    """Build a config from layers: preset, named model, file, overrides. Each layer replaces values of the earlier ones.

    Args:
        path: a YAML or JSON file with any part of the settings, nested as in `Config`. It may also name a `preset`, and another
            file that it `extends`, relative to its own folder.
        preset: `paper` (default) or `release`.
        model: one of `MODELS`.
        overrides: values by dotted path, or strings `path=value` with the value in YAML.

    Raises:
        UserError: a file cannot be read, a name is unknown, or a value is not valid.
    """
    file_layer = read_layer(Path(path)) if path is not None else {}
    file_preset = file_layer.pop("preset", None)
    if not isinstance(file_preset, str | None):
        raise UserError(f"{path}: preset: a name was expected, got {shorten(repr(file_preset))}")
    file_layer.pop("cost", None)  # so that a profile of the tables is also a valid config
    backbones: dict[str, dict[str, Any]] = file_layer.pop("backbones", {})
    if not isinstance(backbones, dict) or not all(isinstance(settings, dict) for settings in backbones.values()):
        raise UserError(f"{path}: backbones: settings of model.backbone by a backbone's name were expected")
    layers = [
        nest(choose("preset", preset or file_preset or "paper", PRESETS), Config),
        nest(choose("model", model, MODELS) if model is not None else {}, Config),
        file_layer,
        nest(overrides if isinstance(overrides, Mapping) else dict(map(parse_override, overrides)), Config),
    ]
    data = Config().model_dump(mode="json")
    for index, layer in enumerate(layers):
        where = f"{path}: " if layer is file_layer and index == 2 else ""
        try:
            data = merge(data, layer, Config)
            if index == 2:
                data = stand_in(data, backbones)
        except UserError as error:
            raise UserError(f"{where}{error}") from None
    return parse_config(data, where=str(path) if path is not None else "")


def stand_in(data: dict[str, Any], backbones: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return a config's data in which a profile's backbone replaces the original one.

    Args:
        backbones: the replacements, as settings of `model.backbone` by the original backbone's name; empty for no change.

    Raises:
        UserError: there is no replacement and the backbone is not itself one, or a setting is unknown.
    """
    name = data["model"]["backbone"]["name"]
    if not backbones or name in {settings.get("name") for settings in backbones.values()}:
        return data
    if name not in backbones:
        raise UserError(f"backbones: no replacement for {name!r} (only for {', '.join(backbones)})")
    return merge(data, {"model": {"backbone": backbones[name]}}, Config)


def parse_config(data: Mapping[str, Any], where: str = "") -> Config:
    """Return the config that nested plain data describe. Raises `UserError` as `parse` does."""
    return parse(Config, data, where)


def choose(what: str, name: str, choices: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """Return the entry with this name. Raises `UserError` with the nearest valid name if there is none."""
    if name not in choices:
        raise UserError(f"unknown {what} {name!r}{nearest(name, choices)}")
    return choices[name]


def parse_override(text: str) -> tuple[str, Any]:
    """Return the path and the value of `path=value`. The value is YAML 1.2: `1e-4` is a number, and `off` is a string.

    Raises:
        UserError: the text has another form, or the value is not YAML.
    """
    path, separator, value = text.partition("=")
    if not separator or not path.strip():
        raise UserError(f"override {shorten(text)!r} is not of the form path=value")
    return path.strip(), parse_yaml(value, f"override {shorten(text)!r}")


def read_layer(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    """Return the settings of a file, merged over those of the file that it extends.

    Raises:
        UserError: a file cannot be read, is not a mapping, extends itself, or the chain of files is too long.
    """
    check_is_file(path)  # links that form a loop cannot be resolved
    if path.resolve() in seen:
        raise UserError(f"{path}: extends itself")
    if len(seen) > _LONGEST_CHAIN:
        raise UserError(f"{path}: extends files over more than {_LONGEST_CHAIN} steps: put the settings into fewer files")
    data = copy.deepcopy(_parsed(path, state_of_file(path)))
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


_LONGEST_CHAIN = 20


@functools.lru_cache(maxsize=256)
def _parsed(path: Path, _state: tuple[int, ...]) -> Any:
    """Return the plain data of a YAML file. A process parses it once, unless it changes."""
    return parse_yaml(read_text(path, most=4 * MOST_CHARACTERS), str(path))


def _overlay(base: dict[str, Any], layer: dict[str, Any]) -> dict[str, Any]:
    """Merge like `merge`, but without checking keys. They are checked later, when the result is merged into the config."""
    result = dict(base)
    for key, value in layer.items():
        both = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = _overlay(result[key], value) if both else value
    return result
