"""Turn the errors that a user can cause anywhere into one line, and refuse arguments that no command can use."""

from __future__ import annotations

from collections.abc import Sequence

from sparseinst.errors import RunFailed, UserError, out_of_memory
from sparseinst.files import write_error
from sparseinst.words import has_half_surrogate, shorten

_LONGEST_MESSAGE = 600  # the middle of a longer one is left out


def check_arguments(arguments: Sequence[str]) -> None:
    """Raise `UserError` for an empty argument, such as `--output ""`, and for one that is not text.

    An empty path would mean the working folder.
    """
    for number, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        given_empty = name.startswith("--") and equals and not value.strip()
        if not argument.strip() or given_empty:
            option = name if given_empty else arguments[number - 1] if number else ""
            what = f"the value of {option}" if option.startswith("-") else f"argument {number + 1}"
            raise UserError(f"{what} is empty: give a value, or leave it out")
        if has_half_surrogate(argument):  # how Python passes on bytes that are not UTF-8
            raise UserError(f"argument {number + 1} ({shorten(ascii(argument))}) is not UTF-8 text: rename the file")


def explain(error: BaseException) -> tuple[str, int] | None:
    """Return the line and the exit code for an error; None for an error of the program, which needs its traceback."""
    if isinstance(error, UserError | RunFailed):
        return _line(str(error)), 2 if isinstance(error, UserError) else 1
    if isinstance(error, OSError) and isinstance(found := write_error(error.filename or "standard output", error), RunFailed):
        return _line(str(found)), 1
    if isinstance(error, OSError) and error.strerror:
        name = f"{shorten(str(error.filename))}: " if error.filename is not None else ""
        return _line(f"{name}{error.strerror}"), 2
    if (problem := out_of_memory(error)) is not None:
        return f"{problem}: lower the size of the images (inference.short_side, inference.long_side) or the batch size", 1
    return None


def _line(text: str) -> str:
    return shorten(" ".join(text.splitlines()), _LONGEST_MESSAGE)
