"""The command that times models: bench."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from sparseinst.ablation.store import RESULTS
from sparseinst.bench.modes import INFERENCE_MODES, TRAINING_MODES
from sparseinst.bench.rows import PRECISIONS
from sparseinst.cli.options import Device, Json, ProfileName, Record, Results, check_paths
from sparseinst.errors import UserError

app = typer.Typer()


_Models = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME|WEIGHTS",
        help="A model's name, a weights file, a run's folder, or a peer: mask-rcnn-r50-fpn, yolo26n-seg, rfdetr-seg-nano, "
        "detectron2:CONFIG."
        "  [default: r50-iam]",
    ),
]
_Sizes = Annotated[
    list[int] | None,
    typer.Option(
        min=1,
        max=16_384,
        help="Length of the image's shorter side in pixels.  [default: 640, or the size of the weights' config]",
    ),
]
_Batches = Annotated[list[int] | None, typer.Option(min=1, max=65_536, help="Number of images at once.  [default: 1]")]
_Precisions = Annotated[
    list[str] | None, typer.Option(help=f"{', '.join(PRECISIONS)}, or int8 with --engine openvino.  [default: fp32]")
]
_Engines = Annotated[
    list[str] | None,
    typer.Option(
        metavar="torch|onnxruntime|openvino|all",
        help="The library that runs the network; all means the same as --engines.  [default: torch]",
    ),
]
_ByTurns = Annotated[
    bool,
    typer.Option(
        "--engines",
        help="Compare engines (those of --engine, or all) with the reference's path: print each one's speed and lost AP.",
    ),
]
_Images = Annotated[
    int | None, typer.Option(min=1, help="With --engines: evaluate only this many validation images, the first ones.")
]
_Plot = Annotated[Path | None, typer.Option(help="With --engines: draw speed against lost AP, as PNG and SVG, in this file.")]
_Modes = Annotated[
    list[str] | None,
    typer.Option(help=f"{', '.join(INFERENCE_MODES)}; with --train {', '.join(TRAINING_MODES)}.  [default: eager]"),
]
_Compare = Annotated[
    tuple[str, str] | None,
    typer.Option(
        metavar="A B", help="Time two settings alternately, and print their ratio. Example: mode=plain mode=best,precision=bf16"
    ),
]
_Repetitions = Annotated[int, typer.Option(min=3, help="Number of timed runs of each setting.")]
_Warmup = Annotated[int, typer.Option(min=1, help="Number of runs before the timed ones.")]
_Photos = Annotated[
    list[Path] | None,
    typer.Option(metavar="IMAGE|DIR", help="Time these photos at their own sizes, instead of random 480 x 640 images."),
]
_Train = Annotated[
    bool, typer.Option("--train", help="Time training steps instead of inference: forward, loss, backward, update.")
]
_Data = Annotated[
    Path | None,
    typer.Option(
        help="A COCO-format folder. With --train: train on it instead of on synthetic images. With --engines: calibrate and "
        "evaluate on it instead of on the model's own data.",
    ),
]
_Roofline = Annotated[
    bool,
    typer.Option(
        "--roofline", help="Also print a lower bound of the time, from the device's measured arithmetic and memory rates."
    ),
]
_Output = Annotated[Path | None, typer.Option(help="Also write the JSON to this file.")]


@app.command()
def bench(
    model: _Models = None,
    size: _Sizes = None,
    batch: _Batches = None,
    precision: _Precisions = None,
    engine: _Engines = None,
    engines: _ByTurns = False,
    images: _Images = None,
    plot: _Plot = None,
    mode: _Modes = None,
    compare: _Compare = None,
    repetitions: _Repetitions = 50,
    warmup: _Warmup = 10,
    photos: _Photos = None,
    train: _Train = False,
    data: _Data = None,
    roofline: _Roofline = False,
    device: Device = None,
    output: _Output = None,
    record: Record = False,
    profile: ProfileName = "coco",
    results: Results = RESULTS,
    as_json: Json = False,
) -> None:
    """Time models by the paper's protocol.

    The forward pass and the post-processing are timed, without the decoding of images. A model given by name has random weights
    and keeps every map, which is the slowest case. To time real use, give weights and --photos.

    Repeat an option to give it several values. Every combination of the values is timed.

    Modes of inference: plain runs like the reference; eager runs the model as it is; folded, compiled, graph and best run the
    model that `load_model(..., optimize=...)` returns.

    --train times a training step, from a batch to the new weights. Its modes: plain trains like the reference; eager trains like
    `train`; compiled sets `train.compile`; recomputed sets `train.checkpoint_activations`.

    --engines times every engine and precision. They take turns with the reference's path, which runs eager in fp32. The command
    also evaluates the artifacts that it times. Each row then shows a speed and the AP that is lost.
    """
    from sparseinst.visualize.inputs import find_images

    check_paths(data=data)
    files = find_images(photos) if photos else []

    from sparseinst.bench.engine_report import report_engines
    from sparseinst.bench.report import report_results
    from sparseinst.bench.request import Request, limit_photos, measure_request
    from sparseinst.device import pick_device

    engines = engines or "all" in (engine or [])
    if plot is not None and not engines:
        raise UserError("--images and --plot need --engines")
    # The other engines run on the CPU, so torch is timed there, too.
    on_cpu = device is None and (engines or set(engine or ()) - {"torch"})
    request = Request(
        pick_device("cpu" if on_cpu else device),
        model or ["r50-iam"], size, batch or [1], precision, mode, engine,
        by_turns=engines, compare=compare, train=train, photos=limit_photos(files), data=data,
        images=images, roofline=roofline, record=record, warmup=warmup, repetitions=repetitions,
    )  # fmt: skip
    found = measure_request(request, partial(_record_peer, profile=profile, results=results) if record else None)
    if engines:
        report_engines(found, output, plot, as_json=as_json)
    else:
        report_results(found, output, as_json=as_json)


def _record_peer(row: dict[str, Any], device: str, profile: str, results: Path) -> None:
    """Record a peer's latency."""
    from sparseinst.ablation.peers import keep_peer
    from sparseinst.ablation.store import Store

    seconds = row["repetitions"] * row["whole_ms"]["median"] / 1000
    result = {"whole_ms": row["whole_ms"]}
    keep_peer(Store(results), row["model"], row["size"], result, profile=profile, device=device, seconds=seconds)
