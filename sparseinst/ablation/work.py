"""Do one stage and write its record. Each function imports the engine, and so torch, when it is called."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sparseinst.ablation.plan import StageRun
from sparseinst.ablation.provenance import describe, note_code, trained_by
from sparseinst.ablation.store import Record, Store
from sparseinst.attempts import Attempt
from sparseinst.config import Config
from sparseinst.paths import RunPaths, file_digest
from sparseinst.section import Stage

_log = logging.getLogger(__name__)

RUNS = Path("runs")


def run_folder(key: str) -> RunPaths:
    """Where the stage of that key works."""
    return RunPaths(RUNS / key)


Claim = Callable[[RunPaths], AbstractContextManager[Attempt]]
"""How this process takes a run's folder."""


@dataclass(frozen=True)
class Place:
    """Where and how stages are done; plain data but for the claim."""

    profile: str
    device: str | None
    """As `--device` names it."""
    device_name: str
    progress: bool = True
    accumulate: int | None = None
    """In place of `train.accumulate`; see `train`."""
    claim: Claim = Attempt.begin


def do_stage(run: StageRun, store: Store, place: Place) -> None:
    """Claim a stage's folder, do the stage and keep its record. In a process group all its processes call this.

    Raises:
        Held: another process is at it.
        UserError, RunFailed: as the engine does.
    """
    began = time.perf_counter()
    with place.claim(run_folder(run.key)) as attempt:
        if store.has(run.key):  # it may have come while we went for the claim
            return
        outcome = _DO[run.stage](run, place, attempt)
        if outcome is None:
            return
        result, data = outcome
        about = describe(
            profile=place.profile,
            device=place.device_name,
            world_size=attempt.world_size,
            attempts=attempt.number,
            seed=run.config.train.seed,
            # A training's time is in its log: this process may have done the last of it only.
            seconds=result.get("seconds", time.perf_counter() - began),
            data=file_digest(data) if data is not None else None,
        )
        if run.stage == "train":
            about |= trained_by(run_folder(run.key))
        if run.needs is not None:
            about["trained"] = trained_by(run_folder(run.needs))
        store.write(Record(run.stage, run.key, result, run.config.model_dump(mode="json"), about), attempt.check)


Outcome = tuple[dict[str, Any], Path | None]
"""A record's result, and the annotation file that was read. Rank 0 has it."""


def _train(run: StageRun, place: Place, attempt: Attempt) -> Outcome | None:
    from sparseinst.data.coco import train_split
    from sparseinst.engine.device import pick_device
    from sparseinst.engine.distributed import rank
    from sparseinst.engine.train import train

    paths = run_folder(run.key)
    device = pick_device(place.device)
    if rank() == 0 and not paths.weights.exists():
        note_code(paths)
    weights = train(run.config, paths.root, device=device, progress=place.progress, attempt=attempt, accumulate=place.accumulate)
    if rank() != 0:
        return None
    lines = paths.metrics.read_text(encoding="utf-8").splitlines()
    steps = [record for record in map(json.loads, lines) if "loss" in record]
    last = steps[-1]
    before = [0, *(record["iteration"] for record in steps)]
    result = {
        "steps": last["iteration"],
        "seconds": round(sum(r["seconds"] * (r["iteration"] - start) for r, start in zip(steps, before, strict=False)), 3),
        "losses": {name.removeprefix("loss_"): value for name, value in last.items() if name.startswith("loss")},
        "parameters": _parameters(weights),
    }
    return result, train_split(run.config.data).file


def _parameters(weights: Path) -> int:
    from sparseinst.engine.checkpoint import load_weights

    return sum(parameter.numel() for parameter in load_weights(weights)[0].parameters())


def _evaluate(run: StageRun, place: Place, attempt: Attempt) -> Outcome | None:
    from sparseinst.data.coco import val_split
    from sparseinst.engine.checkpoint import load_weights
    from sparseinst.engine.device import pick_device
    from sparseinst.engine.distributed import rank, same_for_all
    from sparseinst.engine.evaluate import evaluate

    assert run.needs is not None
    training = run_folder(run.needs)
    if not same_for_all(training.weights.exists()):  # its record is there, its folder is gone
        _log.warning("%s: the weights of training %s are not here: training again", run.label, run.needs)
        attempt.rest()  # what moves now is the training
        with place.claim(training) as second:
            _train(StageRun("train", run.needs, run.config, run.label), place, second)
    chosen = pick_device(place.device)
    model, _, _ = load_weights(training.weights)
    split = val_split(run.config.data)
    result = evaluate(
        model.to(chosen),
        split,
        run.config,
        device=chosen,
        predictions=run_folder(run.key).predictions,
        progress=place.progress,
        attempt=attempt,
    )
    if rank() != 0:
        return None
    return {"figures": result.figures, "images": result.images, "skipped": len(result.skipped)}, split.file


def _latency(run: StageRun, place: Place, attempt: Attempt) -> Outcome | None:
    from sparseinst.engine.benchmark import measure_latency
    from sparseinst.engine.device import pick_device

    if attempt.rank != 0:
        return None
    return asdict(measure_latency(run.config, device=pick_device(place.device))), None


_DO: dict[Stage, Callable[[StageRun, Place, Attempt], Outcome | None]] = {
    "train": _train,
    "evaluate": _evaluate,
    "latency": _latency,
}


def draw(key: str, config: Config, output: Path, device: str | None, images: int = 6) -> None:
    """Overlays of a trained model's predictions for the first validation images."""
    from sparseinst.data.coco import val_split
    from sparseinst.engine.predict import load_model
    from sparseinst.engine.predict_files import predict_files

    files = [image.path for image in val_split(config.data).images[:images]]
    predict_files(load_model(run_folder(key).root, device), files, output, score=0.4)
