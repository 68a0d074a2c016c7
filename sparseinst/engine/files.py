"""Errors of the file system in the words of a user."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sparseinst.errors import RunFailed, UserError


@contextmanager
def no_space_explained(folder: Path) -> Iterator[None]:
    """Turn a failed write below `folder` into a `RunFailed` that says so. (torch.save hides the cause in a RuntimeError.)"""
    try:
        yield
    except (OSError, RuntimeError) as error:
        full = any(isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT) for cause in _causes(error))
        reason = "no space left" if full else str(error).splitlines()[0][:150]
        raise RunFailed(f"{folder}: cannot write: {reason}; what was there before is whole") from error


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def make_folder(path: Path) -> Path:
    """Create an output folder. Raises `UserError` where that cannot be."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path}: cannot be made a folder ({error.strerror})") from None
    return path
