"""The command for timing models: bench."""

from __future__ import annotations

import json
from typing import Annotated, Any, get_args

import typer

from sparseinst.cli.options import Device, Json
from sparseinst.config import Precision
from sparseinst.errors import UserError
from sparseinst.overrides import nearest

app = typer.Typer()

PRECISIONS: tuple[str, ...] = get_args(Precision)
MODES = ("eager", "compiled")

MASK_RCNN = "mask-rcnn-r50-fpn"
"""A peer: torchvision's."""


@app.command()
def bench(
    model: Annotated[list[str] | None, typer.Option(help=f"By name, or {MASK_RCNN} of torchvision.  [default: r50-iam]")] = None,
    size: Annotated[list[int] | None, typer.Option(min=32, help="Shorter side of the image.  [default: 640]")] = None,
    batch: Annotated[list[int] | None, typer.Option(min=1, help="Images at once.  [default: 1]")] = None,
    precision: Annotated[list[str] | None, typer.Option(help=f"{', '.join(PRECISIONS)}.  [default: fp32]")] = None,
    mode: Annotated[list[str] | None, typer.Option(help=f"{', '.join(MODES)}.  [default: eager]")] = None,
    repetitions: Annotated[int, typer.Option(min=3, help="Timed runs of each, after ten that are not.")] = 50,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Latency by the paper's protocol, with random weights: forward and post-processing, decoding of the image left out.

    Every combination of the options is timed; repeat an option for more of its values.
    """
    import itertools

    from sparseinst.ablation.plan import device_name
    from sparseinst.engine.device import pick_device

    for what, values, known in (("precision", precision, PRECISIONS), ("mode", mode, MODES)):
        for value in values or []:
            if value not in known:
                raise UserError(f"{what} {value!r}: one of {', '.join(known)} was expected{nearest(value, known)}")
    chosen = pick_device(device)
    rows = []
    for name, side in itertools.product(model or ["r50-iam"], size or [640]):
        if name == MASK_RCNN:
            rows.append(_peer(side, chosen, repetitions))
            continue
        for settings in itertools.product(batch or [1], precision or ["fp32"], mode or ["eager"]):
            rows.append(_row(name, side, *settings, chosen, repetitions))
    about = {"device": device_name(str(chosen)), "rows": rows}
    if as_json:
        print(json.dumps(about))
    else:
        _show(about)


def _row(name: str, side: int, batch: int, precision: str, mode: Any, device: Any, repetitions: int) -> dict[str, Any]:
    from sparseinst.engine.benchmark import count_flops, count_parameters, measure_latency
    from sparseinst.overrides import load_config

    longest = round(side * 853 / 640)
    overrides = {"inference.short_side": side, "inference.long_side": longest, "inference.precision": precision}
    config = load_config(model=name, overrides={**overrides, "model.backbone.pretrained": False})
    found = measure_latency(config, device=device, repetitions=repetitions, batch=batch, mode=mode)
    return {
        "model": name,
        "size": side,
        "batch": batch,
        "precision": precision,
        "mode": mode,
        "whole_ms": found.whole_ms,
        "modules_ms": found.modules_ms,
        "flops": count_flops(config),
        "parameters": count_parameters(config),
    }


def _peer(side: int, device: Any, repetitions: int) -> dict[str, Any]:
    from sparseinst.engine.benchmark import measure_mask_rcnn

    whole = measure_mask_rcnn((side, round(side * 853 / 640)), device=device, repetitions=repetitions)
    row = {"model": MASK_RCNN, "size": side, "batch": 1, "precision": "fp32", "mode": "eager", "whole_ms": whole}
    return {**row, "modules_ms": {}, "flops": None, "parameters": None}


def _show(about: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    modules = ("backbone", "encoder", "decoder", "post")
    table = Table(title=f"milliseconds on {about['device']}", title_justify="left")
    for column in (
        "model",
        "size",
        "batch",
        "precision",
        "mode",
        "median",
        "p5",
        "p95",
        *modules,
        "sum",
        "GFLOPs",
        "M parameters",
    ):
        table.add_column(column)
    for row in about["rows"]:
        whole, parts = row["whole_ms"], row["modules_ms"]
        table.add_row(
            *(str(row[name]) for name in ("model", "size", "batch", "precision", "mode")),
            *(f"{whole[name]:.1f}" for name in ("median", "p5", "p95")),
            *(f"{parts[name]:.1f}" if name in parts else "" for name in modules),
            f"{sum(parts.values()):.1f}" if parts else "",
            f"{row['flops'] / 1e9:.1f}" if row["flops"] else "",
            f"{row['parameters'] / 1e6:.1f}" if row["parameters"] else "",
        )
    Console(width=max(Console().width, 150)).print(table)
    print("Each module is synchronised by itself, so that the parts sum to more than the whole; random weights keep every map.")
