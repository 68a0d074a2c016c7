"""Check training on any COCO-format folder: other categories, more instances than maps, and fine-tuning."""

from pathlib import Path

import numpy as np
import pytest

from sparseinst import load_model
from sparseinst.cli import run_cli

from .conftest import TINY, annotation, box, write_coco

QUICK = {**TINY, "train.iterations": 2, "train.warmup_iterations": 1, "train.batch_size": 2}


def options(**more: object) -> list[str]:
    """Return the options of a quick training, without the numbers of classes and maps."""
    settings = {key: value for key, value in {**QUICK, **more}.items() if "num_" not in key}
    return [part for key, value in settings.items() for part in ("-o", f"{key}={value}")]


@pytest.fixture
def crowded(tmp_path: Path) -> Path:
    """Write four images with 40 to 400 instances each. All are of the category 1000; the category 7 has no instance."""
    images = [{"id": 9 - n, "file_name": f"{n}.png", "width": 80, "height": 64} for n in range(4)]
    annotations = [
        annotation(100 * n + k, 9 - n, 1000, box(k % 20 * 4, k // 20 * 3, 3, 2))
        for n, count in enumerate((40, 40, 400, 60))
        for k in range(count)
    ]  # fmt: skip
    for number, entry in enumerate(annotations):
        entry["id"] = number + 1
    return write_coco(tmp_path / "data", images, annotations)


def test_images_of_400_instances_train_and_are_evaluated(
    crowded: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """The classes, their ids and the number of maps come from the annotation file."""
    assert run_cli(["train", "--data", str(crowded), "--output", str(tmp_path / "run"), *options(), "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert "2 classes: seven, thousand" in printed
    assert "images hold up to 400 instances, so model.decoder.iam.num_maps is 400 instead of 100" in printed
    assert "take no part" not in caplog.text
    model = load_model(tmp_path / "run", "cpu")
    assert [category.id for category in model.categories] == [7, 1000]
    assert model.config.model.decoder.iam.num_maps == 400
    assert set(model.predict(np.zeros((40, 50, 3), np.uint8)).names) <= {"seven", "thousand"}


def test_too_few_maps_give_a_warning_with_numbers(crowded: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    command = ["train", "--data", str(crowded), "--output", str(tmp_path / "run"), *options(), "--device", "cpu"]
    assert run_cli([*command, "-o", "model.decoder.iam.num_maps=50"]) == 0
    assert "2 of 4 training images have more than model.decoder.iam.num_maps=50 instances, up to 400; 360 of them" in caplog.text


def test_a_number_of_maps_in_a_file_stays(crowded: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "own.yaml").write_text("model: {decoder: {iam: {num_maps: 60}}}")
    file = ["--config", str(tmp_path / "own.yaml")]
    command = ["train", "--data", str(crowded), "--output", str(tmp_path / "run"), *file, *options(), "--device", "cpu"]
    assert run_cli(command) == 0
    assert "more than model.decoder.iam.num_maps=60 instances" in caplog.text


@pytest.mark.slow
def test_fine_tuning_keeps_the_model_but_replaces_its_class_head(
    crowded: Path, shapes_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    first = ["train", "--data", str(shapes_root), "--output", str(tmp_path / "first"), *options(), "--device", "cpu"]
    assert run_cli([*first, "-o", "model.decoder.iam.num_maps=50"]) == 0
    capsys.readouterr()
    training = [part for part in options() if part != "-o" and not part.startswith("model.")]
    second = [part for setting in training for part in ("-o", setting)]
    weights = str(tmp_path / "first" / "model.safetensors")
    command = ["train", "--data", str(crowded), "--weights", weights, "--output", str(tmp_path / "second"), *second]
    assert run_cli([*command, "--device", "cpu"]) == 0
    assert "it keeps the classes with the same names" in capsys.readouterr().out
    assert "new random weights: decoder.instance_branch.classes.bias, decoder.instance_branch.classes.weight" in caplog.text
    assert "2 of 4 training images have more than model.decoder.iam.num_maps=50" in caplog.text
    tuned, before = (load_model(tmp_path / name, "cpu") for name in ("second", "first"))
    assert tuned.config.model.encoder == before.config.model.encoder
    moved = (tuned.model.encoder.fusion.weight - before.model.encoder.fusion.weight).detach().abs().max()  # type: ignore[union-attr, operator]
    assert 0 < float(moved) < 0.01, "two small steps change the weights only a little"

    other = [*command, "-o", "model.encoder.ppm=false", "--device", "cpu"]
    other[other.index(str(tmp_path / "second"))] = str(tmp_path / "third")
    assert run_cli(other) == 2
    assert "of another kind of model" in capsys.readouterr().err
