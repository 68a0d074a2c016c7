"""Read and write files. A write either completes or changes nothing, and errors become messages for the user."""

from __future__ import annotations

import errno
import hashlib
import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from sparseinst.errors import RunFailed, UserError


@contextmanager
def no_space_explained(folder: Path) -> Iterator[None]:
    """Turn a failed write below `folder` into a `RunFailed` with the reason. (torch.save hides it in a RuntimeError.)"""
    try:
        yield
    except (OSError, RuntimeError) as error:
        full = any(isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT) for cause in _causes(error))
        reason = "no space left" if full else str(error).splitlines()[0][:150]
        raise RunFailed(f"{folder}: cannot write: {reason}; earlier files are unchanged") from error


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield the error and its chain of causes."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def make_folder(path: Path) -> Path:
    """Create an output folder and return it. Raises `UserError` if it cannot be created."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{path}: cannot create this folder ({error.strerror})") from None
    return path


@contextmanager
def atomic(path: Path, check: Callable[[], None] | None = None) -> Iterator[Path]:
    """Yield a temporary file in the folder of `path`. It is renamed to `path` if the block succeeds, and removed if it fails.

    Args:
        check: is called just before the renaming. If it raises an error, the file is not renamed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        if check is not None:
            check()
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def file_digest(path: Path) -> str:
    """Return 16 hexadecimal digits of a file's SHA-256. Raises `UserError` if the file cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()[:16]
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None


def read_text(path: Path) -> str:
    """Return the text of a file that the user named. Raises `UserError` if it is missing, is a folder or is not text."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise UserError(f"{path}: is a folder, a file was expected") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
