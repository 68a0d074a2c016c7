"""Any COCO-format folder: other categories, more instances than maps, fine-tuning."""

from pathlib import Path

import numpy as np
import pytest

from sparseinst import load_model
from sparseinst.cli import run_cli

from .conftest import TINY, annotation, box, write_coco

QUICK = {**TINY, "train.iterations": 2, "train.warmup_iterations": 1, "train.batch_size": 2}


def options(**more: object) -> list[str]:
    """The quick model, without classes and maps."""
    settings = {key: value for key, value in {**QUICK, **more}.items() if "num_" not in key}
    return [part for key, value in settings.items() for part in ("-o", f"{key}={value}")]


@pytest.fixture
def crowded(tmp_path: Path) -> Path:
    """One class with the id 1000, beside one of id 7 that nothing is of; images of 40 and 400 instances."""
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
    """Without a change of code: classes, ids and the number of maps come from the file."""
    assert run_cli(["train", "--data", str(crowded), "--output", str(tmp_path / "run"), *options(), "--device", "cpu"]) == 0
    told = capsys.readouterr().out
    assert "2 classes: seven, thousand" in told
    assert "images hold up to 400 instances: model.decoder.iam.num_maps=400 in place of 100" in told
    assert "take no part" not in caplog.text
    model = load_model(tmp_path / "run", "cpu")
    assert [category.id for category in model.categories] == [7, 1000]
    assert model.config.model.decoder.iam.num_maps == 400
    assert set(model.predict(np.zeros((40, 50, 3), np.uint8)).names) <= {"seven", "thousand"}


def test_too_few_maps_are_told_in_numbers(crowded: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    command = ["train", "--data", str(crowded), "--output", str(tmp_path / "run"), *options(), "--device", "cpu"]
    assert run_cli([*command, "-o", "model.decoder.iam.num_maps=50"]) == 0
    assert "2 of 4 training images hold more than model.decoder.iam.num_maps=50 instances, up to 400; 360 of them" in caplog.text


def test_fine_tuning_takes_the_model_and_starts_its_class_head_afresh(
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
    assert "the class head starts afresh" in capsys.readouterr().out
    assert "afresh: decoder.instance_branch.classes.bias, decoder.instance_branch.classes.weight" in caplog.text
    assert "2 of 4 training images hold more than model.decoder.iam.num_maps=50" in caplog.text
    tuned, before = (load_model(tmp_path / name, "cpu") for name in ("second", "first"))
    assert tuned.config.model.encoder == before.config.model.encoder
    moved = (tuned.model.encoder.fusion.weight - before.model.encoder.fusion.weight).detach().abs().max()  # type: ignore[union-attr, operator]
    assert 0 < float(moved) < 0.01, "two small steps from where it was"

    other = [*command, "-o", "model.encoder.ppm=false", "--device", "cpu"]
    other[other.index(str(tmp_path / "second"))] = str(tmp_path / "third")
    assert run_cli(other) == 2
    assert "of another kind of model" in capsys.readouterr().err
