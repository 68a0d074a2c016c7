"""Define `Config`, all settings of an experiment, and the keys of its stages."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Self

from pydantic import model_validator

from sparseinst.config.data import DataConfig
from sparseinst.config.inference import InferenceConfig
from sparseinst.config.loss import LossConfig, MatcherConfig
from sparseinst.config.model import ModelConfig
from sparseinst.config.training import PretrainConfig, TrainConfig
from sparseinst.config.types import REFERENCE_PARTS
from sparseinst.nested import commented_yaml, merge, nest, parse
from sparseinst.section import Section, content_hash
from sparseinst.words import counted


class Config(Section):
    """All settings of an experiment. The defaults are the preset `paper`."""

    model: ModelConfig = ModelConfig()
    loss: LossConfig = LossConfig()
    matcher: MatcherConfig = MatcherConfig()
    data: DataConfig = DataConfig()
    inference: InferenceConfig = InferenceConfig()
    train: TrainConfig = TrainConfig()
    pretrain: PretrainConfig = PretrainConfig()

    @model_validator(mode="after")
    def _rescoring_needs_objectness(self) -> Self:
        if self.loss.objectness == "none" and self.inference.rescore:
            raise ValueError("loss.objectness is none, so set inference.rescore=false: an untrained objectness cannot rescore")
        return self

    @model_validator(mode="after")
    def _recomputing_needs_frozen_norms(self) -> Self:
        if self.train.checkpoint_activations and not self.model.backbone.frozen_norm:
            raise ValueError(
                "train.checkpoint_activations needs model.backbone.frozen_norm=true: other norms would count images twice"
            )
        return self

    def replace(self, overrides: Mapping[str, Any]) -> Config:
        """Return a copy in which dotted paths have new values, e.g. `{"model.decoder.depth": 2}`.

        Raises:
            UserError: a path does not exist (the message gives the nearest valid path), or its value is not valid.
        """
        return parse(Config, merge(self.model_dump(mode="json"), nest(overrides, Config), Config))

    def to_json(self) -> str:
        return self.model_dump_json(indent=2)

    def to_yaml(self) -> str:
        return commented_yaml(self.model_dump(mode="json"), {})

    def pretrain_content(self) -> dict[str, Any]:
        """Return everything that can change the backbone's weights from the stage `pretrain`."""
        backbone = self.model.backbone
        start = {"name": backbone.name, "pretrained": backbone.pretrained, "weights": backbone.weights}
        parts = {"data": self.data.content("pretrain"), "pretrain": self.pretrain.content("pretrain")}
        return {"stage": "pretrain", "backbone": start, **parts}

    def pretrain_key(self) -> str:
        """Return the key of the stage `pretrain`, which also names its folder."""
        return content_hash(self.pretrain_content())

    @property
    def pretrains(self) -> bool:
        """Whether the training starts from the stage `pretrain`; weights in `train.start` take its place."""
        return self.pretrain.enabled and self.train.start is None

    def train_content(self) -> dict[str, Any]:
        """Return everything that can change the trained weights. With `train.patience`, evaluations decide when it ends."""
        parts = {"model": self.model, "loss": self.loss, "matcher": self.matcher, "data": self.data, "train": self.train}
        start = {"start": self.pretrain_key()} if self.pretrains else {}
        ends = {"evaluation": self._evaluation_content()} if self.train.patience is not None else {}
        return {"stage": "train", **{name: part.content("train") for name, part in parts.items()}, **start, **ends}

    def _evaluation_content(self) -> dict[str, Any]:
        """Return everything that can change the metrics of given weights."""
        return {"inference": self.inference.content("evaluate"), "data": self.data.content("evaluate")}

    def layout_advice(self, parts: int) -> str | None:
        """Return a warning if a batch is split into other parts than the paper's; None otherwise.

        Args:
            parts: the parts over which the losses are averaged, one after the other or in several processes.
        """
        images = self.train.batch_size // parts
        if self.loss.reduction == "global" or (parts, images) == REFERENCE_PARTS:
            return None
        return (
            f"a batch is split into {counted(parts, 'part')} of {counted(images, 'image')}; the paper uses 8 parts of 8. Losses "
            "are averaged over each part, so results may differ a little: set train.accumulate=8 on one device, or `parts` in a "
            "cluster's profile. With frozen norms, loss.reduction=global makes the result independent of the parts"
        )

    def tile_advice(self) -> str | None:
        """Return a warning if the tiles of training and inference show objects in other sizes; None if they do not."""
        data, inference = self.data, self.inference
        if data.tile is None and inference.tile is None:
            return None
        if data.tile is None or inference.tile is None:
            which = ("data.tile", "inference.tile") if data.tile is not None else ("inference.tile", "data.tile")
            return (
                f"{which[0]} is set but {which[1]} is not, so objects have other sizes in training than in inference: set both "
                "to the same value, unless you have chosen the image sizes to fit"
            )
        scale = inference.sides()[0] / inference.tile
        low, high = min(data.short_sides) * data.scale_jitter_min, max(data.short_sides) * data.scale_jitter_max
        if low / data.tile <= scale <= high / data.tile:
            return None
        usual = max(data.short_sides) / data.tile
        return (
            f"tiles are scaled by {usual:.3g} in training (data.short_sides / data.tile) and by {scale:.3g} in inference "
            "(inference.short_side / inference.tile), so objects have other sizes there"
        )

    def train_key(self) -> str:
        """Return the key of the training, which also names its folder. Configs with equal keys share one run."""
        return content_hash(self.train_content())

    def evaluate_key(self, train_key: str | None = None) -> str:
        """Return the key of the evaluation of these weights with these inference settings on these data.

        Args:
            train_key: what `train_key` returns, if the caller has it already.
        """
        return content_hash({"stage": "evaluate", "train": train_key or self.train_key(), **self._evaluation_content()})

    def keys_of_seeds(self, seeds: Iterable[int]) -> dict[int, tuple[str, str]]:
        """Return the keys of the training and of the evaluation with each seed, by seed; the config's own seed plays no part.

        The contents are built once for all seeds, because a report asks for thousands of keys.
        """
        content, parts = self.train_content(), self._evaluation_content()
        keys = {}
        for seed in seeds:
            content["train"]["seed"] = seed
            training = content_hash(content)
            keys[seed] = training, content_hash({"stage": "evaluate", "train": training, **parts})
        return keys

    def latency_key(self, device: str) -> str:
        """Return the key of the timing on the device with this name. It begins with `latency_prefix`."""
        return f"{self.latency_prefix()}-{content_hash({'device': device, 'mode': 'eager'})[:8]}"

    def latency_prefix(self) -> str:
        """Return the hash of what is timed: the model without its weights, the image size, the precision and the thresholds."""
        parts = {"model": self.model.content("latency"), "inference": self.inference.content("latency")}
        return content_hash({"stage": "latency", **parts})
