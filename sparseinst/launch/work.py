"""Do one stage and write its record. Each function imports the code that it needs, and with it torch, when it is called."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparseinst.ablation.gate import curve, not_trained
from sparseinst.ablation.plan import StageRun
from sparseinst.ablation.provenance import code_version, describe, note_code, trained_by
from sparseinst.ablation.store import Record, Store
from sparseinst.attempts import Attempt
from sparseinst.checked import read_json_lines
from sparseinst.config import Config
from sparseinst.errors import RunFailed, UserError
from sparseinst.files import file_digest
from sparseinst.launch.names import give_name
from sparseinst.machine import device_name, energy_counters, energy_since
from sparseinst.paths import RunPaths, run_folder, stored_weights
from sparseinst.section import Stage

if TYPE_CHECKING:
    from sparseinst.bench.benchmark import Latency
    from sparseinst.data.coco import CocoSplit

_log = logging.getLogger(__name__)

Claim = Callable[[RunPaths], AbstractContextManager[Attempt]]
"""A function that claims a run's folder for this process."""


@dataclass(frozen=True)
class StageContext:
    """Where and how a process does its stages; plain data except for `claim`."""

    profile: str
    device: str | None
    """The value of `--device`."""
    device_name: str
    progress: bool = True
    parts: int | None = None
    """Parts into which a training splits its batch; see `train`."""
    from_scratch: bool = False
    """Whether a training whose checkpoints are all damaged begins at step 0; otherwise it is refused."""
    claim: Claim = Attempt.begin


def do_stage(run: StageRun, store: Store, context: StageContext) -> None:
    """Claim a stage's folder, do the stage and write its record. All processes of a process group call this.

    Raises:
        Held: another process is doing the stage.
        UserError, RunFailed: the stage's own errors.
    """
    began = time.perf_counter()
    code_version()  # it is asked once, before somebody edits the code while the stage runs
    with context.claim(run_folder(run.key)) as attempt:
        if run.is_done(store):  # another process may have written it before this one got the claim
            return
        if run.remake:
            _log.warning("%s: the weights of %s %s are gone, so they are made again", run.label, run.stage, run.key)
        if attempt.rank == 0:
            give_name(run_folder(run.key), run.name(context.profile))
        check_device(context)
        energy = energy_counters()
        outcome = _DO[run.stage](run, store, context, attempt)
        if outcome is None:
            return
        # A training's time comes from its log, because this process may have done only its last steps.
        seconds = outcome[0].get("seconds", time.perf_counter() - began)
        write_record(run, outcome, store, context, attempt, seconds, energy)


def write_record(
    run: StageRun,
    outcome: Outcome,
    store: Store,
    context: StageContext,
    attempt: Attempt,
    seconds: float,
    energy: dict[str, tuple[int, int]],
    *,
    session: str | None = None,
) -> None:
    """Write the record of a stage that has just ended.

    Args:
        seconds: its wall time.
        energy: the counters of energy when it began.
        session: names the rows that were timed by turns.
    """
    result, split = outcome
    from sparseinst.data.coco import images_digest
    from sparseinst.device import arithmetic
    from sparseinst.inference.weights import file_tensors_digest

    about = describe(
        profile=context.profile,
        device=context.device_name,
        world_size=attempt.world_size,
        attempts=attempt.number,
        seed=run.config.train.seed,
        seconds=seconds,
        data=file_digest(split.file) if split is not None else None,
        images=images_digest(split) if split is not None else None,
        arithmetic=arithmetic(),
    )
    if attempt.number == 1 and (joules := energy_since(energy)) is not None:  # an earlier attempt's energy is unknown
        about["energy_joules"] = round(joules, 1)
    if session is not None:
        about["session"] = session
    if run.stage in ("pretrain", "train"):
        about |= {**trained_by(run_folder(run.key)), "weights": file_tensors_digest(run_folder(run.key).weights)}
    if run.stage == "train":
        about["parts"] = context.parts or attempt.world_size * run.config.train.accumulate
    if run.stage == "evaluate":
        assert run.needs is not None
        weights = stored_weights(run.needs)
        assert weights is not None
        about |= {
            "trained": trained_by(run_folder(run.needs)),
            "training": run.needs,
            "weights": file_tensors_digest(weights),
        }
        training = store.load(run.needs)
        about["parts"] = training.provenance.get("parts") if training is not None else None
    record = Record(run.stage, run.key, result, run.config.model_dump(mode="json"), about)
    if run.remake and _differs(record, store.load(run.key)):
        # Not every GPU kernel repeats its bits. The record must describe the weights that exist.
        attempt.check()
        if (old := store.retire(run.key)) is not None:
            _log.warning("%s described weights that are gone: renamed to %s", store.path(run.key), old.name)
    store.write(record, attempt.check)


def check_device(context: StageContext) -> None:
    """Raise `RunFailed` if torch uses another device than the one that keys and records name.

    The driver names the devices, so that a plan needs no torch; but it also sees GPUs that are hidden from torch.
    """
    import torch

    from sparseinst.device import pick_device

    device = pick_device(context.device)
    used = torch.cuda.get_device_name(device) if device.type == "cuda" else device_name("cpu")
    if used.partition(" MIG ")[0] != context.device_name.partition(" MIG ")[0]:  # torch adds the profile of a part of a GPU
        raise RunFailed(
            f"torch uses {used}, but the driver names {context.device_name}: give --device cpu, or let torch see the GPUs that "
            "the driver lists, in the same order (CUDA_VISIBLE_DEVICES, CUDA_DEVICE_ORDER=PCI_BUS_ID, a torch with CUDA)"
        )


def _differs(new: Record, old: Record | None) -> bool:
    """Return whether two records of one training describe different weights."""
    return old is not None and old.provenance.get("weights") not in (None, new.provenance["weights"])


Outcome = tuple[dict[str, Any], "CocoSplit | None"]
"""A record's result and the images that were used. Rank 0 returns it; the other ranks return None."""


def _train(run: StageRun, store: Store, context: StageContext, attempt: Attempt) -> Outcome | None:
    from sparseinst.bench.roofline import count_parameters
    from sparseinst.data.coco import train_split
    from sparseinst.device import pick_device
    from sparseinst.distributed import rank
    from sparseinst.training.train import train

    paths = run_folder(run.key)
    device = pick_device(context.device)
    if rank() == 0 and not paths.weights.exists():
        note_code(paths)
    train(
        run.config,
        paths.root,
        device=device,
        progress=context.progress,
        attempt=attempt,
        parts=context.parts,
        start=_needed_weights(run, store),
        from_scratch=context.from_scratch,
    )
    if rank() != 0:
        return None
    result = {**_steps(paths), "parameters": count_parameters(run.config)}
    history = [record for record in _metrics(paths) if "AP" in record]
    result |= {"history": history} if history else {}
    result["not_trained"] = not_trained(result, run.config.model_dump(mode="json"))
    return result, train_split(run.config.data)


def _needed_weights(run: StageRun, store: Store) -> Path | None:
    """Return the weights that a stage needs of another one; None if it needs none.

    Raises:
        RunFailed: they were removed after the plan was made.
        UserError: they are not the weights that the record of the other stage describes.
    """
    if run.needs is None:
        return None
    from sparseinst.distributed import rank, same_for_all

    weights = same_for_all(stored_weights(run.needs) if rank() == 0 else None)
    if weights is None:
        raise RunFailed(f"{run_folder(run.needs).weights}: removed while it was needed; the same command makes it again")
    record = store.load(run.needs)
    if record is not None:
        check_weights(weights, record)
    return weights


def check_weights(weights: Path, record: Record) -> None:
    """Raise `UserError` if a file does not hold the weights that its training's record describes by their checksum."""
    from sparseinst.inference.weights import file_tensors_digest

    known = record.provenance.get("weights")  # records of earlier versions have none
    if known is not None and file_tensors_digest(weights) != known:
        raise UserError(
            f"{weights}: these are not the weights of the record {record.key}: put the right file back, or remove this one, so "
            "that `run` trains again"
        )


def _pretrain(run: StageRun, _: Store, context: StageContext, attempt: Attempt) -> Outcome | None:
    from sparseinst.data.coco import train_split
    from sparseinst.device import pick_device
    from sparseinst.distributed import rank
    from sparseinst.training.pretrain import pretrain

    paths = run_folder(run.key)
    if rank() == 0 and not paths.weights.exists():
        note_code(paths)
    pretrain(
        run.config,
        paths.root,
        device=pick_device(context.device),
        progress=context.progress,
        attempt=attempt,
        from_scratch=context.from_scratch,
    )
    if rank() != 0:
        return None
    validation = ([record for record in _metrics(paths) if "loss" not in record] or [{}])[-1]
    right = {name.removeprefix("cells_right_"): value for name, value in validation.items() if name.startswith("cells_right")}
    return {**_steps(paths), "cells_right": right}, train_split(run.config.data)


def _metrics(paths: RunPaths) -> list[dict[str, Any]]:
    return read_json_lines(paths.metrics)


def _steps(paths: RunPaths) -> dict[str, Any]:
    """Return the number of steps in a run's log, their time in seconds without evaluations and checkpoints, the last losses, and
    the losses over the steps."""
    steps = [record for record in _metrics(paths) if "loss" in record and "seconds" in record]
    if not steps:
        raise RunFailed(f"{paths.metrics}: holds no step of this training; remove {paths.root} to train again")
    last = steps[-1]
    before = [0, *(record["iteration"] for record in steps)]
    return {
        "steps": last["iteration"],
        "seconds": round(sum(r["seconds"] * (r["iteration"] - start) for r, start in zip(steps, before, strict=False)), 3),
        "losses": {name.removeprefix("loss_"): value for name, value in last.items() if name.startswith("loss")},
        "curve": curve(steps),
    }


def _evaluate(run: StageRun, store: Store, context: StageContext, attempt: Attempt) -> Outcome | None:
    from sparseinst.data.coco import val_split
    from sparseinst.device import pick_device
    from sparseinst.distributed import rank
    from sparseinst.evaluation.evaluate import evaluate
    from sparseinst.evaluation.predictions import read_predictions
    from sparseinst.evaluation.resampling import resampled_figures
    from sparseinst.evaluation.weights import prepare_network
    from sparseinst.inference.engine_network import open_source

    weights = _needed_weights(run, store)
    assert weights is not None
    chosen = pick_device(context.device)
    source = open_source(weights)
    split = val_split(run.config.data)
    prepared = prepare_network(source, run.config, device=chosen)
    result = evaluate(
        prepared.network,
        split,
        run.config,
        device=chosen,
        predictions=run_folder(run.key).predictions,
        progress=context.progress,
        attempt=attempt,
    )
    if rank() != 0:
        return None
    metrics: dict[str, Any] = {"figures": result.figures, "mechanism": result.mechanism}
    if run.config.inference.engine != "torch":
        metrics["engine"] = prepared.as_json()
    if result.by_limit:
        metrics |= {"by_limit": result.by_limit, "maps": result.maps}
    skipped = set(result.skipped_images)
    images = [image.id for image in split.images if image.id not in skipped]
    resampled = resampled_figures(split.file, read_predictions(run_folder(run.key).predictions), images)
    return {**metrics, "images": result.images, "skipped": len(skipped), "resampled": resampled}, split


def _latency(run: StageRun, _: Store, context: StageContext, attempt: Attempt) -> Outcome | None:
    from sparseinst.bench.benchmark import measure_latency
    from sparseinst.device import pick_device

    if attempt.rank != 0:
        return None
    return timing_result(run, measure_latency(run.config, device=pick_device(context.device))), None


def timing_result(run: StageRun, latency: Latency) -> dict[str, Any]:
    """Return the result of a timing for its record."""
    measured = asdict(latency)
    if run.config.inference.engine == "torch":  # the record's key and provenance say all of this
        del measured["facts"]
    return measured


_DO: dict[Stage, Callable[[StageRun, Store, StageContext, Attempt], Outcome | None]] = {
    "pretrain": _pretrain,
    "train": _train,
    "evaluate": _evaluate,
    "latency": _latency,
}


def draw(key: str, config: Config, output: Path, device: str | None, images: int = 6) -> None:
    """Draw a trained model's predictions over the first validation images, and save the pictures in `output`."""
    from sparseinst.data.coco import val_split
    from sparseinst.inference.predict import load_model
    from sparseinst.visualize.predict_files import predict_files

    files = [image.path for image in val_split(config.data).images[:images]]
    predict_files(load_model(run_folder(key).root, device), files, output, score=0.4)
