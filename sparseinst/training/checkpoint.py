"""Save and load training checkpoints. A run that resumes from one gives exactly the result of a run without a stop.

A checkpoint gets its name only when it is complete. Checksums show whether it was damaged later.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from sparseinst.errors import RunFailed
from sparseinst.files import atomic, causes
from sparseinst.inference.checkpoints import archive_damage, damage
from sparseinst.paths import RunPaths

_log = logging.getLogger(__name__)

Check = Callable[[], None] | None

DAMAGED = ".damaged"
"""The suffix of a checkpoint that cannot be read."""
MISFIT = f".misfit{DAMAGED}"
"""The suffix of one that can be read, but whose content does not fit the run. It stays so however often it is read."""


def save_checkpoint(paths: RunPaths, iteration: int, state: dict[str, Any], keep: int, check: Check = None) -> None:
    """Write the state after `iteration` optimiser steps, then remove all checkpoints except the newest `keep`.

    Args:
        check: is called before anything changes. If it raises an error, nothing changes.

    Raises:
        RunFailed: the checkpoint cannot be written, for example because no space is left. Earlier checkpoints are unchanged.
    """
    with atomic(paths.checkpoint(iteration), check) as temporary:
        write_state(state, temporary)
    for old in paths.saved_checkpoints()[keep:]:
        old.unlink()


def write_state(state: dict[str, Any], path: Path) -> None:
    """Save with torch.save into a file that Python opened: torch.save alone hides why a write fails.

    Raises:
        OSError: the file cannot be written.
        SystemExit, KeyboardInterrupt: a signal stopped the process meanwhile. torch.save alone hides them in a RuntimeError, and
            an interrupted run would count as failed.
    """
    with path.open("wb") as file:
        try:
            torch.save(state, file)
        except RuntimeError as error:
            stop = next((cause for cause in causes(error) if isinstance(cause, SystemExit | KeyboardInterrupt)), None)
            if stop is not None:
                raise stop from None
            raise


def newest_checkpoint(paths: RunPaths, restore: Callable[[dict[str, Any]], None] | None = None) -> Path | None:
    """Return the newest checkpoint that can be read; None if there are no checkpoints. Damaged ones are renamed, with a warning.

    Args:
        restore: loads a checkpoint's state into the run. A checkpoint that it cannot load counts as damaged, too.

    Raises:
        RunFailed: all checkpoints are damaged. This stays so until the user gives --from-scratch (`remove_if_all_damaged`).
        RunFailed, Exception: a checkpoint cannot be read or loaded for another reason (see `damage`). It keeps its name.
    """
    for path in paths.saved_checkpoints():
        state, problem = _read(path)
        suffix = DAMAGED
        if state is not None and restore is not None:
            problem, suffix = _misfit(path, state, restore), MISFIT
        if problem is None:
            return path
        renamed = path.rename(path.with_suffix(suffix))
        _log.warning("checkpoint %s is damaged (%s) and was renamed to %s", path, problem, renamed.name)
    if any(paths.checkpoints.glob(f"[0-9]*{DAMAGED}")):
        raise RunFailed(f"{paths.checkpoints}: every checkpoint is damaged; --from-scratch trains again from step 0")
    return None


def remove_if_all_damaged(paths: RunPaths) -> None:
    """Remove a run's checkpoints if all of them are damaged, so that the run begins at step 0. Otherwise remove none.

    The renamed ones are read again first, because a disk may have failed only for a while. The newest that is whole gets its name
    back, unless its content did not fit the run.

    Raises:
        RunFailed, Exception: see `newest_checkpoint`. Nothing is removed.
    """
    if any(_read(path)[1] is None for path in paths.saved_checkpoints()):
        return
    damaged = sorted(paths.checkpoints.glob(f"[0-9]*{DAMAGED}"), reverse=True)
    for path in damaged:
        if not path.name.endswith(MISFIT) and _read(path)[1] is None:
            path.rename(path.with_suffix(".pt"))
            _log.warning("checkpoint %s is whole after all and has its name back", path.with_suffix(".pt"))
            return
    for path in [*paths.saved_checkpoints(), *damaged]:
        path.unlink()
        _log.warning("removed the damaged checkpoint %s; the run begins at step 0", path)


def load_checkpoint(path: Path, device: torch.device) -> dict[str, Any]:
    """Return the state that `save_checkpoint` wrote."""
    state: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
    return state


def _read(path: Path) -> tuple[dict[str, Any], None] | tuple[None, str]:
    """Return a checkpoint's state if it is whole, and what is damaged if it is not."""
    if problem := archive_damage(path):
        return None, problem
    try:
        state = load_checkpoint(path, torch.device("cpu"))
        if state["iteration"] != int(path.stem):
            return None, f"it holds step {state['iteration']}"
    except Exception as error:  # noqa: BLE001 (damaged headers and foreign content raise errors of many kinds)
        return None, damage(path, error)
    return state, None


def _misfit(path: Path, state: dict[str, Any], restore: Callable[[dict[str, Any]], None]) -> str | None:
    """Return why a state cannot be loaded into the run; None if `restore` has loaded it."""
    try:
        restore(state)
    except Exception as error:  # noqa: BLE001 (foreign content raises errors of many kinds)
        return damage(path, error)
    return None
