"""Handle settings as nested plain data: dotted paths, layers, and one-line error messages with the nearest valid name."""

from __future__ import annotations

import difflib
import functools
import inspect
import json
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, TypeVar, get_args

from pydantic import ValidationError

from sparseinst.errors import UserError
from sparseinst.section import Section
from sparseinst.words import shorten

S = TypeVar("S", bound=Section)


def parse(schema: type[S], data: Mapping[str, Any], where: str = "") -> S:
    """Return the section that nested plain data describe.

    Args:
        where: the source of the data, for the error message.

    Raises:
        UserError: the data are not valid. The message names the source, the key and the problem.
    """
    try:
        # JSON mode is strict about types, but takes arrays as tuples and whole numbers as floats, as YAML and JSON write them.
        return schema.model_validate_json(json.dumps(data))
    except ValidationError as error:
        raise UserError(one_line(error, where, schema)) from None
    except (TypeError, ValueError, RecursionError) as error:
        raise UserError(f"{where + ': ' if where else ''}not plain data: {error}") from None


def nest(overrides: Mapping[str, Any], schema: type[Section]) -> dict[str, Any]:
    """Return nested dicts from values by dotted path.

    Raises:
        UserError: a path is unknown. The message gives the nearest valid path.
    """
    nested: dict[str, Any] = {}
    known = _known_paths(schema)
    for path, value in overrides.items():
        if path not in known:
            if inside := [name for name in leaf_paths(schema) if name.startswith(f"{path}.")]:
                raise UserError(f"{path!r} is a group of settings: name one of them, such as {inside[0]}=VALUE")
            raise UserError(f"unknown setting {path!r}{nearest(path, known)}")
        node = nested
        *parents, leaf = path.split(".")
        for name in parents:
            node = node.setdefault(name, {})
        node[leaf] = value
    return nested


def merge(base: Mapping[str, Any], layer: Mapping[str, Any], schema: type[Section], prefix: str = "") -> dict[str, Any]:
    """Return `base` with the values of `layer` in place of its own, level by level.

    Raises:
        UserError: `layer` has a key that `base` lacks, or a single value where `base` has a group of settings.
    """
    merged = dict(base)
    for key, value in layer.items():
        path = f"{prefix}{key}"
        if key not in base:
            raise UserError(f"unknown setting {path!r}{nearest(path, leaf_paths(schema))}")
        if isinstance(base[key], dict):
            if not isinstance(value, Mapping):
                raise UserError(f"{path}: a group of settings was expected, got {shorten(repr(value))}")
            merged[key] = merge(base[key], value, schema, f"{path}.")
        else:
            merged[key] = value
    return merged


def flatten(data: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return the values of nested mappings by dotted path. This is the inverse of `nest`."""
    found: dict[str, Any] = {}
    for name, value in data.items():
        found |= flatten(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return found


def leaf_paths(section: type[Section], prefix: str = "") -> Iterator[str]:
    """Yield the dotted path of every setting."""
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            yield from leaf_paths(field.annotation, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


@functools.cache
def _known_paths(section: type[Section]) -> frozenset[str]:
    return frozenset(leaf_paths(section))


def explanations(section: type[Section], prefix: str = "") -> dict[str, str]:
    """Return the explanation of every setting and group that has one, by dotted path: its docstring, in one line."""
    found: dict[str, str] = {}
    for name, field in section.model_fields.items():
        path, group = f"{prefix}{name}", field.annotation
        own = field.description or _inherited(section, name)
        if isinstance(group, type) and issubclass(group, Section):
            own = own or inspect.cleandoc(group.__doc__ or "")
            found |= explanations(group, f"{path}.")
        if own:
            found[path] = " ".join(own.split())
    return found


def _inherited(section: type[Section], name: str) -> str | None:
    """Return the explanation of a field that a base class has and this class only gives another default."""
    bases = (base for base in section.__mro__[1:] if issubclass(base, Section))
    return next((base.model_fields[name].description for base in bases if name in base.model_fields), None)


def commented_yaml(data: Mapping[str, Any], comments: Mapping[str, str], prefix: str = "") -> str:
    """Return nested plain data as YAML with a comment above each setting and group that has one.

    Args:
        comments: the comments, by dotted path.
    """
    lines: list[str] = []
    depth = prefix.count(".")
    indent = "  " * depth
    for name, value in data.items():
        path = f"{prefix}{name}"
        if path in comments:
            lines += textwrap.wrap(comments[path], 110, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# ")
        if isinstance(value, Mapping):
            lines += [f"{indent}{name}:", commented_yaml(value, comments, f"{path}.").rstrip("\n")]
        else:
            lines.append(f"{indent}{name}: {json.dumps(value)}")  # JSON is YAML
    return "\n".join(lines) + "\n"


def nearest(name: str, known: Iterable[str]) -> str:
    """Return ` (did you mean ...?)` with the valid name most similar to `name`.

    First the full paths are compared, then their last parts. If nothing is similar, the result lists the valid names if there are
    at most 20, and is empty otherwise.
    """
    names = sorted(known)
    matches = difflib.get_close_matches(name, names, n=1, cutoff=0.75)
    if not matches:
        last = {full.rsplit(".", 1)[-1]: full for full in reversed(names)}
        matches = [last[m] for m in difflib.get_close_matches(name.rsplit(".", 1)[-1], last, n=1, cutoff=0.6)]
    if matches:
        return f" (did you mean {matches[0]!r}?)"
    return f" (valid: {', '.join(names)})" if len(names) <= 20 else ""


def one_line(error: ValidationError, where: str, schema: type[Section]) -> str:
    """Return the first problem that pydantic found, in one line, and the number of other problems."""
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
        message = f"{message[0].lower()}{message[1:]}, got {shorten(repr(first['input']))}"
        if first["type"] == "string_type" and isinstance(first["input"], bool | int | float):
            message += f": write {shorten(json.dumps(json.dumps(first['input'])))} in quotes"
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return f"{where + ': ' if where else ''}{path + ': ' if path else ''}{message}{more}"


def _section_at(schema: type[Section], location: tuple[int | str, ...]) -> type[Section] | None:
    """Return the section at a location in nested data, also inside tuples and dicts of sections; None if there is no section."""
    section: type[Section] | None = schema
    for part in location:
        if section is None:
            return None
        if part in section.model_fields:
            section = next(_sections_in(section.model_fields[str(part)].annotation), None)
    return section


def _sections_in(annotation: Any) -> Iterator[type[Section]]:
    """Yield the sections that a type annotation contains."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        yield annotation
    for inner in get_args(annotation):
        yield from _sections_in(inner)
