"""Make and keep the files that ONNX Runtime and OpenVINO run, so that each is made once, and name the folders of all artifacts.

An artifact is the network alone: from normalised, padded images to raw predictions, for any number and size of images. It names
its config, its categories and, in int8, how it was quantised, so that it can be used without the weights that it came from.
The folder of artifacts has one subfolder for each network, named by the content of its weights and its settings.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from sparseinst.config import Config, EngineName
from sparseinst.data.coco import Category, read_categories
from sparseinst.engines.artifact_files import ABOUT, GRAPH, OPSET, artifact_files, read_about_text, read_onnx, with_about
from sparseinst.engines.base import missing_package
from sparseinst.errors import RunFailed, UserError
from sparseinst.files import atomic, file_digest
from sparseinst.inference.kept import kept, make_cache_folder
from sparseinst.models.tensors import tensors_digest
from sparseinst.overrides import parse_config
from sparseinst.section import content_hash
from sparseinst.words import shorten

if TYPE_CHECKING:
    from sparseinst.models.sparseinst import SparseInst

ARTIFACT_SUFFIXES: dict[EngineName, str] = {"onnxruntime": ".onnx", "openvino": ".xml"}
"""The suffix of each engine's artifacts. The suffix of a given artifact therefore names its engine."""
_VERSION = 2
"""Goes up when the same weights give another artifact, so that older ones are made again."""


@dataclass(frozen=True)
class About:
    """What an artifact says about itself."""

    config: Config
    categories: tuple[Category, ...]
    weights: str
    """The `tensors_digest` of the weights that it was made of."""
    pixel_mean: tuple[float, ...]
    pixel_std: tuple[float, ...]
    recipe: dict[str, Any] | None = None
    """How it was quantised, and what stayed in float; None if nothing was quantised."""

    def to_json(self, weights_file: Path | None = None) -> str:
        """Return the text for the artifact's metadata.

        Args:
            weights_file: OpenVINO's file `.bin`, which the text identifies by its content; None if there is only one file.
        """
        categories = [asdict(category) for category in self.categories]
        fields = {"weights": self.weights, "pixel_mean": self.pixel_mean, "pixel_std": self.pixel_std, "recipe": self.recipe}
        fields |= {"weights_file": file_digest(weights_file)} if weights_file is not None else {}
        return json.dumps({"config": self.config.model_dump(mode="json"), "categories": categories, **fields})

    @classmethod
    def from_json(cls, text: str, path: Path) -> About:
        try:
            data = json.loads(text)
            categories = read_categories(data["categories"])
            mean, std = tuple(data["pixel_mean"]), tuple(data["pixel_std"])
            about = cls(parse_config(data["config"]), categories, data["weights"], mean, std, data["recipe"])
            beside = data.get("weights_file")
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}: its metadata are damaged ({shorten(str(error))}); export it again") from None
        weights = path.with_suffix(".bin")
        if beside is not None and weights.exists() and file_digest(weights) != beside:
            raise UserError(
                f"{path}: {weights.name} beside it holds other weights than those of its export: copy both files of the same "
                "export"
            )
        return about


def describe(model: SparseInst, config: Config, categories: tuple[Category, ...]) -> About:
    """Return what an artifact of this model says about itself."""
    mean, std = (tuple(map(float, buffer.flatten().cpu())) for buffer in (model.pixel_mean, model.pixel_std))
    return About(config, categories, tensors_digest(state_on_cpu(model)), mean, std)


def state_on_cpu(model: SparseInst) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}


def artifacts_folder() -> Path:
    """Return the folder of all artifacts: `$SPARSEINST_CACHE`, or `sparseinst` in the user's folder for caches."""
    chosen = os.environ.get("SPARSEINST_CACHE")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sparseinst"


def network_folder(about: About) -> Path:
    """Return the folder of one network's artifacts. It depends on the weights, the model's settings and the exporter.

    It does not depend on the settings of `data` and `inference`, so an artifact there may name those of an earlier use.
    `copy_artifact` replaces them.
    """
    content = {
        "version": _VERSION,
        "weights": about.weights,
        "model": about.config.model.content(),
        "exporter": [torch.__version__, OPSET],
    }
    return artifacts_folder() / "networks" / content_hash(content)


def compiled_folder() -> Path:
    """Return the folder in which OpenVINO keeps compiled models, in a subfolder for each artifact."""
    return artifacts_folder() / "compiled"


def libraries_folder() -> Path:
    """Return the folder of the networks that torch has compiled for this CPU, see `inference.ahead`."""
    return artifacts_folder() / "torch"


def float_artifact(model: SparseInst, about: About, engine: EngineName) -> Path:
    """Return the artifact of a network in float32, which is made unless an earlier call has made it.

    Raises:
        UserError: a package is missing, or the network cannot be exported.
    """
    if engine == "onnxruntime":
        return onnx_file(model, about, engine)
    openvino = _openvino()
    path = network_folder(about) / f"network-{openvino.__version__.split('-')[0]}.xml"
    return kept(path, lambda: write_openvino(openvino.Core().read_model(onnx_file(model, about, engine)), path, about))


def onnx_file(model: SparseInst, about: About, engine: EngineName) -> Path:
    """Return the ONNX file that an engine's artifact is made of; it is made unless an earlier call has made it.

    Raises:
        UserError: a package is missing.
    """
    from sparseinst.inference.export import export_network
    from sparseinst.models.layers import DeformableConv2d

    # The process of OpenVINO 2026.4.1 dies when it reads ONNX's deformable convolutions.
    sampled = engine == "openvino" and any(isinstance(module, DeformableConv2d) for module in model.modules())
    path = network_folder(about) / ("network-sampled.onnx" if sampled else "network.onnx")

    def export() -> None:
        with atomic(path) as temporary:
            export_network(model, temporary, sampled=sampled)

    return kept(path, export)


def _openvino() -> Any:
    try:
        import openvino
    except ImportError as error:
        raise missing_package("openvino", error) from None
    return openvino


def write_openvino(model: Any, path: Path, about: About) -> None:
    """Write an OpenVINO model with what it says about itself.

    Raises:
        UserError, RunFailed: the files cannot be written.
    """
    model.set_rt_info("", [ABOUT])
    with tempfile.TemporaryDirectory(dir=make_cache_folder(path.parent), prefix=".", suffix=".tmp") as folder:
        copy_artifact(_saved(model, Path(folder), path), path, about)


def save_openvino(model: Any, path: Path) -> None:
    """Write an OpenVINO model that is no network of this package.

    Raises:
        UserError, RunFailed: the files cannot be written.
    """
    with tempfile.TemporaryDirectory(dir=make_cache_folder(path.parent), prefix=".", suffix=".tmp") as folder:
        saved = _saved(model, Path(folder), path)
        for written, file in reversed(list(zip(artifact_files(saved), artifact_files(path), strict=True))):  # the weights first
            written.replace(file)


def _saved(model: Any, folder: Path, path: Path) -> Path:
    """Write the two files of an OpenVINO model that is meant for `path` into this folder, and return the one that names both."""
    saved = folder / path.name
    try:
        _openvino().save_model(model, saved, compress_to_fp16=False)
    except RuntimeError as error:  # it does not say why
        free = shutil.disk_usage(folder).free
        raise RunFailed(
            f"{path}: OpenVINO cannot write it ({shorten(str(error).strip().splitlines()[-1])}); "
            f"{free / 1e6:.1f} MB are free on this disk"
        ) from None
    return saved


def copy_artifact(artifact: Path, output: Path, about: About) -> None:
    """Copy an artifact, with its weights beside it, and let the copy say this about itself.

    Raises:
        UserError: `output` has another suffix than the artifact.
        UserError, RunFailed: the files cannot be written.
    """
    if output.suffix != artifact.suffix:
        raise UserError(
            f"{output}: the artifact of this engine is a file {artifact.suffix}: name it {output.stem}{artifact.suffix}"
        )
    if artifact.suffix == ".onnx":
        with atomic(output) as temporary:
            temporary.write_bytes(with_about(artifact, about.to_json()))
        return
    [_, weights], [_, new_weights] = artifact_files(artifact), artifact_files(output)
    with atomic(output) as temporary:
        temporary.write_bytes(with_about(artifact, about.to_json(weights)))
        # The weights come first, and an older `.xml` is removed before, so that `.xml` means that both files are complete.
        with atomic(new_weights, lambda: output.unlink(missing_ok=True)) as copied:
            shutil.copyfile(weights, copied)


def engine_of(path: Path) -> EngineName | None:
    """Return the engine that runs an artifact, by its suffix; None if the path is no artifact."""
    return next((engine for engine, suffix in ARTIFACT_SUFFIXES.items() if path.suffix == suffix), None)


def read_about(path: Path) -> About:
    """Return what an artifact says about itself.

    Raises:
        UserError: the file is incomplete, it was not made by this package, or the weights beside it are those of another one.
    """
    text = read_about_text(path)
    if text is None and path.suffix == ".onnx" and any(entry.key == GRAPH for entry in read_onnx(path).metadata_props):
        raise UserError(
            f"{path}: contains pre- and post-processing, and runs without this package. In place of weights, use the network "
            "alone: sparseinst export --engine onnxruntime"
        )
    if text is None:
        raise UserError(
            f"{path}: is no network of this package, or it is incomplete: copy it again, or make one with "
            "sparseinst export --engine"
        )
    return About.from_json(text, path)
