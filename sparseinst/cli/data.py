"""Commands for data sets."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sparseinst.cli.options import Json, Overrides
from sparseinst.errors import UserError

app = typer.Typer(no_args_is_help=True)


@app.command()
def shapes(
    output: Annotated[Path, typer.Option(help="A new folder.")],
    train_images: Annotated[int, typer.Option("--train", min=1)] = 800,
    val_images: Annotated[int, typer.Option("--val", min=1)] = 200,
    side: Annotated[int, typer.Option(min=32, help="Side of the square images in pixels.")] = 128,
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    """Write the embedded data set, in COCO format."""
    from sparseinst.data.shapes import write_shapes

    write_shapes(output, train=train_images, val=val_images, side=side, seed=seed)
    print(f"{train_images} + {val_images} images in {output}")


@app.command()
def collage(
    cutouts: Annotated[Path, typer.Option(help="One folder a class, with transparent images in it.")],
    backgrounds: Annotated[Path, typer.Option(help="Images to lay them on.")],
    output: Annotated[Path, typer.Option(help="A new folder.")],
    train_images: Annotated[int, typer.Option("--train", min=1)] = 2000,
    val_images: Annotated[int, typer.Option("--val", min=1)] = 300,
    side: Annotated[int, typer.Option(min=64, help="Side of the square images in pixels.")] = 256,
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    """Compose scenes from cut-outs on backgrounds, in COCO format; train and val share neither."""
    from sparseinst.data.collage import write_collage

    found = write_collage(output, cutouts, backgrounds, train=train_images, val=val_images, side=side, seed=seed)
    print(f"{train_images} + {val_images} images in {output}, from {sum(found.values())} cut-outs in {len(found)} classes")


@app.command()
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


@app.command()
def speed(
    folder: Annotated[Path, typer.Argument(metavar="DIR")],
    workers: Annotated[
        list[int] | None,
        typer.Option(min=0, help="Processes; repeat for more.  [default: 0, 1, 2, 4, ... its cores]"),
    ] = None,
    images: Annotated[int, typer.Option(min=8, help="How many are timed with each, at least.")] = 400,
    override: Overrides = [],  # noqa: B006
    as_json: Json = False,
) -> None:
    """Training images a second that the loader decodes, augments and draws, by the number of workers.

    A training that takes more images than that waits for its data: `data_seconds` of each step in its metrics.jsonl.
    """
    import json

    from sparseinst.attempts import usable_cores
    from sparseinst.data.coco import train_split
    from sparseinst.data.speed import doubled, loading_speed
    from sparseinst.overrides import load_config, parse_override

    settings = load_config(overrides={**dict(map(parse_override, override)), "data.root": str(folder)})
    split = train_split(settings.data)
    found = {}
    for count in workers or doubled(usable_cores()):
        found[count] = round(loading_speed(split, settings, workers=count, images=images), 1)
        if not as_json:
            print(f"{count or 'no'} worker{'' if count == 1 else 's'}: {found[count]:.1f} images/s", flush=True)
    if as_json:
        print(json.dumps({"rows": [{"workers": k, "images_per_second": v} for k, v in found.items()]}))
