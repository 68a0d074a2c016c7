"""Escape text for each form in which a report is written. Names and labels come from specs, which people share."""

from __future__ import annotations

import html as html_module

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


def tex(text: str) -> str:
    """Return text that LaTeX prints as it is."""
    return "".join(_TEX.get(character, character) for character in text)


def html(text: str) -> str:
    """Return text that a browser shows as it is between tags."""
    return html_module.escape(text, quote=False)


def markdown(text: str) -> str:
    """Return text that Markdown shows as it is in a cell of a table, without HTML."""
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
