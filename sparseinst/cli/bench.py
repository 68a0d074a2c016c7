"""The command that times models: bench."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from sparseinst.ablation.store import RESULTS
from sparseinst.bench.modes import INFERENCE_MODES, TRAINING_MODES
from sparseinst.bench.rows import PRECISIONS, Setting, Task, apply_changes
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
    precision: Annotated[
        list[str] | None, typer.Option(help=f"{', '.join(PRECISIONS)}, or int8 with --engine openvino.  [default: fp32]")
    ] = None,
    engine: Annotated[
        list[str] | None,
        typer.Option(
            metavar="torch|onnxruntime|openvino|all", help="What runs the network; all is short for --engines.  [default: torch]"
        ),
    ] = None,
    engines: Annotated[
        bool,
        typer.Option(
            "--engines",
            help="Time the engines (those of --engine, or all) by turns with the reference's path, and print what AP each loses.",
        ),
    ] = False,
    images: Annotated[
        int | None, typer.Option(min=1, help="With --engines: evaluate only this many validation images, the first ones.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="With --engines: draw speed against lost AP, as PNG and SVG, in this file.")
    ] = None,
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
        Path | None,
        typer.Option(
            help="A COCO-format folder. With --train: train on it, instead of noise with ellipses. With --engines: calibrate and "
            "evaluate on it, instead of the model's own data."
        ),
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
    --engines times every engine and precision by turns with the reference's path and scores the same artifacts, so that each row
    has a speed and the AP that it costs.
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

    models = model or ["r50-iam"]
    engines = engines or "all" in (engine or [])
    chosen = pick_device("cpu" if device is None and (engines or set(engine or ()) - {"torch"}) else device)
    if not engines and (images is not None or plot is not None):
        raise UserError("--images and --plot go with --engines")
    if engines:
        if train or compare or roofline or record:
            raise UserError("--engines: not with --train, --compare, --roofline or --record")
        base = build_settings(models, size, batch or [1], ["fp32"], ["eager"])
        task = Task(False, limit_photos(find_images(photos)) if photos else (), data, images)
        results_of = _compare_engines(base, engine, precision, mode, task, chosen, (warmup, repetitions))
        _report_engines(results_of, output, plot, as_json)
        return
    settings = build_settings(models, size, batch or [1], precision or ["fp32"], mode or ["eager"], engine or ["torch"])
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


def _compare_engines(
    base: list[Setting],
    engine: list[str] | None,
    precision: list[str] | None,
    mode: list[str] | None,
    task: Task,
    device: Any,
    runs: tuple[int, int],
) -> dict[str, Any]:
    from sparseinst.bench.engines import compare_engines, engine_settings
    from sparseinst.bench.run import describe_machine
    from sparseinst.integrations.peers import is_peer

    found: dict[str, Any] = {**describe_machine(device), "engines": []}
    for setting in base:
        if is_peer(setting.model):
            raise UserError(f"--engines: {setting.model} is a peer, which only torch runs here")
        settings, missing = engine_settings(setting, engine or ["all"], precision, mode or ["eager"])
        for line in missing:
            print(line, file=sys.stderr)
        for each in settings:
            task.check(each)
        warmup, repetitions = runs
        found["engines"] += compare_engines(settings, task, device, warmup=warmup, repetitions=repetitions)
    found["rows"] = found["engines"]
    return found


def _report_engines(found: dict[str, Any], output: Path | None, plot: Path | None, as_json: bool) -> None:
    from sparseinst.bench.engine_report import draw_engines, print_engines
    from sparseinst.files import atomic
    from sparseinst.report.style import save

    by_model: dict[tuple[str, int, int], list[dict[str, Any]]] = {}
    for row in found.pop("engines"):
        by_model.setdefault((row["model"], row["size"], row["batch"]), []).append(row)
    if output is not None:
        with atomic(output) as temporary:
            temporary.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if as_json:
        print(json.dumps(found))
    for number, rows in enumerate(by_model.values()):
        shown = {**found, "engines": rows}
        if not as_json:
            print_engines(shown)
        figure = draw_engines(shown) if plot is not None else None
        if plot is not None and figure is not None:
            save(figure, plot if number == 0 else plot.with_stem(f"{plot.stem}-{number + 1}"))


def _record_peer(row: dict[str, Any], device: str, profile: str, results: Path) -> None:
    """Record a peer's latency."""
    from sparseinst.ablation.peers import keep_peer
    from sparseinst.ablation.store import Store

    seconds = row["repetitions"] * row["whole_ms"]["median"] / 1000
    result = {"whole_ms": row["whole_ms"]}
    keep_peer(Store(results), row["model"], row["size"], result, profile=profile, device=device, seconds=seconds)
