"""Escape text for each form in which a report is written. Names and labels come from specs, which people share."""

from __future__ import annotations

import html as html_module
import re

_TEX = {
    "\\": "\\textbackslash{}",
    "{": "\\{",
    "}": "\\}",
    "&": "\\&",
    "%": "\\%",
    "_": "\\_",
    "#": "\\#",
    "$": "\\$",
    "^": "\\^{}",
    "~": "\\~{}",
    "†": "$\\dagger$",
    "‡": "$\\ddagger$",
    "±": "$\\pm$",
    "|": "$|$",
    "<": "$<$",
    ">": "$>$",
}


_MARKDOWN = re.compile(r"\\|\*|(?<![^\W_])_|_(?![^\W_])|\](?=[(\[:])")
"""Characters that act: a backslash, emphasis that is not inside a word, and the end of a link's or picture's text. Intervals and
names such as small_resnet stay as they are."""


def tex(text: str) -> str:
    """Return text that LaTeX prints as it is."""
    return "".join(_TEX.get(character, character) for character in text)


def html(text: str) -> str:
    """Return text that a browser shows as it is between tags."""
    return html_module.escape(text, quote=False)


def markdown(text: str) -> str:
    """Return text that Markdown shows as it is in a cell of a table, without HTML, links, pictures or emphasis."""
    text = _MARKDOWN.sub(r"\\\g<0>", text)
    for plain, escaped in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;"), ("|", "\\|"), ("`", "\\`"), ("\n", " ")):
        text = text.replace(plain, escaped)
    return text


def csv(text: str) -> str:
    """Return text that a spreadsheet does not run as a formula; numbers and a single dash stay as they are."""
    if text[:1] not in ("=", "+", "-", "@", "\t", "\r") or text == "-":
        return text
    try:
        float(text)
    except ValueError:
        return f"'{text}"
    return text
