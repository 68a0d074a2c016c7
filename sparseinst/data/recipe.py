"""Choose settings for a data set from what it holds, with a reason for each (`sparseinst init`). Imports no torch.

The rules follow this project's own trainings on shapes and on nuclei (docs/small-scale.md) and the paper's settings. They are a
start; they are not tuned for your data.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

from sparseinst.config import Config
from sparseinst.data.check import MIRRORED
from sparseinst.data.facts import DataFacts, measure_splits
from sparseinst.errors import UserError
from sparseinst.files import atomic
from sparseinst.machine import multiplies_bfloat16
from sparseinst.nested import commented_yaml, nest
from sparseinst.overrides import load_config

Size = Literal["small", "full"]
"""`small` has a tenth of ResNet-50's parameters and trains on a CPU in one to three hours; `full` is the paper's model."""

_MANY = 50
"""Images with more instances are cut into tiles, if these are clearly smaller than the images."""
_TILE_SPACINGS = 2.8
"""The side of a tile, as a multiple of the spacing of the objects. A tile then holds about 8 objects, like an image of shapes."""
_TILE_OVERLAP = 0.375
"""The overlap of the tiles, as a fraction of their side. It must hold a large object."""
_TILE_PART = 0.75
"""The largest tile, as a part of the images' shorter side."""
_CLUSTERS = 1.6
"""How many times more instances the fullest tile of an image holds than a mean one."""
_FEW_MORE = 1.25
"""The fullest image gets enough maps for all of its instances if they are at most so many times those that most images need."""
_CELL = 4
"""The stride of the predicted masks with the default `mask_scale`."""


@dataclass
class Recipe:
    """Settings by dotted path, the reason for each, and warnings."""

    given: Mapping[str, Any] = field(default_factory=dict)
    """The settings that the user gave. They stay."""
    settings: dict[str, Any] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    def prefer(self, path: str, value: Any) -> Any:
        """Return the given value of a setting, or else `value`."""
        return self.given.get(path, value)

    def choose(self, path: str, value: Any, reason: str) -> None:
        self.settings[path] = self.prefer(path, value)
        self.reasons[path] = "You gave this value." if path in self.given else reason

    def text(self, head: str) -> str:
        """Return a config file: the settings in YAML, with the reasons and the warnings as comments."""
        comments = [head, *(f"Warning: {warning}" for warning in self.warnings)]
        lines = [f"# {' '.join(comment.split())}" for comment in comments]  # names in them may hold line breaks
        return "\n".join(lines) + "\n" + commented_yaml(nest(self.settings, Config), self.reasons)


def recipe(
    facts: DataFacts,
    data: Path,
    size: Size,
    start: Mapping[str, Any] | None = None,
    *,
    given: Mapping[str, Any] = MappingProxyType({}),
    fast_bfloat16: bool = False,
) -> Recipe:
    """Return settings for a data set.

    Args:
        data: the COCO-format folder.
        size: the model.
        fast_bfloat16: whether this machine's CPU has bfloat16 instructions; only `small` uses it.
        start: the model settings of the weights that the training starts from, by dotted path; None for no such weights.
        given: settings that the user gave, by dotted path. They stay, and the others are chosen to fit them.
    """
    chosen = Recipe(given)
    chosen.settings |= {"data.source": "coco", "data.root": str(data)}
    chosen.choose("model.num_classes", facts.classes, "The number of categories in the training annotations.")
    facts = _choose_tiles(chosen, facts)
    scale = _choose_input(chosen, facts, size)
    _choose_maps(chosen, facts, size, start)
    _choose_model(chosen, facts, size, start)
    _choose_steps(chosen, facts, size, fine=start is not None)
    if size == "small" and fast_bfloat16:
        chosen.choose("train.precision", "bf16", "This CPU has bfloat16 instructions, which halve the time of a step.")
        chosen.settings["pretrain.precision"] = "bf16"
    if facts.mirrored is not None:
        chosen.choose("data.flip", 0.0, f"{MIRRORED[0].upper()}{MIRRORED[1:].format(*facts.mirrored)}.")
    chosen.settings |= given
    _warn(chosen, facts, scale, size, start)
    return chosen


def _choose_tiles(chosen: Recipe, facts: DataFacts) -> DataFacts:
    """Choose tiles if the images are crowded with objects that are small compared with them.

    Returns:
        What the training sees: the facts of the tiles, or those of the images.
    """
    side = _tile_side(facts)
    crowded = facts.usual_instances > _MANY and side <= _TILE_PART * facts.short_side and not chosen.prefer("data.crop", 0.0)
    side = chosen.prefer("inference.tile", chosen.prefer("data.tile", side if crowded else None))
    if side is None:
        return facts
    instances = max(1.0, (side / facts.spacing) ** 2)
    usual = math.ceil(_CLUSTERS * facts.densest * side**2)
    holds = f"A square tile of {side} pixels holds about {instances:.0f} instances."
    many = (
        f"Crowded images (1 % of all) hold more than {facts.usual_instances} instances, and the maps cannot tell so many apart. "
        f"{holds}"
    )
    chosen.choose("data.tile", side, many if "inference.tile" not in chosen.given else f"As in inference. {holds}")
    chosen.choose("inference.tile", side, "As in training. The instances of all tiles are joined.")
    overlap = chosen.prefer("inference.tile_overlap", _TILE_OVERLAP)
    fits = facts.large_object <= overlap * chosen.prefer("inference.tile", side)
    so = "so that a tile shows them as a whole" if fits else "so that every tile may cut the longest ones: use larger tiles"
    long = f"95 % of the objects are at most {facts.large_object:.0f} pixels long, {so}."
    chosen.choose("inference.tile_overlap", _TILE_OVERLAP, long)
    return replace(
        facts, short_side=side, aspect=1.0, instances=instances, most_instances=min(usual, facts.most_instances),
        usual_instances=min(usual, facts.usual_instances), unit="tile", tiles=max(1.0, facts.instances / instances),
    )  # fmt: skip


def _tile_side(facts: DataFacts) -> int:
    """Return the side of tiles that hold some objects, and each large object as a whole."""
    return 32 * math.ceil(max(_TILE_SPACINGS * facts.spacing, facts.large_object / _TILE_OVERLAP) / 32)


def _choose_input(chosen: Recipe, facts: DataFacts, size: Size) -> float:
    """Choose the sizes of the input and of the masks. Return the factor from original pixels to input pixels."""
    usual, most = (256, 512) if size == "small" else (640, 800)
    wanted = facts.short_side * 4 * _CELL / facts.small_object
    short = int(min(max(wanted, usual / 2), most, max(2 * facts.short_side, usual / 2)) / 32 + 0.5) * 32
    if wanted <= usual <= 2 * facts.short_side:
        short = usual
    short = chosen.prefer("inference.short_side", short)
    scale = short / facts.short_side
    what = "A tile has a" if facts.unit == "tile" else "The median image has a shorter"
    why = (
        f"{what} side of {facts.short_side:.0f} pixels, and a tenth of the objects are smaller than "
        f"{facts.small_object:.0f} x {facts.small_object:.0f} pixels, which become {scale * facts.small_object:.0f} pixels here."
    )
    chosen.choose("inference.short_side", short, why)
    if facts.unit == "image":
        long = math.ceil(short * max(4 / 3, min(facts.aspect, 2.0)) / 32) * 32
        chosen.choose("inference.long_side", long, f"95 % of the images have an aspect ratio of at most {facts.aspect:.2f}.")
        chosen.settings["data.long_side"] = long
    shorts = [short] if size == "small" else list(range(max(32, round(0.65 * short / 32) * 32), short + 1, 32))
    chosen.choose("data.short_sides", shorts, "As in inference; the full model also sees smaller images, as in the paper.")
    cells = scale * facts.small_object / _CELL
    if cells < 3:
        chosen.choose(
            "model.decoder.mask_scale",
            4.0,
            f"With the default of 2, small objects would be {cells:.1f} mask cells wide. Twice the resolution costs memory.",
        )
    return scale


def _choose_maps(chosen: Recipe, facts: DataFacts, size: Size, start: Mapping[str, Any] | None) -> None:
    has = start["model.decoder.iam.num_maps"] if start is not None else None
    least = 100 if size == "full" else 20
    wanted = max(least, math.ceil(facts.usual_instances / 10) * 10)
    if facts.most_instances <= _FEW_MORE * wanted:
        wanted = max(wanted, math.ceil(facts.most_instances / 10) * 10)
    if facts.unit == "tile":
        holds = f"A tile of the fullest images may hold about {facts.usual_instances} instances."
    else:
        holds = f"An image holds up to {facts.most_instances} instances; 99 % of the images hold at most {facts.usual_instances}."
    if has is not None and has >= facts.usual_instances:
        chosen.choose(
            "model.decoder.iam.num_maps", has, f"{holds} The {has} maps of the weights are kept, because they are trained."
        )
    else:
        new = "" if has is None else f" The {has} maps of the weights are kept; the others start from random weights."
        chosen.choose("model.decoder.iam.num_maps", wanted, f"{holds} Each instance needs a map of its own.{new}")


def _choose_model(chosen: Recipe, facts: DataFacts, size: Size, start: Mapping[str, Any] | None) -> None:
    if start is not None:
        for path, value in start.items():
            chosen.settings.setdefault(path, value)
        chosen.settings["model.backbone.pretrained"] = False
        return
    if size == "full":
        chosen.choose(
            "model.backbone.name", "resnet50.tv_in1k", "ImageNet weights, which timm reads from its cache or downloads."
        )
        return
    chosen.choose("model.width_factor", 0.25, "A quarter of the paper's channels: 64 instead of 256.")
    chosen.choose("model.backbone.name", "small_resnet", "A ResNet with a quarter of the width of ResNet-50 and fewer blocks.")
    chosen.settings["model.backbone.pretrained"] = False
    chosen.choose(
        "pretrain.enabled",
        True,
        "It has no ImageNet weights, so it first learns to predict the category and the centre at each cell.",
    )
    steps = int(min(12_000, max(2000, 30 * facts.train_images / 8)) / 500) * 500
    chosen.choose("pretrain.iterations", steps, "About 30 epochs of 8 images, between 2,000 and 12,000 steps.")


def _choose_steps(chosen: Recipe, facts: DataFacts, size: Size, *, fine: bool) -> None:
    # A step of the trainings that the rules come from holds 30 to 90 objects, and a whole training about 700,000.
    batch = (2 if facts.instances > 20 else 4) if size == "small" else 16
    if size == "small":
        steps = min(30_000, max(7000, 700_000 / (batch * facts.instances)))
    else:
        steps = min(90_000, max(7000, 150 * facts.train_images / batch))
    parts, which = (f" of {facts.tiles:.0f} tiles each", "A tile") if facts.unit == "tile" else ("", "An image")
    batch = chosen.prefer("train.batch_size", batch)
    steps = chosen.prefer("train.iterations", round(steps / (3 if fine else 1) / 500) * 500)
    chosen.choose(
        "train.iterations",
        steps,
        f"{steps * batch * facts.instances:,.0f} objects, or {steps * batch / (facts.train_images * facts.tiles):.0f} epochs of "
        f"{facts.train_images} images{parts}. The maps find their objects late, so a short schedule costs much AP.",
    )
    chosen.choose("train.batch_size", batch, f"{which} holds {facts.instances:.0f} instances on average.")
    rate = 4e-4 if size == "small" else 5e-5 * batch / 64
    source = "as in the profile small" if size == "small" else "the paper's 5e-5 for a batch of 64, in proportion to the batch"
    chosen.choose(
        "train.learning_rate",
        rate,
        f"{source[0].upper()}{source[1:]}{'; a quarter of it needs more steps' if fine and size == 'small' else ''}.",
    )
    if size == "small":
        chosen.settings["train.backbone_multiplier"] = 0.5
    chosen.settings["train.warmup_iterations"] = min(1000, steps // 20)
    chosen.choose("train.clip_norm", 5.0, "Stops a single bad batch from ruining the run.")
    averaged = max(1, min(500, steps // 10))
    decay = round(1 - 1 / averaged, 4) if averaged > 1 else None
    chosen.choose("train.ema_decay", decay, f"The average of the weights over the last {averaged} steps is evaluated and saved.")
    every = max(min(500, steps), steps // 10)
    chosen.choose("train.evaluate_every", every, "After so many steps AP is measured each time; `sparseinst curves` shows it.")
    chosen.choose("train.evaluate_images", 200, "The evaluations during the run use only this many images.")
    chosen.settings["train.checkpoint_every"] = max(250, steps // 40)
    chosen.settings["train.log_every"] = 50


def _warn(chosen: Recipe, facts: DataFacts, scale: float, size: Size, start: Mapping[str, Any] | None) -> None:
    maps = chosen.settings["model.decoder.iam.num_maps"]
    cell = 8 / chosen.settings.get("model.decoder.mask_scale", 2.0)
    if facts.train_images * facts.tiles < 300 and start is None:
        chosen.warnings.append(
            f"{facts.train_images} training images are few for a start without trained weights: AP may stay near zero. Start "
            "from released weights with --weights, or label more images."
        )
    elif facts.train_images * facts.tiles < 300:
        chosen.warnings.append(
            f"{facts.train_images} training images are few: the model may learn them by heart. Compare its AP on the training "
            "images with that on the validation images, and label more images if the two differ much."
        )
    if not facts.val_images:
        chosen.warnings.append("the validation split has no image, so there will be no AP: `sparseinst data split` makes one.")
    elif not facts.val_instances:
        chosen.warnings.append(
            "no validation image has an instance, so there will be no AP: `sparseinst data split` splits anew."
        )
    elif facts.val_images < 30:
        chosen.warnings.append(f"with {facts.val_images} validation images AP is uncertain by several points.")
    if facts.other_categories is not None:
        chosen.warnings.append(f"the training will refuse these data: {facts.other_categories}.")
    if facts.shared_images:
        chosen.warnings.append(
            f"{facts.shared_images} validation images have the name of a training image, apart from the file type and Roboflow's "
            "ending .rf.…: AP is too high if they show the same photo."
        )
    if facts.missing:
        chosen.warnings.append(
            f"{len(facts.missing)} images do not exist, the first is {facts.missing[0]}: copy them, or leave them out with "
            "data.on_bad_image=skip."
        )
    if facts.left_out:
        chosen.warnings.append(
            f"training images with an invalid annotation, which will be left out (data.on_bad_image=skip): {facts.left_out}."
        )
    if facts.repeated_names:
        chosen.warnings.append(
            f"several categories have the same name ({', '.join(facts.repeated_names[:5])}), but the model learns them as "
            "different ones: give each its own name, or make them one category."
        )
    if scale * facts.small_object < 2 * cell:
        chosen.warnings.append(
            f"a tenth of the objects are smaller than two mask cells ({2 * cell:.0f} input pixels) and will hardly be found: "
            + ("use smaller tiles." if facts.unit == "tile" else "cut the images into tiles with data.tile and inference.tile.")
        )
    if facts.unit == "image" and facts.most_instances > maps:
        chosen.warnings.append(
            f"an image holds up to {facts.most_instances} instances, more than the {maps} maps: the others are not "
            f"learned and never found. {_without_tiles(facts)}"
        )
    if facts.unit == "tile" and facts.usual_instances > maps:
        chosen.warnings.append(
            f"a tile of the fullest images may hold {facts.usual_instances} instances, more than the {maps} maps: use smaller "
            "tiles, or raise model.decoder.iam.num_maps."
        )
    if facts.rare:
        names = ", ".join(facts.rare[:5]) + (f" and {len(facts.rare) - 5} more" if len(facts.rare) > 5 else "")
        have = "has" if len(facts.rare) == 1 else "have"
        chosen.warnings.append(f"{len(facts.rare)} of {facts.classes} categories {have} fewer than 20 instances: {names}.")
    if size == "full" and start is None:
        chosen.warnings.append("the full model takes days on a CPU; --size small takes one to three hours.")


def _without_tiles(facts: DataFacts) -> str:
    """Return what to do about images with more instances than maps, which are not cut into tiles."""
    side = _tile_side(facts)
    if facts.usual_instances <= _MANY or side <= _TILE_PART * facts.short_side:
        return "Cut the images into tiles with data.tile and inference.tile, or raise model.decoder.iam.num_maps."
    return (
        f"No tiles were chosen. A tile has to show several objects, and the large ones ({facts.large_object:.0f} pixels) as a "
        f"whole. It would need a side of {side} pixels, and the images have {facts.short_side:.0f}. After the training, compare "
        "the AP with tiles: `sparseinst evaluate --weights RUN -o inference.tile=N`. If the small objects matter most, train "
        "with smaller tiles (data.tile and inference.tile); otherwise raise model.decoder.iam.num_maps."
    )


def write_recipe(
    data: Path,
    output: Path,
    size: Size,
    start: Mapping[str, Any] | None = None,
    given: Mapping[str, Any] = MappingProxyType({}),
) -> tuple[DataFacts, Recipe]:
    """Look at a COCO-format folder and write a config file for it. `given` is as in `recipe`.

    Raises:
        UserError: the output exists or cannot be written.
        DataError: as in `measure_splits`.
    """
    if output.exists():
        raise UserError(f"{output}: exists; give another --output, or remove it")
    given = {**given, "data.root": str(data)}
    facts = measure_splits(load_config(overrides={path: value for path, value in given.items() if path.startswith("data.")}).data)
    chosen = recipe(facts, data, size, start, given=given, fast_bfloat16=multiplies_bfloat16())
    text = chosen.text(
        f"Settings for {data}, chosen by `sparseinst init`. Every setting can be changed; `sparseinst config` lists all."
    )
    load_config(overrides=chosen.settings)  # a setting that is not valid must not reach the file
    with atomic(output) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return facts, chosen
