"""Commands for one model that belongs to no table: train, evaluate."""

from __future__ import annotations

from collections.abc import Container
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from sparseinst.ablation.store import RESULTS
from sparseinst.cli.mechanism import print_mechanism
from sparseinst.cli.options import (
    Checkpoint,
    Device,
    EngineChoice,
    FromScratch,
    Json,
    NetworkPrecisionChoice,
    Optimize,
    Overrides,
    ProfileName,
    Record,
    Results,
    check_paths,
    engine_overrides,
)
from sparseinst.errors import UserError
from sparseinst.words import counted

if TYPE_CHECKING:
    import torch

    from sparseinst.config import Config

app = typer.Typer()


@app.command()
def train(
    output: Annotated[Path, typer.Option(help="The run's folder; the same command resumes a stopped run.")],
    config: Annotated[Path | None, typer.Option(help="A YAML or JSON file with any of the settings.")] = None,
    preset: Annotated[str | None, typer.Option(help="The set of defaults: paper (default) or release.")] = None,
    model: Annotated[str | None, typer.Option(help="A model by name, such as r50-giam.")] = None,
    data: Annotated[
        Path | None, typer.Option(help="A COCO-format folder; sets data.root, model.num_classes and, if needed, num_maps.")
    ] = None,
    weights: Annotated[
        Path | None,
        typer.Option(
            help="Start from these weights, for example imported ones, with their model settings. Classes that the weights "
            "do not know by name start from random values.",
        ),
    ] = None,
    preflight: Annotated[
        bool, typer.Option("--preflight", help="Only check that the model learns eight of the images by heart.")
    ] = False,
    override: Overrides = [],  # noqa: B006 (typer reads the default)
    device: Device = None,
    from_scratch: FromScratch = False,
) -> None:
    """Train one model on any COCO-format data, then evaluate it."""
    from sparseinst.nested import flatten
    from sparseinst.overrides import load_config, parse_override, read_layer

    check_paths(weights=weights)
    overrides: dict[str, Any] = dict(map(parse_override, override))
    if data is not None:
        overrides = {"data.root": str(data), "data.source": "coco", **overrides}
    if weights is not None:
        overrides = {**model_overrides(weights), "train.start": str(weights), **overrides}
    settings = load_config(config, preset=preset, model=model, overrides=overrides)
    if data is not None:
        in_file = flatten(read_layer(config)) if config is not None else {}
        settings = settings.replace(_data_overrides(settings, in_file.keys() | overrides.keys()))
    from sparseinst.device import pick_device
    from sparseinst.evaluation.weights import evaluate_run
    from sparseinst.inference.engine_network import device_for
    from sparseinst.paths import RunPaths
    from sparseinst.training.loggers import log_evaluation
    from sparseinst.training.train import train as run

    chosen = pick_device(device)
    if preflight:
        _preflight(settings, output, chosen)
        return
    trained = run(settings, output, device=chosen, from_scratch=from_scratch)
    evaluation = evaluate_run(output, settings, device=device_for(settings, device))
    if settings.train.loggers:
        log_evaluation(settings, RunPaths(output), {**evaluation.figures, **evaluation.mechanism})
    _print_metrics(evaluation)
    print(f"weights: {trained}")
    if (best := RunPaths(output).best).exists():
        print(f"the weights with the best AP during training: {best} (use them with --weights {output} --checkpoint best)")


def _preflight(settings: Config, output: Path, device: torch.device) -> None:
    from sparseinst.training.preflight import IMAGES, STEPS, preflight

    found = preflight(settings, output, device=device)
    what = "images" if settings.data.tile is None else "tiles"
    print(
        f"preflight passed in {found.seconds / 60:.1f} minutes: {STEPS} steps on {IMAGES} {what} lowered the loss from "
        f"{found.loss_before:.2f} to {found.loss_after:.2f}, and AP50 on them is {found.ap50:.1f}"
    )
    one = "an image" if settings.data.tile is None else "a tile"
    print(
        f"{one} took {found.image_seconds:.2f} s, so {settings.train.iterations} steps of {settings.train.batch_size} {what} may "
        f"take {_time(found.training_hours)}, and the evaluations {_time(found.evaluation_hours)} (estimates, without "
        "pretraining)"
    )


def _time(hours: float) -> str:
    """Return an estimated time in words, in minutes if it is shorter than an hour."""
    minutes = max(1, round(60 * hours))
    return f"about {counted(minutes, 'minute')}" if minutes < 60 else f"about {hours:,.1f} hours"


def model_overrides(weights: Path) -> dict[str, Any]:
    """Return the model settings of a weights file as overrides."""
    from sparseinst.inference.weights import load_weights
    from sparseinst.nested import flatten

    return flatten(load_weights(weights)[1].model.model_dump(mode="json"), "model.")


def _data_overrides(settings: Config, given: Container[str]) -> dict[str, Any]:
    """Return overrides that fit the model to the data: the number of classes and enough maps.

    Args:
        given: the settings that the user chose, in a file or by an override; they stay.
    """
    from sparseinst.data.coco import train_split

    split = train_split(settings.data)
    found: dict[str, Any] = {}
    if "model.num_classes" not in given or settings.train.start is not None:
        found["model.num_classes"] = len(split.categories)
        names = ", ".join(category.name for category in split.categories[:5])
        print(f"{counted(len(split.categories), 'class')}: {names}{', ...' if len(split.categories) > 5 else ''}")
    most, maps = max(split.instances_per_tile(settings.data.tile)), settings.model.decoder.iam.num_maps
    if most > maps and "model.decoder.iam.num_maps" not in given:
        wanted = -(-most // 50) * 50
        found["model.decoder.iam.num_maps"] = wanted
        holds = "images hold up to" if settings.data.tile is None else "tiles of the fullest image hold about"
        print(f"{holds} {most} instances, so model.decoder.iam.num_maps is {wanted} instead of {maps}")
    if settings.train.start is not None:
        print(f"training starts from {settings.train.start}; in the class head, it keeps the classes with the same names")
    return found


@app.command()
def evaluate(
    weights: Annotated[Path | None, typer.Option(help="A weights file, or the folder of a run, which may be unfinished.")] = None,
    data: Annotated[
        Path | None, typer.Option(help="A COCO-format folder; default: the data that the model was trained on.")
    ] = None,
    predictions: Annotated[
        Path | None, typer.Option(help="Also write the predicted instances to this file, in COCO's result format.")
    ] = None,
    override: Overrides = [],  # noqa: B006
    engine: EngineChoice = None,
    precision: NetworkPrecisionChoice = None,
    evaluator: Annotated[
        Literal["hotcoco", "pycocotools"], typer.Option(help="The library that computes the metrics.")
    ] = "hotcoco",
    peer: Annotated[
        str | None,
        typer.Option(help="A peer instead of our model: mask-rcnn-r50-fpn, yolo26n-seg, rfdetr-seg-nano, detectron2:CONFIG."),
    ] = None,
    checkpoint: Checkpoint = None,
    optimize: Optimize = None,
    record: Record = False,
    profile: ProfileName = "coco",
    results: Results = RESULTS,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Print COCO's twelve mask metrics of a model or a peer.

    A peer uses its published weights unless --weights is given.
    """
    from sparseinst.files import check_writable
    from sparseinst.overrides import parse_override

    overrides: dict[str, Any] = {} if data is None else {"data.root": str(data), "data.source": "coco"}
    overrides |= engine_overrides(engine, precision) | dict(map(parse_override, override))
    if predictions is not None:
        check_writable(predictions)
    if peer is not None and checkpoint is not None:
        raise UserError("evaluate: --checkpoint chooses weights of a run, so it cannot be used with --peer")
    if peer is not None and (engine is not None or precision is not None or optimize is not None):
        raise UserError("evaluate: a peer always runs in torch and fp32: leave out --engine, --precision and --optimize")
    if weights is None and peer is None:
        raise UserError("evaluate: give --weights to evaluate a model, or --peer to evaluate another system")
    if peer is None and record:
        raise UserError("evaluate: --record is for peers only; `run` and `launch` record their results without it")
    check_paths(weights=weights, data=data)
    if peer is not None:
        found = _evaluate_peer(peer, weights, overrides, predictions, evaluator, device, (profile, results) if record else None)
    else:
        from sparseinst.evaluation.weights import evaluate_source, open_for_evaluation
        from sparseinst.inference.checkpoints import find_weights
        from sparseinst.inference.engine_network import device_for

        assert weights is not None
        weights = find_weights(weights, checkpoint)
        _refuse_other_weights(weights, results)
        source, config = open_for_evaluation(weights, overrides)
        chosen = device_for(config, device)
        found = evaluate_source(source, config, device=chosen, predictions=predictions, evaluator=evaluator, optimize=optimize)
    _print_metrics(found, as_json)


def _refuse_other_weights(weights: Path, results: Path) -> None:
    """Raise `UserError` if the weights file of a run differs from the weights that the record of its training names."""
    from sparseinst.ablation.store import Store
    from sparseinst.launch.work import check_weights
    from sparseinst.paths import WEIGHTS

    record = Store(results).load(weights.resolve().parent.name) if weights.name == WEIGHTS else None
    if record is not None and record.kind == "train" and weights.exists():
        check_weights(weights, record)


def _evaluate_peer(
    name: str,
    weights: Path | None,
    overrides: dict[str, Any],
    predictions: Path | None,
    evaluator: Literal["hotcoco", "pycocotools"],
    device: str | None,
    keep: tuple[str, Path] | None,
) -> Any:
    from sparseinst.ablation.peers import keep_peer
    from sparseinst.ablation.store import Store
    from sparseinst.data.coco import val_split
    from sparseinst.device import pick_device
    from sparseinst.files import file_digest
    from sparseinst.integrations.peers import build_peer, default_sides
    from sparseinst.integrations.peers.evaluate import evaluate_peer
    from sparseinst.machine import device_name
    from sparseinst.overrides import load_config

    short, long = default_sides(name)
    config = load_config(overrides={"inference.short_side": short, "inference.long_side": long, **overrides})
    split = val_split(config.data)
    chosen = pick_device(device)
    model = build_peer(name, device=chosen, sides=config.inference.sides(), weights=weights)
    found = evaluate_peer(model, split, predictions=predictions, evaluator=evaluator)
    if keep is not None:
        profile, results = keep
        result = {"figures": found.figures, "images": found.images}
        keep_peer(
            Store(results), name, config.inference.sides()[0], result, profile=profile,
            device=device_name(str(chosen)), seconds=found.seconds, data=file_digest(split.file),
        )  # fmt: skip
    return found


def _print_categories(by_category: dict[str, float | None], console: Any) -> None:
    """Print the AP of each category, several in a line, in the order of the annotations."""
    from rich.columns import Columns
    from rich.text import Text

    print("AP of each category:")
    console.print(
        Columns([Text(f"{name} {'-' if ap is None else f'{ap:.1f}'}") for name, ap in by_category.items()], padding=(0, 3))
    )


def _print_limits(result: Any, console: Any) -> None:
    """Print AP at several numbers of predictions, and why they differ."""
    from rich.table import Table

    most = max(int(name.partition("@")[2]) for name in result.by_limit)
    table = Table(*result.by_limit, title="AP@N counts the N best of an image and category", min_width=60)
    table.add_row(*("-" if value is None else f"{value:.1f}" for value in result.by_limit.values()))
    console.print(table)
    print(f"An image holds up to {most} objects of one category, but COCO's metrics count only 100 predictions: AP means AP@100.")
    if result.maps is not None and result.maps < most:
        print(
            f"The model has {result.maps} maps (model.decoder.iam.num_maps), so it finds at most {result.maps} objects an image."
        )


def _print_metrics(result: Any, as_json: bool = False) -> None:
    import json

    if as_json:
        print(json.dumps(result.as_json()))
        return
    from rich.console import Console
    from rich.table import Table

    from sparseinst.ablation.gate import untrained_ap

    table = Table(*result.figures, title=f"COCO mask metrics over {counted(result.images, 'image')}, in percent", min_width=60)
    table.add_row(*("-" if value is None else f"{value:.1f}" for value in result.figures.values()))
    console = Console(width=max(Console().width, 100))  # on a narrow terminal, lines wrap but no value is cut
    console.print(table)
    if untrained_ap(result.figures.get("AP")):
        print("AP is near zero, so the model has not learned the task: train for more steps, or see docs/data.md")
    elif len(result.by_category) > 1:
        _print_categories(result.by_category, console)
    if result.by_limit:
        _print_limits(result, console)
    if result.mechanism:
        print_mechanism(result.mechanism)
    if result.skipped:
        print(f"{counted(len(result.skipped), 'image', 'was', 'were')} left out; see the warnings")
