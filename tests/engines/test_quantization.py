"""Check the quantisation to int8: what can stay in float, and that parts return to float until AP is kept."""

import json
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from torch import nn

from sparseinst import load_model
from sparseinst.errors import DataError, RunFailed, UserError
from sparseinst.inference import artifacts as keeping
from sparseinst.inference.engine_network import load_artifact
from sparseinst.inference.quantization import (
    PARTS,
    Quantiser,
    int8_artifact,
    int8_file,
    modules_of,
    network_input,
    operators_of,
    part_of,
)
from sparseinst.inference.weights import load_weights
from tests.engines.test_engines import photo, require

INT8 = {"inference.engine": "openvino", "inference.precision": "int8", "inference.calibration_images": 8}


@pytest.mark.parametrize(
    ("module", "part"),
    [
        ("decoder", "kernel x feature product"),
        ("decoder.projection", "mask features"),
        ("decoder.instance_branch.iam.conv", "activation maps"),
        ("decoder.instance_branch.iam", "activation maps"),
        ("decoder.instance_branch.classes", "class and objectness heads"),
        ("decoder.instance_branch.convs.0", "instance branch"),
        ("encoder.ppm.stages.0", "encoder"),
        ("backbone.body.conv1", "backbone stem"),
        ("backbone.body.layer1.0.conv1", None),
        ("encoders", None),
    ],
)
def test_the_part_of_a_module(module: str, part: str | None) -> None:
    assert part_of(module) == part


def test_without_a_score_int8_is_not_made(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARSEINST_CACHE", str(tmp_path))
    with pytest.raises(UserError, match="make one, with its AP checked, by sparseinst export --engine openvino --precision int8"):
        load_model(trained, engine="openvino", precision="int8")


def about(run: Path, **settings: Any) -> tuple[Any, keeping.About]:
    model, config, categories = load_weights(run / "model.safetensors")
    return model, keeping.describe(model, config.replace({**INT8, **settings}), categories)


class Scores:
    """Gives the float network and each attempt a chosen AP."""

    def __init__(self, *values: float) -> None:
        self.values = list(values)

    def __call__(self, artifact: Path, precision: str) -> float:
        assert artifact.exists()
        return self.values.pop(0)


@pytest.mark.slow
def test_parts_return_to_float_until_the_drop_is_allowed(artifacts: Path, trained: Path) -> None:
    pytest.importorskip("nncf", reason="needs the extra int8")
    model, described = about(trained)
    path = int8_artifact(model, described, Scores(60.0, 58.0, 59.0, 59.6))
    recipe = keeping.read_about(path).recipe
    assert recipe is not None
    assert (recipe["AP_float"], recipe["AP"], recipe["calibration_images"]) == (60.0, 59.6, 8)
    assert [attempt["AP"] for attempt in recipe["attempts"]] == [58.0, 59.0, 59.6]
    kept = [attempt["float"] for attempt in recipe["attempts"]]
    assert kept[0] == []
    assert kept[2][:1] == kept[1]
    assert recipe["float"] == kept[2]
    assert set(kept[2]) <= set(PARTS)
    assert int8_artifact(model, described, None) == path, "it is made once"
    found = load_model(path).predict(photo((64, 64)))  # its own engine and precision
    expected = load_model(trained, "cpu").predict(photo((64, 64)))
    assert np.abs(np.sort(found.scores)[-3:] - np.sort(expected.scores)[-3:]).max() < 0.1
    for precision in ("fp32", "bf16"):
        with pytest.raises(UserError, match="is a network for the engine openvino in int8"):
            load_model(path, precision=precision)


@pytest.mark.slow
def test_too_large_a_drop_is_an_error_and_leaves_nothing(artifacts: Path, trained: Path) -> None:
    pytest.importorskip("nncf", reason="needs the extra int8")
    model, described = about(trained, **{"inference.max_drop": 0.1})
    before = set(keeping.network_folder(described).iterdir())
    with pytest.raises(RunFailed, match=r"int8 loses 20.00 AP even with .* in float; 0.1 are allowed"):
        int8_artifact(model, described, Scores(60.0, *[40.0] * 20))
    made = set(keeping.network_folder(described).iterdir()) - before
    assert all(path.name.startswith("network") for path in made)


def test_all_convolutions_of_a_part_stay_in_float(artifacts: Path, trained: Path) -> None:
    require("openvino")
    import openvino

    model, described = about(trained)
    read = openvino.Core().read_model(keeping.float_artifact(model, described, "openvino"))
    modules = modules_of(keeping.float_artifact(model, described, "onnxruntime"))
    kinds = {operator.get_friendly_name(): operator.get_type_name() for operator in read.get_ops()}
    expected = Counter(part_of(name) for name, module in model.named_modules() if isinstance(module, nn.Conv2d))
    found = {part: [kinds[name] for name in operators_of(part, read, modules)].count("Convolution") for part in PARTS}
    assert found == {part: expected[part] for part in PARTS}
    assert found["encoder"] > found["mask features"] == found["backbone stem"] == 1


@pytest.mark.slow
def test_what_is_kept_in_float_runs_in_float(artifacts: Path, trained: Path, tmp_path: Path) -> None:
    nncf = pytest.importorskip("nncf", reason="needs the extra int8")
    import openvino

    model, described = about(trained)
    source = keeping.float_artifact(model, described, "openvino")
    modules = modules_of(keeping.float_artifact(model, described, "onnxruntime"))
    pictures = [Image.fromarray(photo((64, 64)))]
    network = Quantiser(nncf, openvino, source, modules, pictures, lambda picture: network_input(picture, described))
    keeping.write_openvino(network.quantise(list(PARTS)), tmp_path / "model.xml", described)
    layers = load_artifact(tmp_path / "model.xml", described, "int8", keep_compiled=False).facts.layers
    backbone = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d) and part_of(name) is None]
    assert layers["int8"] == len(backbone)
    assert sum(layers.values()) > 2 * layers["int8"]


def test_an_int8_network_is_kept_for_its_settings_and_data(trained: Path, shapes_root: Path, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(shapes_root, data)
    described = about(trained, **{"data.root": str(data)})[1]

    def with_settings(**settings: Any) -> Path:
        return int8_file(replace(described, config=described.config.replace(settings)))

    files = [int8_file(described)]
    for settings in ({"inference.max_drop": 1.0}, {"inference.short_side": 48}, {"data.train_limit": 4}, {"data.val_limit": 3}):
        files.append(with_settings(**settings))
    for split in ("train", "val"):
        file = data / "annotations" / f"instances_{split}2017.json"
        content = json.loads(file.read_text())
        file.write_text(json.dumps({**content, "annotations": content["annotations"][1:]}))
        files.append(int8_file(described))
    assert len(set(files)) == len(files)
    assert with_settings(**{"train.iterations": 9, "data.flip": 0.0}) == files[-1]


def test_a_trained_network_is_never_calibrated_on_noise(trained: Path, shapes_root: Path, tmp_path: Path) -> None:
    shutil.copytree(shapes_root, tmp_path / "data")
    (tmp_path / "data" / "annotations" / "instances_train2017.json").unlink()
    model, described = about(trained, **{"data.root": str(tmp_path / "data")})
    with pytest.raises(DataError, match=r"instances_train2017.json: no such file"):
        int8_artifact(model, described, Scores())
