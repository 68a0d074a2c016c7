"""Put messages into words: shorten texts, count things with the right plural, and name commands."""

from __future__ import annotations


def shorten(text: str, most: int = 120) -> str:
    """Return a text of at most `most` characters: its beginning and its end, if it is longer."""
    return text if len(text) <= most else f"{text[: most - most // 3 - 5]} ... {text[-(most // 3) :]}"


def has_half_surrogate(text: str) -> bool:
    """Return whether a text holds half of a surrogate pair, which JSON can write and no file can hold."""
    return any("\ud800" <= character <= "\udfff" for character in text)


def counted(count: int, noun: str, one: str = "", many: str = "") -> str:
    """Return a count with its noun, and with the verb that fits the number: `1 image has`, `2 images have`.

    Args:
        one, many: the verb for one thing and for several; empty for no verb.
    """
    verb = one if count == 1 else many
    plural = "" if count == 1 else "es" if noun.endswith("s") else "s"
    return f"{count} {noun}{plural}" + (f" {verb}" if verb else "")


def three_digits(value: float) -> str:
    """Return a number with three significant digits, never in powers of ten for a large one: `0.25`, `8,840`."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def install_extra(extra: str) -> str:
    """Return the command that installs an optional extra of this package, which is on no package registry.

    The quotes are for shells that read brackets as a pattern.
    """
    return f"pip install -e '.[{extra}]'"
