"""Commands that draw what a model does: predict, maps, failures, curves."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from sparseinst.cli.mechanism import print_mechanism
from sparseinst.cli.options import (
    Checkpoint,
    Device,
    EngineChoice,
    NetworkPrecisionChoice,
    Optimize,
    Overrides,
    Weights,
    check_paths,
    engine_overrides,
    finite,
)
from sparseinst.errors import RunFailed, UserError
from sparseinst.paths import SHIPPED_MODELS
from sparseinst.words import counted

if TYPE_CHECKING:
    from sparseinst.visualize.predict_files import Prediction

app = typer.Typer()


@app.command()
def predict(
    inputs: Annotated[list[Path], typer.Argument(metavar="IMAGE|DIR|VIDEO ...")],
    weights: Weights,
    output: Annotated[Path, typer.Option(help="Folder for the overlays and predictions.json.")],
    score: Annotated[
        float, typer.Option(min=0.0, max=1.0, callback=finite, help="Leave out instances with a lower score.")
    ] = 0.4,
    top: Annotated[int | None, typer.Option(min=1, help="Keep only this many instances of an image, the best ones.")] = None,
    maps: Annotated[bool, typer.Option("--maps", help="Also draw each instance's activation map (images only).")] = False,
    sheet: Annotated[bool, typer.Option("--sheet", help="Also draw all inputs on contact sheets, sheet-1.jpg ...")] = False,
    colour: Annotated[
        Literal["class", "instance"] | None,
        typer.Option(
            "--colour",
            help="class: one colour for each class, the same in all images; instance: one colour for each instance of an image.  "
            "[default: instance; in videos, one colour for each activation map]",
        ),
    ] = None,
    tile: Annotated[
        int | None,
        typer.Option(
            min=0,
            metavar="PIXELS",
            help="Segment each image in overlapping tiles of this side, for many small objects; 0: as a whole.  "
            "[default: inference.tile of the weights]",
        ),
    ] = None,
    checkpoint: Checkpoint = None,
    engine: EngineChoice = None,
    precision: NetworkPrecisionChoice = None,
    optimize: Optimize = None,
    device: Device = None,
) -> None:
    """Segment images and videos. Write an overlay for each, and all instances as COCO JSON."""
    from sparseinst.visualize.inputs import find_images

    files = find_images(inputs, videos=True)
    check_paths(weights=weights)

    from sparseinst.inference.checkpoints import find_weights
    from sparseinst.inference.predict import load_model
    from sparseinst.visualize.predict_files import predict_files

    choice: dict[str, Any] = {}
    for setting, value in engine_overrides(engine, precision).items():
        choice[setting.removeprefix("inference.")] = value
    if choice.get("precision") == "int8":
        tiles = {} if tile is None else {"inference.tile": tile or None}
        _make_int8(find_weights(weights, checkpoint), engine_overrides(engine, precision) | tiles)
    model = load_model(weights, device, optimize=optimize, checkpoint=checkpoint, tile=tile, **choice)
    found = predict_files(model, files, output, score=score, top=top, maps=maps, sheet=sheet, colour=colour)
    _print_prediction(found, len(files), output, score, tiled=model.config.inference.tile is not None)
    if str(weights) in SHIPPED_MODELS and not weights.exists():
        names = [category.name for category in model.categories]
        print(
            f"{weights} knows {counted(len(names), 'synthetic shape')} ({', '.join(names)}) and nothing else: "
            "on other images it finds shapes that are not there"
        )
    if found.failed:
        raise RunFailed(f"{found.failed} of {counted(len(files), 'file')} could not be read; the warnings above say why")


def _print_prediction(found: Prediction, files: int, output: Path, score: float, *, tiled: bool) -> None:
    """Print what was found, what was left out, and what to do if that is too little."""
    done = files - found.failed
    print(f"{counted(done, 'file')}: overlays and predictions.json in {output}")
    if found.images:
        highest = f"the highest score is {found.highest:.2f}" if found.highest is not None else "no map has a score at all"
        none = f", none in {found.empty} of them" if 0 < found.empty < found.images else ""
        print(
            f"{counted(found.instances, 'instance')} with a score of {score:g} or more "
            f"in {counted(found.images, 'image')}{none}; {highest}"
        )
    if found.left_out:
        print(f"--top left out {counted(found.left_out, 'more instance')} with such a score")
    full = found.full if score > 0 else 0  # every map has a score of 0 or more
    if full and not tiled:
        print(
            f"in {counted(full, 'image')} all maps of the model have such a score; it cannot find "
            "more objects than it has maps (model.decoder.iam.num_maps), unless --tile cuts the image"
        )
    elif full:
        print(
            f"in {counted(full, 'image')} all maps of the model have such a score in a tile; it cannot find "
            "more objects in a tile than it has maps (model.decoder.iam.num_maps): use a smaller --tile"
        )
    for path in found.sheets:
        print(f"contact sheet: {path}")
    if found.empty == found.images > 0:
        print("Use a lower --score to see weaker instances. If the scores stay near zero, the model has not learned the task.")


def _make_int8(weights: Path, overrides: dict[str, Any]) -> None:
    """Make the int8 network of these weights, with its AP checked, unless it exists."""
    from sparseinst.evaluation.weights import open_for_evaluation, prepare_network
    from sparseinst.inference.engine_network import device_for

    source, config = open_for_evaluation(weights, overrides)
    prepare_network(source, config, device=device_for(config, None))


@app.command()
def maps(
    weights: Weights,
    output: Annotated[Path, typer.Option(help="Folder for the sheets and the metrics.")],
    data: Annotated[
        Path | None, typer.Option(help="A folder in COCO format or a folder of images; default: the validation data of the run.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Use only the first images, up to this number.")] = None,
    sheets: Annotated[int, typer.Option(min=0, help="Draw each object's map for this many images.")] = 8,
    checkpoint: Checkpoint = None,
    device: Device = None,
) -> None:
    """Show where the activation maps respond.

    The pictures show the map of each object, and the mean of each map over a data set (the paper's Figures 4 and 6).

    If the data are annotated, the training's matching assigns a map to each object. The map is drawn on the image with the shares
    of its mass on the object, on other objects and on the border. These metrics are also computed over all images.
    """
    import json

    check_paths(weights=weights)
    if data is not None and not data.exists():
        raise UserError(f"{data}: no such image or folder")

    from sparseinst.data.coco import CocoSplit, check_categories, val_split
    from sparseinst.evaluation.evaluate import evaluate
    from sparseinst.files import atomic
    from sparseinst.inference.predict import load_model
    from sparseinst.visualize.activations import mean_responses, write_mean_maps
    from sparseinst.visualize.inputs import find_images
    from sparseinst.visualize.object_maps import write_object_maps

    model = load_model(weights, device, checkpoint=checkpoint)
    settings = model.config
    split: CocoSplit | None = None
    if data is None or (data / settings.data.val_annotations).exists():
        if data is not None:
            settings = settings.replace({"data.root": str(data), "data.source": "coco"})
        split = val_split(settings.data)
        check_categories(split, model.categories, f"{weights}")
        split = CocoSplit(split.file, split.categories, split.images[:limit])
        files = [image.path for image in split.images]
    else:
        files = find_images([data])[:limit]
    for path in write_mean_maps(mean_responses(model, files), output):
        print(f"{path}: {counted(len(files), 'image')}")
    if split is None:
        print(f"{data} has no annotations, so there are no maps of single objects and no metrics")
        return
    for path in write_object_maps(model, split, output, sheets):
        print(path)
    evaluation = evaluate(model.model, split, settings, device=model.device)
    with atomic(output / "mechanism.json") as temporary:
        temporary.write_text(json.dumps({"images": evaluation.images, **evaluation.mechanism}, indent=1) + "\n", encoding="utf-8")
    print_mechanism(evaluation.mechanism)


@app.command()
def failures(
    weights: Weights,
    output: Annotated[Path, typer.Option(help="Folder for the sheets and failures.json.")],
    data: Annotated[
        Path | None, typer.Option(help="A folder in COCO format; default: the data that the model was trained on.")
    ] = None,
    score: Annotated[float, typer.Option(min=0.0, max=1.0, callback=finite, help="Ignore instances with a lower score.")] = 0.4,
    most: Annotated[int, typer.Option(min=1, help="The largest number of images in a sheet.")] = 12,
    override: Overrides = [],  # noqa: B006 (typer reads the default)
    checkpoint: Checkpoint = None,
    device: Device = None,
) -> None:
    """Show where a model fails.

    The sheets show the images with the lowest AP, the missed objects by size, and the false positives.
    """
    import json

    check_paths(weights=weights, data=data)

    from sparseinst.data.coco import val_split
    from sparseinst.evaluation.weights import evaluate_source, open_for_evaluation
    from sparseinst.files import make_folder
    from sparseinst.inference.checkpoints import find_weights
    from sparseinst.inference.engine_network import device_for
    from sparseinst.overrides import parse_override
    from sparseinst.visualize.failures import find_failures, write_failures

    overrides = {} if data is None else {"data.root": str(data), "data.source": "coco"}
    overrides |= dict(map(parse_override, override))
    source, config = open_for_evaluation(find_weights(weights, checkpoint), overrides)
    split = val_split(config.data)
    predictions = make_folder(output) / "predictions.json"
    evaluation = evaluate_source(source, config, device=device_for(config, device), predictions=predictions)
    results = json.loads(predictions.read_text(encoding="utf-8"))
    images = [image.id for image in split.images if image.id not in evaluation.skipped_images]
    found = find_failures(split.file, results, images, score)
    for path in write_failures(found, split, results, output, score=score, most=most):
        print(path)
    for size, objects in found.objects.items():
        if objects:
            print(f"{size}: {found.found[size]} of {objects} objects found ({found.found[size] / objects:.0%})")
    reasons = {kind: ", ".join(f"{name} {count}" for name, count in counts.items()) for kind, counts in found.reasons().items()}
    if found.missed:
        print(f"{counted(len(found.missed), 'object')} missed: {reasons['missed']}")
    verb = "matches" if len(found.invented) == 1 else "match"
    why = f": {reasons['invented']}" if found.invented else ""
    print(f"{counted(len(found.invented), 'instance')} with a score of {score:g} or more {verb} no annotated object{why}")


@app.command()
def curves(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN ...", help="The folders of finished or running trainings.")],
    output: Annotated[Path, typer.Option(help="The file of the figure, which is written as PNG and as SVG.")] = Path(
        "curves.png"
    ),
) -> None:
    """Plot how trainings went: losses, AP, learning rate.

    The figure also shows the matching stability. It can hold several runs.
    """
    from sparseinst.report.curves import different_losses, draw_curves, read_metrics, run_names
    from sparseinst.report.style import save

    if output.suffix not in ("", ".png", ".svg"):
        raise UserError(f"{output}: curves are written as .png and .svg")
    figure = draw_curves(
        {name: read_metrics(run) for name, run in zip(run_names(runs), runs, strict=True)}, different_losses(runs)
    )
    save(figure, output)
    print(f"{output.with_suffix('.png')} and {output.with_suffix('.svg')}")
