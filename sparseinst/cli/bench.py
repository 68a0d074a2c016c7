"""The command that times models: bench."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from sparseinst.ablation.store import RESULTS
from sparseinst.bench.modes import INFERENCE_MODES, TRAINING_MODES
from sparseinst.bench.rows import PRECISIONS, Task, apply_changes
from sparseinst.cli.options import Device, Json, ProfileName, Record, Results
from sparseinst.errors import UserError

app = typer.Typer()


@app.command()
def bench(
    model: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME|WEIGHTS",
            help="A model's name, a weights file, a run's folder, or a peer: mask-rcnn-r50-fpn of torchvision, detectron2:CONFIG."
            "  [default: r50-iam]",
        ),
    ] = None,
    size: Annotated[
        list[int] | None,
        typer.Option(
            min=1,
            max=16_384,
            help="Length of the image's shorter side in pixels.  [default: 640, or the size of the weights' config]",
        ),
    ] = None,
    batch: Annotated[list[int] | None, typer.Option(min=1, max=65_536, help="Number of images at once.  [default: 1]")] = None,
    precision: Annotated[list[str] | None, typer.Option(help=f"{', '.join(PRECISIONS)}.  [default: fp32]")] = None,
    mode: Annotated[
        list[str] | None,
        typer.Option(help=f"{', '.join(INFERENCE_MODES)}; with --train {', '.join(TRAINING_MODES)}.  [default: eager]"),
    ] = None,
    compare: Annotated[
        tuple[str, str] | None,
        typer.Option(
            metavar="A B", help="Time two settings alternately, and print their ratio: mode=plain mode=best,precision=bf16"
        ),
    ] = None,
    repetitions: Annotated[int, typer.Option(min=3, help="Number of timed runs of each setting.")] = 50,
    warmup: Annotated[int, typer.Option(min=1, help="Number of runs before the timed ones.")] = 10,
    photos: Annotated[
        list[Path] | None,
        typer.Option(metavar="IMAGE|DIR", help="Time these photos at their own sizes, instead of random 480 x 640 images."),
    ] = None,
    train: Annotated[
        bool, typer.Option("--train", help="Time training steps instead of inference: forward, loss, backward, update.")
    ] = False,
    data: Annotated[
        Path | None, typer.Option(help="With --train: train on this COCO-format folder, instead of noise with ellipses.")
    ] = None,
    roofline: Annotated[
        bool,
        typer.Option(
            "--roofline", help="Also print a lower bound of the time, from the device's measured arithmetic and memory rates."
        ),
    ] = False,
    device: Device = None,
    output: Annotated[Path | None, typer.Option(help="Also write the JSON to this file.")] = None,
    record: Record = False,
    profile: ProfileName = "coco",
    results: Results = RESULTS,
    as_json: Json = False,
) -> None:
    """Time models by the paper's protocol.

    The forward pass and the post-processing are timed, without the decoding of images.

    A model given by name has random weights and keeps every map, which is the slowest case. Give weights and --photos to time
    real use. Every combination of the options is timed. Repeat an option to give it several values.
    Modes of inference: plain runs like the reference; eager runs the model as it is; folded, compiled, graph and best run the
    model that `load_model(..., optimize=...)` returns. --train times a step from a batch to new weights. Its modes: plain trains
    like the reference; eager trains like `train`; compiled and recomputed set `train.compile` and
    `train.checkpoint_activations`.
    """
    from sparseinst.bench.report import report_results
    from sparseinst.bench.run import (
        build_settings,
        check_task_options,
        compare_settings,
        describe_machine,
        limit_photos,
        measure_row,
    )
    from sparseinst.device import pick_device
    from sparseinst.integrations.peers import is_peer
    from sparseinst.visualize.predict_files import find_images

    chosen = pick_device(device)
    models = model or ["r50-iam"]
    settings = build_settings(models, size, batch or [1], precision or ["fp32"], mode or ["eager"])
    check_task_options(photos=bool(photos), train=train, data=data is not None, roofline_or_record=roofline or record)
    task = Task(train, limit_photos(find_images(photos)) if photos else (), data)
    if record and not all(map(is_peer, models)):
        raise UserError("--record is for peers only; `run` records the timings of our own models")
    pair = [apply_changes(settings[0], text, size_of_model=size is None) for text in compare or ()]
    for setting in pair or settings:
        task.check(setting)
    found: dict[str, Any] = describe_machine(chosen)
    if pair:
        found["compare"] = compare_settings(pair, task, chosen, warmup=warmup, repetitions=repetitions)
    else:
        found["rows"] = []
        for setting in settings:
            row = measure_row(setting, task, chosen, warmup=warmup, repetitions=repetitions, roofline=roofline)
            found["rows"].append(row)
            if record:
                _record_peer(row, found["device"], profile, results)
    report_results(found, output, as_json=as_json)


def _record_peer(row: dict[str, Any], device: str, profile: str, results: Path) -> None:
    """Record a peer's latency."""
    from sparseinst.ablation.peers import keep_peer
    from sparseinst.ablation.store import Store

    seconds = row["repetitions"] * row["whole_ms"]["median"] / 1000
    result = {"whole_ms": row["whole_ms"]}
    keep_peer(Store(results), row["model"], row["size"], result, profile=profile, device=device, seconds=seconds)
