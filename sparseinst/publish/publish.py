"""Write a trained model as a folder in the layout of a Hugging Face model repository. Nothing is sent anywhere.

README.md           the model card
model.safetensors   weights, settings and classes; `load_model(folder)` reads this file
config.json         the settings
record.json         the results with their provenance, and the checksums of the other files
pictures/           predictions
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sparseinst.ablation.store import Record, Store
from sparseinst.config import Config
from sparseinst.data.coco import val_split
from sparseinst.data.images import read_image
from sparseinst.device import pick_device
from sparseinst.errors import UserError
from sparseinst.evaluation.weights import evaluate_weights
from sparseinst.files import atomic, file_digest, make_folder
from sparseinst.inference.checkpoints import CHECKPOINT_SUFFIX, find_weights
from sparseinst.inference.predict import Predictor
from sparseinst.inference.weights import file_tensors_digest, load_weights, save_weights
from sparseinst.paths import WEIGHTS, RunPaths
from sparseinst.publish.card import CardFacts, Measured, UserFacts, model_card, steps_of
from sparseinst.visualize.draw import overlay

_log = logging.getLogger(__name__)

CARD, CONFIG, RECORD, PICTURES = "README.md", "config.json", "record.json", "pictures"
_LONGEST = 1024  # the longer side of a picture in pixels


@dataclass(frozen=True)
class Published:
    """What `publish` wrote."""

    files: tuple[Path, ...]
    measured: Measured | None
    local_paths: tuple[str, ...] = ()
    """The absolute paths of this machine that the published settings and records contain."""


def publish(
    run: Path,
    output: Path,
    about: UserFacts,
    *,
    store: Store,
    checkpoint: str | None = None,
    pictures: int = 4,
    score: float = 0.4,
    overwrite: bool = False,
    device: str | None = None,
) -> Published:
    """Write the model of a run with its card. `load_model(output)` gives the same outputs as the run.

    The metrics are those of a record, or of `evaluation.json` in the run's folder, if these are about the same weights.
    Otherwise the model is evaluated now. If the validation data cannot be read, there are no metrics or pictures, and a warning.

    Args:
        run: the folder of a run, which may be unfinished, or a weights file.
        store: the records of tables.
        checkpoint: see `find_weights`.
        pictures: the number of validation images to draw predictions for.
        score: the pictures show instances with this score or more.
        overwrite: replace files of an earlier call. Other files in the folder stay in any case.

    Raises:
        UserError: there are no such weights, or a file in `output` would be replaced.
    """
    _check_output(run, output, overwrite)
    source = find_weights(run, checkpoint)
    model, config, categories = load_weights(source)
    make_folder(output)
    weights = output / WEIGHTS
    if source.suffix == CHECKPOINT_SUFFIX:
        save_weights(weights, model.state_dict(), config, categories)
    else:
        with atomic(weights) as temporary:
            temporary.write_bytes(source.read_bytes())
    with atomic(output / CONFIG) as temporary:
        temporary.write_text(config.to_json() + "\n", encoding="utf-8")
    digest = file_tensors_digest(weights)
    training = _of_these_weights(store.load(config.train_key()), digest)
    evaluation, measured = _measure(run, weights, config, digest, store, device)
    drawn = _draw(Predictor(model, config, categories, pick_device(device)), output, pictures, score)
    for old in set((output / PICTURES).glob("prediction-*.jpg")) - {output / name for name in drawn}:
        old.unlink()
    keys = {"training": config.train_key(), "evaluation": config.evaluate_key()}
    facts = CardFacts(
        about, config, categories, digest, _progress(source, config), measured, drawn, keys,
        training.provenance if training is not None else {},
    )  # fmt: skip
    with atomic(output / CARD) as temporary:
        model_card(facts).save(temporary)
    files = [CARD, WEIGHTS, CONFIG, *drawn]
    record = {
        "weights": digest,
        "keys": keys,
        "training": asdict(training) if training is not None else None,
        "evaluation": evaluation,
        "files": {name: file_digest(output / name) for name in files},
    }
    with atomic(output / RECORD) as temporary:
        temporary.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    return Published(
        tuple(output / name for name in (*files, RECORD)),
        measured,
        tuple(dict.fromkeys(_absolute_paths([config.model_dump(mode="json"), record]))),
    )


def _check_output(run: Path, output: Path, overwrite: bool) -> None:
    """Raise `UserError` if the output is the run's own folder, or holds a file that would be replaced without permission."""
    if output.resolve() == (run if run.is_dir() else run.parent).resolve():
        raise UserError(f"{output}: this is the run's own folder; name another one with --output")
    for name in (CARD, WEIGHTS, CONFIG, RECORD, PICTURES):
        if (output / name).exists() and not overwrite:
            raise UserError(f"{output / name}: exists; --overwrite replaces the files of an earlier `publish` in this folder")


def _of_these_weights(record: Record | None, digest: str) -> Record | None:
    """Return the record if it is about weights with this checksum, otherwise None."""
    return record if record is not None and record.provenance.get("weights") == digest else None


def _measure(
    run: Path, weights: Path, config: Config, digest: str, store: Store, device: str | None
) -> tuple[dict[str, Any] | None, Measured | None]:
    """Return an evaluation of the weights as it was recorded, and for the card."""
    record = _of_these_weights(store.load(config.evaluate_key()), digest)
    if record is not None:
        result = record.result
        found = Measured(result["figures"], result.get("mechanism", {}), result["images"], f"record {record.key}")
        return asdict(record), found
    kept = _kept_evaluation(RunPaths(run), digest)
    if kept is not None:
        return kept, Measured(kept["figures"], kept["mechanism"], kept["images"], "evaluated after the training")
    _log.warning("no evaluation of these weights is recorded, so they are evaluated now")
    try:
        done = evaluate_weights(weights, {}, device=pick_device(device))
    except UserError as error:  # such as missing files
        _log.warning("the card has no metrics: %s", error)
        return None, None
    return done.as_json(), Measured(done.figures, done.mechanism, done.images, "evaluated for this card")


def _kept_evaluation(paths: RunPaths, digest: str) -> dict[str, Any] | None:
    """Return the evaluation in a run's folder; None if there is none, it is damaged, or it is about other weights."""
    try:
        kept: dict[str, Any] = json.loads(paths.evaluation.read_text(encoding="utf-8"))
        complete = {"figures", "mechanism", "images"} <= kept.keys()
        return kept if complete and kept["of"]["weights"] == digest else None
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        _log.warning("%s is damaged (%s)", paths.evaluation, error)
        return None


def _draw(predictor: Predictor, output: Path, count: int, score: float) -> list[str]:
    """Draw predictions for the first validation images, and return the pictures' paths in the folder."""
    if not count:
        return []
    try:
        records = val_split(predictor.config.data).images[:count]
        drawn = []
        for number, record in enumerate(records, start=1):
            image = read_image(record.path, (record.height, record.width))
            picture = overlay(image, predictor.predict(image, score), colour="class")
            picture.thumbnail((_LONGEST, _LONGEST))
            drawn.append(f"{PICTURES}/prediction-{number}.jpg")
            with atomic(output / drawn[-1]) as temporary:
                picture.save(temporary, format="JPEG", quality=90)
    except UserError as error:  # such as missing files
        _log.warning("the card has no pictures: %s", error)
        return []
    return drawn


def _progress(source: Path, config: Config) -> str:
    """Return how far the training was when it saved these weights."""
    total = config.train.iterations
    if source.suffix == CHECKPOINT_SUFFIX:
        return f"The weights are those after step {int(source.stem)} of {total}."
    if source.name == RunPaths(Path()).best.name:
        return f"The weights are those with the best AP in the evaluations during the training of {steps_of(config.train)}."
    return f"The training of {steps_of(config.train)} is finished."


def _absolute_paths(content: Any) -> Iterator[str]:
    """Yield the absolute paths among the texts of plain data."""
    if isinstance(content, dict):
        content = list(content.values())
    if isinstance(content, list):
        for entry in content:
            yield from _absolute_paths(entry)
    elif isinstance(content, str):
        yield from (word.strip("'\"") for word in content.split() if word.strip("'\"").startswith(("/", "~/")))
