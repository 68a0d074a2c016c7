"""Commands for data sets."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from sparseinst.cli.options import Json, Overrides, finite
from sparseinst.errors import UserError
from sparseinst.words import counted

if TYPE_CHECKING:
    from sparseinst.config import Config

app = typer.Typer(no_args_is_help=True)


def _settings(folder: Path, config: Path | None, override: list[str]) -> Config:
    """Return the settings for a COCO-format folder that exists. Nothing is written into it."""
    from sparseinst.overrides import load_config, parse_override

    return load_config(config, overrides={"data.source": "coco", **dict(map(parse_override, override)), "data.root": str(folder)})


@app.command()
def shapes(
    output: Annotated[Path, typer.Option(help="A new folder.")],
    train_images: Annotated[int, typer.Option("--train", min=1, max=10_000_000)] = 16_000,
    val_images: Annotated[int, typer.Option("--val", min=1, max=10_000_000)] = 2000,
    side: Annotated[int, typer.Option(min=32, max=4096, help="Side of the square images in pixels.")] = 256,
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
    train_images: Annotated[int, typer.Option("--train", min=1, max=10_000_000)] = 2000,
    val_images: Annotated[int, typer.Option("--val", min=1, max=10_000_000)] = 300,
    side: Annotated[int, typer.Option(min=64, max=4096, help="Side of the square images in pixels.")] = 256,
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    """Compose scenes from cut-outs on backgrounds.

    The result is in COCO format. The two splits share no cut-out and no background.
    """
    from sparseinst.data.collage import write_collage

    found = write_collage(output, cutouts, backgrounds, train=train_images, val=val_images, side=side, seed=seed)
    source = f"{counted(sum(found.values()), 'cut-out')} in {counted(len(found), 'class')}"
    print(f"{train_images} + {val_images} images in {output}, from {source}")


_KINDS = """

    masks: a folder for each image, with images/ and masks/ (one file for each instance) in it.

    labelme: JSON files of LabelMe.

    voc: Pascal VOC's JPEGImages/, SegmentationClass/ and SegmentationObject/.

    cityscapes: *_instanceIds.png with Cityscapes' label ids.

    label_maps: images/ and label_maps/ (or masks/, labels/); each positive pixel value is an instance.

    yolo: data.yaml or classes.txt, images/ and labels/ with polygons in text files.
    """


@app.command(
    help="Convert annotations in another format to COCO's.\n\nThe command prints what was left out. KIND is detected if it is "
    "not given." + _KINDS
)
def convert(
    arguments: Annotated[list[str], typer.Argument(metavar="[KIND] DIR", help="The format, and the folder of the annotations.")],
    output: Annotated[Path, typer.Option(help="A new folder.")],
    category: Annotated[
        str, typer.Option(help="The name of the only category, for formats that name none (masks, label_maps).")
    ] = "object",
    val: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            max=1.0,
            callback=finite,
            help="Share of the images for the validation split.  [default: the source's own splits, or else 0.2]",
        ),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed that chooses the validation images.")] = 0,
) -> None:
    from typing import cast

    from sparseinst.data.convert import KINDS, Kind, detect
    from sparseinst.data.convert import convert as run
    from sparseinst.nested import nearest

    if len(arguments) > 2:
        raise UserError(f"convert takes a kind and one folder, not {len(arguments)} arguments")
    source = Path(arguments[-1])
    if len(arguments) == 2 and arguments[0] not in KINDS:
        raise UserError(f"unknown kind {arguments[0]!r}{nearest(arguments[0], KINDS)}")
    kind = cast(Kind, arguments[0]) if len(arguments) == 2 else detect(source)
    if len(arguments) == 1:
        print(f"{source}: read as {kind}")
    report = run(source, output, kind=kind, category=category, val=val, seed=seed)
    for split, images in report.images.items():
        print(f"{split}: {counted(images, 'image')} with {counted(report.instances[split], 'instance')}")
    for reason, count in report.left_out.most_common():
        print(f"left out ({reason}): {count}; the first is {report.examples[reason]}")


@app.command()
def split(
    folder: Annotated[Path, typer.Argument(metavar="DIR")],
    by: Annotated[
        str,
        typer.Option(
            help="image; field:KEY, a field of the image entries, such as field:video_id; or name:REGEX, a regular expression "
            "that finds the group in the file name, such as 'name:^(.+)_[0-9]+'."
        ),
    ] = "image",
    name: Annotated[str, typer.Option(help="The name of the new files.")] = "split",
    val: Annotated[
        float, typer.Option(min=0.0, max=1.0, callback=finite, help="Approximate share of the images for the validation split.")
    ] = 0.2,
    seed: Annotated[int, typer.Option(min=0, help="Seed that chooses the validation images or groups.")] = 0,
    config: Annotated[Path | None, typer.Option(help="A YAML or JSON file with any of the settings.")] = None,
    override: Overrides = [],  # noqa: B006
) -> None:
    """Split the images of a COCO-format folder anew.

    All images of a group go to the same split. No image is copied.

    Writes DIR/annotations/NAME_train.json, NAME_val.json and DIR/NAME.yaml, a config that selects them.
    """
    from sparseinst.data.split import split_folder

    settings = _settings(folder, config, override)
    report = split_folder(settings.data, by=by, name=name, val=val, seed=seed)
    for part, images in report.images.items():
        groups = "" if by == "image" else f" in {counted(report.groups[part], 'group')}"
        print(f"{part}: {counted(images, 'image')}{groups} with {counted(report.instances[part], 'instance')}")
        missing = report.missing[part]
        if missing:
            more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
            print(f"{part}: no instance of {', '.join(missing[:5])}{more}; another --seed may help")
    print(f"to use it: sparseinst init --data {folder} --config {report.config} --output own.yaml")


@app.command()
def look(
    folder: Annotated[Path, typer.Argument(metavar="DIR")],
    output: Annotated[Path, typer.Option(help="The sheet: a .png or .jpg file.")],
    config: Annotated[Path | None, typer.Option(help="A YAML or JSON file with any of the settings.")] = None,
    override: Overrides = [],  # noqa: B006
    pictures: Annotated[int, typer.Option(min=1, help="The number of images in the sheet.")] = 12,
    sample: Annotated[int, typer.Option(min=1, help="The number of images for the printed numbers.")] = 100,
    as_json: Json = False,
) -> None:
    """Draw the images as a training sees them.

    The command also prints the sizes of the instances.

    The images are the first ones that the training uses, resized and augmented, with the masks at the size that the model learns.
    A red ring marks an instance that vanishes at this size.
    """
    import json

    from sparseinst.data.coco import train_split

    settings = _settings(folder, config, override)
    train = train_split(settings.data)

    from sparseinst.models.network import mask_stride
    from sparseinst.visualize.training_images import draw_training_images, lines, summary

    stride = mask_stride(settings.model.decoder.mask_scale)
    numbers = draw_training_images(settings, train, output, mask_stride=stride, pictures=pictures, sample=sample)
    found = summary(numbers)
    print(json.dumps(found, indent=1) if as_json else "\n".join([*lines(found), f"{output}"]))


@app.command()
def check(
    folder: Annotated[Path, typer.Argument(metavar="DIR")],
    config: Annotated[Path | None, typer.Option(help="A YAML or JSON file with any of the settings.")] = None,
    override: Overrides = [],  # noqa: B006
    read: Annotated[bool, typer.Option(help="Decode every image; --no-read only checks that it exists.")] = True,
    as_json: Json = False,
) -> None:
    """Check a COCO-format folder and print what it holds. The exit code is 2 if there is a problem."""
    from sparseinst.data.check import check_folder, show

    settings = _settings(folder, config, override)
    reports = check_folder(settings.data, read_images=read)
    show(reports, as_json=as_json)
    problems = sum(len(report.problems) for report in reports.values())
    if problems:
        raise UserError(f"{folder}: {counted(problems, 'problem')} found")


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
    """Measure how fast training images are loaded.

    The command prints how many images per second are decoded, augmented and rasterised, for each number of workers.

    A training that needs more images per second waits for its data; `data_seconds` in its metrics.jsonl shows how long.
    """
    import json

    from sparseinst.data.coco import train_split
    from sparseinst.data.speed import doubled, loading_speed
    from sparseinst.machine import usable_cores

    settings = _settings(folder, None, override)
    split = train_split(settings.data)
    found = {}
    for count in workers or doubled(usable_cores()):
        found[count] = round(loading_speed(split, settings, workers=count, images=images), 1)
        if not as_json:
            print(f"{counted(count, 'worker')}: {found[count]:.1f} images/s", flush=True)
    if as_json:
        print(json.dumps({"rows": [{"workers": k, "images_per_second": v} for k, v in found.items()]}))
