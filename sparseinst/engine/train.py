"""Training: one model, one loop, resumable at any moment (paper section 4)."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from sparseinst.attempts import Attempt
from sparseinst.config import Config
from sparseinst.data.coco import CocoSplit, check_categories, train_split, val_split
from sparseinst.data.loader import Batch, BatchOrder, TrainSet, train_loader
from sparseinst.engine.checkpoint import load_checkpoint, newest_checkpoint, save_checkpoint, save_weights, start_from
from sparseinst.engine.device import tf32
from sparseinst.engine.distributed import rank, same_for_all, world_size
from sparseinst.engine.evaluate import evaluate
from sparseinst.engine.files import make_folder
from sparseinst.engine.monitor import Monitor, diverged, logging_to
from sparseinst.engine.stability import Matches, matched_maps, stability
from sparseinst.engine.step import Step, check_classes
from sparseinst.errors import RunFailed, UserError
from sparseinst.models.sparseinst import SparseInst, build_model
from sparseinst.overrides import load_config
from sparseinst.paths import RunPaths, atomic

_log = logging.getLogger(__name__)


def train(
    config: Config,
    output: Path,
    *,
    device: torch.device,
    progress: bool = True,
    attempt: Attempt | None = None,
    accumulate: int | None = None,
) -> Path:
    """Train to the end, from wherever an earlier call in the same folder was stopped.

    In a process group all its processes call this, in one folder that they share; rank 0 writes.

    Args:
        output: the run's folder; see `RunPaths` for what it will hold. A finished run returns at once.
        progress: show a bar on a terminal.
        attempt: the caller's claim of the folder; None to claim it here, in a process of its own.
        accumulate: in place of `train.accumulate`, where fewer processes do the work of several: 8 parts are 8 parts,
            whether 8 processes do one each or one does them all.

    Returns:
        The weights file.

    Raises:
        UserError: settings or data that cannot be trained with, another run's folder, or a folder in use.
        RunFailed: the loss became NaN, or the disk is full; checkpoints stay. Also where a newer attempt took over.
    """
    paths = RunPaths(make_folder(output))
    with nullcontext(attempt) if attempt is not None else Attempt.begin(paths) as held, logging_to(paths.log, rank() == 0):
        assert held is not None
        _refuse_other_run(paths, config)
        if not same_for_all(paths.weights.exists()):
            training = _Training(config, paths, device, progress, held, accumulate or config.train.accumulate)
            if rank() == 0:
                # Not before the parts could be built: a mistake must not claim the folder.
                with atomic(paths.config, held.check) as temporary:
                    temporary.write_text(config.to_yaml(), encoding="utf-8")
            with tf32(config.train.precision == "tf32"):
                training.run()
    return paths.weights


def _refuse_other_run(paths: RunPaths, config: Config) -> None:
    if not paths.config.exists():
        return
    theirs, ours = load_config(paths.config).train_content(), config.train_content()
    if theirs != ours:
        parts = ", ".join(part for part in ours if ours[part] != theirs[part])
        raise UserError(f"{paths.root}: holds a run with other settings ({parts}): name another folder, or remove it")


class _Training:
    """The parts of a run, built once; `run` is the loop."""

    def __init__(
        self, config: Config, paths: RunPaths, device: torch.device, progress: bool, attempt: Attempt, accumulate: int
    ) -> None:
        _check(config)
        self.config, self.paths, self.device, self.progress = config, paths, device, progress
        self.attempt, self.accumulate = attempt, accumulate
        split = train_split(config.data)
        check_classes(config, split)
        _check_instances(config, split)
        # What would stop the evaluation after days of training stops here.
        check_categories(val_split(config.data), split.categories, f"{split.file}")
        self.categories = split.categories
        torch.manual_seed(config.train.seed)
        model = build_model(config.model, load_pretrained=config.train.start is None)
        if config.train.start is not None:
            fresh = start_from(model, Path(config.train.start))
            _log.info("starting from %s; afresh: %s", config.train.start, ", ".join(fresh) or "nothing")
        stride = model.mask_stride()
        self.dataset = TrainSet(split, config.data, config.train.seed, stride)
        self.step = Step(model, config, device, stride=stride)
        self.matches: Matches = {}

    def run(self) -> None:
        """The loop. What a step does depends on its number and the state alone, so a resumed run repeats it to the bit."""
        train = self.config.train
        start = self._resume()
        order = BatchOrder(
            self.dataset.split, train, start=start, accumulate=self.accumulate, rank=rank(), world_size=world_size()
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
        )
        with monitor:
            batches: Iterator[Batch] = iter(loader)
            for iteration in range(start, train.iterations):
                self.attempt.at("data", iteration)
                waited = time.perf_counter()
                parts = [next(batches) for _ in range(self.accumulate)]
                facts = {"data_seconds": round(time.perf_counter() - waited, 4)}
                self._warn_of_skipped(parts)
                rate = self.step.set_learning_rate(iteration)
                # A process that waits for the others waits in here.
                self.attempt.at("wait", iteration)
                losses = self.step.gradients(parts)
                facts |= self.step.update()
                monitor.step(iteration, losses, rate, **facts)
                done = iteration + 1
                if done % train.checkpoint_every == 0 or done == train.iterations:
                    monitor.flush(rate)
                    self._save(done)
                if self._evaluates_after(done):
                    self._evaluate(monitor, done)
        if rank() == 0:
            state = self.step.trained().state_dict()
            save_weights(self.paths.weights, state, self.config, self.categories, self.attempt.check)

    def _evaluates_after(self, done: int) -> bool:
        every = self.config.train.evaluate_every
        return bool(every) and done % (every or 1) == 0 and 0 < done < self.config.train.iterations

    def _matches(self, model: SparseInst) -> Matches:
        return matched_maps(model, val_split(self.config.data), self.config, device=self.device, attempt=self.attempt)

    def _evaluate(self, monitor: Monitor, iteration: int) -> None:
        model = self.step.trained().eval()
        split = val_split(self.config.data)
        result = evaluate(model, split, self.config, device=self.device, progress=False, attempt=self.attempt)
        told: dict[str, float | None] = dict(result.figures)
        if rank() == 0:
            matches = self._matches(model)
            told["matching_stability"] = stability(self.matches, matches)
            self.matches = matches
        self.step.model.train()
        monitor.write({"iteration": iteration, **told}, "val")
        _log.info("step %d: AP %s", iteration, result.figures["AP"])

    def _save(self, iteration: int) -> None:
        broken = [name for name, p in self.step.model.named_parameters() if not torch.isfinite(p).all()]
        if broken:
            raise RunFailed(diverged(f"{broken[0]} is no longer finite after step {iteration - 1}", self.paths))
        if rank() != 0:
            return
        self.attempt.at("save", iteration)
        state: dict[str, Any] = {
            "iteration": iteration,
            **self.step.state_dict(),
            "matches": self.matches,
            "random": torch.get_rng_state(),
            "cuda_random": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
        }
        save_checkpoint(self.paths, iteration, state, self.config.train.keep_checkpoints, self.attempt.check)

    def _resume(self) -> int:
        """Load the newest checkpoint, where there is one; the number of steps done."""
        found = same_for_all(newest_checkpoint(self.paths) if rank() == 0 else None)
        if found is None:
            return 0
        state = load_checkpoint(found, self.device)
        self.step.load_state_dict(state)
        self.matches = state.get("matches", {})  # checkpoints of earlier versions lack it
        torch.set_rng_state(state["random"].cpu())
        if state["cuda_random"] is not None:
            torch.cuda.set_rng_state(state["cuda_random"].cpu(), self.device)
        _log.info("resuming after step %d", state["iteration"])
        iteration: int = state["iteration"]
        if rank() == 0 and self._evaluates_after(iteration):
            # That evaluation came after this checkpoint: what it told of the matching is told again.
            self.matches = self._matches(self.step.trained().eval())
            self.step.model.train()
        return iteration

    def _warn_of_skipped(self, parts: list[Batch]) -> None:
        for reason in (reason for part in parts for reason in part.skipped):
            _log.warning("skipped %s", reason)


def _check(config: Config) -> None:
    backbone = config.model.backbone
    if backbone.frozen_norm and not backbone.pretrained and backbone.weights is None and config.train.start is None:
        raise UserError(
            "model.backbone: norms frozen at their random start cannot be trained with: "
            "set frozen_norm=false, or pretrained=true, or weights=FILE"
        )
    advice = config.train.batch_advice()
    if advice is not None:
        _log.warning("%s", advice)


def _check_instances(config: Config, split: CocoSplit) -> None:
    """Say it where images hold more instances than the model has maps: the rest is never learned, nor found."""
    maps = config.model.decoder.iam.num_maps
    counts = [count for count in split.instances_per_image() if count > maps]
    if counts:
        _log.warning(
            "%d of %d training images hold more than model.decoder.iam.num_maps=%d instances, up to %d; %d of them take no part",
            len(counts), len(split.images), maps, max(counts), sum(counts) - maps * len(counts),
        )  # fmt: skip
