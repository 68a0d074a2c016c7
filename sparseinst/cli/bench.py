"""The command for timing models: bench."""

from __future__ import annotations

import itertools
import json
from dataclasses import asdict, fields
from pathlib import Path
from typing import Annotated, Any

import typer

from sparseinst.ablation.store import RESULTS
from sparseinst.cli.apart import compare_apart, measure_apart
from sparseinst.cli.options import Device, Json, ProfileName, Record, Results
from sparseinst.cli.timing import MODES, PRECISIONS, TRAINING_MODES, Setting, Task, changed, network, own_side
from sparseinst.config import MODELS
from sparseinst.errors import UserError

app = typer.Typer()

MOST_PHOTOS = 64


@app.command()
def bench(
    model: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME|WEIGHTS",
            help="By name; a weights file or a run's folder; a peer: mask-rcnn-r50-fpn of torchvision, detectron2:CONFIG."
            "  [default: r50-iam]",
        ),
    ] = None,
    size: Annotated[list[int] | None, typer.Option(help="The image's shorter side.  [default: 640, or the weights' own]")] = None,
    batch: Annotated[list[int] | None, typer.Option(help="Images at once.  [default: 1]")] = None,
    precision: Annotated[list[str] | None, typer.Option(help=f"{', '.join(PRECISIONS)}.  [default: fp32]")] = None,
    mode: Annotated[
        list[str] | None, typer.Option(help=f"{', '.join(MODES)}; of --train {', '.join(TRAINING_MODES)}.  [default: eager]")
    ] = None,
    compare: Annotated[
        tuple[str, str] | None,
        typer.Option(metavar="A B", help="Two settings by turns, and their ratio: mode=plain mode=best,precision=bf16"),
    ] = None,
    repetitions: Annotated[int, typer.Option(min=3, help="Timed runs of each.")] = 50,
    warmup: Annotated[int, typer.Option(min=1, help="Runs before, which are not timed.")] = 10,
    photos: Annotated[
        list[Path] | None, typer.Option(metavar="IMAGE|DIR", help="Time these at their own sizes, in place of a 480 x 640 image.")
    ] = None,
    train: Annotated[
        bool, typer.Option("--train", help="Time steps of training in place of inference: forward, loss, backward, update.")
    ] = False,
    data: Annotated[
        Path | None, typer.Option(help="With --train: a COCO-format folder to train on, in place of noise with ellipses.")
    ] = None,
    roofline: Annotated[
        bool, typer.Option("--roofline", help="Also how soon the device could be done, by its measured arithmetic and memory.")
    ] = False,
    device: Device = None,
    output: Annotated[Path | None, typer.Option(help="Also write the JSON there.")] = None,
    record: Record = False,
    profile: ProfileName = "coco",
    results: Results = RESULTS,
    as_json: Json = False,
) -> None:
    """Latency by the paper's protocol: forward and post-processing, decoding of the image left out.

    A model by name has random weights and keeps every map, the slowest case; weights and --photos show real use.
    Every combination of the options is timed; repeat an option for more of its values. Modes: plain, as the reference runs;
    eager, the model as it is; folded, compiled, graph and best as `load_model(..., optimize=...)` makes it. With --train the step
    from a batch to new weights: eager, as `train` runs; compiled and recomputed, with `train.compile` and
    `train.checkpoint_activations`.
    """
    from sparseinst.ablation.plan import device_name
    from sparseinst.engine.device import pick_device
    from sparseinst.integrations.peers import is_peer

    chosen = pick_device(device)
    settings = [
        Setting(name, *values)
        for name in model or ["r50-iam"]
        for values in itertools.product(size or [own_side(name)], batch or [1], precision or ["fp32"], mode or ["eager"])
    ]
    task = _task(train, photos or [], data, only_usual=record or roofline)
    if record and not all(map(is_peer, model or [""])):
        raise UserError("--record is for peers; our own timings are recorded by `run`")
    pair = [changed(settings[0], text, size is None) for text in compare or ()]
    for setting in pair or settings:
        task.refuse(setting)
    about: dict[str, Any] = {"device": device_name(str(chosen)), **_threads(chosen)}
    if compare is not None:
        if pair[0].batch != pair[1].batch:
            raise UserError(f"--compare: batches of {pair[0].batch} and {pair[1].batch}: a ratio needs as many images at once")
        about["compare"] = _compare(pair, task, chosen, warmup, repetitions)
    else:
        about["rows"] = []
        for setting in settings:
            about["rows"].append(_row(setting, task, chosen, warmup, repetitions))
            if roofline:
                about["rows"][-1] |= _bound(about["rows"][-1], setting, chosen)
            if record:
                _keep(about["rows"][-1], setting, about["device"], profile, results)
    _tell(about, output, as_json)


def _task(train: bool, photos: list[Path], data: Path | None, *, only_usual: bool) -> Task:
    """What is to be done, on which images. Raises `UserError` for options that exclude each other.

    Args:
        only_usual: what is asked for besides is of inference on images of COCO's usual size.
    """
    from sparseinst.engine.predict_files import find_images

    if (photos or train) and only_usual:
        raise UserError("--photos, --train: not with --record or --roofline, which are of 480 x 640 images in inference")
    if (photos and train) or (data is not None and not train):
        raise UserError("--photos are for inference, and --data is for --train, which needs instances to learn")
    files = find_images(photos) if photos else []
    if len(files) > MOST_PHOTOS:
        print(f"the first {MOST_PHOTOS} of {len(files)} photos are taken: all are held on the device")
    return Task(train, tuple(files[:MOST_PHOTOS]), data)


def _tell(about: dict[str, Any], output: Path | None, as_json: bool) -> None:
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    if as_json:
        print(json.dumps(about))
    elif "compare" in about:
        _show_comparison(about)
    else:
        _show(about)


def _threads(device: Any) -> dict[str, Any]:
    import torch

    return {"torch": torch.__version__, **({"threads": torch.get_num_threads()} if device.type == "cpu" else {})}


def _row(setting: Setting, task: Task, device: Any, warmup: int, repetitions: int) -> dict[str, Any]:
    found = measure_apart(setting, task, device, warmup, repetitions)
    return {
        **asdict(setting),
        **found,
        "images_per_second": round(1000 * setting.batch / found["whole_ms"]["mean"], 2),
        "input": found["size"],
        "size": setting.size,
        "train": task.train,
        "photos": str(task.data) if task.data is not None else len(task.photos) or None,
    }


def _bound(row: dict[str, Any], setting: Setting, device: Any) -> dict[str, Any]:
    """How soon the network alone could be done, by what the device did just now."""
    from sparseinst.engine.roofline import count_work, measure_peak
    from sparseinst.integrations.peers import is_peer

    if is_peer(setting.model):
        return {"roofline": None}
    precision: Any = setting.precision
    work, peak = count_work(network(setting)[0], setting.batch), measure_peak(device, precision)
    bound = work.bound_ms(peak, precision)
    return {
        "roofline": {
            "bytes": work.traffic(precision),
            "peak": asdict(peak),
            "bound_ms": round(bound, 3),
            "share": round(bound / row["whole_ms"]["median"], 3),
        }
    }


def _keep(row: dict[str, Any], setting: Setting, device: str, profile: str, results: Path) -> None:
    from sparseinst.ablation.peers import keep_peer
    from sparseinst.ablation.store import Store

    seconds = row["repetitions"] * row["whole_ms"]["median"] / 1000
    result = {"whole_ms": row["whole_ms"]}
    keep_peer(Store(results), setting.model, setting.size, result, profile=profile, device=device, seconds=seconds)


def _compare(pair: list[Setting], task: Task, device: Any, warmup: int, repetitions: int) -> dict[str, Any]:
    found = compare_apart(pair, task, device, warmup, repetitions)
    return {"first": asdict(pair[0]), "second": asdict(pair[1]), **asdict(found)}


def _show(about: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    from sparseinst.engine.step import PHASES
    from sparseinst.engine.timed import MODULES

    train = about["rows"][0]["train"]
    modules = PHASES if train else MODULES
    setting = ("model", "size", "batch", "precision", "mode")
    table = Table(title=f"milliseconds {'a step of training ' if train else ''}on {about['device']}", title_justify="left")
    for column in (*setting, "median", "p5", "p95", "images/s", *modules, "sum", "GFLOPs", "M parameters", "MB"):
        table.add_column(column)
    for row in about["rows"]:
        whole, parts = row["whole_ms"], row["modules_ms"]
        table.add_row(
            *(str(row[name]) for name in setting),
            *(f"{whole[name]:.1f}" for name in ("median", "p5", "p95")),
            f"{row['images_per_second']:.3g}",
            *(f"{parts[name]:.1f}" if name in parts else "" for name in modules),
            f"{sum(parts.values()):.1f}" if parts else "",
            f"{row['flops'] / 1e9:.1f}" if row["flops"] else "",
            f"{row['parameters'] / 1e6:.1f}",
            str(row["peak_memory_mb"] or ""),
        )
    Console(width=max(Console().width, 160)).print(table)
    for row in about["rows"]:
        if row.get("roofline"):
            bound = row["roofline"]
            rates = f"{bound['peak']['flops'] / 1e12:.2f} TFLOP/s and {bound['peak']['bytes'] / 1e9:.0f} GB/s measured"
            print(
                f"{_name(row)}: the network, operator by operator, not below {bound['bound_ms']:.1f} ms, "
                f"{bound['share']:.0%} of the median ({bound['bytes'] / 1e9:.2f} GB; {rates})"
            )
    print("Each module is synchronised by itself: what their sum exceeds the median by is the cost of that.")
    if train:
        print("GFLOPs are those of one image's way forward. The weights stay as they are, so that each step is the same work.")
        print("plain makes masks small within the step; for the others the mapper does that. Sizes are not jittered.")
    elif any(row["model"] in MODELS for row in about["rows"]):
        print("Random weights keep every map, the slowest case.")
    for row in about["rows"]:
        if not 0.95 < row["drift"] < 1.05:
            why = "throttled, other work beside it, or too short a warm-up"
            print(f"{_name(row)}: the last third took {row['drift']:.2f} x the first: not steady ({why})")
        if row["clocks"]:
            print(f"clocks before | after: {row['clocks']}")


def _name(row: dict[str, Any]) -> str:
    return str(Setting(**{field.name: row[field.name] for field in fields(Setting)}))


def _show_comparison(about: dict[str, Any]) -> None:
    found = about["compare"]
    for which in ("first", "second"):
        times = found[f"{which}_ms"]
        print(f"{Setting(**found[which])}: {times['median']:.1f} ms ({times['p5']:.1f} to {times['p95']:.1f})")
    ratio = found["ratio"]
    print(f"ratio {ratio['median']:.2f} (p5 {ratio['p5']:.2f}, p95 {ratio['p95']:.2f}) over {found['repetitions']} turns")
    print(f"on {about['device']}")
