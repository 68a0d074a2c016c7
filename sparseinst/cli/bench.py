"""The command for timing models: bench."""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from sparseinst.ablation.store import RESULTS
from sparseinst.cli.options import Device, Json, ProfileName, Record, Results
from sparseinst.config import MODELS, Precision
from sparseinst.errors import UserError
from sparseinst.overrides import nearest

if TYPE_CHECKING:
    from sparseinst.config import Config
    from sparseinst.engine.timed import Timed
    from sparseinst.models.sparseinst import SparseInst

app = typer.Typer()

PRECISIONS: tuple[str, ...] = get_args(Precision)
MOST_PHOTOS = 64
MODES = ("plain", "eager", "folded", "compiled", "graph", "best")


@dataclass(frozen=True)
class Setting:
    """What one row of the table times."""

    model: str = "r50-iam"
    size: int = 640
    """Of the image's shorter side."""
    batch: int = 1
    precision: str = "fp32"
    mode: str = "eager"

    def __post_init__(self) -> None:
        for what, value, known in (("precision", self.precision, PRECISIONS), ("mode", self.mode, MODES)):
            if value not in known:
                raise UserError(f"{what} {value!r}: one of {', '.join(known)} was expected{nearest(value, known)}")
        if self.size < 32 or self.batch < 1:
            raise UserError(f"size {self.size}, batch {self.batch}: 32 and 1 are the least")

    @property
    def sides(self) -> tuple[int, int]:
        """Shorter side, and most pixels of the longer one, in the paper's proportion."""
        return self.size, round(self.size * 853 / 640)

    def __str__(self) -> str:
        return f"{self.model} {self.size} x{self.batch} {self.precision} {self.mode}"


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
    mode: Annotated[list[str] | None, typer.Option(help=f"{', '.join(MODES)}.  [default: eager]")] = None,
    compare: Annotated[
        tuple[str, str] | None,
        typer.Option(metavar="A B", help="Two settings by turns, and their ratio: mode=plain mode=best,precision=bf16"),
    ] = None,
    repetitions: Annotated[int, typer.Option(min=3, help="Timed runs of each.")] = 50,
    warmup: Annotated[int, typer.Option(min=1, help="Runs before, which are not timed.")] = 10,
    photos: Annotated[
        list[Path] | None, typer.Option(metavar="IMAGE|DIR", help="Time these at their own sizes, in place of a 480 x 640 image.")
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
    eager, the model as it is; folded, compiled, graph and best as `load_model(..., optimize=...)` makes it.
    """
    from sparseinst.ablation.plan import device_name
    from sparseinst.engine.device import pick_device
    from sparseinst.engine.predict_files import find_images
    from sparseinst.integrations.peers import is_peer

    chosen = pick_device(device)
    settings = [
        Setting(name, *values)
        for name in model or ["r50-iam"]
        for values in itertools.product(size or [_own_side(name)], batch or [1], precision or ["fp32"], mode or ["eager"])
    ]
    inputs = find_images(photos) if photos else []
    if len(inputs) > MOST_PHOTOS:
        print(f"the first {MOST_PHOTOS} of {len(inputs)} photos are taken: all are held on the device")
        inputs = inputs[:MOST_PHOTOS]
    if inputs and (record or roofline):
        raise UserError("--photos: neither with --record nor with --roofline, which are of 480 x 640 images")
    if record and not all(map(is_peer, model or [""])):
        raise UserError("--record is for peers; our own timings are recorded by `run`")
    about: dict[str, Any] = {"device": device_name(str(chosen)), **_threads(chosen)}
    if compare is not None:
        pair = [_changed(settings[0], text, size is None) for text in compare]
        if pair[0].batch != pair[1].batch:
            raise UserError(f"--compare: batches of {pair[0].batch} and {pair[1].batch}: a ratio needs as many images at once")
        about["compare"] = _compare(pair, inputs, chosen, warmup, repetitions)
    else:
        about["rows"] = []
        for setting in settings:
            about["rows"].append(_row(setting, inputs, chosen, warmup, repetitions))
            if roofline:
                about["rows"][-1] |= _bound(about["rows"][-1], setting, chosen)
            if record:
                _keep(about["rows"][-1], setting, about["device"], profile, results)
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    if as_json:
        print(json.dumps(about))
    elif compare is not None:
        _show_comparison(about)
    else:
        _show(about)


def _threads(device: Any) -> dict[str, Any]:
    import torch

    return {"torch": torch.__version__, **({"threads": torch.get_num_threads()} if device.type == "cpu" else {})}


def _changed(setting: Setting, text: str, own_size: bool) -> Setting:
    """A setting with what `mode=best,precision=bf16` says. Raises `UserError`.

    Args:
        own_size: give another model the size it is meant for.
    """
    known = {field.name: type(getattr(setting, field.name)) for field in fields(setting)}
    changes: dict[str, Any] = {}
    for part in text.split(","):
        name, _, value = part.partition("=")
        if name not in known:
            raise UserError(f"--compare: {part!r}: NAME=VALUE of {', '.join(known)} was expected{nearest(name, known)}")
        try:
            changes[name] = known[name](value)
        except ValueError:
            raise UserError(f"--compare: {part!r}: a number was expected") from None
    if own_size and "model" in changes:
        changes.setdefault("size", _own_side(changes["model"]))
    return replace(setting, **changes)


def _own_side(model: str) -> int:
    """The image's shorter side that a model is meant for."""
    from sparseinst.engine.checkpoint import load_weights

    return load_weights(Path(model))[1].inference.sides()[0] if _is_weights(model) else 640


def _is_weights(model: str) -> bool:
    """Whether a model is named by its file or folder. The names of models come first."""
    return model not in MODELS and Path(model).exists()


def _network(setting: Setting) -> tuple[Config, SparseInst | None]:
    """The config to time by, and trained weights where the setting names them. Raises `UserError`."""
    from sparseinst.engine.checkpoint import load_weights
    from sparseinst.overrides import load_config

    (short, long), network = setting.sides, None
    if _is_weights(setting.model):
        network, config, _ = load_weights(Path(setting.model))
        own_short, own_long = config.inference.sides()
        long = round(short * own_long / own_short)
    else:
        config = load_config(model=setting.model, overrides={"model.backbone.pretrained": False})
    sides = {"inference.short_side": short, "inference.long_side": long, "inference.size_factor": 1.0}
    return config.replace({**sides, "inference.precision": setting.precision}), network


def _timed(setting: Setting, photos: list[Path], device: Any) -> tuple[Timed, dict[str, Any]]:
    """What is to be timed, and what is known of it: FLOPs of one image, and parameters."""
    from sparseinst.engine.roofline import count_parameters, count_work
    from sparseinst.engine.timed import network_to_time, peer_to_time
    from sparseinst.integrations.peers import build_peer, is_peer

    if is_peer(setting.model):
        usual = Setting(setting.model, setting.size)
        if setting != usual:
            raise UserError(f"{setting}: a peer is timed as it is: batch 1, fp32, eager")
        peer = build_peer(setting.model, device=device, sides=setting.sides, pretrained=False)
        return peer_to_time(peer, device, photos), {"flops": None, "parameters": peer.parameters}
    config, network = _network(setting)
    mode: Any = setting.mode
    timed = network_to_time(config, device=device, model=network, batch=setting.batch, mode=mode, photos=photos)
    return timed, {"flops": count_work(config).flops, "parameters": count_parameters(config)}


def _row(setting: Setting, photos: list[Path], device: Any, warmup: int, repetitions: int) -> dict[str, Any]:
    from dataclasses import asdict

    from sparseinst.engine.benchmark import measure

    timed, known = _timed(setting, photos, device)
    found = asdict(measure(timed, device=device, warmup=warmup, repetitions=repetitions))
    return {**asdict(setting), **found, "input": found["size"], "size": setting.size, "photos": len(photos) or None, **known}


def _bound(row: dict[str, Any], setting: Setting, device: Any) -> dict[str, Any]:
    """How soon the network alone could be done, by what the device did just now."""
    from dataclasses import asdict

    from sparseinst.engine.roofline import count_work, measure_peak
    from sparseinst.integrations.peers import is_peer

    if is_peer(setting.model):
        return {"roofline": None}
    precision: Any = setting.precision
    work, peak = count_work(_network(setting)[0], setting.batch), measure_peak(device, precision)
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


def _compare(pair: list[Setting], photos: list[Path], device: Any, warmup: int, repetitions: int) -> dict[str, Any]:
    from dataclasses import asdict

    from sparseinst.engine.benchmark import compare

    first, second = (_timed(setting, photos, device)[0] for setting in pair)
    found = compare(first, second, device=device, warmup=warmup, repetitions=repetitions)
    return {"first": asdict(pair[0]), "second": asdict(pair[1]), "repetitions": repetitions, **asdict(found)}


def _show(about: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    modules = ("backbone", "encoder", "decoder", "post")
    setting = ("model", "size", "batch", "precision", "mode")
    table = Table(title=f"milliseconds on {about['device']}", title_justify="left")
    for column in (*setting, "median", "p5", "p95", *modules, "sum", "GFLOPs", "M parameters", "MB"):
        table.add_column(column)
    for row in about["rows"]:
        whole, parts = row["whole_ms"], row["modules_ms"]
        table.add_row(
            *(str(row[name]) for name in setting),
            *(f"{whole[name]:.1f}" for name in ("median", "p5", "p95")),
            *(f"{parts[name]:.1f}" if name in parts else "" for name in modules),
            f"{sum(parts.values()):.1f}" if parts else "",
            f"{row['flops'] / 1e9:.1f}" if row["flops"] else "",
            f"{row['parameters'] / 1e6:.1f}",
            str(row["peak_memory_mb"] or ""),
        )
    Console(width=max(Console().width, 150)).print(table)
    for row in about["rows"]:
        if row.get("roofline"):
            bound = row["roofline"]
            rates = f"{bound['peak']['flops'] / 1e12:.2f} TFLOP/s and {bound['peak']['bytes'] / 1e9:.0f} GB/s measured"
            print(
                f"{_name(row)}: the network, operator by operator, not below {bound['bound_ms']:.1f} ms, "
                f"{bound['share']:.0%} of the median ({bound['bytes'] / 1e9:.2f} GB; {rates})"
            )
    print("Each module is synchronised by itself: what their sum exceeds the median by is the cost of that.")
    if any(row["model"] in MODELS for row in about["rows"]):
        print("Random weights keep every map, the slowest case.")
    for row in about["rows"]:
        if not 0.95 < row["drift"] < 1.05:
            print(f"{_name(row)}: the last third took {row['drift']:.2f} x the first: throttled, or other work beside it")
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
