"""Read and write weights files. A weights file holds a model's tensors, its config and its categories."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save
from torch import Tensor

from sparseinst.config import Config
from sparseinst.data.coco import Category, read_categories, train_split
from sparseinst.errors import UserError
from sparseinst.files import atomic, check_is_file
from sparseinst.inference.checkpoints import CHECKPOINT_SUFFIX, find_weights, model_state, read_checkpoint
from sparseinst.models.sparseinst import SparseInst, build_model
from sparseinst.models.tensors import not_finite, read_safetensors, tensors_digest
from sparseinst.overrides import load_config, parse_config
from sparseinst.paths import SHIPPED, SHIPPED_MODELS, RunPaths
from sparseinst.words import shorten

Check = Callable[[], None] | None


def save_weights(
    path: Path,
    state: dict[str, Tensor],
    config: Config,
    categories: tuple[Category, ...],
    check: Check = None,
    *,
    half: bool = False,
    training: Mapping[str, float] | None = None,
) -> None:
    """Write the tensors as safetensors, with the config and the categories in the same file, so that `load_model` can read it.

    Args:
        half: write kernels and matrices in half precision, which halves the file.
        training: facts about unfinished training to keep in the file: the `step` of the weights and their `AP`.
    """
    kept = halved(state) if half else state
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in kept.items()}
    metadata = {"config": config.to_json(), "categories": json.dumps([asdict(category) for category in categories])}
    metadata["sparseinst"] = version("sparseinst")
    if training is not None:
        metadata["training"] = json.dumps(training)
    metadata["checksum"] = _checksum(tensors, metadata)
    with atomic(path, check) as temporary:
        temporary.write_bytes(save(tensors, metadata))


def file_tensors_digest(path: Path) -> str:
    """Return the `tensors_digest` of a safetensors file. Raises `UserError` if it cannot be read."""
    return tensors_digest(_read(path)[0])


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors and the metadata of a safetensors file. Raises `UserError` if it cannot be read."""
    check_is_file(path)
    try:
        return read_safetensors(path)
    except (SafetensorError, OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        exported = "; a file of `export --form torch` is loaded with torch.export.load" if path.suffix == ".pt2" else ""
        raise UserError(
            f"{path} is no readable safetensors file ({shorten((str(error).splitlines() or [''])[0])}){exported}"
        ) from None


def _checksum(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """Return the checksum of a weights file's content."""
    names = ["config", "categories", "sparseinst", *(["training"] if "training" in metadata else [])]
    text = "\n".join([tensors_digest(tensors), *(metadata.get(name, "") for name in names)])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def halved(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors with kernels and matrices in half precision.

    Biases and norms stay as they are, because their range may be too wide for half precision.
    """
    return {name: tensor.half() if tensor.ndim > 1 and tensor.is_floating_point() else tensor for name, tensor in state.items()}


def load_weights(path: Path) -> tuple[SparseInst, Config, tuple[Category, ...]]:
    """Return a model in evaluation mode on the CPU, its config and its categories.

    Args:
        path: a weights file, the folder of a run (see `find_weights`), a checkpoint in such a folder, or the name of a model in
            the package (`demo`).

    Raises:
        UserError: there is no such file, it is not a weights file of this package, it is damaged, holds NaN or infinite values,
            or its tensors do not fit its config.
    """
    path = find_weights(path)
    if path.suffix == CHECKPOINT_SUFFIX and path.exists():
        return _load_checkpoint(path)
    if str(path) in SHIPPED_MODELS and not path.exists():
        path = SHIPPED / f"{path}.safetensors"
    state, metadata = _read(path)
    if not {"config", "categories"} <= metadata.keys():
        raise UserError(f"{path} carries no config, so this package did not write it")
    checksum = metadata.get("checksum")  # files of earlier versions have none
    unknown = metadata.keys() - {"config", "categories", "sparseinst", "checksum", "training"}  # a damaged name
    if unknown or (checksum is not None and checksum != _checksum(state, metadata)):
        raise UserError(f"{path}: is damaged: its content does not match its checksum; copy it again, or train again")
    if (name := not_finite(state)) is not None:
        raise UserError(f"{path}: {name} holds NaN or infinite values: the training diverged; train again")
    try:
        settings, entries = json.loads(metadata["config"]), json.loads(metadata["categories"])
        categories = read_categories(entries)
        if not isinstance(settings, dict):
            raise ValueError(f"settings were expected, got {shorten(repr(settings))}")
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{path}: its metadata cannot be read ({shorten(' '.join(str(error).split()))})") from None
    config = parse_config(settings, where=f"{path}: config")
    return _filled(config, state, path, categories), config, categories


def _load_checkpoint(path: Path) -> tuple[SparseInst, Config, tuple[Category, ...]]:
    """Return the model of a training's checkpoint, its config and its categories, as `load_weights` does."""
    paths = RunPaths(path.parent.parent)
    if not paths.config.exists():
        raise UserError(f"{path}: this is no checkpoint in the folder of a run, because {paths.config} is missing")
    config = load_config(paths.config)
    saved = read_checkpoint(path)
    entries = saved.get("categories")  # checkpoints of earlier versions have none
    try:
        categories = train_split(config.data).categories if entries is None else read_categories(entries)
    except ValueError as error:
        raise UserError(f"{path}: is damaged ({error}); choose another one with --checkpoint") from None
    return _filled(config, model_state(saved), path, categories), config, categories


def _filled(config: Config, state: Mapping[str, Tensor], path: Path, categories: tuple[Category, ...]) -> SparseInst:
    """Return a model in evaluation mode with these tensors, which come from the file `path`.

    Raises:
        UserError: the model of the config has other tensors or another number of categories. A model without memory shows this,
            so that a damaged config cannot ask for more memory than there is.
    """
    if len(categories) != config.model.num_classes:
        raise UserError(f"{path}: holds {len(categories)} categories, but its config says {config.model.num_classes}")
    with torch.device("meta"):
        wanted = build_model(config.model, load_pretrained=False).state_dict()
    counters = "num_batches_tracked"  # torch does not need these either
    problems = [f"{name} is missing" for name in wanted if name not in state and not name.endswith(counters)]
    problems += [f"{name} is not part of the model" for name in state if name not in wanted]
    problems += [
        f"{name} has shape {list(state[name].shape)}, expected {list(tensor.shape)}"
        for name, tensor in wanted.items()
        if name in state and state[name].shape != tensor.shape
    ]
    problems += [
        f"{name} is of type {state[name].dtype}, expected {tensor.dtype}"  # half precision is welcome
        for name, tensor in wanted.items()
        if name in state and state[name].is_floating_point() != tensor.is_floating_point()
    ]
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise UserError(f"{path}: the tensors do not fit the file's own config: {problems[0]}{more}")
    model = build_model(config.model, load_pretrained=False)
    model.load_state_dict(state)
    return model.eval()
