"""Check the quantisation to int8: what can stay in float, and that parts return to float until AP is kept."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sparseinst import load_model
from sparseinst.config import Config
from sparseinst.errors import RunFailed, UserError
from sparseinst.inference import artifacts as keeping
from sparseinst.inference.quantization import PARTS, int8_artifact, part_of
from sparseinst.inference.weights import load_weights
from tests.engines.test_engines import photo

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


def test_the_settings_of_int8_name_the_artifact(trained: Path) -> None:
    """Another allowed drop gives another artifact; another engine setting of the weights' own config does not matter."""
    config: Config = about(trained)[1].config
    assert config.replace({"inference.max_drop": 1.0}).inference.content() != config.inference.content()
