"""The authors' released checkpoints, and detectron2's ImageNet backbones, as weights of ours.

Which model it is, the tensors themselves tell: their names the backbone, their shapes everything else. All of them are accounted
for, or the import is refused.
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

from sparseinst.config import MODELS, PRESETS, Config
from sparseinst.data.coco import Category
from sparseinst.errors import UserError
from sparseinst.models.backbone import read_tensors
from sparseinst.models.sparseinst import PIXEL_MEAN, PIXEL_STD, build_model

_Names = tuple[tuple[str, str], ...]
"""Parts of their names and of ours. One that begins with a dot is found anywhere in a name, others at its beginning."""

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
_SOFTMAX_BIAS = "decoder.inst_branch.softmax_bias"
"""A scalar added before a softmax over positions: it changes nothing, but tells that there is a softmax."""
_WITHOUT_EFFECT = re.compile(rf"^{re.escape(_SOFTMAX_BIAS)}$|\.num_batches_tracked$|^pixel_(mean|std)$")


@dataclass(frozen=True)
class Imported:
    """A released model under our names."""

    state: dict[str, Tensor]
    config: Config
    categories: tuple[Category, ...]
    name: str
    """Of the model as `sparseinst.config.MODELS` has it, or what it resembles most."""
    renamed: dict[str, str]
    """Their names to ours."""
    dropped: list[str] = field(default_factory=list)
    """What has no effect."""


def rename_encoder_decoder(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The encoder's and decoder's tensors under our names; other keys are left as they are."""
    return {_rename(key, _HEADS): tensor for key, tensor in state.items() if not _WITHOUT_EFFECT.search(key)}


def to_our_names(theirs: Iterable[str]) -> dict[str, str]:
    """Ours by theirs, for all that has an effect. Which backbone it is, its names tell."""
    kept = [key for key in theirs if not _WITHOUT_EFFECT.search(key)]
    bodies = {key: _without_wrapper(key) for key in kept if key.startswith("backbone.")}
    body = _backbone_names(bodies.values())
    return {key: f"backbone.body.{_rename(bodies[key], body)}" if key in bodies else _rename(key, _HEADS) for key in kept}


def to_reference_names(ours: Iterable[str]) -> dict[str, str]:
    """Theirs by ours; the inverse of `to_our_names`."""
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
    """Read a checkpoint of the reference implementation; nothing in it is executed.

    Raises:
        UserError: no such file, no model of the reference, one of a kind that was never released, or tensors that are missing
            or left over; the message lists them.
    """
    theirs = _read(path)
    parts = [key for key in theirs if key.startswith(("encoder.", "decoder."))]
    if not parts:
        raise UserError(
            f"{path}: holds no encoder.* and decoder.*, so it is no SparseInst checkpoint (for a backbone: --backbone)"
        )
    _same_pixels(theirs, path)
    backbone = _recognise_backbone({_without_wrapper(key): theirs[key] for key in theirs if key.startswith("backbone.")}, path)
    renamed = to_our_names(theirs)
    state = {ours: theirs[key] for key, ours in renamed.items()}
    settings = PRESETS["release"] | backbone | _settings(state, softmax=_SOFTMAX_BIAS in theirs, path=path)
    config = Config().replace({**settings, "model.backbone.pretrained": False})
    _fits(state, config, {ours: key for key, ours in renamed.items()}, path)
    dropped = sorted(key for key in theirs if _WITHOUT_EFFECT.search(key))
    return Imported(state, config, _categories(config.model.num_classes), _name_of(config), renamed, dropped)


def import_backbone(path: Path) -> tuple[dict[str, Tensor], list[str]]:
    """detectron2's ImageNet weights of a ResNet (`.pkl` or `.pth`) under timm's names, for `model.backbone.weights`.

    Returns:
        The tensors, and the names that were dropped: those of the classifier.

    Raises:
        UserError: none of detectron2's names in it.
    """
    theirs = _read(path)
    if not any(key.startswith("stem.conv1.") for key in theirs):
        raise UserError(
            f"{path}: has none of detectron2's names of a ResNet (stem.conv1.weight, ...); Caffe2's expect other pixels"
        )
    dropped = sorted(key for key in theirs if key.startswith(("fc.", "linear.")) or _WITHOUT_EFFECT.search(key))
    return {_rename(key, _DETECTRON2): tensor for key, tensor in theirs.items() if key not in dropped}, dropped


def _read(path: Path) -> dict[str, Tensor]:
    return _read_pickle(path) if path.suffix == ".pkl" else read_tensors(path)


class _ArraysOnly(pickle.Unpickler):
    """Unpickles numbers, strings, containers and numpy arrays; anything else is refused, so that nothing can be executed."""

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
    """The arrays that detectron2 keeps under `model`."""
    try:
        data = _ArraysOnly(io.BytesIO(path.read_bytes()), encoding="latin1").load()
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (pickle.UnpicklingError, EOFError, ValueError, KeyError, IndexError, AttributeError, ImportError, TypeError) as error:
        raise UserError(f"{path}: no readable weights ({str(error).splitlines()[0][:120]})") from None
    state = data.get("model", data) if isinstance(data, dict) else None
    if not isinstance(state, dict) or not all(isinstance(value, np.ndarray) for value in state.values()):
        raise UserError(f"{path}: holds no dictionary of arrays")
    return {str(name): torch.from_numpy(np.ascontiguousarray(value)) for name, value in state.items()}


def _rename(key: str, names: _Names) -> str:
    for before, after in names:
        if not before.startswith(".") and key.startswith(before):
            key = after + key.removeprefix(before)
            break
    for before, after in names:
        if before.startswith("."):
            key = key.replace(before, after)
    return key


def _without_wrapper(key: str) -> str:
    """The backbone's own name of a tensor: some classes keep the network in a field."""
    return re.sub(r"^backbone\.((backbone|body|model)\.)?", "", key)


def _same_pixels(theirs: Mapping[str, Tensor], path: Path) -> None:
    for key, expected in (("pixel_mean", PIXEL_MEAN), ("pixel_std", PIXEL_STD)):
        if key in theirs and not torch.allclose(theirs[key].flatten().float(), torch.tensor(expected), atol=1e-2):
            raise UserError(
                f"{path}: {key} is {[round(v, 3) for v in theirs[key].flatten().tolist()]}, here it is {list(expected)} (RGB): "
                "the weights were trained on other pixels"
            )


def _recognise_backbone(body: Mapping[str, Tensor], path: Path) -> dict[str, Any]:
    """The settings that its names and shapes ask for."""
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
    raise UserError(f"{path}: no backbone of a released model (its tensors: {first}, ...)")


def _by_depth(names: Mapping[int, str], body: Mapping[str, Tensor], pattern: str, path: Path) -> str:
    blocks = 1 + max((int(match[1]) for key in body if (match := re.match(pattern, key))), default=-1)
    if blocks not in names:
        raise UserError(f"{path}: a backbone with {blocks} blocks where the released ones have {' or '.join(map(str, names))}")
    return names[blocks]


def _deformable(body: Mapping[str, Tensor], stage: str, offset: int) -> dict[str, Any]:
    """detectron2 keeps a deformable convolution's offsets beside it."""
    found = {
        int(match[1]) + offset: tensor.shape[0]
        for key, tensor in body.items()
        if (match := re.match(rf"{stage}(\d)\.\d+\.conv2_offset\.weight", key))
    }
    if not found:
        return {}
    if set(found.values()) != {18}:
        raise UserError(f"its deformable convolutions have {max(found.values())} offset channels; the released ones have 18 (v1)")
    return {"model.backbone.deformable_stages": sorted(found)}


def _settings(state: Mapping[str, Tensor], *, softmax: bool, path: Path) -> dict[str, Any]:
    """Encoder and decoder, from the shapes of their tensors."""
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
        raise UserError(f"{path}: {missing.args[0]} (our name) is missing, so what the model is cannot be told") from None
    return found


def _fits(state: Mapping[str, Tensor], config: Config, theirs: Mapping[str, str], path: Path) -> None:
    """Every tensor has its place and every place its tensor, of the same shape. Raises `UserError` with the lists."""
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
        raise UserError(f"{path}: does not fit {_name_of(config)}: {told}")


def _name_of(config: Config) -> str:
    """The named model with the same settings, else the backbone's name."""
    for name, settings in MODELS.items():
        named = Config().replace(settings).model
        if named.content("latency") == config.model.content("latency"):
            return name
    return config.model.backbone.name


def _categories(count: int) -> tuple[Category, ...]:
    """COCO's, with the ids of its files; numbered ones where there are not 80."""
    if count != 80:
        return tuple(Category(number, f"class {number}") for number in range(1, count + 1))
    from torchvision.models.detection import MaskRCNN_ResNet50_FPN_Weights

    names = MaskRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
    return tuple(Category(number, name) for number, name in enumerate(names) if name not in ("__background__", "N/A"))
