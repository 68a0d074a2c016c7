"""Quantise a trained network to int8 for OpenVINO, and keep the parts in float that cost too much accuracy.

NNCF's post-training quantisation calibrates the integer ranges on training images. If the network then loses more AP than
allowed, parts of it are turned back to float, one after the other, until the loss is small enough. The part that causes most of
the outputs' error comes first. The artifact contains a recipe: all attempts with their AP.
"""

from __future__ import annotations

import ast
import contextlib
import logging
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from sparseinst.config import Config, NetworkPrecision
from sparseinst.data.coco import train_split
from sparseinst.data.images import read_image
from sparseinst.data.network_input import at_test_size, pad
from sparseinst.engines.base import OUTPUTS, missing_package
from sparseinst.errors import RunFailed, UserError
from sparseinst.files import file_digest
from sparseinst.inference.artifacts import About, float_artifact, network_folder, write_openvino
from sparseinst.models.sparseinst import SparseInst, normalise
from sparseinst.section import content_hash

_log = logging.getLogger(__name__)
_log.setLevel(logging.INFO)  # this takes minutes, and its steps are what a user wants to see

Score = Callable[[Path, NetworkPrecision], float | None]
"""Returns the AP in percent, on the validation data, of an OpenVINO artifact in a precision; None if that is unknown."""
Images = Sequence[NDArray[np.float32]]
"""Normalised, padded images, each (1, 3, H, W)."""

PARTS: dict[str, tuple[str, ...]] = {
    "activation maps": ("decoder.instance_branch.iam",),
    "class and objectness heads": ("decoder.instance_branch.classes", "decoder.instance_branch.objectness"),
    "mask kernels": ("decoder.instance_branch.kernels",),
    "mask features": ("decoder.projection",),
    "kernel x feature product": ("decoder.",),
    "instance branch": ("decoder.instance_branch.convs",),
    "mask branch": ("decoder.mask_branch",),
    "encoder": ("encoder",),
    "backbone stem": ("backbone.body.conv1", "backbone.body.bn1"),
}
"""The parts of the network that can stay in float, with the names of their modules.

`decoder.` stands for what the decoder itself does.
"""
_RANKED_ON = 16
"""The number of calibration images on which the parts are ordered."""
_NOISE = 16
"""The number of random images that stand in for training data, for a network with random weights."""


def int8_artifact(model: SparseInst, about: About, score: Score | None) -> Path:
    """Return the int8 artifact of a network for OpenVINO, which is made unless an earlier call has made it.

    It depends on the weights, the training images that set the ranges, the validation images and the allowed loss of AP.

    Args:
        score: returns the AP of an artifact. Without it an artifact that does not exist is not made.

    Raises:
        UserError: the extra `int8` or the training data are missing, there is no artifact and no score, or AP drops too much.
    """
    inference, data = about.config.inference, about.config.data
    train = _annotations(about.config)
    wanted = {
        "train": file_digest(train) if train is not None else "noise",
        "validation": data.content("evaluate"),
        "inference": inference.content("evaluate"),
    }
    path = network_folder(about) / f"int8-{content_hash(wanted)}.xml"
    if path.exists():
        return path
    if score is None:
        raise UserError(
            "there is no int8 network of these weights and settings yet: make one, with its AP checked, by "
            "sparseinst export --engine openvino --precision int8 --weights ... --output model.xml; then load model.xml"
        )
    return quantise(model, about, path, score, from_noise=train is None)


def _annotations(config: Config) -> Path | None:
    """Return the annotation file of the training data; None if there are no data, so that noise is used."""
    root = Path(config.data.root)
    if config.data.source == "coco" and not (root / config.data.train_annotations).exists():
        return None
    return train_split(config.data).file


def quantise(model: SparseInst, about: About, output: Path, score: Score, *, from_noise: bool = False) -> Path:
    """Quantise a network until it loses at most `inference.max_drop` of AP, and write it with its recipe.

    Raises:
        RunFailed: it loses more AP even with every part in float that can be.
        UserError: the extra `int8` is missing.
    """
    nncf, openvino = _packages()
    inference = about.config.inference
    source = float_artifact(model, about, "openvino")
    images = list(_noise(about) if from_noise else _calibration_images(about))
    network = Quantiser(nncf, openvino, source, images, _modules(float_artifact(model, about, "onnxruntime")))
    before = score(source, "fp32")
    attempts: list[dict[str, Any]] = []
    order: list[str] | None = None
    with tempfile.TemporaryDirectory(dir=output.parent) as folder:
        candidate = Path(folder) / "candidate.xml"
        while True:
            kept = [*(order or [])[: len(attempts)]]
            quantised = network.quantise(kept)
            recipe = {
                "method": f"NNCF {nncf.__version__} post-training quantisation, preset mixed",
                "calibration_images": len(images),
                "calibrated_on": "noise" if from_noise else "training images",
                "float": kept,
                "max_drop": inference.max_drop,
                "AP_float": before,
                "attempts": attempts,
            }
            write_openvino(quantised, candidate, _with_recipe(about, recipe))
            after = score(candidate, "int8")
            attempts.append({"float": kept, "AP": after})
            drop = None if before is None or after is None else before - after
            _log.info("int8 with %s in float: AP %s, float %s", ", ".join(kept) or "nothing", after, before)
            if drop is None or drop <= inference.max_drop:
                break
            if order is None:
                order = network.order_parts()
            if len(attempts) > len(order):
                raise RunFailed(
                    f"int8 loses {drop:.2f} AP even with {', '.join(kept)} in float; {inference.max_drop:g} are allowed: "
                    "allow more with --max-drop, use more --calibration-images, or use bf16"
                )
    write_openvino(quantised, output, _with_recipe(about, {**recipe, "AP": after}))
    return output


def _with_recipe(about: About, recipe: dict[str, Any]) -> About:
    return About(about.config, about.categories, about.weights, about.pixel_mean, about.pixel_std, recipe)


def _packages() -> tuple[Any, Any]:
    try:
        import nncf
        import openvino
    except ImportError as error:
        raise missing_package("openvino with precision int8", error, extra="int8") from None
    logging.getLogger("nncf").setLevel(logging.ERROR)
    return nncf, openvino


class Quantiser:
    """Quantises one network on some images, with some of its parts kept in float.

    Args:
        source: the network's OpenVINO artifact in float.
        modules: the name of the module that each operator of the network belongs to.
    """

    def __init__(self, nncf: Any, openvino: Any, source: Path, images: Images, modules: dict[str, str]) -> None:
        self._nncf, self._openvino = nncf, openvino
        self._source, self._images, self._modules = source, images, modules

    def quantise(self, kept: Sequence[str], most: int | None = None) -> Any:
        """Return the quantised OpenVINO model.

        Args:
            kept: the parts that stay in float; see `PARTS`.
            most: use at most this many images.
        """
        model = self._openvino.Core().read_model(self._source)
        present = {operator.get_friendly_name() for operator in model.get_ops()}
        names = [name for part in kept for name in self._operators(part) if name in present]
        images = self._images[:most]
        # NNCF prints its progress, but the output may be JSON for a script.
        with torch.random.fork_rng(), contextlib.redirect_stdout(sys.stderr):
            return self._nncf.quantize(
                model,
                self._nncf.Dataset(images),
                preset=self._nncf.QuantizationPreset.MIXED,
                subset_size=len(images),
                ignored_scope=self._nncf.IgnoredScope(names=names) if names else None,
            )

    def _operators(self, part: str) -> list[str]:
        return [name for name, module in self._modules.items() if part_of(module) == part]

    def order_parts(self) -> list[str]:
        """Return the parts, sorted by the outputs' error if only this part stays in float; the lowest error comes first."""
        images = self._images[:_RANKED_ON]
        expected = self._outputs(self._openvino.Core().read_model(self._source), images)
        errors = {
            part: self._error(self.quantise([part], _RANKED_ON), images, expected) for part in PARTS if self._operators(part)
        }
        for part, error in sorted(errors.items(), key=lambda entry: entry[1]):
            _log.info("int8 with only %s in float: error %.4f", part, error)
        return sorted(errors, key=errors.__getitem__)

    def _outputs(self, model: Any, images: Images) -> list[list[NDArray[np.float32]]]:
        compiled = self._openvino.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        return [[np.array(array) for array in compiled([image]).values()] for image in images]

    def _error(self, model: Any, images: Images, expected: list[list[NDArray[np.float32]]]) -> float:
        """Return the mean difference of the scores and of the mask probabilities, where the float network finds something."""
        found = self._outputs(model, images)
        return float(np.mean([_difference(ours, theirs) for ours, theirs in zip(found, expected, strict=True)]))


def _difference(ours: Sequence[NDArray[np.float32]], theirs: Sequence[NDArray[np.float32]]) -> float:
    """Return the difference of one image's outputs: of each instance's score, and of its mask, weighted by the score."""
    scores, masks = zip(*map(_scores_and_masks, (ours, theirs)), strict=True)
    weight = scores[1].max(-1)  # 1 N
    of_scores = np.abs(scores[0] - scores[1]).max(-1)
    of_masks = np.abs(masks[0] - masks[1]).sum((-2, -1)) / np.maximum(masks[1].sum((-2, -1)), 1.0)
    return float((of_scores + weight * np.minimum(of_masks, 1.0)).sum() / max(float(weight.sum()), 1e-6))


def _scores_and_masks(outputs: Sequence[NDArray[np.float32]]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    raw = dict(zip(OUTPUTS, outputs, strict=True))
    scores = _sigmoid(raw["class_logits"]) * _sigmoid(raw["objectness_logits"])[..., None]  # 1 N classes
    return np.sqrt(scores), _sigmoid(raw["mask_logits"])


def _sigmoid(x: NDArray[np.float32]) -> NDArray[np.float32]:
    return np.asarray(torch.from_numpy(x).sigmoid().numpy())


def part_of(module: str) -> str | None:
    """Return the part of the network that a module belongs to; None if it is always quantised."""
    for part, prefixes in PARTS.items():
        for prefix in prefixes:
            if module == prefix.rstrip(".") or (not prefix.endswith(".") and module.startswith(f"{prefix}.")):
                return part
    return None


def _modules(onnx_file: Path) -> dict[str, str]:
    """Return the module of each operator of an exported network, such as `decoder.projection`."""
    import onnx

    found = {}
    for node in onnx.load(onnx_file, load_external_data=False).graph.node:
        scopes = {entry.key: entry.value for entry in node.metadata_props}.get("pkg.torch.onnx.name_scopes")
        if scopes is not None:
            modules = [scope for scope in ast.literal_eval(scopes)[:-1] if scope.startswith("model.")]
            found[node.name] = modules[-1].removeprefix("model.") if modules else ""
    return found


def _calibration_images(about: About) -> Iterator[NDArray[np.float32]]:
    """Yield the first training images, as the network gets them.

    Raises:
        DataError: a training image cannot be read.
    """
    for record in train_split(about.config.data).images[: about.config.inference.calibration_images]:
        yield network_input(read_image(record.path), about)


def _noise(about: About) -> Iterator[NDArray[np.float32]]:
    random = np.random.default_rng(0)
    for _ in range(_NOISE):
        yield network_input(Image.fromarray(random.integers(0, 256, (480, 640, 3), dtype=np.uint8)), about)


def network_input(picture: Image.Image, about: About) -> NDArray[np.float32]:
    """Return an image as the network gets it: resized, padded and normalised, (1, 3, H, W)."""
    pixels = at_test_size(picture, about.config.inference)
    mean, std = (torch.tensor(values)[:, None, None] for values in (about.pixel_mean, about.pixel_std))
    return normalise(pad([pixels]), [(pixels.shape[1], pixels.shape[2])], mean, std).numpy()
