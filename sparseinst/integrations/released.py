"""Convert the authors' released checkpoints, and detectron2's ImageNet backbones, to weights of this package.

The model is inferred from the tensors: their names give the backbone, their shapes everything else. The import is refused unless
every tensor has its place.
"""

from __future__ import annotations

import io
import pickle
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparseinst.config import PRESETS, RELEASED_MODELS, Config
from sparseinst.data.coco import Category
from sparseinst.errors import UserError
from sparseinst.models.backbone import read_tensors
from sparseinst.models.network import PIXEL_MEAN, PIXEL_STD
from sparseinst.models.sparseinst import build_model

_Names = tuple[tuple[str, str], ...]
"""Pairs of a part of their names and the same part of our names. A part that begins with a dot is replaced anywhere in a name,
other parts only at its beginning."""

_HEADS: _Names = (
    ("encoder.fpn_laterals.", "encoder.laterals."),
    ("encoder.fpn_outputs.", "encoder.outputs."),
    ("decoder.inst_branch.inst_convs.", "decoder.instance_branch.convs."),
    ("decoder.inst_branch.iam_conv.", "decoder.instance_branch.iam.conv."),
    ("decoder.inst_branch.fc.", "decoder.instance_branch.iam.mix."),
    ("decoder.inst_branch.cls_score.", "decoder.instance_branch.classes."),
    ("decoder.inst_branch.mask_kernel.", "decoder.instance_branch.kernels."),
    ("decoder.inst_branch.objectness.", "decoder.instance_branch.objectness."),
    ("decoder.mask_branch.mask_convs.", "decoder.mask_branch."),
    ("decoder.mask_branch.projection.", "decoder.projection."),
)
_DETECTRON2: _Names = (
    ("stem.conv1.norm.", "bn1."),
    ("stem.conv1.", "conv1."),
    *((f"res{stage}.", f"layer{stage - 1}.") for stage in range(2, 6)),
    (".shortcut.norm.", ".downsample.1."),
    (".shortcut.", ".downsample.0."),
    *((f".conv{number}.norm.", f".bn{number}.") for number in range(1, 4)),
    (".conv2_offset.", ".conv2.offset."),
)
_TIMM_2021: _Names = (
    ("stem.conv1.", "stem_conv1."),
    *((f"stages.{stage}.", f"stages_{stage}.") for stage in range(5)),
    (".conv2_offset.", ".conv2.offset."),
)
_PVT: _Names = (
    ("patch_embed1.", "patch_embed."),
    *((f"patch_embed{stage + 1}.", f"stages_{stage}.downsample.") for stage in range(1, 4)),
    *((f"block{stage + 1}.", f"stages_{stage}.blocks.") for stage in range(4)),
    *((f"norm{stage + 1}.", f"stages_{stage}.norm.") for stage in range(4)),
    (".dwconv.dwconv.", ".dwconv."),
)
SOFTMAX_BIAS = "decoder.inst_branch.softmax_bias"
"""A scalar that is added before a softmax over positions. It changes nothing, but it shows that there is a softmax."""
COUNTER = ".num_batches_tracked"
"""The end of the name of a BatchNorm's counter of batches. It has no effect; frozen norms have none."""
_WITHOUT_EFFECT = re.compile(rf"^{re.escape(SOFTMAX_BIAS)}$|^pixel_(mean|std)$")


@dataclass(frozen=True)
class Imported:
    """A released model under our names."""

    state: dict[str, Tensor]
    config: Config
    categories: tuple[Category, ...]
    name: str
    """The model's name in `sparseinst.config.RELEASED_MODELS`, or the backbone's name if the model is not there."""
    renamed: dict[str, str]
    """Our name for each of their names."""
    dropped: list[str] = field(default_factory=list)
    """The tensors that were left out, because they have no effect."""


def rename_encoder_decoder(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors with the encoder's and the decoder's renamed to our names. Other keys stay as they are."""
    return {_rename(key, _HEADS): tensor for key, tensor in state.items() if not _WITHOUT_EFFECT.search(key)}


def to_our_names(theirs: Iterable[str]) -> dict[str, str]:
    """Map each of their names to ours, except tensors without effect. The backbone is inferred from the names."""
    kept = [key for key in theirs if not _WITHOUT_EFFECT.search(key)]
    bodies = {key: _without_wrapper(key) for key in kept if key.startswith("backbone.")}
    body = _backbone_names(bodies.values())
    return {key: f"backbone.body.{_rename(bodies[key], body)}" if key in bodies else _rename(key, _HEADS) for key in kept}


def to_reference_names(ours: Iterable[str]) -> dict[str, str]:
    """Map each of our names to theirs; the inverse of `to_our_names`."""
    names = list(ours)
    plain_resnet = "backbone.body.conv1.weight" in names
    body = _DETECTRON2 if plain_resnet else _PVT if any("patch_embed" in name for name in names) else _TIMM_2021
    heads, body = _reversed(_HEADS), _reversed(body)
    return {
        name: f"backbone.{_rename(name.removeprefix('backbone.body.'), body)}"
        if name.startswith("backbone.body.")
        else _rename(name, heads)
        for name in names
    }


def _reversed(names: _Names) -> _Names:
    return tuple((ours, theirs) for theirs, ours in names)


def _backbone_names(body: Iterable[str]) -> _Names:
    names = set(body)
    return _DETECTRON2 if "stem.conv1.weight" in names else _PVT if "patch_embed1.proj.weight" in names else _TIMM_2021


def import_released(path: Path) -> Imported:
    """Read a checkpoint of the reference implementation. Nothing in the file is executed.

    Raises:
        UserError: there is no such file, it holds no model of the reference or one of a kind that was never released, or tensors
            are missing or left over; the message lists them.
    """
    theirs = _read(path)
    parts = [key for key in theirs if key.startswith(("encoder.", "decoder."))]
    if not parts:
        raise UserError(
            f"{path} holds no encoder.* and decoder.*, so it is no SparseInst checkpoint (use --backbone to import a backbone)"
        )
    _check_normalisation(theirs, path)
    backbone = _recognise_backbone({_without_wrapper(key): theirs[key] for key in theirs if key.startswith("backbone.")}, path)
    settings = {f"model.backbone.{name}": value for name, value in training_settings(backbone["model.backbone.name"]).items()}
    trained_norms = settings.get("model.backbone.frozen_norm") is False
    renamed = {key: ours for key, ours in to_our_names(theirs).items() if trained_norms or not ours.endswith(COUNTER)}
    state = {ours: theirs[key] for key, ours in renamed.items()}
    settings |= PRESETS["release"] | backbone | _settings(state, softmax=SOFTMAX_BIAS in theirs, path=path)
    config = Config().replace({**settings, "model.backbone.pretrained": False})
    if trained_norms:
        norms = [name.removesuffix(".running_mean") for name in state if name.endswith(".running_mean")]
        state = {f"{norm}{COUNTER}": torch.tensor(0) for norm in norms} | state
    _check_fit(state, config, {ours: key for key, ours in renamed.items()}, path)
    dropped = sorted(theirs.keys() - renamed.keys())
    return Imported(state, config, _categories(config.model.num_classes), _name_of(config), renamed, dropped)


def training_settings(backbone: str) -> dict[str, Any]:
    """Return the settings below `model.backbone` that the tensors of a released model do not show: how it is trained."""
    names = ("frozen_norm", "drop_path")
    for settings in RELEASED_MODELS.values():
        if settings.get("model.backbone.name") == backbone:
            return {name: settings[key] for name in names if (key := f"model.backbone.{name}") in settings}
    return {}


def import_backbone(path: Path) -> tuple[dict[str, Tensor], list[str]]:
    """Read detectron2's ImageNet weights of a ResNet (`.pkl` or `.pth`) and give them timm's names, for `model.backbone.weights`.

    Returns:
        The tensors, and the names of the tensors that were left out: the classifier's and those without effect.

    Raises:
        UserError: the file holds none of detectron2's names.
    """
    theirs = _read(path)
    if not any(key.startswith("stem.conv1.") for key in theirs):
        raise UserError(
            f"{path} has none of detectron2's names of a ResNet (stem.conv1.weight, ...); Caffe2's weights are no substitute, "
            "because they expect other pixels"
        )
    dropped = sorted(key for key in theirs if key.startswith(("fc.", "linear.")) or key.endswith(COUNTER))
    return {_rename(key, _DETECTRON2): tensor for key, tensor in theirs.items() if key not in dropped}, dropped


def _read(path: Path) -> dict[str, Tensor]:
    return _read_pickle(path) if path.suffix == ".pkl" else read_tensors(path)


class _ArraysOnly(pickle.Unpickler):
    """Unpickle numbers, strings, containers and numpy arrays only, so that nothing in the file can be executed."""

    ALLOWED = (
        ("numpy", "ndarray"),
        ("numpy", "dtype"),
        ("_codecs", "encode"),
        *((f"numpy.{core}.multiarray", name) for core in ("core", "_core") for name in ("_reconstruct", "scalar")),
    )

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"it holds {module}.{name}, which is no array")
        return super().find_class(module, name)


def _read_pickle(path: Path) -> dict[str, Tensor]:
    """Return the arrays that detectron2 stores under `model`."""
    try:
        data = _ArraysOnly(io.BytesIO(path.read_bytes()), encoding="latin1").load()
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (pickle.UnpicklingError, EOFError, ValueError, KeyError, IndexError, AttributeError, ImportError, TypeError) as error:
        raise UserError(f"{path} holds no readable weights ({str(error).splitlines()[0][:120]})") from None
    state = data.get("model", data) if isinstance(data, dict) else None
    if not isinstance(state, dict) or not all(isinstance(value, np.ndarray) for value in state.values()):
        raise UserError(f"{path} holds no dictionary of arrays")
    return {str(name): torch.from_numpy(np.ascontiguousarray(value)) for name, value in state.items()}


def _rename(key: str, names: _Names) -> str:
    """Apply the first pair that fits the beginning of a name, then every pair that begins with a dot."""
    for before, after in names:
        if not before.startswith(".") and key.startswith(before):
            key = after + key.removeprefix(before)
            break
    for before, after in names:
        if before.startswith("."):
            key = key.replace(before, after)
    return key


def _without_wrapper(key: str) -> str:
    """Return a tensor's name within the backbone. Some classes of the reference wrap the network in an attribute."""
    return re.sub(r"^backbone\.((backbone|body|model)\.)?", "", key)


def _check_normalisation(theirs: Mapping[str, Tensor], path: Path) -> None:
    """Raise `UserError` if the checkpoint normalises pixels with another mean or deviation."""
    for key, expected in (("pixel_mean", PIXEL_MEAN), ("pixel_std", PIXEL_STD)):
        if key in theirs and not torch.allclose(theirs[key].flatten().float(), torch.tensor(expected), atol=1e-2):
            raise UserError(
                f"{path}: {key} is {[round(v, 3) for v in theirs[key].flatten().tolist()]} instead of {list(expected)} (RGB), so "
                "the weights were trained on other pixels"
            )


def _recognise_backbone(body: Mapping[str, Tensor], path: Path) -> dict[str, Any]:
    """Return the backbone's settings, inferred from the names and shapes of the tensors."""
    if "stem.conv1.weight" in body:
        names = {6: "resnet50.tv_in1k", 23: "resnet101.tv_in1k"}
        return {"model.backbone.name": _by_depth(names, body, r"res4\.(\d+)\.", path), **_deformable(body, "res", 0)}
    if "conv1.0.weight" in body:
        names = {6: "resnet50d.ra2_in1k"}
        return {
            "model.backbone.name": _by_depth(names, body, r"layer3\.(\d+)\.", path),
            **_deformable(body, "layer", 1),
        }
    if "patch_embed1.proj.weight" in body:
        linear = body.get("block1.0.attn.sr.weight", torch.empty(0, 0, 8)).shape[-1] == 1
        names = {2: "pvt_v2_b1.in1k"} if not linear else {3: "pvt_v2_b2_li.in1k"}
        return {"model.backbone.name": _by_depth(names, body, r"block1\.(\d+)\.", path)}
    if any(re.match(r"stages[._]0\.", key) for key in body):
        name = "cspdarknet53.ra_in1k" if any("conv_transition" in key for key in body) else "darknet53.c2ns_in1k"
        return {"model.backbone.name": name}
    first = ", ".join(sorted(body)[:3]) or "none"
    raise UserError(f"{path} holds no backbone of a released model (the first tensors are {first})")


def _by_depth(names: Mapping[int, str], body: Mapping[str, Tensor], pattern: str, path: Path) -> str:
    """Return the name that belongs to the number of blocks whose tensors match the pattern."""
    blocks = 1 + max((int(match[1]) for key in body if (match := re.match(pattern, key))), default=-1)
    if blocks not in names:
        raise UserError(f"{path}: the backbone has {blocks} blocks where the released ones have {' or '.join(map(str, names))}")
    return names[blocks]


def _deformable(body: Mapping[str, Tensor], stage: str, offset: int) -> dict[str, Any]:
    """Return the settings of deformable convolutions, which detectron2 marks by tensors named `conv2_offset`."""
    found = {
        int(match[1]) + offset: tensor.shape[0]
        for key, tensor in body.items()
        if (match := re.match(rf"{stage}(\d)\.\d+\.conv2_offset\.weight", key))
    }
    if not found:
        return {}
    if set(found.values()) != {18}:
        raise UserError(f"the deformable convolutions have {max(found.values())} offset channels; the released ones have 18 (v1)")
    return {"model.backbone.deformable_stages": sorted(found)}


def _settings(state: Mapping[str, Tensor], *, softmax: bool, path: Path) -> dict[str, Any]:
    """Return the settings of the encoder and the decoder, inferred from the shapes of their tensors."""
    branch = "decoder.instance_branch"
    try:
        channels = state["encoder.laterals.0.weight"].shape[0]
        first = state[f"{branch}.convs.0.weight"]
        maps = state[f"{branch}.iam.conv.weight"]
        width = first.shape[0]
        groups = width // maps.shape[1]
        found = {
            "model.num_classes": state[f"{branch}.classes.weight"].shape[0],
            "model.encoder.channels": channels,
            "model.encoder.ppm": "encoder.ppm.bottleneck.weight" in state,
            "model.encoder.fusion": "encoder.fusion.weight" in state,
            "model.decoder.depth": sum(bool(re.fullmatch(rf"{branch}\.convs\.\d+\.weight", key)) for key in state),
            "model.decoder.width": width,
            "model.decoder.coordinates": first.shape[1] == channels + 2,
            "model.decoder.kernel_dim": state["decoder.projection.weight"].shape[0],
            "model.decoder.iam.num_maps": maps.shape[0] // groups,
            "model.decoder.iam.groups": groups,
            "model.decoder.iam.kernel_size": maps.shape[-1],
            "model.decoder.iam.activation": "softmax" if softmax else "sigmoid",
        }
    except KeyError as missing:
        raise UserError(
            f"{path}: the model's settings cannot be inferred, because {missing.args[0]} (our name) is missing"
        ) from None
    return found


def _check_fit(state: Mapping[str, Tensor], config: Config, theirs: Mapping[str, str], path: Path) -> None:
    """Raise `UserError`, with lists, unless file and model have the same tensors with the same shapes."""
    with torch.device("meta"):
        expected = {key: tensor.shape for key, tensor in build_model(config.model, load_pretrained=False).state_dict().items()}
    missing = sorted(expected.keys() - state.keys())
    left = sorted(theirs[key] for key in state.keys() - expected.keys())
    other = sorted(
        f"{theirs[key]} {list(state[key].shape)} for {list(expected[key])}"
        for key in state.keys() & expected.keys()
        if state[key].shape != expected[key]
    )
    if missing or left or other:
        lists = (("missing", missing), ("left over", left), ("of another shape", other))
        told = "; ".join(
            f"{len(keys)} {what}: {', '.join(keys[:8])}{', ...' if len(keys) > 8 else ''}" for what, keys in lists if keys
        )
        raise UserError(f"{path} does not fit {_name_of(config)}: {told}")


def _name_of(config: Config) -> str:
    """Return the name of the released model with these settings, or else the backbone's name."""
    for name, settings in RELEASED_MODELS.items():
        named = Config().replace(settings).model
        if named.content("latency") == config.model.content("latency"):
            return name
    return config.model.backbone.name


def _categories(count: int) -> tuple[Category, ...]:
    """Return COCO's categories with the ids of its files, or numbered ones if there are not 80."""
    if count != 80:
        return tuple(Category(number, f"class {number}") for number in range(1, count + 1))
    from torchvision.models.detection import MaskRCNN_ResNet50_FPN_Weights

    names = MaskRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
    return tuple(Category(number, name) for number, name in enumerate(names) if name not in ("__background__", "N/A"))
