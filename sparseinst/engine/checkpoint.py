"""Training checkpoints, from which a run goes on exactly, and weights files, from which a model is used.

A checkpoint appears under its name complete or not at all. One that was damaged later is recognised by its checksums.
"""

from __future__ import annotations

import json
import logging
import zipfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

import sparseinst
from sparseinst.config import Config
from sparseinst.data.coco import Category
from sparseinst.engine.files import no_space_explained
from sparseinst.errors import RunFailed, UserError
from sparseinst.models.sparseinst import SparseInst, build_model
from sparseinst.overrides import parse_config
from sparseinst.paths import WEIGHTS, RunPaths, atomic

_log = logging.getLogger(__name__)

Check = Callable[[], None] | None


def save_checkpoint(paths: RunPaths, iteration: int, state: dict[str, Any], keep: int, check: Check = None) -> None:
    """Write the state after `iteration` optimiser steps, then remove all but the newest `keep`.

    Args:
        check: called before anything changes; what it raises prevents it.

    Raises:
        RunFailed: it cannot be written (no space left, say); the checkpoints before stay as they are.
    """
    with no_space_explained(paths.checkpoints), atomic(paths.checkpoint(iteration), check) as temporary:
        write_state(state, temporary)
    for old in _newest_first(paths)[keep:]:
        old.unlink()


def write_state(state: dict[str, Any], path: Path) -> None:
    """torch.save, through a file of Python's: on its own it hides why a write fails. Raises `OSError`."""
    with path.open("wb") as file:
        torch.save(state, file)


def newest_checkpoint(paths: RunPaths) -> Path | None:
    """The newest whole checkpoint; None where there is none. A damaged one is set aside with a warning.

    Raises:
        RunFailed: there are checkpoints, and not one of them is whole.
    """
    candidates = _newest_first(paths)
    for path in candidates:
        problem = _damage(path)
        if problem is None:
            return path
        path.rename(path.with_suffix(".damaged"))
        _log.warning("checkpoint %s is damaged (%s): set aside as %s.damaged", path, problem, path.stem)
    if candidates:
        raise RunFailed(f"{paths.checkpoints}: every checkpoint is damaged; remove the folder to train from the start")
    return None


def load_checkpoint(path: Path, device: torch.device) -> dict[str, Any]:
    """The state that `save_checkpoint` wrote there."""
    state: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
    return state


def _newest_first(paths: RunPaths) -> list[Path]:
    return sorted(paths.checkpoints.glob("[0-9]*.pt"), reverse=True)


def _damage(path: Path) -> str | None:
    """What is wrong with a file that torch.save wrote: a zip archive whose entries carry checksums."""
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
    except (OSError, zipfile.BadZipFile, EOFError) as error:
        return str(error)
    return f"entry {broken} fails its checksum" if broken is not None else None


def save_weights(
    path: Path, state: dict[str, Tensor], config: Config, categories: tuple[Category, ...], check: Check = None
) -> None:
    """Weights as safetensors, with the config and the categories inside: all that `load_model` needs."""
    metadata = {
        "config": config.to_json(),
        "categories": json.dumps([asdict(category) for category in categories]),
        "sparseinst": sparseinst.__version__,
    }
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    with no_space_explained(path.parent), atomic(path, check) as temporary:
        temporary.write_bytes(save(tensors, metadata))


def start_from(model: SparseInst, path: Path) -> list[str]:
    """Fill a fresh model with the tensors of a weights file that have its shapes.

    Returns:
        The names of the tensors that stay as they are, because theirs have another shape.

    Raises:
        UserError: no weights file of this package, or one of another kind of model: a tensor's name is unknown or missing.
    """
    theirs = load_weights(path)[0].state_dict()
    ours = model.state_dict()
    unknown, missing = sorted(theirs.keys() - ours.keys()), sorted(ours.keys() - theirs.keys())
    if unknown or missing:
        name, what = (unknown[0], "has no place") if unknown else (missing[0], "is not in it")
        raise UserError(f"{path}: of another kind of model: {name} {what} (and {len(unknown) + len(missing) - 1} more)")
    fresh = sorted(name for name, tensor in theirs.items() if tensor.shape != ours[name].shape)
    model.load_state_dict({name: ours[name] if name in fresh else tensor for name, tensor in theirs.items()})
    return fresh


def load_weights(path: Path) -> tuple[SparseInst, Config, tuple[Category, ...]]:
    """The model in evaluation mode on the CPU, its config and its categories.

    Args:
        path: a weights file, or the folder of a run that has one.

    Raises:
        UserError: no such file, no weights of this package, or weights that do not fit their config.
    """
    if path.is_dir():
        path = path / WEIGHTS
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: no readable safetensors file ({str(error).splitlines()[0]})") from None
    if "config" not in metadata:
        raise UserError(f"{path}: carries no config, so it was not written by this package")
    config = parse_config(json.loads(metadata["config"]), where=f"{path}: config")
    categories = tuple(Category(**entry) for entry in json.loads(metadata["categories"]))
    model = build_model(config.model, load_pretrained=False)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise UserError(f"{path}: does not fit its own config: {str(error).splitlines()[1].strip()}") from None
    return model.eval(), config, categories
