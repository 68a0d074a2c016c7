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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from sparseinst.config import NetworkPrecision
from sparseinst.data.coco import train_annotations, train_split, val_annotations
from sparseinst.data.images import read_image
from sparseinst.data.network_input import at_test_size, middle_tile, pad
from sparseinst.engines.artifact_files import read_onnx
from sparseinst.engines.base import OUTPUTS, missing_package
from sparseinst.errors import RunFailed, UserError
from sparseinst.files import file_digest
from sparseinst.inference.artifacts import About, float_artifact, network_folder, onnx_file, write_openvino
from sparseinst.inference.kept import kept
from sparseinst.models.network import normalise
from sparseinst.section import content_hash

_log = logging.getLogger(__name__)
_log.setLevel(logging.INFO)  # this takes minutes, and its steps are what a user wants to see

if TYPE_CHECKING:
    from sparseinst.models.sparseinst import SparseInst

Score = Callable[[Path, NetworkPrecision], float | None]
"""Returns the AP in percent, on the validation data, of an OpenVINO artifact in a precision; None if that is unknown."""
Picture = Path | Image.Image
"""An image for the calibration, or its file. 300 normalised images at once would fill two gigabytes."""

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

    Args:
        score: returns the AP of an artifact. Without it an artifact that does not exist is not made.

    Raises:
        UserError, DataError: the extra `int8` or the data are missing, or there is no artifact and no score.
        RunFailed: AP drops too much.
    """
    path = int8_file(about)

    def make() -> None:
        if score is None:
            raise UserError(
                "there is no int8 network of these weights and settings yet: make one, with its AP checked, by "
                "sparseinst export --engine openvino --precision int8 --weights ... --output model.xml; then load model.xml"
            )
        quantise(model, about, path, score)

    return kept(path, make, again=score is not None)


def int8_file(about: About) -> Path:
    """Return where the int8 artifact of a network is kept.

    The name depends on the weights, the inference settings, the training images that set the ranges, and the validation images
    that decide what stays in float. A network without categories has random weights; its ranges come from noise.

    Raises:
        DataError: an annotation file is missing.
    """
    data = about.config.data
    wanted: dict[str, Any] = {"inference": about.config.inference.content("evaluate"), "calibration": "noise"}
    if about.categories:
        wanted["calibration"] = [file_digest(train_annotations(data)), data.train_images, data.train_limit]
        wanted["validation"] = [file_digest(val_annotations(data)), data.content("evaluate")]
    return network_folder(about) / f"int8-{content_hash(wanted)}.xml"


def quantise(model: SparseInst, about: About, output: Path, score: Score) -> Path:
    """Quantise a network until it loses at most `inference.max_drop` of AP, and write it with its recipe.

    Raises:
        RunFailed: it loses more AP even with every part in float that can be.
        UserError, DataError: the extra `int8` is missing, or the training data cannot be read.
    """
    nncf, openvino = quantisation_packages()
    inference = about.config.inference
    source = float_artifact(model, about, "openvino")
    images: Sequence[Picture] = _calibration_images(about) if about.categories else noise_images()
    modules = modules_of(onnx_file(model, about, "openvino"))
    network = Quantiser(nncf, openvino, source, modules, images, lambda picture: network_input(picture, about))
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
                "calibrated_on": "training images" if about.categories else "noise",
                "float": kept,
                "max_drop": inference.max_drop,
                "AP_float": before,
                "attempts": attempts,
            }
            write_openvino(quantised, candidate, replace(about, recipe=recipe))
            after = score(candidate, "int8")
            attempts.append({"float": kept, "AP": after})
            drop = None if before is None or after is None else before - after
            if drop is None:
                _log.info("int8: quantised without a check of AP: the weights are random, or the validation data has no object")
            else:
                _log.info("int8 with %s in float: AP %.2f, float %.2f", ", ".join(kept) or "nothing", after, before)
            if drop is None or drop <= inference.max_drop:
                break
            if order is None:
                order = network.order_parts()
            if len(attempts) > len(order):
                raise RunFailed(
                    f"int8 loses {drop:.2f} AP even with {', '.join(kept)} in float; {inference.max_drop:g} are allowed: "
                    "allow more with --max-drop, use more --calibration-images, or use bf16"
                )
    write_openvino(quantised, output, replace(about, recipe={**recipe, "AP": after}))
    return output


def quantisation_packages() -> tuple[Any, Any]:
    """Return the modules `nncf` and `openvino`.

    Raises:
        UserError: one of them is not installed.
    """
    try:
        import nncf
        import openvino
    except ImportError as error:
        raise missing_package("openvino with precision int8", error, extra="int8") from None
    logging.getLogger("nncf").setLevel(logging.ERROR)
    return nncf, openvino


def quantise_on(
    nncf: Any,
    model: Any,
    pictures: Sequence[Any],
    read: Callable[[Any], NDArray[np.float32]],
    kept: Sequence[str] = (),
    *,
    transformer: bool = False,
) -> Any:
    """Return an OpenVINO model in int8, with ranges from these pictures.

    Args:
        read: returns a picture as the network gets it, (1, 3, H, W).
        kept: the names of the operators that stay in float.
        transformer: whether the network is a transformer.
    """
    # NNCF prints its progress, but the output may be JSON for a script.
    with torch.random.fork_rng(), contextlib.redirect_stdout(sys.stderr):
        return nncf.quantize(
            model,
            nncf.Dataset(pictures, read),
            preset=nncf.QuantizationPreset.MIXED,
            subset_size=len(pictures),
            ignored_scope=nncf.IgnoredScope(names=list(kept)) if kept else None,
            model_type=nncf.ModelType.TRANSFORMER if transformer else None,
        )


class Quantiser:
    """Quantises one network on some images, with some of its parts kept in float.

    Args:
        source: the network's OpenVINO artifact in float.
        modules: see `modules_of`.
        pictures: the images for the calibration.
        read: returns such an image as the network gets it, (1, 3, H, W).
    """

    def __init__(
        self,
        nncf: Any,
        openvino: Any,
        source: Path,
        modules: Mapping[str, str],
        pictures: Sequence[Picture],
        read: Callable[[Picture], NDArray[np.float32]],
    ) -> None:
        self._nncf, self._openvino, self._source, self._modules = nncf, openvino, source, modules
        self._pictures, self._read = pictures, read

    def quantise(self, kept: Sequence[str], most: int | None = None) -> Any:
        """Return the quantised OpenVINO model.

        Args:
            kept: the parts that stay in float; see `PARTS`.
            most: use at most this many images.
        """
        model = self._openvino.Core().read_model(self._source)
        names = [name for part in kept for name in operators_of(part, model, self._modules)]
        return quantise_on(self._nncf, model, self._pictures[:most], self._read, names)

    def order_parts(self) -> list[str]:
        """Return the parts, sorted by the outputs' error if only this part stays in float; the lowest error comes first."""
        model = self._openvino.Core().read_model(self._source)
        expected = self._outputs(model)
        errors = {
            part: self._error(self.quantise([part], _RANKED_ON), expected)
            for part in PARTS
            if operators_of(part, model, self._modules)
        }
        for part, error in sorted(errors.items(), key=lambda entry: entry[1]):
            _log.info("int8 with only %s in float: error %.4f", part, error)
        return sorted(errors, key=errors.__getitem__)

    def _outputs(self, model: Any) -> list[list[NDArray[np.float32]]]:
        """Return the outputs for the images on which the parts are ordered."""
        compiled = self._openvino.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        images = map(self._read, self._pictures[:_RANKED_ON])
        return [[np.array(array) for array in compiled([image]).values()] for image in images]

    def _error(self, model: Any, expected: list[list[NDArray[np.float32]]]) -> float:
        """Return the mean difference of the scores and of the mask probabilities, where the float network finds something."""
        found = self._outputs(model)
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


def operators_of(part: str, model: Any, modules: Mapping[str, str]) -> list[str]:
    """Return the names of an OpenVINO model's operators that belong to a part of the network.

    One operator of the ONNX file can become several. OpenVINO then calls the last one `NAME` and the others `NAME/...`: a
    convolution with a bias becomes the sum `NAME` and the convolution `NAME/WithoutBiases`.

    Args:
        modules: see `modules_of`.
    """
    names = (operator.get_friendly_name() for operator in model.get_ops())
    return [name for name in names if part_of(modules.get(name.partition("/")[0], "")) == part]


def modules_of(onnx_file: Path) -> dict[str, str]:
    """Return the module of each operator of an exported network, such as `decoder.projection`."""
    found = {}
    for node in read_onnx(onnx_file).graph.node:
        scopes = {entry.key: entry.value for entry in node.metadata_props}.get("pkg.torch.onnx.name_scopes")
        if scopes is not None:
            modules = [scope for scope in ast.literal_eval(scopes)[:-1] if scope.startswith("model.")]
            found[node.name] = modules[-1].removeprefix("model.") if modules else ""
    return found


def _calibration_images(about: About) -> list[Picture]:
    """Return the files of the first training images."""
    return [image.path for image in train_split(about.config.data).images[: about.config.inference.calibration_images]]


def noise_images() -> list[Image.Image]:
    """Return the images on which a network with random weights is calibrated."""
    random = np.random.default_rng(0)
    return [Image.fromarray(random.integers(0, 256, (480, 640, 3), dtype=np.uint8)) for _ in range(_NOISE)]


def network_input(picture: Picture, about: About) -> NDArray[np.float32]:
    """Return an image, or the tile in its middle, as the network gets it: resized, padded and normalised, (1, 3, H, W).

    Raises:
        DataError: the file cannot be read.
    """
    picture = read_image(picture) if isinstance(picture, Path) else picture
    pixels = at_test_size(middle_tile(picture, about.config.inference), about.config.inference)
    mean, std = (torch.tensor(values)[:, None, None] for values in (about.pixel_mean, about.pixel_std))
    return normalise(pad([pixels]), [(pixels.shape[1], pixels.shape[2])], mean, std).numpy()
