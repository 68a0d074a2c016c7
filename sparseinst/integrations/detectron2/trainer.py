"""Train in detectron2 as the reference does: its optimiser, its augmentation, and an evaluation of masks."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog, build_detection_train_loader
from detectron2.engine import DefaultTrainer
from detectron2.solver.build import maybe_add_gradient_clipping, reduce_param_groups
from torch import nn

from sparseinst.errors import UserError
from sparseinst.integrations.detectron2.data import MaskEvaluator, SparseInstDatasetMapper
from sparseinst.integrations.detectron2.model import SparseInst
from sparseinst.integrations.detectron2.settings import ONLY_IN_TRAINING, check_only, choice

_WITHOUT_DECAY = ("norm", "patch_embed", "cls_token")
_MAPPERS = {"SparseInstDatasetMapper": SparseInstDatasetMapper}


class Trainer(DefaultTrainer):  # type: ignore[misc] # detectron2 has no types
    """detectron2's trainer with the reference's optimiser and augmentation. `test` computes COCO's mask metrics."""

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        """Return AdamW with the reference's parameter groups. Gradients are clipped as `SOLVER.CLIP_GRADIENTS` says."""
        check_only(cfg, ONLY_IN_TRAINING)
        adapter = getattr(model, "module", model)  # the trainer may have wrapped it for several processes
        assert isinstance(adapter, SparseInst)
        groups = parameter_groups(adapter, cfg)
        return _clipped(torch.optim.AdamW(groups, lr=cfg.SOLVER.BASE_LR, amsgrad=cfg.SOLVER.AMSGRAD), cfg)

    @classmethod
    def build_train_loader(cls, cfg: CfgNode) -> Iterable[Any]:
        mapper = choice("MODEL.SPARSE_INST.DATASET_MAPPER", cfg.MODEL.SPARSE_INST.DATASET_MAPPER, _MAPPERS)
        loader: Iterable[Any] = build_detection_train_loader(cfg, mapper=mapper(cfg, is_train=True))
        return loader

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str, output_folder: str | None = None) -> MaskEvaluator:
        """Return COCO's evaluator of masks. Its results are in `output_folder`, by default `inference` in `OUTPUT_DIR`.

        Raises:
            UserError: the data set has an evaluator of another kind.
        """
        kind = MetadataCatalog.get(dataset_name).get("evaluator_type", "coco")
        if kind != "coco":
            raise UserError(f"{dataset_name} is evaluated by {kind}, not by COCO: override Trainer.build_evaluator")
        folder = output_folder or str(Path(cfg.OUTPUT_DIR) / "inference")
        return MaskEvaluator(dataset_name, folder, max_dets_per_image=cfg.TEST.DETECTIONS_PER_IMAGE)


def parameter_groups(model: SparseInst, cfg: CfgNode) -> list[dict[str, Any]]:
    """Return the reference's parameter groups for AdamW, each with its learning rate and its weight decay.

    As in the reference, the *names* of parameters decide: those with `norm`, `patch_embed` or `cls_token` do not decay. The
    BatchNorms of CSPDarkNet53 and DarkNet53 are named `bn`, so they decay.
    """
    names = model.reference_names()
    solver = cfg.SOLVER
    parameters = []
    for ours, parameter in model.model.named_parameters():
        if parameter.requires_grad:
            rate = solver.BASE_LR * (solver.BACKBONE_MULTIPLIER if names[ours].startswith("backbone.") else 1.0)
            decay = 0.0 if any(part in names[ours] for part in _WITHOUT_DECAY) else solver.WEIGHT_DECAY
            parameters.append({"params": [parameter], "lr": rate, "weight_decay": decay})
    groups: list[dict[str, Any]] = reduce_param_groups(parameters)
    return groups


def _clipped(optimizer: torch.optim.Optimizer, cfg: CfgNode) -> torch.optim.Optimizer:
    """Make the optimiser clip gradients before each step: those of the full model together, or as detectron2 does."""
    clip = cfg.SOLVER.CLIP_GRADIENTS
    if not clip.ENABLED:
        return optimizer
    by_parameter = choice("SOLVER.CLIP_GRADIENTS.CLIP_TYPE", clip.CLIP_TYPE, {"full_model": False, "norm": True, "value": True})
    if by_parameter:
        clipped: torch.optim.Optimizer = maybe_add_gradient_clipping(cfg, optimizer)
        return clipped

    def before_step(stepped: torch.optim.Optimizer, _arguments: Any, _settings: Any) -> None:
        parameters = [parameter for group in stepped.param_groups for parameter in group["params"]]
        nn.utils.clip_grad_norm_(parameters, clip.CLIP_VALUE, clip.NORM_TYPE)

    optimizer.register_step_pre_hook(before_step)
    return optimizer
