"""Find the weights in the folder of a run, which may be unfinished, and read the model from a training's checkpoint."""

from __future__ import annotations

import errno
import json
import logging
import os
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sparseinst.errors import RunFailed, UserError, device_failed, out_of_memory
from sparseinst.files import causes
from sparseinst.overrides import load_config
from sparseinst.paths import RunPaths

_log = logging.getLogger(__name__)

CHECKPOINT_SUFFIX = ".pt"


def find_weights(path: Path, checkpoint: str | None = None) -> Path:
    """Return the file with the weights of a run. If they are not the final ones, say in one line which weights they are.

    Args:
        path: the folder of a run. Any other path is returned as it is.
        checkpoint: `last`, `best` (the highest AP of the evaluations during training), or the number of a step. `last` and None
            take the trained weights, and before these exist the newest complete checkpoint.

    Raises:
        UserError: the run has no such weights, or `checkpoint` is given and the path is no folder.
        RunFailed: the newest checkpoint cannot be read now, see `damage`.
    """
    if not path.is_dir():
        if checkpoint is not None:
            raise UserError(f"{path}: is not the folder of a run, so --checkpoint cannot choose among its checkpoints")
        return path
    paths = RunPaths(path)
    if checkpoint == "best":
        return _best(paths)
    if checkpoint is not None and checkpoint != "last":
        return _of_step(paths, checkpoint)
    if paths.weights.exists():
        return paths.weights
    for saved in paths.saved_checkpoints():
        problem = archive_damage(saved)  # the file is not renamed, because its run may still train
        if problem is None:
            _say(paths, saved, f"{path} has not finished its training; ")
            return saved
        _log.warning("%s is damaged (%s), so an earlier checkpoint is used", saved, problem)
    raise UserError(f"{path}: has no {paths.weights.name} and no complete checkpoint yet")


def _best(paths: RunPaths) -> Path:
    if not paths.best.exists():
        raise UserError(f"{paths.root}: has no best checkpoint: train.evaluate_every is not set, or no evaluation is done yet")
    try:
        with safe_open(paths.best, "pt") as file:
            about = json.loads((file.metadata() or {})["training"])
            step, ap = int(about["step"]), float(about["AP"])
    except (SafetensorError, OSError, KeyError, ValueError, TypeError) as error:
        raise UserError(f"{paths.best}: is damaged ({damage(paths.best, error)}); use --checkpoint last") from None
    total, average = _training(paths)
    _log.warning("using the best checkpoint of %s, after step %d of %s: AP %.1f%s", paths.root, step, total, ap, average)
    return paths.best


def _of_step(paths: RunPaths, checkpoint: str) -> Path:
    kept = {int(saved.stem): saved for saved in paths.saved_checkpoints()}
    if not checkpoint.isdecimal() or int(checkpoint) not in kept:
        steps = ", ".join(map(str, sorted(kept))) or "none"
        raise UserError(
            f"{paths.root}: has no checkpoint {checkpoint!r}; give last, best, or a step whose checkpoint is kept: {steps}"
        )
    _say(paths, kept[int(checkpoint)], "")
    return kept[int(checkpoint)]


def _say(paths: RunPaths, checkpoint: Path, before: str) -> None:
    total, average = _training(paths)
    _log.warning("%susing %s, after step %d of %s%s", before, checkpoint, int(checkpoint.stem), total, average)


def _training(paths: RunPaths) -> tuple[str, str]:
    """Return the number of steps of a run's training, and words about the weights if it keeps a moving average of them."""
    if not paths.config.exists():
        return "unknown", ""
    train = load_config(paths.config).train
    return str(train.iterations), "; these are the moving average of the weights" if train.ema_decay is not None else ""


def archive_damage(path: Path) -> str | None:
    """Return what is damaged in a checkpoint, by the checksums of the zip archive that torch.save writes; None if nothing is.

    Raises:
        RunFailed: the file cannot be read now, see `damage`.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
    except Exception as error:  # noqa: BLE001 (damaged names and headers raise errors of many kinds)
        return damage(path, error)
    return f"entry {broken} fails its checksum" if broken is not None else None


def damage(path: Path, error: Exception) -> str:
    """Return an error of reading a checkpoint as one line that says what is damaged.

    Raises:
        RunFailed: the file cannot be read now, for example because its disk does not answer. Its content may be whole.
        BaseException: the error again, if the file did not cause it, but too little memory, a device that fails, or a signal.
    """
    for cause in causes(error):  # zipfile and torch hide the first error behind one of their own
        if not isinstance(cause, Exception):
            raise cause from None
        if isinstance(cause, OSError) and cause.errno is not None and cause.errno not in _ERRORS_OF_CONTENT:
            raise RunFailed(f"{path}: cannot be read now ({os.strerror(cause.errno)}); it stays as it is") from error
        if out_of_memory(cause) is not None or device_failed(cause):
            raise error
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"[:200]


_ERRORS_OF_CONTENT = (errno.EINVAL, errno.EISDIR)
"""The system's errors for places in the file that a damaged header names, and for a folder in place of a file."""


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Return the state in a training's checkpoint, on the CPU.

    Raises:
        UserError: the file is damaged, or is no checkpoint of a training.
        RunFailed: it cannot be read now, see `damage`.
    """
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # noqa: BLE001 (as in `archive_damage`)
        # The checksums come first, because a damaged size asks for more memory than there is.
        problem = archive_damage(path) or damage(path, error)
        raise UserError(f"{path}: is damaged ({problem}); choose another one with --checkpoint") from None
    if not isinstance(state, dict) or "model" not in state:
        raise UserError(f"{path}: is not a checkpoint of a training")
    return state


def model_state(saved: dict[str, Any]) -> dict[str, Tensor]:
    """Return the tensors of the model in a checkpoint's state: the moving average of the weights, if the training keeps one."""
    average = saved.get("ema")
    if average is None:
        state: dict[str, Tensor] = saved["model"]
        return state
    return {name.removeprefix("module."): tensor for name, tensor in average.items() if name != "n_averaged"}
