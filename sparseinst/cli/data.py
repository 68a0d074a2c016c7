"""Commands for data sets."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from sparseinst.cli.options import Json, Overrides
from sparseinst.errors import UserError

app = typer.Typer(no_args_is_help=True)


@app.command()
def shapes(
    output: Annotated[Path, typer.Option(help="A new folder.")],
    train_images: Annotated[int, typer.Option("--train", min=1)] = 16_000,
    val_images: Annotated[int, typer.Option("--val", min=1)] = 2000,
    side: Annotated[int, typer.Option(min=32, help="Side of the square images in pixels.")] = 256,
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    """Write the embedded data set in COCO format."""
    from sparseinst.data.shapes import write_shapes

    write_shapes(output, train=train_images, val=val_images, side=side, seed=seed)
    print(f"{train_images} + {val_images} images in {output}")


@app.command()
def collage(
    cutouts: Annotated[Path, typer.Option(help="A folder that holds one folder of transparent images for each class.")],
    backgrounds: Annotated[Path, typer.Option(help="A folder of background images.")],
    output: Annotated[Path, typer.Option(help="A new folder.")],
    train_images: Annotated[int, typer.Option("--train", min=1)] = 2000,
    val_images: Annotated[int, typer.Option("--val", min=1)] = 300,
    side: Annotated[int, typer.Option(min=64, help="Side of the square images in pixels.")] = 256,
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    """Compose scenes from cut-outs on backgrounds, in COCO format. The two splits share no cut-out and no background."""
    from sparseinst.data.collage import write_collage

    found = write_collage(output, cutouts, backgrounds, train=train_images, val=val_images, side=side, seed=seed)
    print(f"{train_images} + {val_images} images in {output}, from {sum(found.values())} cut-outs in {len(found)} classes")


@app.command()
def convert(
    kind: Annotated[
        Literal["masks"], typer.Argument(help="masks: one folder for each image, with one mask file for each instance.")
    ],
    source: Annotated[Path, typer.Argument(metavar="DIR")],
    output: Annotated[Path, typer.Option(help="A new folder.")],
    category: Annotated[str, typer.Option(help="The name of the only category.")] = "object",
    val: Annotated[float, typer.Option(min=0.0, max=1.0, help="Share of the images for the validation split.")] = 0.2,
    seed: Annotated[int, typer.Option(min=0, help="Seed that chooses the validation images.")] = 0,
) -> None:
    """Convert annotations in another format to a COCO-format folder, and print what was left out."""
    from sparseinst.data.convert import convert_masks

    assert kind == "masks"
    report = convert_masks(source, output, category=category, val=val, seed=seed)
    for split, images in report.images.items():
        print(f"{split}: {images} images with {report.instances[split]} instances")
    for reason, count in report.left_out.most_common():
        print(f"left out ({reason}): {count}; the first is {report.examples[reason]}")


@app.command()
def check(
    folder: Annotated[Path, typer.Argument(metavar="DIR")],
    override: Overrides = [],  # noqa: B006
    read: Annotated[bool, typer.Option(help="Decode every image, or only check that it exists.")] = True,
    as_json: Json = False,
) -> None:
    """Check a COCO-format folder and print what it holds. The exit code is 2 if there is a problem."""
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
        typer.Option(
            min=0, help="Number of worker processes; repeat the option for more.  [default: 0, 1, 2, 4, ... number of cores]"
        ),
    ] = None,
    images: Annotated[int, typer.Option(min=8, help="Smallest number of images to time for each number of workers.")] = 400,
    override: Overrides = [],  # noqa: B006
    as_json: Json = False,
) -> None:
    """Print how many training images per second the loader decodes, augments and rasterises, for each number of workers.

    A training that needs more images per second waits for its data; `data_seconds` in its metrics.jsonl shows how long.
    """
    import json

    from sparseinst.data.coco import train_split
    from sparseinst.data.speed import doubled, loading_speed
    from sparseinst.machine import usable_cores
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
