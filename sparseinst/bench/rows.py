"""Turn the options of `bench` into workloads that can be timed. This file imports no torch before it builds one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from sparseinst.bench.modes import INFERENCE_MODES, TRAINING_MODES
from sparseinst.config import ENGINE_PRECISIONS, MODELS, Precision
from sparseinst.engines.names import check_engine
from sparseinst.errors import UserError
from sparseinst.nested import nearest
from sparseinst.paths import SHIPPED_MODELS

if TYPE_CHECKING:
    from sparseinst.bench.timed import Workload
    from sparseinst.config import Config
    from sparseinst.inference.engine_network import Prepared, Source

PRECISIONS: tuple[str, ...] = get_args(Precision)
ENGINE_MODE = "compiled"
"""The mode of every engine other than torch."""
_ALL_MODES = tuple(dict.fromkeys(INFERENCE_MODES + TRAINING_MODES))


@dataclass(frozen=True)
class Setting:
    """One row of the table: a model, and how it is run. Raises `UserError` for a value that is not valid."""

    model: str = "r50-iam"
    size: int = 640
    """Length of the image's shorter side in pixels."""
    batch: int = 1
    precision: str = "fp32"
    mode: str = "eager"
    engine: str = "torch"
    """What runs the network; see `config.EngineName`. Engines other than torch compile it themselves, in mode `compiled`."""

    def __post_init__(self) -> None:
        known_precisions = ENGINE_PRECISIONS[check_engine(self.engine)]
        for what, value, known in (("precision", self.precision, known_precisions), ("mode", self.mode, _ALL_MODES)):
            if value not in known:
                of = f" of engine {self.engine}" if self.engine != "torch" else ""
                raise UserError(f"{what} {value!r}{of} is unknown: expected one of {', '.join(known)}{nearest(value, known)}")
        if self.engine != "torch" and self.mode != ENGINE_MODE:
            raise UserError(f"{self}: engine {self.engine} compiles the network itself, so its mode is {ENGINE_MODE}")
        if self.size < 32 or self.batch < 1:
            raise UserError(f"size {self.size}, batch {self.batch}: the size must be at least 32, and the batch at least 1")

    @property
    def sides(self) -> tuple[int, int]:
        """The shorter side, and the limit of the longer side: the reference's 853, or more for larger images (853 to 640)."""
        return self.size, max(853, round(self.size * 853 / 640))

    def __str__(self) -> str:
        engine = f" {self.engine}" if self.engine != "torch" else ""
        return f"{self.model} {self.size} x{self.batch} {self.precision} {self.mode}{engine}"


@dataclass(frozen=True)
class Task:
    """The work that is timed, inference or training, and the images for it."""

    train: bool = False
    photos: tuple[Path, ...] = ()
    """Photos for inference. If there are none, random images are used."""
    data: Path | None = None
    """A COCO-format folder to train on, or to calibrate and evaluate on. If it is None, training uses random images, and weights
    are evaluated on their own data."""
    images: int | None = None
    """Evaluate only this many validation images; they also decide what int8 keeps in float. None evaluates all."""

    def check(self, setting: Setting) -> None:
        """Raise `UserError` if the setting cannot do this task."""
        from sparseinst.integrations.peers import is_peer

        modes = TRAINING_MODES if self.train else INFERENCE_MODES
        if setting.mode not in modes:
            raise UserError(f"{setting}: the modes {'of --train' if self.train else 'without --train'} are {', '.join(modes)}")
        if self.train and setting.engine != "torch":
            raise UserError(f"{setting}: only torch trains")
        if is_peer(setting.model) and (self.train or not peer_takes(setting)):
            raise UserError(
                f"{setting}: a peer is timed as it is: in inference with batch 1, and in torch with fp32 and mode eager; "
                "engines take fp32, openvino also bf16 and, for YOLO and RF-DETR, int8"
            )


def peer_takes(setting: Setting) -> bool:
    """Tell whether a peer can be timed like this."""
    from sparseinst.integrations.peers import is_quantised

    known = {"fp32"} if setting.engine == "torch" else {"fp32", "bf16"}
    if setting.engine == "openvino" and is_quantised(setting.model):
        known.add("int8")
    return setting.batch == 1 and setting.precision in known and setting.mode in ("eager", ENGINE_MODE)


def apply_changes(setting: Setting, text: str, *, size_of_model: bool) -> Setting:
    """Return the setting with the values of a text such as `mode=best,precision=bf16`.

    Args:
        size_of_model: if the text names another model but no size, use the size that this model is meant for.

    Raises:
        UserError: the text names an unknown field, or a value is not valid.
    """
    known = {field.name: type(getattr(setting, field.name)) for field in fields(setting)}
    changes: dict[str, Any] = {}
    for part in text.split(","):
        name, _, value = part.partition("=")
        if name not in known:
            raise UserError(f"--compare: {part!r}: expected NAME=VALUE, with a name of {', '.join(known)}{nearest(name, known)}")
        try:
            changes[name] = known[name](value)
        except ValueError:
            raise UserError(f"--compare: {part!r}: expected a number") from None
    if size_of_model and "model" in changes:
        changes.setdefault("size", default_short_side(changes["model"]))
    if changes.get("engine", "torch") != "torch":
        changes.setdefault("mode", ENGINE_MODE)
    return replace(setting, **changes)


def default_short_side(model: str) -> int:
    """Return the image's shorter side that a model is meant for: a peer's own, that of its weights' config, else 640."""
    from sparseinst.inference.checkpoints import find_weights
    from sparseinst.inference.engine_network import open_source
    from sparseinst.integrations.peers import default_sides, is_peer

    if is_peer(model):
        return default_sides(model)[0]
    return open_source(find_weights(Path(model))).config.inference.sides()[0] if _is_weights(model) else 640


def _is_weights(model: str) -> bool:
    """Tell whether the text names weights: a path or a model of the package. The name of a model takes precedence."""
    return model not in MODELS and (model in SHIPPED_MODELS or Path(model).exists())


def load_network(setting: Setting, data: Path | None = None, images: int | None = None) -> tuple[Config, Source | None]:
    """Return the config to time with, and the trained weights, or the artifact of an engine, if the setting names them.

    Args:
        data: a COCO-format folder, instead of the config's own data.
        images: evaluate only this many validation images.

    Raises:
        UserError: the model's name is unknown, or its weights cannot be loaded.
    """
    from sparseinst.inference.checkpoints import find_weights
    from sparseinst.inference.engine_network import open_source
    from sparseinst.overrides import load_config

    (short, long), trained = setting.sides, None
    if _is_weights(setting.model):
        trained = open_source(find_weights(Path(setting.model)))
        config = trained.config
        own_short, own_long = config.inference.sides()
        long = max(own_long, round(short * own_long / own_short))
    else:
        config = load_config(model=setting.model, overrides={"model.backbone.pretrained": False})
    changes: dict[str, Any] = {
        "inference.short_side": short,
        "inference.long_side": long,
        "inference.size_factor": 1.0,
        "inference.precision": setting.precision,
        "inference.engine": setting.engine,
        "data.short_sides": [short],
        "data.long_side": long,
        **({"train.precision": setting.precision} if setting.engine == "torch" else {}),
        "train.batch_size": setting.batch,
        "train.accumulate": 1,
        # These values give every setting the same training images.
        "train.seed": 0,
        "data.flip": 0.5,
        "data.crop": 0.0,
        "data.train_limit": None,
    }
    if data is not None:
        changes |= {"data.root": str(data), "data.source": "coco"}
    if images is not None:
        changes["data.val_limit"] = images
    return config.replace(changes), trained


def build_workload(setting: Setting, task: Task, device: Any) -> tuple[Workload, Callable[[], dict[str, Any]]]:
    """Return the workload to time, and a function that counts what it costs.

    The function returns `flops` (one forward pass of one image; None for a peer), `parameters` and, for a peer, `published` (the
    AP of its published weights and the source, or None). Counting takes as long as a second start of most engines.

    Raises:
        UserError: the model is unknown or cannot do the task.
        DataError: an image or the data set cannot be read.
    """
    from sparseinst.bench.roofline import count_network_cost, count_parameters
    from sparseinst.bench.timed import network_workload, peer_workload
    from sparseinst.bench.timed_training import training_workload
    from sparseinst.data.coco import train_split
    from sparseinst.integrations.peers import build_peer, default_sides, is_peer

    if is_peer(setting.model):
        own = default_sides(setting.model)
        sides = setting.size, round(setting.size * own[1] / own[0])
        peer = build_peer(setting.model, device=device, sides=sides, pretrained=False)
        engine: Any = setting.engine
        precision: Any = setting.precision
        workload = peer_workload(peer, device, task.photos, engine=engine, precision=precision)
        published = asdict(peer.published) if peer.published is not None else None
        return workload, lambda: {"flops": None, "parameters": peer.parameters, "published": published}
    config, source = load_network(setting, task.data, task.images)

    def count() -> dict[str, Any]:
        return {"flops": count_network_cost(config).flops, "parameters": count_parameters(config)}

    mode: Any = setting.mode
    if task.train:
        split = train_split(config.data) if task.data is not None else None
        model = source.model if source is not None else None
        return training_workload(config, device=device, model=model, mode=mode, split=split), count
    prepared = prepare_for_timing(setting, config, source, device)
    return network_workload(config, prepared, device=device, batch=setting.batch, mode=mode, photos=task.photos), count


def prepare_for_timing(setting: Setting, config: Config, source: Source | None, device: Any) -> Prepared:
    """Return the network of a setting, ready to run.

    Args:
        source: the trained weights or an artifact. Without it the weights are random; then int8 is calibrated on noise.

    Raises:
        UserError: the engine or its precision is not available.
    """
    from sparseinst.bench.timed import optimize_mode, random_network
    from sparseinst.evaluation.weights import prepare_network

    mode: Any = setting.mode
    if source is None:
        return random_network(config, device=device, mode=mode)
    return prepare_network(source, config, device=device, optimize=optimize_mode(config, mode))
