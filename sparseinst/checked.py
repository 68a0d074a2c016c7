"""Write and read JSON with a checksum, which shows that a digit has changed.

The checksum is a CRC-32. It shows every change of one or two bits in a small file, in a third of the time that SHA-256 takes.
Files of earlier versions have none, and are read without a check.
"""

from __future__ import annotations

import json
import logging
import re
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic_core import from_json

_log = logging.getLogger(__name__)

_FIRST_FIELD = '"checksum": "{}",\n '
"""The first field of a file. The checksum is that of the file without this text."""
_CHECKED_LINE = re.compile(rb'(.*), "crc": "([0-9a-f]{8})"\}', re.DOTALL)


def with_checksum(content: Mapping[str, Any]) -> str:
    """Return the text of a JSON file that holds this content and its checksum."""
    text = _canonical(content)
    return text.replace('"', _FIRST_FIELD.format(_checksum(text.encode())) + '"', 1)


def has_checksum(text: bytes) -> bool:
    """Return whether a file holds a checksum, so that `read_checked` finds damage."""
    return _FIRST_FIELD.partition("{")[0].encode() in text[:32]


def read_checked(text: bytes) -> dict[str, Any]:
    """Return the content of a file that `with_checksum` wrote.

    If a bit of the name `checksum` is damaged, the file looks like one of an earlier version with an unknown field. Callers
    therefore refuse unknown fields.

    Raises:
        ValueError: it is no JSON object, or its checksum does not match.
    """
    content = from_json(text)  # three times as fast as json.loads
    if not isinstance(content, dict):
        raise ValueError("it is no JSON object")
    checksum = content.pop("checksum", None)
    if checksum is None:
        return content
    without = text.replace(_FIRST_FIELD.format(checksum).encode(), b"", 1)
    # A tool may have changed the spaces of the file, but not its values.
    if checksum != _checksum(without) and checksum != _checksum(_canonical(content).encode()):
        raise ValueError("its checksum does not match")
    return content


def _canonical(content: Mapping[str, Any]) -> str:
    return json.dumps(content, indent=1, sort_keys=True) + "\n"


def _checksum(text: bytes) -> str:
    return f"{zlib.crc32(text):08x}"


def json_line(entry: Mapping[str, Any]) -> str:
    """Return an object as a line of JSON. Its last field `crc` is the checksum of the line without this field."""
    text = json.dumps(entry)
    return f'{text[:-1]}, "crc": "{_checksum(text.encode())}"}}\n'


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Return the JSON objects of a file that holds one in each line, without their checksums.

    Damaged lines are left out, and a warning names them. If any line has a checksum, a line without one is
    damaged, too. So is a line whose `iteration` is no whole number.

    Raises:
        OSError: the file cannot be read.
    """
    lines = path.read_bytes().splitlines()
    matches = [_CHECKED_LINE.fullmatch(line) for line in lines]
    checked = any(matches)
    found: list[dict[str, Any]] = []
    damaged = []
    for place, (line, match) in enumerate(zip(lines, matches, strict=True), start=1):
        content = match[1] + b"}" if match is not None else line
        right = match[2].decode() == _checksum(content) if match is not None else not checked
        try:
            entry = json.loads(content) if right else None
        except (ValueError, RecursionError):
            entry = None
        if isinstance(entry, dict) and type(entry.get("iteration")) is int:
            found.append(entry)
        else:
            damaged.append(str(place))
    if damaged:
        which = f"line {damaged[0]} is" if len(damaged) == 1 else f"lines {', '.join(damaged[:10])} are"
        _log.warning("%s: %s damaged or incomplete and left out", path, which)
    return found
