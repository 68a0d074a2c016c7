"""Make and keep the files that ONNX Runtime and OpenVINO run, so that each is made once.

An artifact is the network alone: from normalised, padded images to raw predictions, for any number and size of images. It names
its config, its categories and, in int8, how it was quantised, so that it can be used without the weights that it came from.
The folder of artifacts has one subfolder for each network, named by the content of its weights and its settings.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from sparseinst.config import Config, EngineName
from sparseinst.data.coco import Category, read_categories
from sparseinst.engines.base import artifact_files, missing_package
from sparseinst.errors import UserError
from sparseinst.files import atomic, check_is_file, make_folder
from sparseinst.inference.export import OPSET, export_network
from sparseinst.inference.weights import tensors_digest
from sparseinst.models.layers import DeformableConv2d
from sparseinst.models.sparseinst import SparseInst
from sparseinst.overrides import parse_config
from sparseinst.section import content_hash
from sparseinst.words import shorten

ARTIFACT_SUFFIXES: dict[EngineName, str] = {"onnxruntime": ".onnx", "openvino": ".xml"}
"""The suffix of each engine's artifacts. The suffix of a given artifact therefore names its engine."""
_VERSION = 1
"""Goes up when the same weights give another artifact, so that older ones are made again."""
_ABOUT = "sparseinst"
"""The name of the entry that describes an artifact in its own metadata."""


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

    def to_json(self) -> str:
        categories = [asdict(category) for category in self.categories]
        fields = {"weights": self.weights, "pixel_mean": self.pixel_mean, "pixel_std": self.pixel_std, "recipe": self.recipe}
        return json.dumps({"config": self.config.model_dump(mode="json"), "categories": categories, **fields})

    @classmethod
    def from_json(cls, text: str, path: Path) -> About:
        try:
            data = json.loads(text)
            categories = read_categories(data["categories"])
            mean, std = tuple(data["pixel_mean"]), tuple(data["pixel_std"])
            return cls(parse_config(data["config"]), categories, data["weights"], mean, std, data["recipe"])
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path}: its metadata are damaged ({shorten(str(error))}); export it again") from None


def describe(model: SparseInst, config: Config, categories: tuple[Category, ...]) -> About:
    """Return what an artifact of this model says about itself."""
    mean, std = (tuple(map(float, buffer.flatten().cpu())) for buffer in (model.pixel_mean, model.pixel_std))
    return About(config, categories, tensors_digest(_state(model)), mean, std)


def _state(model: SparseInst) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}


def artifacts_folder() -> Path:
    """Return the folder of all artifacts: `$SPARSEINST_CACHE`, or `sparseinst` in the user's folder for caches."""
    chosen = os.environ.get("SPARSEINST_CACHE")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sparseinst"


def network_folder(about: About) -> Path:
    """Return the folder of one network's artifacts. It depends on the weights, the model's settings and the exporter."""
    content = {
        "version": _VERSION,
        "weights": about.weights,
        "model": about.config.model.content(),
        "exporter": [torch.__version__, OPSET],
    }
    return artifacts_folder() / "networks" / content_hash(content)


def compiled_folder() -> Path:
    """Return the folder in which OpenVINO keeps compiled models. It names them by their content and its settings."""
    return artifacts_folder() / "compiled"


def float_artifact(model: SparseInst, about: About, engine: EngineName) -> Path:
    """Return the artifact of a network in float32, which is made unless an earlier call has made it.

    Raises:
        UserError: a package is missing, or the network cannot be exported.
    """
    if engine == "openvino":
        _check_openvino_layers(model)
    folder = network_folder(about)
    onnx = folder / "network.onnx"
    if not onnx.exists():
        make_folder(folder)
        with atomic(onnx) as temporary:
            export_network(model, temporary, {_ABOUT: about.to_json()})
    if engine == "onnxruntime":
        return onnx
    converted = folder / f"network-{_openvino().__version__.split('-')[0]}.xml"
    if not converted.exists():
        write_openvino(_openvino().Core().read_model(onnx), converted, about)
    return converted


def _check_openvino_layers(model: SparseInst) -> None:
    """Raise `UserError` for deformable convolutions: the process of OpenVINO 2026.4.1 dies when it reads them from ONNX."""
    found = [name for name, module in model.named_modules() if isinstance(module, DeformableConv2d)]
    if found:
        raise UserError(
            f"engine openvino cannot read deformable convolutions, and the model has {len(found)} (first: {found[0]}); "
            "use the engine onnxruntime or torch"
        )


def _openvino() -> Any:
    try:
        import openvino
    except ImportError as error:
        raise missing_package("openvino", error) from None
    return openvino


def write_openvino(model: Any, path: Path, about: About) -> None:
    """Write an OpenVINO model with what it says about itself. The weights in `.bin` come first, so that `.xml` means complete."""
    model.set_rt_info(about.to_json(), [_ABOUT])
    with atomic(path) as temporary:
        # OpenVINO wants the suffix .xml.
        written = temporary.with_name(f"{temporary.name}.xml")
        weights = written.with_suffix(".bin")
        try:
            _openvino().save_model(model, written, compress_to_fp16=False)
            weights.replace(path.with_suffix(".bin"))
            written.replace(temporary)
        finally:
            for part in (written, weights):
                part.unlink(missing_ok=True)


def copy_artifact(artifact: Path, output: Path) -> None:
    """Copy an artifact, with its weights beside it.

    Raises:
        UserError: `output` has another suffix than the artifact.
    """
    if output.suffix != artifact.suffix:
        raise UserError(
            f"{output}: the artifact of this engine is a file {artifact.suffix}: name it {output.stem}{artifact.suffix}"
        )
    for source, target in zip(artifact_files(artifact), artifact_files(output), strict=True):
        with atomic(target) as temporary:
            shutil.copyfile(source, temporary)


def engine_of(path: Path) -> EngineName | None:
    """Return the engine that runs an artifact, by its suffix; None if the path is no artifact."""
    return next((engine for engine, suffix in ARTIFACT_SUFFIXES.items() if path.suffix == suffix), None)


def read_about(path: Path) -> About:
    """Return what an artifact says about itself.

    Raises:
        UserError: the file cannot be read, or it was not made by this package.
    """
    check_is_file(path)
    text = _read_onnx(path) if path.suffix == ".onnx" else _read_xml(path)
    if text is None:
        raise UserError(f"{path}: is not a network of this package; make one with sparseinst export --engine")
    return About.from_json(text, path)


def _read_onnx(path: Path) -> str | None:
    try:
        import onnx
        from google.protobuf.message import DecodeError
    except ImportError as error:
        raise missing_package("onnxruntime", error) from None
    try:
        entries: Mapping[str, str] = {
            entry.key: entry.value for entry in onnx.load(path, load_external_data=False).metadata_props
        }
    except DecodeError:
        raise UserError(f"{path}: is not an ONNX file, or it is damaged") from None
    return entries.get(_ABOUT)


def _read_xml(path: Path) -> str | None:
    try:
        model = _openvino().Core().read_model(path)
    except RuntimeError as error:
        raise UserError(f"{path}: OpenVINO cannot read it ({shorten(str(error).strip().splitlines()[-1])})") from None
    return str(model.get_rt_info([_ABOUT]).astype(str)) if model.has_rt_info([_ABOUT]) else None
