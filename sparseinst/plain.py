"""Read YAML text as plain data, within limits of size, depth and repetition. Plain data are what JSON can hold."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from sparseinst.errors import UserError
from sparseinst.words import has_half_surrogate, shorten

MOST_CHARACTERS = 128 * 1024
"""The longest text. The longest settings of this package have 8,000 characters."""
DEEPEST = 20
"""The largest number of nested levels of lists and groups. Settings have five."""
MOST_VALUES = 20_000
"""The largest number of values, counted after each alias (`*name`) is replaced by its value."""


def parse_yaml(text: str, where: str) -> Any:
    """Return the plain data of a YAML 1.2 text.

    Raises:
        UserError: the text is not YAML, repeats a key, exceeds a limit, or holds a value that is no plain data, such as a date.
            The message names `where` and the line or the key.
    """
    from ruamel.yaml.error import YAMLError

    if len(text) > MOST_CHARACTERS:
        raise UserError(
            f"{where}: has {len(text)} characters, but settings have at most {MOST_CHARACTERS}: is this the right file?"
        )
    try:
        data = _reader().load(text)
    except _TooDeepError:
        raise UserError(f"{where}: has more than {DEEPEST} levels of nested lists and groups; settings have five") from None
    except YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}, column {mark.column + 1}" if mark is not None else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise UserError(f"{where}:{line} {problem}") from None
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError) as error:
        # ruamel's constructors let such errors through: a date in month 13, `!!bool maybe`, a number of 5000 digits.
        raise UserError(f"{where}: a value cannot be read: {shorten(str(error))}; put it in quotes if it is text") from None
    _check_plain(data, where)
    return data


class _TooDeepError(Exception):
    pass


def _reader() -> Any:
    """Return a YAML reader that stops at `DEEPEST` levels."""
    from ruamel.yaml import YAML

    reader = YAML(typ="safe", pure=True)
    reader.Composer = _shallow_composer()
    return reader


@cache
def _shallow_composer() -> Any:
    """Return a subclass of ruamel's `Composer` that stops at `DEEPEST` levels. ruamel is imported late, as its import is slow."""
    from ruamel.yaml.composer import Composer

    class ShallowComposer(Composer):
        levels = 0

        def compose_sequence_node(self, *arguments: Any) -> Any:
            return self._deeper(super().compose_sequence_node, *arguments)

        def compose_mapping_node(self, *arguments: Any) -> Any:
            return self._deeper(super().compose_mapping_node, *arguments)

        def _deeper(self, compose: Callable[..., Any], *arguments: Any) -> Any:
            self.levels += 1
            if self.levels > DEEPEST:
                raise _TooDeepError
            node = compose(*arguments)
            self.levels -= 1
            return node

    return ShallowComposer


def _check_plain(data: Any, where: str) -> None:
    """Raise `UserError` if data hold a value that JSON cannot hold, or too many values."""
    left = MOST_VALUES
    waiting: list[tuple[Any, str, int]] = [(data, "", 1)]
    while waiting:
        value, path, depth = waiting.pop()
        place = f"{where}: {shorten(path)}: " if path else f"{where}: "
        left -= 1
        if left < 0:
            raise UserError(f"{where}: its aliases (*name) stand for more than {MOST_VALUES} values: write the values out")
        if depth > DEEPEST:
            raise UserError(f"{place}the alias (*name) contains itself: write the values out")
        if isinstance(value, dict):
            for key, inner in value.items():
                if isinstance(key, bool) or not isinstance(key, str | int):  # YOLO files use integers as keys
                    raise UserError(f"{place}the key {shorten(repr(key))} is not text: put it in quotes")
                _check_text(str(key), place)
                waiting.append((inner, f"{path}.{key}" if path else str(key), depth + 1))
        elif isinstance(value, list):
            waiting += [(inner, path, depth + 1) for inner in value]
        elif isinstance(value, str):
            _check_text(value, place)
        elif isinstance(value, int):
            if abs(value) >= 2**63:
                raise UserError(f"{place}a number of {len(hex(value)) - 2} hexadecimal digits is too large")
        elif value is not None and not isinstance(value, float):
            kind = type(value).__name__
            raise UserError(
                f"{place}{shorten(repr(value))} is read as a {kind}, which no setting takes; if it is text, put it in quotes"
            )


def _check_text(text: str, place: str) -> None:
    if "\0" in text or has_half_surrogate(text):
        raise UserError(
            f"{place}the text {shorten(ascii(text))} holds a character that no file can hold (NUL or half a surrogate pair)"
        )
