"""Commands for one model outside any table: train, evaluate."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from sparseinst.ablation.store import RESULTS
from sparseinst.cli.options import Device, Json, Optimize, Overrides, ProfileName, Record, Results
from sparseinst.errors import UserError

if TYPE_CHECKING:
    from sparseinst.config import Config

app = typer.Typer()


@app.command()
def train(
    output: Annotated[Path, typer.Option(help="The run's folder; the same command resumes a stopped run.")],
    config: Annotated[Path | None, typer.Option(help="YAML or JSON with any of the settings.")] = None,
    preset: Annotated[str | None, typer.Option(help="paper (default) or release.")] = None,
    model: Annotated[str | None, typer.Option(help="A model by name, such as r50-giam.")] = None,
    data: Annotated[
        Path | None, typer.Option(help="A COCO-format folder; sets data.root, model.num_classes and, where needed, num_maps.")
    ] = None,
    weights: Annotated[
        Path | None, typer.Option(help="Weights to start from, imported ones, say; their model is taken, with fresh classes.")
    ] = None,
    override: Overrides = [],  # noqa: B006 (typer reads the default)
    device: Device = None,
) -> None:
    """Train one model on any COCO-format data, then evaluate it."""
    from sparseinst.overrides import load_config, parse_override

    overrides: dict[str, Any] = dict(map(parse_override, override))
    if data is not None:
        overrides = {"data.root": str(data), "data.source": "coco", **overrides}
    if weights is not None:
        overrides = {**_model_of(weights), "train.start": str(weights), **overrides}
    settings = load_config(config, preset=preset, model=model, overrides=overrides)
    if data is not None:
        settings = settings.replace(_fitting(settings, overrides))
    from sparseinst.engine.device import pick_device
    from sparseinst.engine.evaluate import evaluate_run
    from sparseinst.engine.train import train as run

    chosen = pick_device(device)
    trained = run(settings, output, device=chosen)
    _print_figures(evaluate_run(output, settings, device=chosen))
    print(f"weights: {trained}")


def _model_of(weights: Path) -> dict[str, Any]:
    """The model of a weights file, as overrides."""
    from sparseinst.engine.checkpoint import load_weights
    from sparseinst.overrides import flatten

    return flatten(load_weights(weights)[1].model.model_dump(mode="json"), "model.")


def _fitting(settings: Config, overrides: dict[str, Any]) -> dict[str, Any]:
    """What the data ask for and nobody has set: as many classes as the file has, as many maps as the fullest image needs."""
    from sparseinst.data.coco import train_split

    split = train_split(settings.data)
    found: dict[str, Any] = {}
    if "model.num_classes" not in overrides or settings.train.start is not None:
        found["model.num_classes"] = len(split.categories)
        names = ", ".join(category.name for category in split.categories[:5])
        print(f"{len(split.categories)} classes: {names}{', ...' if len(split.categories) > 5 else ''}")
    most, maps = max(split.instances_per_image()), settings.model.decoder.iam.num_maps
    if most > maps and "model.decoder.iam.num_maps" not in overrides:
        wanted = -(-most // 50) * 50
        found["model.decoder.iam.num_maps"] = wanted
        print(f"images hold up to {most} instances: model.decoder.iam.num_maps={wanted} in place of {maps}")
    if settings.train.start is not None:
        print(f"starting from {settings.train.start}; the class head starts afresh")
    return found


@app.command()
def evaluate(
    weights: Annotated[Path | None, typer.Option(help="A weights file, or the folder of a finished run.")] = None,
    data: Annotated[Path | None, typer.Option(help="A COCO-format folder; default: the one it was trained on.")] = None,
    predictions: Annotated[Path | None, typer.Option(help="Also write the instances, in COCO's result format.")] = None,
    override: Overrides = [],  # noqa: B006
    engine: Annotated[Literal["hotcoco", "pycocotools"], typer.Option(help="Who computes the figures.")] = "hotcoco",
    peer: Annotated[
        str | None, typer.Option(help="Another system in place of ours: mask-rcnn-r50-fpn, or detectron2:CONFIG.")
    ] = None,
    optimize: Optimize = None,
    record: Record = False,
    profile: ProfileName = "coco",
    results: Results = RESULTS,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """The twelve COCO mask figures of a model, or of a peer (whose published weights are fetched where --weights names none)."""
    from sparseinst.engine.device import pick_device
    from sparseinst.overrides import parse_override

    overrides: dict[str, Any] = {} if data is None else {"data.root": str(data), "data.source": "coco"}
    overrides |= dict(map(parse_override, override))
    if peer is not None:
        found = _evaluate_peer(peer, weights, overrides, predictions, engine, device, (profile, results) if record else None)
    elif weights is None:
        raise UserError("evaluate: --weights names what to evaluate, or --peer another system")
    elif record:
        raise UserError("evaluate: --record is for peers; what `run` and `launch` do is recorded without it")
    else:
        from sparseinst.engine.evaluate import evaluate_weights

        found = evaluate_weights(
            weights, overrides, device=pick_device(device), predictions=predictions, engine=engine, optimize=optimize
        )
    _print_figures(found, as_json)


def _evaluate_peer(
    name: str,
    weights: Path | None,
    overrides: dict[str, Any],
    predictions: Path | None,
    engine: Literal["hotcoco", "pycocotools"],
    device: str | None,
    keep: tuple[str, Path] | None,
) -> Any:
    from sparseinst.ablation.peers import keep_peer
    from sparseinst.ablation.plan import device_name
    from sparseinst.ablation.store import Store
    from sparseinst.data.coco import val_split
    from sparseinst.engine.device import pick_device
    from sparseinst.integrations.peers import SIDES, build_peer, evaluate_peer
    from sparseinst.overrides import load_config
    from sparseinst.paths import file_digest

    sides = {"inference.short_side": SIDES[0], "inference.long_side": SIDES[1]}
    config = load_config(overrides={**sides, **overrides})
    split = val_split(config.data)
    chosen = pick_device(device)
    model = build_peer(name, device=chosen, sides=config.inference.sides(), weights=weights)
    found = evaluate_peer(model, split, predictions=predictions, engine=engine)
    if keep is not None:
        profile, results = keep
        keep_peer(
            Store(results), name, config.inference.sides()[0], {"figures": found.figures}, profile=profile,
            device=device_name(str(chosen)), seconds=found.seconds, data=file_digest(split.file),
        )  # fmt: skip
    return found


def _print_figures(result: Any, as_json: bool = False) -> None:
    import json
    from dataclasses import asdict

    if as_json:
        print(json.dumps(asdict(result)))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(*result.figures, title=f"COCO mask figures over {result.images} images, in percent", min_width=60)
    table.add_row(*("-" if value is None else f"{value:.1f}" for value in result.figures.values()))
    Console(width=max(Console().width, 100)).print(table)  # a narrow terminal wraps lines, not figures
    if result.skipped:
        print(f"{len(result.skipped)} images were left out; see the warnings")
