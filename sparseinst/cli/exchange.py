"""Commands that exchange models with others: import-weights, export, publish."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from sparseinst.ablation.store import RESULTS, Store
from sparseinst.cli.options import (
    Checkpoint,
    Device,
    EngineChoice,
    NetworkPrecisionChoice,
    Results,
    Weights,
    check_paths,
    engine_overrides,
    finite,
)
from sparseinst.errors import UserError
from sparseinst.files import check_is_file
from sparseinst.words import counted

app = typer.Typer()


@app.command("import-weights")
def import_weights(
    released: Annotated[
        Path, typer.Argument(help="A checkpoint of the authors (.pth); with --backbone, one of detectron2 (.pkl).")
    ],
    output: Annotated[Path, typer.Option(help="The weights file to write (.safetensors).")],
    backbone: Annotated[
        bool, typer.Option("--backbone", help="Import ImageNet weights of a ResNet for model.backbone.weights.")
    ] = False,
) -> None:
    """Convert a released model to a weights file.

    The file also holds the model's config. Every tensor must fit.
    """
    check_is_file(released)  # before torch is imported

    from sparseinst.integrations import released as released_models

    if backbone:
        from safetensors.torch import save_file

        from sparseinst.files import atomic

        state, dropped = released_models.import_backbone(released)
        with atomic(output) as temporary:
            save_file(state, temporary)
        print(f"{len(state)} tensors of a backbone; left out: {', '.join(dropped) or 'none'}")
        print(f"{output}: use it with -o model.backbone.weights={output}")
        return
    from sparseinst.inference.weights import save_weights

    found = released_models.import_released(released)
    save_weights(output, found.state, found.config, found.categories)
    for part in ("backbone", "encoder", "decoder"):
        pairs = [(theirs, ours) for theirs, ours in found.renamed.items() if ours.startswith(f"{part}.")]
        print(f"{part}: {len(pairs)} tensors; for example, {pairs[-1][0]} is now {pairs[-1][1]}")
    print(f"left out, because they have no effect: {', '.join(found.dropped) or 'none'}")
    print(f"{output}: {found.name}, {found.config.model.num_classes} classes")


@app.command()
def export(
    weights: Weights,
    output: Annotated[Path, typer.Option(help="The file to write: model.onnx, or model.pt2 with --form torch.")],
    form: Annotated[Literal["onnx", "torch"], typer.Option(help="onnx, or torch for an archive of torch.export.")] = "onnx",
    normalised: Annotated[
        bool, typer.Option("--normalised", help="Let the graph take normalised images instead of pixels of 0-255.")
    ] = False,
    probabilities: Annotated[
        bool, typer.Option("--probabilities", help="Return masks as probabilities instead of booleans.")
    ] = False,
    half: Annotated[bool, typer.Option("--half", help="Use fp16 weights; scores and masks stay fp32.")] = False,
    engine: EngineChoice = None,
    precision: NetworkPrecisionChoice = None,
    max_drop: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            max=100.0,
            callback=finite,
            help="With int8: the largest allowed loss of AP on the validation data.  [default: 0.5]",
        ),
    ] = None,
    calibration_images: Annotated[
        int | None, typer.Option(min=1, help="With int8: the number of training images for calibration.  [default: 300]")
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="With int8: a COCO-format folder; default: the data that the model was trained on.")
    ] = None,
    checkpoint: Checkpoint = None,
) -> None:
    """Export a model to ONNX or torch.export.

    The graph contains the pre- and post-processing: it takes one image of any size and returns scores, labels and masks.

    With --engine, the command exports only the network that this engine runs, from normalised images to raw predictions. It
    writes model.onnx for onnxruntime, or model.xml and model.bin for openvino. `predict`, `evaluate` and `load_model` accept such
    a file in place of weights.
    """
    if engine is not None:
        given = {"max_drop": max_drop, "calibration_images": calibration_images}
        overrides: dict[str, Any] = {f"inference.{name}": value for name, value in given.items() if value is not None}
        if data is not None:
            overrides |= {"data.root": str(data), "data.source": "coco"}
        check_paths(weights=weights, data=data)
        _export_network(weights, output, {**engine_overrides(engine, precision), **overrides}, checkpoint)
        return
    if precision is not None or max_drop is not None or calibration_images is not None or data is not None:
        raise UserError("export: --precision, --max-drop, --calibration-images and --data need --engine")
    check_paths(weights=weights)
    from sparseinst.inference.artifacts import describe
    from sparseinst.inference.checkpoints import find_weights
    from sparseinst.inference.export import export_model
    from sparseinst.inference.weights import load_weights

    model, config, categories = load_weights(find_weights(weights, checkpoint))
    about = describe(model, config, categories).to_json()
    export_model(
        model, config.inference, output, form=form, normalise=not normalised, probabilities=probabilities, half=half, about=about
    )
    size = output.stat().st_size / 1e6
    print(f"{output}: {size:.1f} MB, {counted(len(categories), 'class')}, {config.model.decoder.iam.num_maps} maps an image")


def _export_network(weights: Path, output: Path, overrides: dict[str, Any], checkpoint: str | None) -> None:
    from sparseinst.evaluation.weights import open_for_evaluation, prepare_network
    from sparseinst.files import check_writable
    from sparseinst.inference.artifacts import ARTIFACT_SUFFIXES, copy_artifact
    from sparseinst.inference.checkpoints import find_weights
    from sparseinst.inference.engine_network import device_for

    source, config = open_for_evaluation(find_weights(weights, checkpoint), overrides)
    inference = config.inference
    if inference.engine == "torch":
        raise UserError(
            "export: torch needs no exported network, it runs the weights; use --engine onnxruntime or openvino, or --form torch"
        )
    if output.suffix != (suffix := ARTIFACT_SUFFIXES[inference.engine]):
        raise UserError(f"export: {output}: a network for {inference.engine} is a file {suffix}: name it {output.stem}{suffix}")
    check_writable(output)
    prepared = prepare_network(source, config, device=device_for(config, None))
    assert prepared.artifact is not None
    assert prepared.about is not None
    copy_artifact(prepared.artifact, output, prepared.about)
    facts, recipe = prepared.facts, prepared.recipe
    print(f"{output}: {facts.bytes / 1e6:.1f} MB, {facts.engine} {facts.version}, {facts.precision}, digest {facts.artifact}")
    if recipe is not None:
        kept, before, after = ", ".join(recipe["float"]) or "nothing", recipe["AP_float"], recipe["AP"]
        scored = f"AP {after:.2f}, in float {before:.2f}" if before is not None and after is not None else "AP is unknown"
        print(f"int8: {kept} stayed in float; {scored}; calibrated on {recipe['calibration_images']} {recipe['calibrated_on']}")


@app.command()
def publish(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run, which may be unfinished, or a weights file.")],
    output: Annotated[Path, typer.Option(help="The folder to write: a model repository in the layout of Hugging Face.")],
    name: Annotated[str | None, typer.Option(help="The model's name; default: the name of the output folder.")] = None,
    dataset: Annotated[
        str | None, typer.Option(help="The data set's name or its id at Hugging Face; default: the name of its folder.")
    ] = None,
    data_license: Annotated[
        str, typer.Option(help="The licence of the training data, in your words. The card says it as you give it.")
    ] = "not stated",
    license_: Annotated[
        str, typer.Option("--license", help="The licence of the weights, as Hugging Face calls it: mit, cc-by-4.0, other, ...")
    ] = "unknown",
    pictures: Annotated[int, typer.Option(min=0, help="Draw the predictions for this many validation images.")] = 4,
    score: Annotated[
        float, typer.Option(min=0.0, max=1.0, callback=finite, help="The pictures leave out instances with a lower score.")
    ] = 0.4,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the files of an earlier `publish` in the folder.")
    ] = False,
    checkpoint: Checkpoint = None,
    results: Results = RESULTS,
    device: Device = None,
) -> None:
    """Write a model with its card as a folder for upload.

    The folder also holds metrics, pictures and checksums. Nothing is uploaded.

    `load_model(DIR)` and `--weights DIR` read the folder.
    """
    check_paths(weights=run)

    from sparseinst.publish.card import UserFacts
    from sparseinst.publish.publish import publish as write

    about = UserFacts(name or output.resolve().name, dataset, data_license, license_)
    found = write(
        run, output, about, store=Store(results), checkpoint=checkpoint, pictures=pictures, score=score, overwrite=overwrite,
        device=device,
    )  # fmt: skip
    for path in found.files:
        print(path)
    if found.measured is not None:
        ap = found.measured.figures.get("AP")
        print(f"AP {'-' if ap is None else f'{ap:.1f}'} over {counted(found.measured.images, 'image')} ({found.measured.source})")
    if found.local_paths:
        more = f" and {len(found.local_paths) - 3} more" if len(found.local_paths) > 3 else ""
        print(f"the settings and records name paths of this machine: {', '.join(found.local_paths[:3])}{more}")
    if any(path.suffix == ".jpg" for path in found.files):
        print("the pictures show images of your validation data; --pictures 0 leaves them out")
    print(f"nothing was uploaded; hf upload OWNER/{about.name} {output} does it")
