"""Commands to look at a model: predict, maps, failures, curves."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sparseinst.cli.options import Device, Optimize, Overrides
from sparseinst.errors import RunFailed, UserError

app = typer.Typer()


@app.command()
def predict(
    inputs: Annotated[list[Path], typer.Argument(metavar="IMAGE|DIR|VIDEO ...")],
    weights: Annotated[Path, typer.Option(help="A weights file, or the folder of a finished run.")],
    output: Annotated[Path, typer.Option(help="Folder for the overlays and predictions.json.")],
    score: Annotated[float, typer.Option(min=0.0, max=1.0, help="Leave out instances below.")] = 0.4,
    maps: Annotated[bool, typer.Option("--maps", help="Also draw each instance's activation map.")] = False,
    optimize: Optimize = None,
    device: Device = None,
) -> None:
    """Segment images and videos: an overlay for each, and all instances as COCO JSON."""
    from sparseinst.engine.predict import load_model
    from sparseinst.engine.predict_files import find_images, predict_files

    files = find_images(inputs, videos=True)
    failed = predict_files(load_model(weights, device, optimize=optimize), files, output, score=score, maps=maps)
    done = len(files) - failed
    print(f"{done} file{'s' if done != 1 else ''}: overlays and predictions.json in {output}")
    if failed:
        raise RunFailed(f"{failed} of {len(files)} files could not be read; see the warnings above")


@app.command()
def maps(
    weights: Annotated[Path, typer.Option(help="A weights file, or the folder of a finished run.")],
    output: Annotated[Path, typer.Option(help="Folder for the sheets and the numbers.")],
    data: Annotated[Path | None, typer.Option(help="A folder of images; default: the validation images of the run.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Take the first images only.")] = None,
    device: Device = None,
) -> None:
    """Where each instance activation map responds, as the mean over a data set: 12 that differ most, and all (Figure 6)."""
    from sparseinst.data.coco import val_split
    from sparseinst.engine.activations import mean_responses, write_mean_maps
    from sparseinst.engine.predict import load_model
    from sparseinst.engine.predict_files import find_images

    model = load_model(weights, device)
    files = find_images([data]) if data is not None else [image.path for image in val_split(model.config.data).images]
    files = files[:limit]
    for path in write_mean_maps(mean_responses(model, files), output):
        print(f"{path}: {len(files)} images")


@app.command()
def failures(
    weights: Annotated[Path, typer.Option(help="A weights file, or the folder of a finished run.")],
    output: Annotated[Path, typer.Option(help="Folder for the sheets and failures.json.")],
    data: Annotated[Path | None, typer.Option(help="A COCO-format folder; default: the one it was trained on.")] = None,
    score: Annotated[float, typer.Option(min=0.0, max=1.0, help="Instances below are not looked at.")] = 0.4,
    most: Annotated[int, typer.Option(min=1, help="Pictures a sheet.")] = 12,
    override: Overrides = [],  # noqa: B006 (typer reads the default)
    device: Device = None,
) -> None:
    """Where a model fails: the images of lowest AP, the objects it missed, by size, and those it invented."""
    import json

    from sparseinst.data.coco import val_split
    from sparseinst.engine.checkpoint import load_weights
    from sparseinst.engine.device import pick_device
    from sparseinst.engine.evaluate import evaluate_weights
    from sparseinst.engine.failures import find_failures, write_failures
    from sparseinst.engine.files import make_folder
    from sparseinst.overrides import parse_override

    overrides = {} if data is None else {"data.root": str(data), "data.source": "coco"}
    overrides |= dict(map(parse_override, override))
    predictions = make_folder(output) / "predictions.json"
    evaluation = evaluate_weights(weights, overrides, device=pick_device(device), predictions=predictions)
    split = val_split(load_weights(weights)[1].replace(overrides).data)
    results = json.loads(predictions.read_text(encoding="utf-8"))
    images = [image.id for image in split.images if image.id not in evaluation.skipped_images]
    found = find_failures(split.file, results, images, score)
    for path in write_failures(found, split, results, output, score=score, most=most):
        print(path)
    for size, objects in found.objects.items():
        if objects:
            print(f"{size}: {found.found[size]} of {objects} objects found ({found.found[size] / objects:.0%})")
    print(f"{len(found.invented)} instances of score {score:g} and above are none of the annotated objects")


@app.command()
def curves(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN ...", help="The folders of runs, finished or under way.")],
    output: Annotated[Path, typer.Option(help="The figure; written as PNG and SVG.")] = Path("curves.png"),
) -> None:
    """Losses, learning rate, AP and the stability of matching over the course of trainings, one beside the other."""
    from sparseinst.report.curves import draw_curves, read_metrics
    from sparseinst.report.style import save

    if output.suffix not in ("", ".png", ".svg"):
        raise UserError(f"{output}: curves are written as .png and .svg")
    figure = draw_curves({str(run): read_metrics(run) for run in runs})
    save(figure, output)
    print(f"{output.with_suffix('.png')} and {output.with_suffix('.svg')}")
