"""The command line: one thin command a verb. Imports no torch before a command needs it."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from sparseinst import __version__
from sparseinst.errors import RunFailed, UserError

app = typer.Typer(
    name="sparseinst",
    help="A reproducible research and ablation workbench for SparseInst.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
data_app = typer.Typer(no_args_is_help=True, help="Write the embedded data set; check a COCO-format folder.")
app.add_typer(data_app, name="data")

Overrides = Annotated[
    list[str], typer.Option("-o", "--override", metavar="KEY=VALUE", help="A setting by its path; repeat for more.")
]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1; default: a GPU where there is one.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")]


@app.callback(invoke_without_command=True)
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    """A reproducible research and ablation workbench for SparseInst."""
    # A terminal has the progress bar; a log file wants the steps.
    quiet = sys.stderr.isatty() and not debug
    console = logging.StreamHandler()
    console.setLevel(logging.WARNING if quiet else logging.INFO)
    logging.basicConfig(format="%(levelname)s: %(message)s", handlers=[console])
    if version:
        print(__version__)
        raise typer.Exit


@app.command()
def train(
    output: Annotated[Path, typer.Option(help="The run's folder; the same command resumes a stopped run.")],
    config: Annotated[Path | None, typer.Option(help="YAML or JSON with any of the settings.")] = None,
    preset: Annotated[str | None, typer.Option(help="paper (default) or release.")] = None,
    model: Annotated[str | None, typer.Option(help="A model by name, such as r50-giam.")] = None,
    data: Annotated[Path | None, typer.Option(help="A COCO-format folder; sets data.root and model.num_classes.")] = None,
    override: Overrides = [],  # noqa: B006 (typer reads the default)
    device: Device = None,
) -> None:
    """Train one model on any COCO-format data, then evaluate it."""
    from sparseinst.overrides import load_config, parse_override

    overrides: dict[str, Any] = dict(map(parse_override, override))
    if data is not None:
        overrides = {"data.root": str(data), **overrides}
    settings = load_config(config, preset=preset, model=model, overrides=overrides)
    if data is not None and "model.num_classes" not in overrides:
        from sparseinst.data.coco import train_split

        classes = len(train_split(settings.data).categories)
        settings = settings.replace({"model.num_classes": classes})
    from sparseinst.engine.device import pick_device
    from sparseinst.engine.evaluate import evaluate_run
    from sparseinst.engine.train import train as run

    chosen = pick_device(device)
    weights = run(settings, output, device=chosen)
    _print_figures(evaluate_run(output, device=chosen))
    print(f"weights: {weights}")


@app.command()
def evaluate(
    weights: Annotated[Path, typer.Option(help="A weights file, or the folder of a finished run.")],
    data: Annotated[Path | None, typer.Option(help="A COCO-format folder; default: the one it was trained on.")] = None,
    predictions: Annotated[Path | None, typer.Option(help="Also write the instances, in COCO's result format.")] = None,
    override: Overrides = [],  # noqa: B006
    engine: Annotated[Literal["hotcoco", "pycocotools"], typer.Option(help="Who computes the figures.")] = "hotcoco",
    device: Device = None,
    as_json: Json = False,
) -> None:
    """The twelve COCO mask figures of a model."""
    from sparseinst.engine.device import pick_device
    from sparseinst.engine.evaluate import evaluate_weights
    from sparseinst.overrides import parse_override

    overrides: dict[str, Any] = {} if data is None else {"data.root": str(data), "data.source": "coco"}
    overrides |= dict(map(parse_override, override))
    result = evaluate_weights(weights, overrides, device=pick_device(device), predictions=predictions, engine=engine)
    _print_figures(result, as_json)


@app.command()
def predict(
    inputs: Annotated[list[Path], typer.Argument(metavar="IMAGE|DIR ...")],
    weights: Annotated[Path, typer.Option(help="A weights file, or the folder of a finished run.")],
    output: Annotated[Path, typer.Option(help="Folder for the overlays and predictions.json.")],
    score: Annotated[float, typer.Option(min=0.0, max=1.0, help="Leave out instances below.")] = 0.4,
    device: Device = None,
) -> None:
    """Segment images: an overlay for each, and all instances as COCO JSON."""
    from sparseinst.engine.predict import load_model
    from sparseinst.engine.predict_files import find_images, predict_files

    files = find_images(inputs)
    failed = predict_files(load_model(weights, device), files, output, score=score)
    print(f"{len(files) - failed} images: overlays and predictions.json in {output}")
    if failed:
        raise RunFailed(f"{failed} of {len(files)} images could not be read; see the warnings above")


@app.command()
def run(
    tables: Annotated[list[str], typer.Argument(metavar="TABLE ...", help="table5, or a path to a spec.")],
    profile: Annotated[str, typer.Option(help="The scale: a file in experiments/profiles, by name or path.")] = "coco",
    row: Annotated[str | None, typer.Option(help="Only the rows whose name holds this text.")] = None,
    pictures: Annotated[Path | None, typer.Option(help="Draw predictions of each row below this folder.")] = None,
    device: Device = None,
) -> None:
    """Train and evaluate the rows of a table, here and now; what is done is not done again."""
    from sparseinst.ablation.run import run_rows, show
    from sparseinst.ablation.study import read_profile, read_spec, select_rows

    specs = [read_spec(table) for table in tables]
    settings = read_profile(profile)
    for spec in specs:
        rows = select_rows(spec, row)
        results = run_rows(spec, rows, settings, device=device, pictures=pictures)
        show(spec, rows, results, profile)


@data_app.command()
def shapes(
    output: Annotated[Path, typer.Option(help="A new folder.")],
    train_images: Annotated[int, typer.Option("--train", min=1)] = 800,
    val_images: Annotated[int, typer.Option("--val", min=1)] = 200,
    side: Annotated[int, typer.Option(min=32, help="Shorter side in pixels.")] = 128,
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    """Write the embedded data set, in COCO format."""
    from sparseinst.data.shapes import write_shapes

    write_shapes(output, train=train_images, val=val_images, side=side, seed=seed)
    print(f"{train_images} + {val_images} images in {output}")


@data_app.command()
def check(
    folder: Annotated[Path, typer.Argument(metavar="DIR")],
    override: Overrides = [],  # noqa: B006
    read: Annotated[bool, typer.Option(help="Decode every image, not only look whether it is there.")] = True,
    as_json: Json = False,
) -> None:
    """Validate a COCO-format folder and say what is in it; exit code 2 where something is wrong."""
    from sparseinst.data.check import check_folder, show
    from sparseinst.overrides import load_config, parse_override

    settings = load_config(overrides={**dict(map(parse_override, override)), "data.root": str(folder)})
    reports = check_folder(settings.data, read_images=read)
    show(reports, as_json=as_json)
    problems = sum(len(report.problems) for report in reports.values())
    if problems:
        raise UserError(f"{folder}: {problems} problem{'s' if problems > 1 else ''} found")


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
    Console().print(table)
    if result.skipped:
        print(f"{len(result.skipped)} images were left out; see the warnings")


def main() -> None:
    """Entry point. Exit codes: 0 done, 1 a run failed or was interrupted, 2 bad input."""
    sys.exit(run_cli(sys.argv[1:]))


def run_cli(arguments: list[str]) -> int:
    """Run one command line; returns the exit code."""
    command = typer.main.get_command(app)
    try:
        command.main(arguments, prog_name="sparseinst")
    except (UserError, RunFailed) as error:
        if "--debug" in arguments:
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    except SystemExit as ended:  # how typer ends, well or with its own one-line errors
        return ended.code if isinstance(ended.code, int) else 1
    return 0


if __name__ == "__main__":
    main()
