"""Read and write files. A write either completes or changes nothing, and errors become messages for the user."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
import os
import stat
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel

from sparseinst.errors import RunFailed, UserError
from sparseinst.words import shorten

_log = logging.getLogger(__name__)

AnyModel = TypeVar("AnyModel", bound=BaseModel)

_FULL = (errno.ENOSPC, errno.EDQUOT)
_NOT_ALLOWED = (errno.EROFS, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG)


def write_error(path: Path | str, error: OSError) -> RunFailed | UserError | None:
    """Return a failed write as one line.

    Returns:
        `RunFailed` if the disk is full or broken; `UserError` if nothing can be written at this place; None for another cause.
    """
    if error.errno in (*_FULL, errno.EIO):
        reason = "no space left" if error.errno in _FULL else os.strerror(errno.EIO)
        return RunFailed(f"{path}: cannot write: {reason}; earlier files are unchanged")
    if error.errno in _NOT_ALLOWED:
        return UserError(f"{path}: cannot write: {os.strerror(error.errno or 0)}; choose another place")
    return None


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield the error and its chain of causes."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def make_folder(path: Path) -> Path:
    """Create an output folder and return it.

    Raises:
        UserError: it cannot be created at this place.
        RunFailed: the disk is full.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if error.errno in _FULL:
            raise RunFailed(f"{path}: cannot create this folder: no space left") from None
        raise UserError(f"{path}: cannot create this folder ({error.strerror})") from None
    return path


def check_writable(file: Path) -> None:
    """Check that a file can be written, before work is done whose result goes there. Its folder is created.

    Raises:
        UserError: nothing can be written at this place, or the path is a folder.
        RunFailed: the disk is full.
    """
    if file.is_dir():
        raise UserError(f"{file}: is a folder; name a file in it")
    make_folder(file.parent)
    temporary = _temporary(file)
    try:
        temporary.write_bytes(b"0")
    except OSError as error:
        raise write_error(file, error) or error from None
    finally:
        _remove(temporary)


@contextmanager
def atomic(path: Path, check: Callable[[], None] | None = None) -> Iterator[Path]:
    """Yield a temporary file in the folder of `path`. It is renamed to `path` if the block succeeds, and removed if it fails.

    Args:
        check: is called just before the renaming. If it raises an error, the file is not renamed.

    Raises:
        UserError, RunFailed: the file cannot be written, see `write_error`.
    """
    temporary = _temporary(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        try:
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
        except FileNotFoundError:
            if check is not None:  # a newer attempt may have removed the file, and this is then the better reason
                check()
            raise
        if check is not None:
            check()
        temporary.replace(path)
    except (OSError, RuntimeError) as error:  # torch.save hides the reason in a RuntimeError
        failed = next((cause for cause in causes(error) if isinstance(cause, OSError)), None)
        explained = write_error(path, failed) if failed is not None else None
        if explained is None:
            raise
        raise explained from error
    finally:
        _remove(temporary)


def _temporary(path: Path) -> Path:
    """Return a name for a temporary file beside `path`; `remove_temporaries` finds it."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")


def _remove(temporary: Path) -> None:
    with contextlib.suppress(OSError):  # it was never made, or the disk is read-only, and the error of the write says more
        temporary.unlink(missing_ok=True)


@contextmanager
def private_files() -> Iterator[int]:
    """Let only this user read and write the files that are created meanwhile, and return the file mode mask from before.

    submitit pickles the jobs, and whoever can write a pickle runs code as the user who sent it.
    """
    mask = os.umask(0o077)
    try:
        yield mask
    finally:
        os.umask(mask)


def remove_temporaries(folder: Path, *, older_than: float = 0.0) -> None:
    """Remove the temporary files that killed writers left in a folder.

    Args:
        older_than: keep files that were changed in the last `older_than` seconds, because their writers may still be at work.
    """
    for path in folder.glob(".*.tmp"):
        try:
            if time.time() - path.stat().st_mtime >= older_than:
                path.unlink()
        except FileNotFoundError:  # its writer has just ended, or another process removed it
            continue


def parse_json(text: bytes | str, model: type[AnyModel]) -> AnyModel | None:
    """Return a JSON object as this model; None if it is damaged, lacks a field, or a field has a wrong type."""
    try:
        return model.model_validate_json(text, strict=True)
    except ValueError:  # pydantic raises it for every kind of damage: no UTF-8, no JSON, no object, too deep, a wrong type
        return None


def free_path(path: Path) -> Path:
    """Return the path, or the first of `NAME-2`, `NAME-3` and so on that does not exist."""
    candidate, number = path, 1
    while candidate.exists():
        number += 1
        candidate = path.with_name(f"{path.stem}-{number}{path.suffix}")
    return candidate


def distinct_names(names: Iterable[str], reserved: Iterable[str] = ()) -> list[str]:
    """Return the names of files, with `-2`, `-3` and so on before the suffix of one that is reserved or that came before."""
    found: list[str] = []
    taken = set(reserved)
    for name in names:
        path, number = Path(name), 2
        while name in taken:
            name, number = f"{path.stem}-{number}{path.suffix}", number + 1
        taken.add(name)
        found.append(name)
    return found


def state_of_file(file: Path) -> tuple[int, ...]:
    """Return what changes when a file is written again: its time, size and number on the disk; () if it does not exist."""
    try:
        state = file.stat()
    except OSError:
        return ()
    return state.st_mtime_ns, state.st_size, state.st_ino


def file_digest(path: Path) -> str:
    """Return 16 hexadecimal digits of a file's SHA-256. Raises `UserError` if the file cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()[:16]
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from None


def check_is_file(path: Path) -> None:
    """Raise `UserError` if a path that the user named is no file: missing, a folder, a device or a pipe, which may never end."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        raise UserError(f"{shorten(str(path))}: no such file") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{shorten(str(path))}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
    if stat.S_ISDIR(mode):
        raise UserError(f"{path}: is a folder, a file was expected")
    if not stat.S_ISREG(mode):
        raise UserError(f"{path}: is a device or a pipe, a file was expected")


def read_text(path: Path, *, most: int | None = None) -> str:
    """Return the text of a file that the user named.

    Args:
        most: the largest size of the file in bytes; None for any.

    Raises:
        UserError: the file is missing, is no file, is too large, or is not text.
    """
    check_is_file(path)
    try:
        if most is not None and path.stat().st_size > most:
            raise UserError(f"{path}: has {path.stat().st_size} bytes, at most {most} were expected: is this the right file?")
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
