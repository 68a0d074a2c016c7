"""Commands for weights: import those of others, export ours."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

app = typer.Typer()


@app.command("import-weights")
def import_weights(
    released: Annotated[
        Path, typer.Argument(help="A checkpoint of the authors' (.pth), or with --backbone detectron2's (.pkl).")
    ],
    output: Annotated[Path, typer.Option(help="The weights file to write (.safetensors).")],
    backbone: Annotated[
        bool, typer.Option("--backbone", help="ImageNet weights of a ResNet, for model.backbone.weights.")
    ] = False,
) -> None:
    """A released model as a weights file of ours, which carries its config; refuses what does not fit whole."""
    from sparseinst.integrations import released as released_models

    if backbone:
        from safetensors.torch import save_file

        from sparseinst.paths import atomic

        state, dropped = released_models.import_backbone(released)
        with atomic(output) as temporary:
            save_file(state, temporary)
        print(f"{len(state)} tensors of a backbone; left out: {', '.join(dropped) or 'none'}")
        print(f"{output}: use it with -o model.backbone.weights={output}")
        return
    from sparseinst.engine.checkpoint import save_weights

    found = released_models.import_released(released)
    save_weights(output, found.state, found.config, found.categories)
    for part in ("backbone", "encoder", "decoder"):
        pairs = [(theirs, ours) for theirs, ours in found.renamed.items() if ours.startswith(f"{part}.")]
        print(f"{part}: {len(pairs)} tensors, such as {pairs[-1][0]} as {pairs[-1][1]}")
    print(f"left out, without effect: {', '.join(found.dropped) or 'none'}")
    print(f"{output}: {found.name}, {found.config.model.num_classes} classes")


@app.command()
def export(
    weights: Annotated[Path, typer.Option(help="A weights file, or the folder of a finished run.")],
    output: Annotated[Path, typer.Option(help="The file to write: model.onnx, or model.pt2 with --form torch.")],
    form: Annotated[Literal["onnx", "torch"], typer.Option(help="ONNX, or torch.export's archive.")] = "onnx",
    normalised: Annotated[
        bool, typer.Option("--normalised", help="The graph takes normalised images, not pixels of 0-255.")
    ] = False,
    probabilities: Annotated[bool, typer.Option("--probabilities", help="Masks as probabilities, not booleans.")] = False,
    half: Annotated[bool, typer.Option("--half", help="fp16 weights; scores and masks stay in fp32.")] = False,
) -> None:
    """The whole inference as a graph that takes an image of any size and gives scores, labels and masks."""
    from sparseinst.engine.checkpoint import load_weights
    from sparseinst.integrations.export import export_model

    model, config, categories = load_weights(weights)
    export_model(model, config.inference, output, form=form, normalise=not normalised, probabilities=probabilities, half=half)
    size = output.stat().st_size / 1e6
    print(f"{output}: {size:.1f} MB, {len(categories)} classes, {config.model.decoder.iam.num_maps} maps an image")
