"""Check that a published model loads with equal outputs, and that its card says what was measured."""

import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from huggingface_hub import ModelCard
from PIL import Image

from sparseinst import load_model
from sparseinst.ablation.store import Record, Store
from sparseinst.cli import run_cli
from sparseinst.config import Config
from sparseinst.data.coco import Category
from sparseinst.evaluation.weights import evaluate_run
from sparseinst.files import file_digest
from sparseinst.inference.weights import file_tensors_digest
from sparseinst.overrides import load_config
from sparseinst.paths import RunPaths
from sparseinst.publish.card import CardFacts, UserFacts, model_card
from tests.conftest import CPU


@pytest.fixture
def evaluated(trained: Path, tmp_path: Path) -> Path:
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    evaluate_run(run, load_config(run / "config.yaml"), device=CPU)
    return run


def publish(run: Path, output: Path, *options: str) -> int:
    return run_cli(["publish", str(run), "--output", str(output), "--device", "cpu", "--results", str(output / "none"), *options])


def front_matter(folder: Path) -> dict[str, Any]:
    return ModelCard.load(folder / "README.md").data.to_dict()


def test_a_published_model_gives_equal_outputs(
    evaluated: Path, tmp_path: Path, shapes_root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "tiny-shapes"
    options = [
        "--data-license",
        "made by us, CC0",
        "--license",
        "mit",
        "--dataset",
        "me/shapes",
        "--pictures",
        "2",
        "--score",
        "0",
    ]
    assert publish(evaluated, output, *options) == 0
    printed = capsys.readouterr()
    assert "nothing was uploaded; hf upload OWNER/tiny-shapes" in printed.out
    assert f"name paths of this machine: {shapes_root}" in printed.out
    assert "evaluated now" not in printed.err
    names = {str(path.relative_to(output)) for path in output.rglob("*") if path.is_file()}
    pictures = {"pictures/prediction-1.jpg", "pictures/prediction-2.jpg"}
    assert names == {"README.md", "model.safetensors", "config.json", "record.json", *pictures}

    picture = shapes_root / "val2017" / "000000000001.png"
    ours, theirs = (load_model(folder, "cpu").predict(picture) for folder in (evaluated, output))
    assert np.array_equal(ours.scores, theirs.scores)
    assert np.array_equal(ours.masks, theirs.masks)
    assert ours.names == theirs.names
    assert len(ours.scores) > 0
    command = ["predict", str(picture), "--weights", str(output), "--output", str(tmp_path / "out"), "--device", "cpu"]
    assert run_cli(command) == 0
    assert load_config(output / "config.json") == load_config(evaluated / "config.yaml")

    record = json.loads((output / "record.json").read_text())
    assert record["weights"] == file_tensors_digest(evaluated / "model.safetensors")
    assert record["files"] == {name: file_digest(output / name) for name in names - {"record.json"}}
    kept = json.loads(RunPaths(evaluated).evaluation.read_text())
    assert record["evaluation"] == kept

    data = front_matter(output)
    assert (data["library_name"], data["license"], data["datasets"]) == ("sparseinst", "mit", ["me/shapes"])
    [index] = data["model-index"]
    assert index["name"] == "tiny-shapes"
    listed = {metric["type"]: metric["value"] for result in index["results"] for metric in result["metrics"]}
    assert listed == {name: round(value, 2) for name, value in kept["figures"].items() if name in listed and value is not None}
    assert "AP" in listed
    assert data["metrics"] == list(listed)
    card = (output / "README.md").read_text()
    assert "licence of the data: made by us, CC0" in card
    assert f"checksum of the weights: {record['weights']}" in card
    assert "| prefers_own |" in card
    assert "![Prediction 2](pictures/prediction-2.jpg)" in card
    with Image.open(output / "pictures/prediction-1.jpg") as shown:
        assert shown.size == (64, 64)


def test_what_the_user_does_not_say_is_not_stated(evaluated: Path, tmp_path: Path) -> None:
    output = tmp_path / "plain"
    assert publish(evaluated, output, "--pictures", "0") == 0
    assert not (output / "pictures").exists()
    assert "licence of the data: not stated" in (output / "README.md").read_text()
    data = front_matter(output)
    assert data["license"] == "unknown"
    assert data["datasets"] == ["shapes"]


def test_only_a_record_of_these_weights_is_published(evaluated: Path, tmp_path: Path) -> None:
    config = load_config(evaluated / "config.yaml")
    digest = file_tensors_digest(evaluated / "model.safetensors")
    store = Store(tmp_path / "results")
    about = {"weights": digest, "commit": "abcdef0123456789", "device": "A card", "seconds": 7.0}
    result = {"figures": {"AP": 12.345, "APs": None}, "mechanism": {"own": 0.25}, "images": 6}
    train = Record("train", config.train_key(), {"steps": 6}, provenance=about)
    store.write(train)
    store.write(Record("evaluate", config.evaluate_key(), result, provenance=about))
    command = ["publish", str(evaluated), "--device", "cpu", "--pictures", "0"]
    assert run_cli([*command, "--output", str(tmp_path / "a"), "--results", str(store.results)]) == 0
    record = json.loads((tmp_path / "a/record.json").read_text())
    assert record["training"]["provenance"] == about
    assert record["evaluation"]["result"] == result
    card = (tmp_path / "a/README.md").read_text()
    assert "commit: abcdef0123456789" in card
    assert "| 12.3 | - |" in card
    assert f"record {config.evaluate_key()}" in card

    other = Store(tmp_path / "other")
    other.write(replace(train, provenance={**about, "weights": "0" * 16}))
    other.write(Record("evaluate", config.evaluate_key(), result, provenance={"weights": "0" * 16}))
    assert run_cli([*command, "--output", str(tmp_path / "b"), "--results", str(other.results)]) == 0
    record = json.loads((tmp_path / "b/record.json").read_text())
    assert record["training"] is None
    assert record["evaluation"]["of"]["weights"] == digest
    card = (tmp_path / "b/README.md").read_text()
    assert "12.3" not in card
    assert "evaluated after the training" in card


def test_an_unfinished_run_is_evaluated_now_and_the_card_says_its_step(
    trained: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run, output = tmp_path / "run", tmp_path / "half"
    shutil.copytree(trained, run)
    (run / "model.safetensors").unlink()
    RunPaths(run).evaluation.unlink(missing_ok=True)
    with caplog.at_level(logging.WARNING):
        assert publish(run, output, "--checkpoint", "4", "--pictures", "1") == 0
    assert "evaluated now" in caplog.text
    card = (output / "README.md").read_text()
    assert "The weights are those after step 4 of 6." in card
    assert "evaluated for this card" in card
    assert len(load_model(output, "cpu").categories) == 6


def test_a_training_that_can_end_early_is_not_said_to_have_all_steps(tiny: Config) -> None:
    config = tiny.replace({"train.evaluate_every": 2, "train.patience": 1})
    facts = CardFacts(UserFacts("name", "data"), config, [Category(1, "a|b <i>")], "0" * 16, "", None)
    card = str(model_card(facts))
    assert "- at most 6 steps of 4 images" in card
    assert "a\\|b &lt;i&gt;" in card, "names are not Markdown"
    assert "at most" not in str(model_card(replace(facts, config=tiny))).partition("## Training")[2]


def test_without_the_data_the_card_says_so(
    evaluated: Path, tmp_path: Path, tiny: Config, caplog: pytest.LogCaptureFixture
) -> None:
    from sparseinst.inference.weights import load_weights, save_weights

    model, config, categories = load_weights(evaluated)
    moved = config.replace({"data.root": str(tmp_path / "gone")})
    save_weights(tmp_path / "alone.safetensors", model.state_dict(), moved, categories)
    with caplog.at_level(logging.WARNING):
        assert publish(tmp_path / "alone.safetensors", tmp_path / "card") == 0
    assert "the card has no metrics: " in caplog.text
    assert "the card has no pictures: " in caplog.text
    assert "model-index" not in front_matter(tmp_path / "card")
    assert "These weights were not evaluated." in (tmp_path / "card/README.md").read_text()


def test_nothing_is_replaced_without_permission(evaluated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "repository"
    output.mkdir()
    (output / "README.md").write_text("mine")
    (output / ".gitattributes").write_text("*.safetensors filter=lfs")
    assert publish(evaluated, output) == 2
    assert "README.md: exists; --overwrite replaces" in capsys.readouterr().err
    assert (output / "README.md").read_text() == "mine"
    assert [path.name for path in sorted(output.iterdir())] == [".gitattributes", "README.md"]
    assert publish(evaluated, output, "--overwrite", "--pictures", "3") == 0
    assert publish(evaluated, output, "--overwrite", "--pictures", "1") == 0
    assert [path.name for path in (output / "pictures").iterdir()] == ["prediction-1.jpg"]
    assert (output / ".gitattributes").exists()
    assert publish(evaluated, evaluated) == 2
    assert "the run's own folder" in capsys.readouterr().err
    for where in (output, tmp_path / "new"):
        assert publish(tmp_path / "nothing", where, "--overwrite") == 2
        assert "nothing: no such file" in capsys.readouterr().err
    assert (output / "pictures/prediction-1.jpg").exists(), "a call that is refused removes nothing"
    assert publish(evaluated, evaluated.parent, "--pictures", "0") == 0, "the folder around a run is not the run's own"
    assert publish(evaluated / "model.safetensors", evaluated) == 2
    assert publish(evaluated, tmp_path / "x", "--score", "nan") == 2
