"""What `bench` is asked to time, from its options to something that can be timed."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from sparseinst.config import MODELS, Precision
from sparseinst.errors import UserError
from sparseinst.overrides import nearest

if TYPE_CHECKING:
    from sparseinst.config import Config
    from sparseinst.engine.timed import Timed
    from sparseinst.models.sparseinst import SparseInst

PRECISIONS: tuple[str, ...] = get_args(Precision)
MODES = ("plain", "eager", "folded", "compiled", "graph", "best")
TRAINING_MODES = ("plain", "eager", "compiled", "recomputed")
_ALL_MODES = tuple(dict.fromkeys(MODES + TRAINING_MODES))


@dataclass(frozen=True)
class Setting:
    """What one row of the table times."""

    model: str = "r50-iam"
    size: int = 640
    """Of the image's shorter side."""
    batch: int = 1
    precision: str = "fp32"
    mode: str = "eager"

    def __post_init__(self) -> None:
        for what, value, known in (("precision", self.precision, PRECISIONS), ("mode", self.mode, _ALL_MODES)):
            if value not in known:
                raise UserError(f"{what} {value!r}: one of {', '.join(known)} was expected{nearest(value, known)}")
        if self.size < 32 or self.batch < 1:
            raise UserError(f"size {self.size}, batch {self.batch}: 32 and 1 are the least")

    @property
    def sides(self) -> tuple[int, int]:
        """Shorter side, and most pixels of the longer one, in the paper's proportion."""
        return self.size, round(self.size * 853 / 640)

    def __str__(self) -> str:
        return f"{self.model} {self.size} x{self.batch} {self.precision} {self.mode}"


def changed(setting: Setting, text: str, own_size: bool) -> Setting:
    """A setting with what `mode=best,precision=bf16` says. Raises `UserError`.

    Args:
        own_size: give another model the size it is meant for.
    """
    known = {field.name: type(getattr(setting, field.name)) for field in fields(setting)}
    changes: dict[str, Any] = {}
    for part in text.split(","):
        name, _, value = part.partition("=")
        if name not in known:
            raise UserError(f"--compare: {part!r}: NAME=VALUE of {', '.join(known)} was expected{nearest(name, known)}")
        try:
            changes[name] = known[name](value)
        except ValueError:
            raise UserError(f"--compare: {part!r}: a number was expected") from None
    if own_size and "model" in changes:
        changes.setdefault("size", own_side(changes["model"]))
    return replace(setting, **changes)


def own_side(model: str) -> int:
    """The image's shorter side that a model is meant for."""
    from sparseinst.engine.checkpoint import load_weights

    return load_weights(Path(model))[1].inference.sides()[0] if _is_weights(model) else 640


def _is_weights(model: str) -> bool:
    """Whether a model is named by its file or folder. The names of models come first."""
    return model not in MODELS and Path(model).exists()


@dataclass(frozen=True)
class Task:
    """What a setting's model is to do, and on which images."""

    train: bool = False
    photos: tuple[Path, ...] = ()
    data: Path | None = None
    """A COCO-format folder to train on."""

    def refuse(self, setting: Setting) -> None:
        """Raises `UserError` for a setting that cannot do this."""
        from sparseinst.integrations.peers import is_peer

        modes = TRAINING_MODES if self.train else MODES
        if setting.mode not in modes:
            raise UserError(f"{setting}: the modes {'of --train' if self.train else 'without --train'} are {', '.join(modes)}")
        usual = Setting(setting.model, setting.size)
        if is_peer(setting.model) and (self.train or setting != usual):
            raise UserError(f"{setting}: a peer is timed as it is: batch 1, fp32, eager, and not in training")


def network(setting: Setting, data: Path | None = None) -> tuple[Config, SparseInst | None]:
    """The config to time by, and trained weights where the setting names them. Raises `UserError`.

    Args:
        data: what to train on in place of the config's data.
    """
    from sparseinst.engine.checkpoint import load_weights
    from sparseinst.overrides import load_config

    (short, long), trained = setting.sides, None
    if _is_weights(setting.model):
        trained, config, _ = load_weights(Path(setting.model))
        own_short, own_long = config.inference.sides()
        long = round(short * own_long / own_short)
    else:
        config = load_config(model=setting.model, overrides={"model.backbone.pretrained": False})
    changes: dict[str, Any] = {
        "inference.short_side": short,
        "inference.long_side": long,
        "inference.size_factor": 1.0,
        "inference.precision": setting.precision,
        "data.short_sides": [short],
        "data.long_side": long,
        "train.precision": setting.precision,
        "train.batch_size": setting.batch,
        "train.accumulate": 1,
        # The same images for all that are compared.
        "train.seed": 0,
        "data.flip": 0.5,
        "data.crop": 0.0,
        "data.train_limit": None,
    }
    if data is not None:
        changes |= {"data.root": str(data), "data.source": "coco"}
    return config.replace(changes), trained


def timed(setting: Setting, task: Task, device: Any) -> tuple[Timed, dict[str, Any]]:
    """What is to be timed, and what is known of it: FLOPs of one image's way through the network, and parameters."""
    from sparseinst.data.coco import train_split
    from sparseinst.engine.roofline import count_parameters, count_work
    from sparseinst.engine.timed import network_to_time, peer_to_time
    from sparseinst.engine.timed_training import training_to_time
    from sparseinst.integrations.peers import build_peer, is_peer

    if is_peer(setting.model):
        peer = build_peer(setting.model, device=device, sides=setting.sides, pretrained=False)
        return peer_to_time(peer, device, task.photos), {"flops": None, "parameters": peer.parameters}
    config, trained = network(setting, task.data)
    known = {"flops": count_work(config).flops, "parameters": count_parameters(config)}
    mode: Any = setting.mode
    if task.train:
        split = train_split(config.data) if task.data is not None else None
        return training_to_time(config, device=device, model=trained, mode=mode, split=split), known
    return network_to_time(config, device=device, model=trained, batch=setting.batch, mode=mode, photos=task.photos), known
