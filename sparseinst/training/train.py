"""Train a model (paper section 4). A training that was stopped at any moment can be resumed."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sparseinst.attempts import Attempt
from sparseinst.config import REFERENCE_BATCH, Config, ModelConfig
from sparseinst.data.check import MIRRORED, mirrored_categories
from sparseinst.data.coco import CocoSplit, category_names, check_categories, train_split, val_split
from sparseinst.data.loader import Batch, BatchOrder, TrainSet, train_loader
from sparseinst.device import tf32
from sparseinst.distributed import rank, same_for_all, share_buffers, world_size
from sparseinst.errors import RunFailed, UserError, memory_explained
from sparseinst.evaluation.coco_metrics import COCO_LIMIT, most_objects
from sparseinst.evaluation.evaluate import evaluate
from sparseinst.evaluation.mechanism import Matches, stability
from sparseinst.files import atomic, make_folder, read_text
from sparseinst.inference.start import start_from
from sparseinst.inference.weights import save_weights
from sparseinst.models.sparseinst import build_model
from sparseinst.nested import flatten
from sparseinst.overrides import load_config
from sparseinst.paths import RunPaths
from sparseinst.training.best import BestSoFar
from sparseinst.training.checkpoint import load_checkpoint, newest_checkpoint, remove_if_all_damaged, save_checkpoint
from sparseinst.training.interrupt import StopRequest
from sparseinst.training.loggers import Loggers, check_installed
from sparseinst.training.monitor import Monitor, Pending, diverged, logging_to
from sparseinst.training.pretrain import ensure_start
from sparseinst.training.step import LOWER_MODEL, LOWER_TRAINING, Step, check_batch, check_classes, check_memory

_log = logging.getLogger(__name__)


def train(
    config: Config,
    output: Path,
    *,
    device: torch.device,
    progress: bool = True,
    attempt: Attempt | None = None,
    parts: int | None = None,
    start: Path | None = None,
    from_scratch: bool = False,
) -> Path:
    """Run a training to its end. If an earlier call was stopped, continue from its last checkpoint.

    In a process group, all processes call this function with one shared folder, and rank 0 writes.

    Args:
        output: the run's folder, whose files `RunPaths` lists. If the run is finished, the function returns at once.
        progress: show a progress bar on a terminal.
        attempt: the caller's claim to the folder; None claims it here, for a training with one process.
        parts: the number of parts into which each batch is split. Each process computes an equal share of them in turn, so that
            one process with 8 parts computes what 8 processes do. None: processes x `train.accumulate`.
        start: the weights file of the stage `pretrain`. None takes the package's, or runs the stage in the folder `pretrain` of
            the run. Pass None if the config does not enable the stage.
        from_scratch: begin at step 0 if every checkpoint is damaged; otherwise such a run is refused.

    Returns:
        The weights file.

    Raises:
        UserError: the settings or data are not valid for training, or the folder is in use or belongs to another run.
        RunFailed: a loss became NaN, the disk is full, or a newer attempt has taken over the folder. The checkpoints are kept.
    """
    paths = RunPaths(make_folder(output))
    _refuse_other_run(paths, config)
    needs_start = config.pretrains
    if needs_start and start is None and not same_for_all(paths.weights.exists()):
        # The key in the folder's name keeps the weights from different settings apart.
        folder = paths.start / config.pretrain_key()
        start = ensure_start(config, folder, device=device, progress=progress, from_scratch=from_scratch)
    with nullcontext(attempt) if attempt is not None else Attempt.begin(paths) as held, logging_to(paths.log, rank() == 0):
        assert held is not None
        _refuse_other_run(paths, config)
        if from_scratch and rank() == 0:
            remove_if_all_damaged(paths)
        if not same_for_all(paths.weights.exists()):
            with memory_explained(LOWER_MODEL):
                training = _Training(config, paths, device, progress, held, parts, start)
            if rank() == 0:
                # This comes after `_Training` has checked the settings: a run with invalid settings must not claim the folder.
                with atomic(paths.config, held.check) as temporary:
                    temporary.write_text(config.to_yaml(), encoding="utf-8")
            _log.info("training %s", paths.title())
            with tf32(config.train.precision == "tf32"), memory_explained(LOWER_TRAINING):
                training.run()
    return paths.weights


def _refuse_other_run(paths: RunPaths, config: Config) -> None:
    """Raise `UserError` if the folder belongs to a run with other settings."""
    if not paths.config.exists():
        return
    if not read_text(paths.config).strip():
        raise UserError(
            f"{paths.config}: is empty, so the settings of the run in this folder are unknown: remove this file if the run has "
            "the settings of this command, or use another folder"
        )
    theirs, ours = load_config(paths.config).train_content(), config.train_content()
    if theirs != ours:
        there, here = flatten(theirs), flatten(ours)
        differing = [name for name in {**here, **there} if here.get(name) != there.get(name)]
        shown = ", ".join(f"{name}: {there.get(name)} there, {here.get(name)} here" for name in differing[:3])
        more = f" and {len(differing) - 3} more" if len(differing) > 3 else ""
        raise UserError(
            f"{paths.root}: holds a run with other settings ({shown}{more}): use another folder, or remove this one; --weights "
            f"{paths.root} starts a new run from its weights"
        )


class _Training:
    """The model, data and optimiser of a run. `run` is the training loop."""

    def __init__(
        self,
        config: Config,
        paths: RunPaths,
        device: torch.device,
        progress: bool,
        attempt: Attempt,
        parts: int | None,
        start: Path | None,
    ) -> None:
        self.config, self.paths, self.device, self.progress = config, paths, device, progress
        self.attempt, self.parts = attempt, parts or world_size() * config.train.accumulate
        _check(config, self.parts)
        split = train_split(config.data)
        check_classes(config, split)
        _check_instances(config, split)
        # An error in the validation data must stop the run now, not after days of training.
        val = val_split(config.data)
        check_categories(val, split.categories, f"{split.file}")
        self.val = replace(val, images=val.images[: config.train.evaluate_images])
        self.categories = split.categories
        check_batch("train.batch_size", config.train.batch_size, len(split.with_instances().images))
        check_memory(config, device)
        torch.manual_seed(config.train.seed)
        model = build_model(_with_start(config.model, start), load_pretrained=config.train.start is None)
        if config.train.start is not None:
            kept = start_from(model, Path(config.train.start), self.categories)
            _log.info("starting from %s: %s", config.train.start, kept.describe())
        self.dataset = TrainSet(split, config.data, config.train.seed, model.mask_stride())
        self.step = Step(model, config, device)
        self.matches: Matches = {}
        self.evaluated = 0
        """The number of steps before the last evaluation during training."""
        self.best = BestSoFar()
        self.pending: Pending = ()
        """The losses that a stopped run had not written yet."""

    def run(self) -> None:
        """Run all steps. A step depends only on its number and the state, so a resumed run gives exactly the same weights."""
        train = self.config.train
        start = self._resume()
        by_part = self.config.loss.reduction == "per_process"
        order = BatchOrder(
            self.dataset.split, train, start=start, parts=self.parts, rank=rank(), world_size=world_size(), by_part=by_part
        )
        loader = train_loader(self.dataset, order, pin_memory=self.device.type == "cuda")
        monitor = Monitor(
            self.paths,
            start=start,
            total=train.iterations,
            every=train.log_every,
            visible=self.progress,
            device=self.device,
            check=self.attempt.check,
            evaluated=self.evaluated == start,
            loggers=Loggers(self.config, self.paths) if train.loggers else None,
            pending=self.pending,
        )
        with monitor, StopRequest() as stop:
            if (
                self.config.train.evaluates_after(start) and self.evaluated != start
            ):  # the run was killed between checkpoint and evaluation
                self._evaluate(monitor, start)
            batches: Iterator[Batch] = iter(loader)
            for iteration in range(start, train.iterations):
                if self._gives_up():
                    break
                self.attempt.at("data", iteration)
                waited = time.perf_counter()
                parts = [next(batches) for _ in range(order.passes)]
                values = {"data_seconds": round(time.perf_counter() - waited, 4)}
                self._warn_of_skipped(parts)
                rate = self.step.set_learning_rate(iteration)
                # The following calls wait for the other processes.
                self.attempt.at("wait", iteration)
                losses = self.step.gradients(parts, seeds=[_seed(train.seed, iteration, part) for part in order.own])
                values |= self.step.update()
                monitor.step(iteration, losses, rate, **values)
                done = iteration + 1
                stopping = stop.requested and done < train.iterations
                due = done % train.checkpoint_every == 0 or done == train.iterations
                if due or stopping:
                    if due:  # a stop writes no line of its own
                        monitor.flush(rate)
                    self._save(done, monitor)
                if self.config.train.evaluates_after(done):
                    self._evaluate(monitor, done)
                    if due or stopping or self._gives_up():  # save (again), with the state of the evaluation
                        if due or self._gives_up():
                            monitor.flush(rate)
                        self._save(done, monitor)
                if stopping and not self._gives_up():
                    raise stop.stopped(done, train.iterations)
        if rank() == 0:
            state = self.step.trained().state_dict()
            save_weights(self.paths.weights, state, self.config, self.categories, self.attempt.check)

    def _gives_up(self) -> bool:
        """Return whether the training ends early, because the last `train.patience` evaluations gave no better AP."""
        patience = self.config.train.patience
        return patience is not None and self.best.without_better >= patience

    def _evaluate(self, monitor: Monitor, iteration: int) -> None:
        model = self.step.trained().eval()
        share_buffers(model)  # the means and variances of norms differ between processes, and rank 0's are saved
        with monitor.pause():
            result = evaluate(model, self.val, self.config, device=self.device, progress=False, attempt=self.attempt)
        logged: dict[str, float | None] = {**result.figures, **result.mechanism}
        logged["matching_stability"] = stability(self.matches, result.matches)
        self.matches, self.evaluated = result.matches, iteration
        self.step.model.train()
        monitor.write({"iteration": iteration, **logged}, "val")
        ap, total = result.figures["AP"], self.config.train.iterations
        if self.best.note(iteration, ap) and rank() == 0:
            about = {"step": iteration, "AP": self.best.ap or 0.0}
            state = model.state_dict()
            save_weights(self.paths.best, state, self.config, self.categories, self.attempt.check, training=about)
        most = most_objects(self.val)
        limited = f" (COCO's AP counts {COCO_LIMIT} objects of an image, and one holds {most})" if most > COCO_LIMIT else ""
        monitor.say(self.best.describe(iteration, total, ap) + limited)
        if self._gives_up():
            monitor.say(
                f"the last {self.best.without_better} evaluations gave no better AP, so the training ends (train.patience)"
            )

    def _save(self, iteration: int, monitor: Monitor) -> None:
        """Save a checkpoint. Raises `RunFailed` if a weight is NaN or infinite."""
        not_finite = [name for name, p in self.step.model.named_parameters() if not torch.isfinite(p).all()]
        if not_finite:
            raise RunFailed(diverged(f"{not_finite[0]} is no longer finite after step {iteration - 1}", self.paths))
        if rank() != 0:
            return
        self.attempt.at("save", iteration)
        state: dict[str, Any] = {
            "iteration": iteration,
            **self.step.state_dict(),
            "matches": self.matches,
            "evaluated": self.evaluated,
            "best": self.best.state_dict(),
            "pending": list(monitor.pending),
            "categories": [asdict(category) for category in self.categories],
        }
        with monitor.pause():
            save_checkpoint(self.paths, iteration, state, self.config.train.keep_checkpoints, self.attempt.check)

    def _resume(self) -> int:
        """Load the newest checkpoint, if there is one, and return the number of finished steps."""
        found = same_for_all(newest_checkpoint(self.paths, self._restore) if rank() == 0 else None)
        if found is None:
            return 0
        state = load_checkpoint(found, self.device)
        self._restore(state)
        _log.info("resuming after step %d", state["iteration"])
        return int(state["iteration"])

    def _restore(self, state: dict[str, Any]) -> None:
        """Load the state of a checkpoint."""
        self.step.load_state_dict(state)
        # Checkpoints of earlier versions lack these keys.
        self.matches = state.get("matches", {})
        self.evaluated = state.get("evaluated", state["iteration"])
        self.best.load_state_dict(state.get("best", {}))
        self.pending = state.get("pending", ())

    def _warn_of_skipped(self, parts: list[Batch]) -> None:
        for reason in (reason for part in parts for reason in part.skipped):
            _log.warning("skipped %s", reason)


def _seed(seed: int, iteration: int, part: int) -> int:
    """Return the seed of the random numbers of a part of a step. Neither a stop nor the number of processes changes it."""
    return int(np.random.SeedSequence((seed, iteration, part)).generate_state(1)[0])


def _with_start(model: ModelConfig, start: Path | None) -> ModelConfig:
    """Return the model's config with the weights file `start` for its backbone; unchanged if it is None."""
    if start is None:
        return model
    return model.model_copy(update={"backbone": model.backbone.model_copy(update={"weights": str(start)})})


def _check(config: Config, parts: int) -> None:
    """Raise `UserError` for settings that cannot be trained, and warn about settings that lower the AP."""
    check_installed(config.train.loggers)
    backbone = config.model.backbone
    trained = backbone.pretrained or backbone.weights is not None or config.train.start is not None or config.pretrain.enabled
    if backbone.frozen_norm and not trained:
        raise UserError(
            "model.backbone: frozen norms need pretrained weights: set frozen_norm=false, or pretrained=true, or weights=FILE"
        )
    papers_batch = config.train.batch_size == REFERENCE_BATCH  # no layout of another batch is the paper's
    layout = config.layout_advice(parts) if papers_batch else None
    for advice in (config.train.batch_advice(), layout, config.tile_advice()):
        if advice is not None:
            _log.warning("%s", advice)


def _check_instances(config: Config, split: CocoSplit) -> None:
    """Warn if images or tiles have more instances than the model can learn, and if flips give wrong labels."""
    maps, tile = config.model.decoder.iam.num_maps, config.data.tile
    counts = [count for count in split.instances_per_tile(tile) if count > maps]
    if counts and tile is None:
        _log.warning(
            "%d of %d training images have more than model.decoder.iam.num_maps=%d instances, up to %d; %d of them take no part",
            len(counts), len(split.images), maps, max(counts), sum(counts) - maps * len(counts),
        )  # fmt: skip
    elif counts:
        _log.warning(
            "%d of %d training images have more than model.decoder.iam.num_maps=%d instances in a tile of %d pixels on average, "
            "up to %d; the others take no part",
            len(counts), len(split.images), maps, tile, max(counts),
        )  # fmt: skip
    mirrored = mirrored_categories(category_names(split.categories))
    if mirrored and config.data.flip:
        _log.warning("%s: set data.flip=0", MIRRORED.format(*mirrored[0]))
