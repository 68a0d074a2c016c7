"""Build the backbone from any timm model with features at strides 8, 16 and 32 (paper section 4; DCN as in section 4.1).

Shapes: B images, C channels, H W padded height and width.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import timm
import torch
from timm.layers.norm_act import freeze_batch_norm_2d
from torch import Tensor, nn

from sparseinst.config import STRIDES, BackboneConfig
from sparseinst.errors import UserError
from sparseinst.files import check_is_file
from sparseinst.models import small  # noqa: F401 (the import registers its models in timm)
from sparseinst.models.layers import DeformableConv2d
from sparseinst.models.tensors import not_finite, read_safetensors, tensors_digest
from sparseinst.nested import nearest
from sparseinst.paths import SHIPPED
from sparseinst.words import shorten


class Backbone(nn.Module):
    """Map images (B, 3, H, W) to [C3, C4, C5]: (B, C, H/8, W/8), (B, C, H/16, W/16) and (B, C, H/32, W/32).

    Attributes:
        channels: the channel counts of C3, C4 and C5.
        channels_last: whether the timm model returns (B, H, W, C).

    Raises:
        UserError: see `build_model`.
    """

    def __init__(self, config: BackboneConfig, *, load_pretrained: bool = True) -> None:
        super().__init__()
        body = _feature_model(config, _level_indices(config.name))
        self.channels: list[int] = body.feature_info.channels()
        self.channels_last = getattr(getattr(body, "output_fmt", None), "value", "NCHW") == "NHWC"
        if load_pretrained and (config.pretrained or config.weights is not None):
            _load(body, config)
        for stage in config.deformable_stages:
            _make_deformable(_stage(body, config.name, stage), config.deformable_version)
        if config.freeze_at:
            _freeze_stem_and_stages(body, config)
        # A frozen norm is a fixed affine map. Its tensors are buffers, not parameters.
        self.body: nn.Module = freeze_batch_norm_2d(body) if config.frozen_norm else body

    def forward(self, images: Tensor) -> list[Tensor]:
        features: list[Tensor] = self.body(images)
        return [f.permute(0, 3, 1, 2) for f in features] if self.channels_last else features


@cache  # timm tells the strides of a built model only
def _level_indices(name: str) -> tuple[int, ...]:
    """Return the indices of timm's feature levels with the strides 8, 16 and 32."""
    try:
        with torch.device("meta"):
            model: Any = timm.create_model(name, features_only=True)
        reductions = model.feature_info.reduction()
    except (RuntimeError, ValueError, AttributeError, NotImplementedError) as error:
        # timm's errors have no common class, and they do not list the valid names.
        hint = nearest(name, timm.list_models() + timm.list_models(pretrained=True))
        reason = str(error).splitlines()[0] if timm.is_model(name) else "timm has no such model"
        raise UserError(f"model.backbone.name: {name!r}: {reason}{hint}") from None
    missing = set(STRIDES) - set(reductions)
    if missing:
        raise UserError(f"model.backbone.name: {name!r} has features at strides {list(reductions)}, but 8, 16 and 32 are needed")
    return tuple(reductions.index(stride) for stride in STRIDES)


def _feature_model(config: BackboneConfig, levels: tuple[int, ...]) -> Any:
    """Return timm's feature model with random weights."""
    drop_path: dict[str, Any] = {"drop_path_rate": config.drop_path} if config.drop_path else {}
    try:
        return timm.create_model(config.name, features_only=True, out_indices=levels, **drop_path)
    except TypeError:
        if not drop_path:
            raise
        raise UserError(f"model.backbone.drop_path: {config.name} has no stochastic depth; set it to 0") from None


def _load(body: nn.Module, config: BackboneConfig) -> None:
    """Load ImageNet weights into the feature model.

    Raises:
        UserError: a tensor of the model is missing or has another shape, or a tensor of the weights is unknown.
    """
    with torch.device("meta"):
        whole = set(timm.create_model(config.name).state_dict())
    if config.weights is not None:
        source, state = config.weights, read_tensors(_weights_file(config.weights))
    else:
        source, state = f"timm's {config.name}", _from_timm(config.name)
    # timm's feature models write `stages_0` for `stages.0`. Their names are otherwise equal.
    found = {key.replace(".", "_"): (key, value) for key, value in state.items()}
    loaded, problems = {}, []
    for key, tensor in body.state_dict().items():
        match = found.get(key.replace(".", "_"))
        if match is not None and match[1].shape == tensor.shape:
            loaded[key] = match[1]
        elif match is not None:
            problems.append(f"{key} has shape {list(match[1].shape)}, expected {list(tensor.shape)}")
        elif key.endswith("num_batches_tracked"):
            loaded[key] = tensor
        else:
            problems.append(f"{key} is missing")
    names = {key.replace(".", "_") for key in whole}
    problems += [f"{key} is not part of the model" for key in sorted(state) if key.replace(".", "_") not in names]
    if problems:
        raise UserError(
            f"{source} does not fit the backbone {config.name}: {'; '.join(problems[:3])}"
            f"{f' and {len(problems) - 3} more' if len(problems) > 3 else ''}"
        )
    body.load_state_dict(loaded)


def _weights_file(name: str) -> Path:
    """Return the file with this name. If it does not exist, return the package's weights with this key, if there are any."""
    shipped = SHIPPED / f"{name}.safetensors"
    return shipped if shipped.exists() and not Path(name).exists() else Path(name)


def _from_timm(name: str) -> dict[str, Tensor]:
    """Return timm's pretrained weights. Raises `UserError` if they are not in its cache and cannot be downloaded."""
    try:
        return _from_hub(name)
    except Exception as error:
        raise UserError(
            f"the pretrained weights of {name} are not in timm's cache, and the download failed ({type(error).__name__}); go "
            "online once, or set model.backbone.weights=FILE, or set model.backbone.pretrained=false and "
            "model.backbone.frozen_norm=false, which trains much longer"
        ) from error


def pretrained_problem(name: str) -> str | None:
    """Return in one line why timm's pretrained weights of a model cannot be loaded, or None. Nothing is downloaded."""
    from huggingface_hub import HfApi, try_to_load_from_cache

    entry = timm.get_pretrained_cfg(name)
    if entry is None or not entry.hf_hub_id:
        return None  # the weights have another source or do not exist; the training's error explains this case
    repository = f"{entry.hf_hub_id}{name}" if entry.hf_hub_id.endswith("/") else entry.hf_hub_id
    if any(isinstance(try_to_load_from_cache(repository, file), str) for file in ("model.safetensors", "pytorch_model.bin")):
        return None
    try:
        HfApi().model_info(repository, timeout=5.0)
    except Exception as error:  # noqa: BLE001 (the errors of a network have no common class)
        return f"the pretrained weights of {name} are not in timm's cache and cannot be reached ({type(error).__name__})"
    return None


def _from_hub(name: str) -> dict[str, Tensor]:
    state: dict[str, Tensor] = timm.create_model(name, pretrained=True).state_dict()
    return state


def backbone_metadata(tensors: Mapping[str, Tensor], name: str, key: str) -> dict[str, str]:
    """Return the metadata of a backbone's weights file: its model, the key of the pretraining, and a checksum of all content."""
    text = "\n".join([tensors_digest(tensors), name, key])
    return {"backbone": name, "key": key, "checksum": hashlib.sha256(text.encode()).hexdigest()[:16]}


def _check_backbone_file(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Raise `UserError` if the file is one of `backbone_metadata` and does not match its checksum."""
    names = {"backbone", "key", "checksum"}
    if len(names & metadata.keys()) < 2:  # another program wrote it; one name may be damaged
        return
    if metadata.keys() == {"backbone", "key"}:  # files of earlier versions
        return
    if metadata != backbone_metadata(tensors, metadata.get("backbone", ""), metadata.get("key", "")):
        raise UserError(f"{path}: is damaged: its content does not match its checksum; copy it again, or pretrain again")


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a .safetensors file or of a torch checkpoint. Nothing in the file is executed.

    A checkpoint holds the tensors at its top level, under `model` or under `state_dict`.

    Raises:
        UserError: there is no such file, it has another format, it does not match the checksum that this package wrote into it,
            or it holds NaN or infinite values.
    """
    check_is_file(path)
    try:
        tensors, metadata = read_safetensors(path) if path.suffix == ".safetensors" else (_read_checkpoint(path), {})
    except UserError:
        raise
    except Exception as error:  # noqa: BLE001 (damaged bytes make torch's unpickler raise anything, such as an IndexError)
        raise UserError(f"{path} holds no readable weights ({shorten(' '.join(str(error).split()))})") from None
    _check_backbone_file(path, tensors, metadata)
    if (name := not_finite(tensors)) is not None:
        raise UserError(f"{path}: {name} holds NaN or infinite values")
    return tensors


def _read_checkpoint(path: Path) -> dict[str, Tensor]:
    data = torch.load(path, map_location="cpu", weights_only=True)
    for key in ("model", "state_dict"):
        if isinstance(data, Mapping) and isinstance(data.get(key), Mapping):
            data = data[key]
    if not isinstance(data, Mapping) or not all(isinstance(value, Tensor) for value in data.values()):
        raise UserError(f"{path} holds no state dict")
    return dict(data)


def _stage(body: nn.Module, name: str, stage: int) -> nn.Module:
    """Return a ResNet's stage by its number from 2 to 5 (res2 to res5). timm numbers its layers from 1."""
    layer = getattr(body, f"layer{stage - 1}", None)
    if not isinstance(layer, nn.Module):
        raise UserError(f"model.backbone: {name} has no stage res{stage}; deformable_stages and freeze_at need a ResNet")
    return layer


def _make_deformable(stage: nn.Module, version: int) -> None:
    """Replace the 3x3 convolution of each block by a deformable one."""
    for block in stage.children():
        conv = getattr(block, "conv2", None)
        if not isinstance(conv, nn.Conv2d) or conv.kernel_size != (3, 3) or conv.groups != 1:
            raise UserError(f"model.backbone.deformable_stages: {type(block).__name__} has no plain 3x3 convolution conv2")
        block.conv2 = DeformableConv2d(conv, version)


def _freeze_stem_and_stages(body: nn.Module, config: BackboneConfig) -> None:
    """Freeze the stem and the stages from res2 to `freeze_at`, with their norms; `freeze_at=1` freezes the stem only."""
    _stage(body, config.name, 2)  # raises an error if the backbone is not a ResNet
    trained = {f"layer{stage - 1}" for stage in range(config.freeze_at + 1, 6) if stage > 1}
    for name, part in list(body.named_children()):
        if name not in trained:
            part.requires_grad_(False)
            body.add_module(name, freeze_batch_norm_2d(part))
