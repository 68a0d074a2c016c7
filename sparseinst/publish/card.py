"""Write the model card of a published model: the README.md of a Hugging Face model repository. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from sparseinst.ablation.study import AccuracyFigure
from sparseinst.config import Config, TrainConfig
from sparseinst.data.coco import Category, category_names
from sparseinst.report.escape import markdown

NOT_STATED = "not stated"
_TASK = "image-segmentation"
_MEANINGS = {
    "own": "share of a map's mass on its own object",
    "others": "share on the image's other objects",
    "background": "share outside all objects",
    "border": "share on the outermost ring of cells",
    "prefers_own": "share of the maps that respond most to their own object",
    "chance": "the same share for maps that do not depend on the objects",
    "peak_on_own": "share of the maps whose strongest cell lies on their own object",
    "lift": "`own` divided by the object's share of the area",
    "duplicates": "further confident instances for each found object",
    "neighbours_recall": "share of the pairs of touching objects of one category with both found",
}
_CITATION = """```bibtex
@inproceedings{Cheng2022SparseInst,
  title     = {Sparse Instance Activation for Real-Time Instance Segmentation},
  author    = {Cheng, Tianheng and Wang, Xinggang and Chen, Shaoyu and Zhang, Wenqiang and Zhang, Qian and Huang, Chang
               and Zhang, Zhaoxiang and Liu, Wenyu},
  booktitle = {Proc. IEEE Conf. Computer Vision and Pattern Recognition (CVPR)},
  year      = {2022}
}
```"""


@dataclass(frozen=True)
class UserFacts:
    """What only the user knows about a model."""

    name: str
    """The model's name, without the owner of the repository."""
    dataset: str | None
    """The data set's name, if possible its id among Hugging Face's data sets; None for the name of its folder."""
    data_license: str = NOT_STATED
    license: str = "unknown"
    """The licence of the weights, as Hugging Face's identifiers name it, such as `cc-by-4.0`."""


@dataclass(frozen=True)
class Measured:
    """An evaluation of the published weights."""

    figures: Mapping[str, float | None]
    """COCO's mask metrics in percent."""
    mechanism: Mapping[str, float | None]
    images: int
    source: str
    """Where the values come from, in words."""


@dataclass(frozen=True)
class CardFacts:
    """What a model card says about a model."""

    about: UserFacts
    config: Config
    categories: Sequence[Category]
    weights: str
    """The checksum of the tensors, as in the records."""
    progress: str
    """How far the training was, in words."""
    measured: Measured | None
    pictures: Sequence[str] = ()
    """The pictures' paths in the repository."""
    keys: Mapping[str, str] = field(default_factory=dict)
    """The keys of the training and the evaluation."""
    provenance: Mapping[str, Any] = field(default_factory=dict)
    """The provenance in the training's record; empty if it has no record."""

    @property
    def dataset(self) -> str:
        """The data set's name, from the user or from its folder."""
        data = self.config.data
        return self.about.dataset or ("shapes" if data.source == "shapes" else Path(data.root).resolve().name)


def model_card(facts: CardFacts) -> ModelCard:
    """Return the card, with the metadata that Hugging Face reads as YAML at its beginning."""
    sections = [
        _head(facts), _use(facts), _metrics(facts.measured), _pictures(facts.pictures), _data(facts), _training(facts),
        f"## Citation\n\n{_CITATION}",
    ]  # fmt: skip
    return ModelCard(f"---\n{_metadata(facts).to_yaml()}\n---\n\n" + "\n\n".join(sections) + "\n")


def _metadata(facts: CardFacts) -> ModelCardData:
    figures = facts.measured.figures if facts.measured is not None else {}
    known = {name: round(value, 2) for name in get_args(AccuracyFigure) if (value := figures.get(name)) is not None}
    dataset = facts.dataset
    results = [
        EvalResult(
            task_type=_TASK, task_name="instance segmentation", dataset_type=dataset, dataset_name=dataset, dataset_split="val",
            metric_type=name, metric_name=f"mask {name}", metric_value=value,
        )
        for name, value in known.items()
    ]  # fmt: skip
    return ModelCardData(
        model_name=facts.about.name,
        library_name="sparseinst",
        pipeline_tag=_TASK,
        license=facts.about.license,
        tags=["sparseinst", "instance-segmentation", "coco-format", "pytorch"],
        datasets=[dataset],
        metrics=list(known) or None,
        eval_results=results or None,
    )


def _head(facts: CardFacts) -> str:
    model, inference = facts.config.model, facts.config.inference
    short, long = inference.sides()
    where, resized = "an image", f"Images are resized to a shorter side of {short} pixels, with a longer side of at most {long}."
    if inference.tile is not None:
        where = "a tile"
        resized = (
            f"Images are cut into overlapping tiles of {inference.tile} pixels, whose instances are joined. A tile is resized to "
            f"a side of {short} pixels."
        )
    return (
        f"# {facts.about.name}\n\n"
        "This model segments the instances of images with "
        "[SparseInst](https://arxiv.org/abs/2203.12827) (CVPR 2022). It was trained with the SparseInst workbench. "
        f"Its backbone is {model.backbone.name}. It has {model.decoder.iam.num_maps} instance activation maps, so it finds at "
        f"most {model.decoder.iam.num_maps} instances of {where}. {resized} {facts.progress}"
    )


def _use(facts: CardFacts) -> str:
    name = facts.about.name
    return f"""## Use

Install the SparseInst workbench, download this repository into a folder, and load the folder:

```
hf download OWNER/{name} --local-dir {name}
sparseinst predict photo.jpg --weights {name} --output out
```

```python
from sparseinst import load_model

found = load_model("{name}").predict("photo.jpg", score=0.4)
found.scores, found.names, found.masks  # (K,), K class names, (K, H, W) booleans at the photo's own size
```

`model.safetensors` holds the weights, their settings and the classes. `config.json` holds the same settings for
`sparseinst train --config`. `record.json` holds the results with their provenance, and the checksums of the files."""


def _metrics(measured: Measured | None) -> str:
    if measured is None:
        return "## Metrics\n\nThese weights were not evaluated."

    def row(values: Sequence[str]) -> str:
        return f"| {' | '.join(values)} |"

    figures = {name: "-" if value is None else f"{value:.1f}" for name, value in measured.figures.items()}
    lines = [
        f"## Metrics\n\nCOCO's mask metrics over {measured.images} validation images, in percent ({measured.source}):\n",
        row(list(figures)),
        row(["---"] * len(figures)),
        row(list(figures.values())),
    ]
    if measured.mechanism:
        lines += ["\nDo the instance activation maps highlight their objects?\n", row(["metric", "value", ""]), row(["---"] * 3)]
        for name, meaning in _MEANINGS.items():
            value = measured.mechanism.get(name)
            lines.append(row([name, "-" if value is None else f"{value:.3f}", meaning]))
    lines.append("\nThe values hold for these images and for one training; another seed gives other values.")
    return "\n".join(lines)


def _pictures(pictures: Sequence[str]) -> str:
    if not pictures:
        return "## Predictions\n\nThis card has no pictures."
    shown = "\n".join(f"![Prediction {number}]({path})" for number, path in enumerate(pictures, start=1))
    return f"## Predictions\n\nThe model's instances in the first validation images:\n\n{shown}"


def _data(facts: CardFacts) -> str:
    names = [markdown(name) for name in category_names(facts.categories)]
    listed = ", ".join(names[:100]) + (f" and {len(names) - 100} more" if len(names) > 100 else "")
    return (
        f"## Data\n\n- data set: {markdown(facts.dataset)}\n- licence of the data: {markdown(facts.about.data_license)}\n"
        f"- licence of the weights: {markdown(facts.about.license)}\n- {len(names)} classes: {listed}"
    )


def steps_of(train: TrainConfig) -> str:
    """Return the number of a training's steps in words. With `train.patience`, it can end before all are done."""
    return f"{'at most ' if train.patience is not None else ''}{train.iterations} steps"


def _training(facts: CardFacts) -> str:
    train, backbone = facts.config.train, facts.config.model.backbone
    if train.start is not None:
        start = "the weights of another SparseInst model"
    elif facts.config.pretrain.enabled:
        start = "a backbone that was first trained on the same images"
    else:
        start = "ImageNet weights" if backbone.pretrained or backbone.weights is not None else "random weights"
    lines = [
        f"- {steps_of(train)} of {train.batch_size} images, learning rate {train.learning_rate:g}, seed {train.seed}",
        f"- start: {start}",
        f"- checksum of the weights: {facts.weights}",
        *(f"- key of the {stage}: {key}" for stage, key in facts.keys.items()),
    ]
    known = {
        "commit": str(facts.provenance.get("commit") or "") + ("+" if facts.provenance.get("changes") else ""),
        "device": facts.provenance.get("device"),
        "seconds": facts.provenance.get("seconds"),
    }
    lines += [f"- {name}: {value}" for name, value in known.items() if value]
    return "## Training\n\n" + "\n".join(lines)
