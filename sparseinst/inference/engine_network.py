"""Prepare a trained network to run in the engine and the precision that its config names.

What only weights need is imported where weights are read: timm and torchvision take longer to import than an artifact to load.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sparseinst.config import Config, EngineName, NetworkPrecision, OptimizeMode, Precision
from sparseinst.data.coco import Category
from sparseinst.device import pick_device
from sparseinst.engines.base import Engine, EngineFacts
from sparseinst.engines.names import check_engine
from sparseinst.errors import UserError
from sparseinst.inference.artifacts import (
    About,
    compiled_folder,
    describe,
    engine_of,
    float_artifact,
    read_about,
    state_on_cpu,
)
from sparseinst.inference.quantization import Score, int8_artifact
from sparseinst.models.network import InstanceNetwork, Predictions
from sparseinst.models.tensors import tensors_digest

if TYPE_CHECKING:
    from sparseinst.models.sparseinst import SparseInst

Optimize = OptimizeMode | None


class EngineNetwork(InstanceNetwork):
    """A network that runs in an engine."""

    def __init__(self, engine: Engine, about: About) -> None:
        super().__init__(about.config.model.decoder.mask_scale, about.pixel_mean, about.pixel_std)
        self.engine = engine

    def forward(self, images: Tensor) -> Predictions:
        return self.engine.run(images)


@dataclass(frozen=True)
class Prepared:
    """A network that is ready to run, and the facts about what runs it."""

    network: InstanceNetwork
    facts: EngineFacts
    artifact: Path | None = None
    """The file that runs; None for torch."""
    about: About | None = None
    """The settings and the classes of an artifact; None for torch. The file can name the settings of an earlier use."""

    @property
    def recipe(self) -> dict[str, Any] | None:
        """How the network was quantised, and what stayed in float; None if nothing was quantised."""
        return self.about.recipe if self.about is not None else None

    def as_json(self) -> dict[str, Any]:
        """Return the facts, with the recipe if there is one."""
        return {**self.facts.as_json(), **({"recipe": self.recipe} if self.recipe is not None else {})}


def prepare(
    model: SparseInst,
    config: Config,
    categories: tuple[Category, ...],
    *,
    device: torch.device,
    optimize: Optimize = None,
    score: Score | None = None,
) -> Prepared:
    """Return the network of a trained model in the engine and precision of `config.inference`.

    Args:
        optimize: for torch: see `inference.optimize`; None leaves the model as it is.
        score: for int8: returns a network's AP on the validation data in percent, to check what quantisation costs. Without it,
            only an int8 network that an earlier call has made can be used.

    Raises:
        UserError: the engine's extra is missing, it compiled another precision, or it does not run on this device.
    """
    inference = config.inference
    if inference.engine == "torch":
        return _prepare_torch(model, config, device, optimize)
    check_device(inference.engine, device, optimize)
    about = describe(model, config, categories)
    if inference.precision == "int8":
        artifact = int8_artifact(model, about, score)
        about = replace(about, recipe=read_about(artifact).recipe)
    else:
        artifact = float_artifact(model, about, inference.engine)
    return load_artifact(artifact, about, inference.precision)


def load_artifact(artifact: Path, about: About, precision: NetworkPrecision, *, keep_compiled: bool = True) -> Prepared:
    """Return the network of an artifact.

    Args:
        keep_compiled: let OpenVINO keep the compiled network on the disk, for the next start.

    Raises:
        UserError: as `prepare` does.
    """
    engine: Engine
    if engine_of(artifact) == "onnxruntime":
        from sparseinst.engines import onnxruntime_engine

        engine = onnxruntime_engine.load(artifact, precision)
    else:
        from sparseinst.engines import openvino_engine

        engine = openvino_engine.load(artifact, precision, cache=compiled_folder() if keep_compiled else None)
    return Prepared(EngineNetwork(engine, about).eval(), engine.facts, artifact, about)


def check_device(engine: EngineName, device: torch.device, optimize: Optimize = None) -> None:
    """Raise `UserError` if an engine other than torch is asked for a GPU or for an optimisation of torch."""
    if device.type != "cpu":
        raise UserError(f"engine {engine} runs on the CPU only, not on {device}: use --device cpu, or the engine torch")
    if optimize is not None:
        raise UserError(f"engine {engine} optimises the network itself: leave out --optimize {optimize}, which is for torch")


def device_for(config: Config, name: str | None) -> torch.device:
    """Return the device with this name. Without a name, torch takes a GPU if there is one, and other engines take the CPU."""
    return pick_device("cpu" if name is None and config.inference.engine != "torch" else name)


def _prepare_torch(model: SparseInst, config: Config, device: torch.device, optimize: Optimize) -> Prepared:
    from sparseinst.engines import torch_engine
    from sparseinst.inference import optimize as optimizing

    state = state_on_cpu(model)
    size = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
    network = model.to(device).eval()
    if optimize is not None:
        network = optimizing.optimize(network, device=device, mode=optimize, precision=torch_precision(config))
    facts = torch_engine.facts(network, config.inference.precision, tensors_digest(state), size, device)
    return Prepared(network, facts)


def torch_precision(config: Config) -> Precision:
    """Return the precision of `config.inference` for torch, which has no int8."""
    precision = config.inference.precision
    if precision == "int8":
        raise UserError("engine torch has no precision int8; use the engine openvino")
    return precision


def with_engine(config: Config, engine: str | None, precision: str | None) -> Config:
    """Return the config with another engine and precision; None keeps what it has.

    Raises:
        UserError: there is no such engine, or it does not have the precision.
    """
    changes: dict[str, Any] = {}
    if engine is not None:
        changes["inference.engine"] = check_engine(engine)
    if precision is not None:
        changes["inference.precision"] = precision
    return config.replace(changes) if changes else config


@dataclass(frozen=True)
class Source:
    """Trained weights, or an artifact that was made of them."""

    path: Path
    config: Config
    categories: tuple[Category, ...]
    model: SparseInst | None
    """None for an artifact."""
    about: About | None = None
    """What an artifact says about itself; None for weights."""

    def prepare(self, config: Config, *, device: torch.device, optimize: Optimize = None, score: Score | None = None) -> Prepared:
        """Return the network in the engine and precision of this config, as the function `prepare` does.

        Raises:
            UserError: also if an artifact cannot run in this engine and precision.
        """
        if self.model is not None:
            return prepare(self.model, config, self.categories, device=device, optimize=optimize, score=score)
        assert self.about is not None
        inference, own = config.inference, self.config.inference
        if inference.engine != own.engine or (
            inference.precision != own.precision and "int8" in (inference.precision, own.precision)
        ):
            raise UserError(
                f"{self.path}: is a network for the engine {own.engine} in {own.precision}; it does not run with the engine "
                f"{inference.engine} in {inference.precision}: use --engine {own.engine} --precision {own.precision}, or give "
                "the weights that it was made of"
            )
        check_device(inference.engine, device, optimize)
        return load_artifact(self.path, self.about, inference.precision)


def open_source(path: Path) -> Source:
    """Read weights, or an artifact: a file `.onnx` or `.xml` that `sparseinst export --engine` wrote.

    Raises:
        UserError: the file is neither.
    """
    engine = engine_of(path)
    if engine is None:
        from sparseinst.inference.weights import load_weights

        model, config, categories = load_weights(path)
        return Source(path, config, categories, model)
    about = read_about(path)
    own, quantised = about.config.inference, about.recipe is not None
    precision = "int8" if quantised else own.precision if own.engine == engine and own.precision != "int8" else "fp32"
    config = about.config.replace({"inference.engine": engine, "inference.precision": precision})
    return Source(path, config, about.categories, None, about)
