"""Run the stage `pretrain`, which trains a backbone that has no ImageNet weights on the training images.

Three 1x1 heads, one on each of the backbone's features, predict for every cell the category of the object at the cell's centre
(or none), and the offset from this centre to the middle of the object's box. The backbone thus learns what objects look like and
where they end. Its norms can then be frozen, as with ImageNet weights. The paper has no such stage. The rows of its tables share
ImageNet weights; here they share the weights of this stage.

Shapes: B images, K instances of one image, S classes, C channels, H W padded height and width, h w those of one feature.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional as F

from sparseinst.attempts import Attempt
from sparseinst.config import STRIDES, WITHOUT_AUGMENTATION, Config
from sparseinst.data.coco import check_categories, train_split, val_split
from sparseinst.data.loader import Batch, BatchOrder, TrainSet, train_loader
from sparseinst.device import autocast, tf32
from sparseinst.distributed import average, largest, rank, same_for_all, share_norms, world_size
from sparseinst.errors import memory_explained
from sparseinst.files import atomic, make_folder
from sparseinst.inference.weights import halved
from sparseinst.models.backbone import Backbone, backbone_metadata
from sparseinst.models.network import normalise
from sparseinst.paths import SHIPPED, RunPaths
from sparseinst.training.checkpoint import load_checkpoint, newest_checkpoint, remove_if_all_damaged, save_checkpoint
from sparseinst.training.interrupt import StopRequest
from sparseinst.training.monitor import Monitor, Pending, logging_to
from sparseinst.training.schedule import parameter_groups
from sparseinst.training.step import check_batch, check_classes
from sparseinst.training.updates import Updates

_log = logging.getLogger(__name__)

CHECK_IMAGES = 200
"""The accuracy of the cells' categories is measured on this many images, the first of the validation split."""


class DenseTarget(NamedTuple):
    """The targets of the cells of one feature, for a batch."""

    classes: Tensor
    """(B, h, w) int64: 0 for the background, otherwise the label + 1."""
    offsets: Tensor
    """(B, 2, h, w): the offset x, y from a cell's centre to the middle of its object's box, in units of the deepest stride."""


class DenseModel(nn.Module):
    """Predict (B, 1 + S + 2, h, w) from each feature of normalised images (B, 3, H, W).

    The channels are the class logits, background first, and then the offset.
    """

    def __init__(self, backbone: Backbone, num_classes: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.heads = nn.ModuleList(nn.Conv2d(channels, 1 + num_classes + 2, 1) for channels in backbone.channels)

    def forward(self, images: Tensor) -> list[Tensor]:
        return [head(feature) for head, feature in zip(self.heads, self.backbone(images), strict=True)]


def dense_targets(labels: Sequence[Tensor], masks: Sequence[Tensor], padded: tuple[int, int]) -> list[DenseTarget]:
    """Return the targets for the features at strides 8, 16 and 32.

    Args:
        labels: B tensors (K,) int64.
        masks: B tensors (K, height, width) of 0 and 1, at the images' resolution. Where two masks overlap, the later one counts.
        padded: height and width of the padded images.
    """
    classes = torch.zeros((len(labels), *padded), dtype=torch.int64)
    middles = torch.zeros((len(labels), 2, *padded))
    for image, (label, mask) in enumerate(zip(labels, masks, strict=True)):
        for number, inside in enumerate(mask.bool().cpu()):
            rows, columns = inside.any(1).nonzero()[:, 0], inside.any(0).nonzero()[:, 0]
            height, width = inside.shape
            classes[image, :height, :width][inside] = int(label[number]) + 1
            middles[image, 0, :height, :width][inside] = float(columns[0] + columns[-1] + 1) / 2
            middles[image, 1, :height, :width][inside] = float(rows[0] + rows[-1] + 1) / 2
    targets = []
    for stride in STRIDES:
        centres = slice(stride // 2, None, stride)
        y, x = (torch.arange(side)[centres] + 0.0 for side in padded)
        positions = torch.stack([x.expand(len(y), -1), y[:, None].expand(-1, len(x))])
        targets.append(DenseTarget(classes[:, centres, centres], (middles[:, :, centres, centres] - positions) / STRIDES[-1]))
    return targets


def dense_counts(targets: Sequence[DenseTarget], object_weight: float) -> Tensor:
    """Return the losses' divisors for each feature, (features, 2) float64.

    The divisor of the class loss is the sum of the weights of all cells; that of the offset loss is the number of object cells.
    """
    cells = torch.tensor([[target.classes.numel(), int((target.classes > 0).sum())] for target in targets], dtype=torch.float64)
    return torch.stack([cells[:, 0] + (object_weight - 1) * cells[:, 1], cells[:, 1]], dim=1)


def dense_losses(
    outputs: Sequence[Tensor], targets: Sequence[DenseTarget], object_weight: float, counts: Tensor | None = None
) -> dict[str, Tensor]:
    """Return the losses `class` and `offset`, each summed over the features.

    The class loss is the weighted mean cross-entropy over the cells. The offset loss is the mean smooth L1 over the object cells.

    Args:
        counts: the result of `dense_counts`, averaged over the processes of the step; by default, that of this batch.
    """
    divisors = (dense_counts(targets, object_weight) if counts is None else counts).tolist()
    total = {"class": outputs[0].new_zeros((), dtype=torch.float32), "offset": outputs[0].new_zeros((), dtype=torch.float32)}
    for output, target, (cells, objects) in zip(outputs, targets, divisors, strict=True):
        logits, offset = output[:, :-2].float(), output[:, -2:].float()
        weights = logits.new_full((logits.shape[1],), object_weight)
        weights[0] = 1.0
        total["class"] = total["class"] + F.cross_entropy(logits, target.classes, weights, reduction="sum") / cells
        on_object = (target.classes > 0)[:, None]
        error = F.smooth_l1_loss(offset, target.offsets, reduction="none") * on_object
        total["offset"] = total["offset"] + error.sum() / (objects or 1.0)
    return total


def ensure_start(
    config: Config, folder: Path, *, device: torch.device, progress: bool = True, from_scratch: bool = False
) -> Path:
    """Return the weights file of a config's stage `pretrain`: the package's, or else the one that `pretrain` writes to `folder`.

    Raises:
        UserError, RunFailed: as `pretrain` does.
    """
    shipped = SHIPPED / f"{config.pretrain_key()}.safetensors"
    if shipped.exists():
        return shipped
    return pretrain(config, folder, device=device, progress=progress, from_scratch=from_scratch)


def pretrain(
    config: Config,
    output: Path,
    *,
    device: torch.device,
    progress: bool = True,
    attempt: Attempt | None = None,
    from_scratch: bool = False,
) -> Path:
    """Run the stage `pretrain` to its end. If an earlier call was stopped, continue from its last checkpoint.

    In a process group, all processes call this function with one shared folder, and rank 0 writes.

    Args:
        config: the function reads the settings of the stage, the backbone, the data and the number of classes.
        output: the run's folder, whose files `RunPaths` lists. If the run is finished, the function returns at once.
        progress: show a progress bar on a terminal.
        attempt: the caller's claim to the folder; None claims it here.
        from_scratch: begin at step 0 if every checkpoint is damaged; otherwise such a run is refused.

    Returns:
        The weights file, with the backbone's tensors by timm's names. The kernels are in half precision.

    Raises:
        UserError: the settings or data are not valid for training, or the folder is in use.
        RunFailed: a loss became NaN, or the disk is full. The checkpoints are kept.
    """
    paths = RunPaths(make_folder(output))
    with nullcontext(attempt) if attempt is not None else Attempt.begin(paths) as held, logging_to(paths.log, rank() == 0):
        assert held is not None
        if from_scratch and rank() == 0:
            remove_if_all_damaged(paths)
        if not same_for_all(paths.weights.exists()):
            with tf32(config.pretrain.precision == "tf32"), memory_explained(_LOWER):
                _Pretraining(config, paths, device, progress, held).run()
    return paths.weights


_LOWER = "lower pretrain.batch_size, data.short_sides or data.long_side; the checkpoints are kept"


class _Pretraining:
    """The model, data and optimiser of a run. `run` is the training loop."""

    def __init__(self, config: Config, paths: RunPaths, device: torch.device, progress: bool, attempt: Attempt) -> None:
        self.config, self.paths, self.device, self.progress, self.attempt = config, paths, device, progress, attempt
        settings = self.settings = config.pretrain
        self.split = train_split(config.data)
        check_classes(config, self.split)
        # An error in the validation data must stop the run before it begins.
        self.val = val_split(config.data)
        check_categories(self.val, self.split.categories, f"{self.split.file}")
        check_batch("pretrain.batch_size", settings.batch_size, len(self.split.with_instances().images))
        torch.manual_seed(settings.seed)
        # Deformable stages later start from plain weights, as they do with ImageNet weights.
        plain = config.model.backbone.model_copy(
            update={"frozen_norm": False, "freeze_at": 0, "deformable_stages": (), "drop_path": 0.0}
        )
        model = DenseModel(Backbone(plain), len(self.split.categories))
        self.model = model.to(device).to(memory_format=torch.channels_last).train()
        share_norms(self.model)
        self.dataset = TrainSet(self.split, config.data, settings.seed)
        optimizer = torch.optim.AdamW(parameter_groups(self.model, settings), fused=True)
        self.updates = Updates(self.model, settings, optimizer, device)
        self.pending: Pending = ()
        """The losses that a stopped run had not written yet."""

    def run(self) -> None:
        """Run all steps. A step depends only on its number and the state, so a resumed run gives exactly the same weights."""
        settings = self.settings
        start = self._resume()
        order = BatchOrder(self.dataset.split, settings, start=start, parts=world_size(), rank=rank(), world_size=world_size())
        batches: Iterator[Batch] = iter(train_loader(self.dataset, order, pin_memory=self.device.type == "cuda"))
        monitor = Monitor(
            self.paths,
            start=start,
            total=settings.iterations,
            every=settings.log_every,
            visible=self.progress,
            device=self.device,
            check=self.attempt.check,
            evaluated=False,  # a run that was killed after its evaluation evaluates again
            pending=self.pending,
        )
        with monitor, StopRequest() as stop:
            for iteration in range(start, settings.iterations):
                self.attempt.at("data", iteration)
                batch = next(batches)
                self.attempt.at("wait", iteration)
                rate = self.updates.set_learning_rate(iteration)
                losses = self._step(batch)
                monitor.step(iteration, losses, rate)
                done = iteration + 1
                stopping = stop.requested and done < settings.iterations
                due = done % settings.checkpoint_every == 0 or done == settings.iterations
                if due:
                    monitor.flush(rate)
                if due or stopping:
                    self._save(done, monitor)
                if stopping:
                    raise stop.stopped(done, settings.iterations)
            accuracies = self._cell_accuracies()
            monitor.write({"iteration": settings.iterations, **accuracies}, "val")
        if rank() == 0:
            self._save_weights()

    def _step(self, batch: Batch) -> dict[str, Tensor]:
        """Do one optimiser step and return its losses."""
        # The same padding in all processes makes the result independent of their number.
        batch = batch.padded_to(largest([batch.padded], self.device))
        targets_on_cpu = dense_targets(batch.labels, batch.masks, batch.padded)
        counts = average(dense_counts(targets_on_cpu, self.settings.object_weight), self.device)
        targets = [DenseTarget(*(tensor.to(self.device) for tensor in target)) for target in targets_on_cpu]
        with autocast(self.device, self.settings.precision):
            losses = dense_losses(self.model(self._images(batch)), targets, self.settings.object_weight, counts)
        self.updates.backward(losses)
        self.updates.update()
        return losses

    def _images(self, batch: Batch) -> Tensor:
        images = batch.images.to(self.device, non_blocking=True, memory_format=torch.channels_last)
        return normalise(images, batch.sizes)

    @torch.no_grad()
    def _cell_accuracies(self) -> dict[str, float]:
        """Return the percentage of object cells whose category is correct, by stride; an empty dict if there are no objects."""
        subset = replace(self.val, images=self.val.images[:CHECK_IMAGES])
        if not subset.with_instances().images:
            return {}
        self.model.eval()
        unaugmented = self.config.data.model_copy(update=WITHOUT_AUGMENTATION)
        dataset = TrainSet(subset, unaugmented, self.settings.seed)
        epoch = self.settings.model_copy(update={"iterations": len(dataset), "batch_size": 1})
        counts = torch.zeros(len(STRIDES), 2)
        for batch in train_loader(dataset, BatchOrder(dataset.split, epoch), pin_memory=False):
            with autocast(self.device, self.settings.precision):
                outputs = self.model(self._images(batch))
            targets = dense_targets(batch.labels, batch.masks, batch.padded)
            for number, (output, target) in enumerate(zip(outputs, targets, strict=True)):
                on_object = target.classes > 0
                correct = output[:, :-2].argmax(1).cpu()[on_object] == target.classes[on_object]
                counts[number] += torch.tensor([correct.sum(), on_object.sum()])
        self.model.train()
        percentages = (100 * counts[:, 0] / counts[:, 1].clamp(min=1)).tolist()
        return {f"cells_right_{stride}": round(value, 2) for stride, value in zip(STRIDES, percentages, strict=True)}

    def _save(self, iteration: int, monitor: Monitor) -> None:
        if rank() != 0:
            return
        self.attempt.at("save", iteration)
        state: dict[str, Any] = {"iteration": iteration, "pending": list(monitor.pending), **self.updates.state_dict()}
        with monitor.pause():
            save_checkpoint(self.paths, iteration, state, self.settings.keep_checkpoints, self.attempt.check)

    def _resume(self) -> int:
        """Load the newest checkpoint, if there is one, and return the number of finished steps."""
        found = same_for_all(newest_checkpoint(self.paths, self.updates.load_state_dict) if rank() == 0 else None)
        if found is None:
            return 0
        state = load_checkpoint(found, self.device)
        self.updates.load_state_dict(state)
        self.pending = state.get("pending", ())  # checkpoints of earlier versions have none
        _log.info("resuming after step %d", state["iteration"])
        return int(state["iteration"])

    def _save_weights(self) -> None:
        state = halved(self.model.backbone.body.state_dict())
        state = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
        metadata = backbone_metadata(state, self.config.model.backbone.name, self.config.pretrain_key())
        with atomic(self.paths.weights, self.attempt.check) as temporary:
            temporary.write_bytes(save(state, metadata))
