"""Keep files that take long to make for the next start, and make them again if they are damaged."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from sparseinst.engines.artifact_files import artifact_files
from sparseinst.errors import UserError
from sparseinst.files import atomic, check_is_file, file_digest, make_folder

_log = logging.getLogger(__name__)


def kept(artifact: Path, make: Callable[[], None], *, again: bool = True) -> Path:
    """Return an artifact, which `make` writes unless an earlier call has kept it and it is whole.

    The file `NAME.sha256` beside it holds the digests of its files. It is written last.

    Args:
        again: make a damaged artifact again. If not, because that would need more than the caller has, it is an error.

    Raises:
        UserError: the folder cannot be created, a folder is in the place of a file, or the artifact is damaged and cannot be made
            again.
    """
    note = artifact.with_name(f"{artifact.name}.sha256")
    if note.exists():
        check_is_file(note)
    if artifact.exists():
        known = note.read_text(encoding="ascii", errors="replace") if note.exists() else None
        if known == _digests(artifact) or (known is None and not again):
            return artifact
        if not again:
            raise UserError(f"{artifact}: is damaged: make it again by the command that made it, such as sparseinst export")
        if known is not None:
            _log.warning("%s is damaged, so it is made again", artifact)
    make_cache_folder(artifact.parent)
    note.unlink(missing_ok=True)
    make()
    with atomic(note) as temporary:
        temporary.write_text(_digests(artifact), encoding="ascii")
    return artifact


def _digests(artifact: Path) -> str:
    return "".join(f"{file_digest(file) if file.exists() else 'missing'}  {file.name}\n" for file in artifact_files(artifact))


def make_cache_folder(path: Path) -> Path:
    """Create a folder for kept files and return it.

    Raises:
        UserError: it cannot be created.
        RunFailed: the disk is full.
    """
    try:
        return make_folder(path)
    except UserError as error:
        raise UserError(f"{error}; set SPARSEINST_CACHE to a folder that you may write to") from None
