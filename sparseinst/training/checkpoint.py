"""Save and load training checkpoints. A run that resumes from one gives exactly the result of a run without a stop.

A checkpoint gets its name only when it is complete. Checksums show whether it was damaged later.
"""

from __future__ import annotations

import logging
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from sparseinst.errors import RunFailed
from sparseinst.files import atomic, no_space_explained
from sparseinst.paths import RunPaths

_log = logging.getLogger(__name__)

Check = Callable[[], None] | None


def save_checkpoint(paths: RunPaths, iteration: int, state: dict[str, Any], keep: int, check: Check = None) -> None:
    """Write the state after `iteration` optimiser steps, then remove all checkpoints except the newest `keep`.

    Args:
        check: is called before anything changes. If it raises an error, nothing changes.

    Raises:
        RunFailed: the checkpoint cannot be written, for example because no space is left. Earlier checkpoints are unchanged.
    """
    with no_space_explained(paths.checkpoints), atomic(paths.checkpoint(iteration), check) as temporary:
        write_state(state, temporary)
    for old in paths.saved_checkpoints()[keep:]:
        old.unlink()


def write_state(state: dict[str, Any], path: Path) -> None:
    """Save with torch.save into a file that Python opened: torch.save alone hides why a write fails. Raises `OSError`."""
    with path.open("wb") as file:
        torch.save(state, file)


def newest_checkpoint(paths: RunPaths) -> Path | None:
    """Return the newest complete checkpoint; None if there are no checkpoints. Damaged ones are renamed, with a warning.

    Raises:
        RunFailed: all checkpoints are damaged.
    """
    candidates = paths.saved_checkpoints()
    for path in candidates:
        problem = _damage(path)
        if problem is None:
            return path
        path.rename(path.with_suffix(".damaged"))
        _log.warning("checkpoint %s is damaged (%s) and was renamed to %s.damaged", path, problem, path.stem)
    if candidates:
        raise RunFailed(f"{paths.checkpoints}: every checkpoint is damaged; remove the folder to train from the start")
    return None


def load_checkpoint(path: Path, device: torch.device) -> dict[str, Any]:
    """Return the state that `save_checkpoint` wrote."""
    state: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
    return state


def _damage(path: Path) -> str | None:
    """Return what is damaged in a file that torch.save wrote, a zip archive with checksums; None if it is complete."""
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
    except (OSError, zipfile.BadZipFile, EOFError) as error:
        return str(error)
    return f"entry {broken} fails its checksum" if broken is not None else None
