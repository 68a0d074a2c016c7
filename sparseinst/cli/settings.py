"""Commands about settings: the settings for own data, and all settings with their explanations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from sparseinst.cli.options import Json, Overrides, check_paths

if TYPE_CHECKING:
    from sparseinst.data.facts import DataFacts
    from sparseinst.data.recipe import Recipe

app = typer.Typer()


@app.command()
def init(
    data: Annotated[Path, typer.Option(help="A COCO-format folder.")],
    output: Annotated[Path, typer.Option(help="The config file to write.")] = Path("config.yaml"),
    size: Annotated[
        Literal["auto", "small", "full"],
        typer.Option(
            help="small trains on a CPU in one to three hours; full is the paper's model; auto: full if there is a GPU."
        ),
    ] = "auto",
    weights: Annotated[
        Path | None, typer.Option(help="Trained weights to start from: imported ones, a run, or demo (the package's own).")
    ] = None,
    config: Annotated[
        Path | None, typer.Option(help="A file with settings to keep, such as the split that `data split` wrote.")
    ] = None,
    override: Overrides = [],  # noqa: B006 (typer reads the default)
) -> None:
    """Choose settings for your own data, each with a reason.

    The command looks at the data, writes a config file for `train`, and warns about problems that would spoil the training.
    """
    from sparseinst.data.recipe import write_recipe
    from sparseinst.nested import flatten
    from sparseinst.overrides import parse_override, read_layer

    check_paths(weights=weights, data=data)
    given = {**(flatten(read_layer(config)) if config is not None else {}), **dict(map(parse_override, override))}
    start: dict[str, Any] | None = None
    if weights is not None:
        from sparseinst.cli.models import model_overrides

        start = {**model_overrides(weights), "train.start": str(weights)}
        size = "small" if start["model.width_factor"] < 1 else "full"
    if size == "auto":
        from sparseinst.device import pick_device

        size = "full" if pick_device(None).type == "cuda" else "small"
    facts, chosen = write_recipe(data, output, size, start, given)
    _print_choice(facts, chosen)
    if size == "full" and start is None:
        from sparseinst.models.backbone import pretrained_problem

        if problem := pretrained_problem(chosen.settings["model.backbone.name"]):
            print(
                f"warning: {problem}: the training would stop. Go online once, or set model.backbone.weights=FILE, or start from "
                "--weights, or use --size small, which needs none."
            )
    print(
        f"{output} holds all settings and their reasons. Next come a check of 500 steps on 8 images, which also says how long the"
    )
    print("training may take, and the training:")
    print(f"  sparseinst train --config {output} --output runs/preflight --preflight")
    print(f"  sparseinst train --config {output} --output runs/mine")


def _print_choice(facts: DataFacts, chosen: Recipe) -> None:
    """Print what the data hold, the most important settings, and the warnings."""
    categories = "category" if facts.classes == 1 else "categories"
    print(
        f"{facts.train_images} training and {facts.val_images} validation images, {facts.classes} {categories}, "
        f"{facts.instances:.1f} instances an image (at most {facts.most_instances}), "
        f"a median object of {facts.median_object:.0f} pixels"
    )
    for path in (
        "data.tile",
        "inference.short_side",
        "model.decoder.iam.num_maps",
        "train.iterations",
        "train.batch_size",
        "train.learning_rate",
        "data.flip",
    ):
        if path in chosen.settings:
            print(f"  {path} = {chosen.settings[path]}")
    for warning in chosen.warnings:
        print(f"warning: {warning}")


@app.command("config")
def show_config(
    config: Annotated[Path | None, typer.Option(help="A YAML or JSON file with any of the settings.")] = None,
    preset: Annotated[str | None, typer.Option(help="The set of defaults: paper (default) or release.")] = None,
    model: Annotated[str | None, typer.Option(help="A model by name, such as r50-giam.")] = None,
    override: Overrides = [],  # noqa: B006
    as_json: Json = False,
) -> None:
    """Print all settings with their explanations.

    The values come from the defaults, a config file, a model and overrides.
    """
    from sparseinst.config import Config
    from sparseinst.nested import commented_yaml, explanations
    from sparseinst.overrides import load_config, parse_override

    data = load_config(config, preset=preset, model=model, overrides=dict(map(parse_override, override))).model_dump(mode="json")
    print(json.dumps(data, indent=1) if as_json else commented_yaml(data, explanations(Config)), end="\n" if as_json else "")
