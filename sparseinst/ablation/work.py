"""Do one stage and write its record. Each function imports the engine, and so torch, when it is called."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sparseinst.ablation.plan import StageRun
from sparseinst.ablation.provenance import describe, file_digest
from sparseinst.ablation.store import Record, Store
from sparseinst.config import Config, Stage
from sparseinst.paths import RunPaths, atomic

_log = logging.getLogger(__name__)

RUNS = Path("runs")


def run_folder(key: str) -> RunPaths:
    """Where the stage of that key works."""
    return RunPaths(RUNS / key)


def do_stage(run: StageRun, store: Store, *, profile: str, device: str | None, device_name: str, progress: bool) -> None:
    """Do a stage and keep its record.

    Raises:
        UserError, RunFailed: as the engine does.
    """
    began = time.perf_counter()
    result, data = _DO[run.stage](run, device, progress)
    about = describe(
        profile=profile,
        device=device_name,
        seed=run.config.train.seed,
        # A training's time is in its log: this process may have done the last of it only.
        seconds=result.get("seconds", time.perf_counter() - began),
        data=file_digest(data) if data is not None else None,
    )
    store.write(Record(run.stage, run.key, result, run.config.model_dump(mode="json"), about))


Outcome = tuple[dict[str, Any], Path | None]
"""A record's result, and the annotation file that was read."""


def _train(run: StageRun, device: str | None, progress: bool) -> Outcome:
    from sparseinst.data.coco import train_split
    from sparseinst.engine.device import pick_device
    from sparseinst.engine.train import train

    paths = run_folder(run.key)
    weights = train(run.config, paths.root, device=pick_device(device), progress=progress)
    lines = paths.metrics.read_text(encoding="utf-8").splitlines()
    steps = [record for record in map(json.loads, lines) if "loss" in record]
    last = steps[-1]
    before = [0, *(record["iteration"] for record in steps)]
    result = {
        "steps": last["iteration"],
        "seconds": round(sum(r["seconds"] * (r["iteration"] - start) for r, start in zip(steps, before, strict=False)), 1),
        "losses": {name.removeprefix("loss_"): value for name, value in last.items() if name.startswith("loss")},
        "parameters": _parameters(weights),
    }
    return result, train_split(run.config.data).file


def _parameters(weights: Path) -> int:
    from sparseinst.engine.checkpoint import load_weights

    return sum(parameter.numel() for parameter in load_weights(weights)[0].parameters())


def _evaluate(run: StageRun, device: str | None, progress: bool) -> Outcome:
    from sparseinst.data.coco import val_split
    from sparseinst.engine.checkpoint import load_weights
    from sparseinst.engine.device import pick_device
    from sparseinst.engine.evaluate import evaluate

    assert run.needs is not None
    weights = run_folder(run.needs).weights
    if not weights.exists():  # its record is there, its folder is gone
        _log.warning("%s: the weights of training %s are not here: training again", run.label, run.needs)
        _train(StageRun("train", run.needs, run.config, run.label), device, progress)
    chosen = pick_device(device)
    model, _, _ = load_weights(weights)
    split = val_split(run.config.data)
    predictions = run_folder(run.key).predictions
    result = evaluate(model.to(chosen), split, run.config, device=chosen, predictions=predictions, progress=progress)
    return {"figures": result.figures, "images": result.images, "skipped": len(result.skipped)}, split.file


def _latency(run: StageRun, device: str | None, _: bool) -> Outcome:
    from sparseinst.engine.benchmark import measure_latency
    from sparseinst.engine.device import pick_device

    return asdict(measure_latency(run.config, device=pick_device(device))), None


_DO: dict[Stage, Callable[[StageRun, str | None, bool], Outcome]] = {
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


def note_state(key: str, **state: Any) -> None:
    """Leave word in the stage's folder of what became of it."""
    with atomic(run_folder(key).state) as temporary:
        temporary.write_text(json.dumps(state) + "\n", encoding="utf-8")
