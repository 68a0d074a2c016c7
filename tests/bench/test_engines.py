"""Check the comparison of engines: which settings are timed, and that the artifact that is timed is the one that is scored."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sparseinst.bench import engines as comparing
from sparseinst.bench.engine_report import draw_engines, report_engines
from sparseinst.bench.engines import agreement, compare_engines, engine_settings
from sparseinst.bench.isolated import Runner
from sparseinst.bench.rows import Setting, Task, apply_changes, load_network
from sparseinst.cli import run_cli
from sparseinst.data.masks import encode
from sparseinst.errors import RunFailed, UserError
from tests.conftest import CPU


def test_every_installed_engine_is_timed_in_its_precisions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comparing, "_missing_package", lambda name: name if name in ("onnxruntime", "nncf") else None)
    monkeypatch.setattr(comparing, "multiplies_bfloat16", lambda: True)
    settings, missing = engine_settings(Setting(), ["all"], None, ["eager", "compiled"])
    assert [(each.engine, each.precision, each.mode) for each in settings] == [
        ("torch", "fp32", "eager"),
        ("torch", "fp32", "compiled"),
        ("torch", "bf16", "eager"),
        ("torch", "bf16", "compiled"),
        ("openvino", "fp32", "compiled"),
        ("openvino", "bf16", "compiled"),
    ]
    assert len(missing) == 2
    assert "pip install -e '.[onnxruntime]'" in missing[0]
    assert "pip install -e '.[int8]'" in missing[1]
    monkeypatch.setattr(comparing, "multiplies_bfloat16", lambda: False)
    settings, missing = engine_settings(Setting(), ["openvino"], None, ["eager"])
    assert [each.precision for each in settings] == ["fp32"]
    assert "openvino in bf16 is left out" in missing[0]


def test_named_engines_and_precisions() -> None:
    settings, _ = engine_settings(Setting(), ["openvino", "torch"], ["int8", "fp32"], ["eager"])
    assert [(each.engine, each.precision) for each in settings] == [("openvino", "fp32"), ("openvino", "int8"), ("torch", "fp32")]
    with pytest.raises(UserError, match="engine onnxruntime has none of bf16"):
        engine_settings(Setting(), ["onnxruntime"], ["bf16"], ["eager"])
    with pytest.raises(UserError, match="so its mode is compiled"):
        Setting(engine="openvino", mode="best")
    with pytest.raises(UserError, match="precision 'int8' is unknown"):
        Setting(precision="int8")
    assert apply_changes(Setting(), "engine=openvino,precision=int8", size_of_model=False).mode == "compiled"
    with pytest.raises(UserError, match="only torch trains"):
        Task(train=True).check(Setting(engine="openvino", mode="compiled"))


def instance(image: int, category: int, score: float, left: int, width: int = 8) -> dict[str, Any]:
    mask = np.zeros((1, 16, 32), dtype=np.bool_)
    mask[0, 4:12, left : left + width] = True
    return {"image_id": image, "category_id": category, "score": score, "segmentation": encode(mask)[0]}


def test_agreement_counts_images_whose_instances_have_partners() -> None:
    expected = [instance(1, 1, 0.9, 0), instance(1, 1, 0.8, 16), instance(2, 1, 0.7, 0), instance(3, 2, 0.6, 0)]
    found = [instance(1, 1, 0.8, 16), instance(1, 1, 0.90005, 0), instance(2, 1, 0.65, 0), instance(3, 1, 0.6, 0)]
    assert agreement(expected, found) == {"images": 3, "equal_images": 1, "score_difference": 0.05, "mask_iou": 1.0}
    shifted = [*expected[:3], instance(3, 2, 0.6, 4)]
    assert agreement(expected, shifted)["equal_images"] == 2
    assert agreement(expected, shifted)["mask_iou"] == pytest.approx((3 + 4 / 12) / 4, abs=1e-4)
    assert agreement(expected, expected[:3])["equal_images"] == 2, "a missing instance counts"
    empty_and_twice = [instance(4, 1, 0.3, 0, 0), instance(4, 1, 0.2, 0, 0), instance(4, 1, 0.9, 4), instance(4, 1, 0.5, 4)]
    assert agreement(empty_and_twice, empty_and_twice[::-1])["equal_images"] == 1


@pytest.mark.slow
@pytest.mark.usefixtures("in_this_process")
def test_the_command_gives_speed_and_accuracy_of_the_same_artifacts(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("onnxruntime", reason="needs the extra onnxruntime")
    pytest.importorskip("onnxscript", reason="needs the extra export")
    monkeypatch.setenv("SPARSEINST_CACHE", str(tmp_path / "cache"))
    command = [
        "bench",
        "--model",
        str(trained),
        "--engines",
        "--engine",
        "torch",
        "--engine",
        "onnxruntime",
        "--precision",
        "fp32",
    ]
    assert run_cli([*command, "--repetitions", "3", "--warmup", "1", "--plot", str(tmp_path / "p.png"), "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [(row["engine"], row["precision"], row["mode"]) for row in rows] == [
        ("torch", "fp32", "plain"),
        ("torch", "fp32", "eager"),
        ("onnxruntime", "fp32", "compiled"),
    ]
    for row in rows:
        assert row["whole_ms"]["p5"] <= row["whole_ms"]["median"] <= row["whole_ms"]["p95"]
        assert row["first_image_s"] > 0
        assert 0 < row["post_ms"] < 2 * row["whole_ms"]["p95"]
        assert row["bytes"] > 1000
        assert row["AP_lost"]["low"] - 1e-9 <= row["AP_lost"]["value"] <= row["AP_lost"]["high"] + 1e-9
        assert row["AP_lost"]["value"] == pytest.approx(rows[0]["AP"] - row["AP"], abs=1e-3)
    assert rows[0]["ratio"]["median"] == 1
    assert rows[0]["agreement"]["equal_images"] == rows[0]["agreement"]["images"] > 0
    assert rows[2]["agreement"]["score_difference"] < 1e-3
    assert rows[2]["facts"]["artifact"] != rows[0]["facts"]["artifact"] == rows[1]["facts"]["artifact"]
    assert (tmp_path / "p.png").exists()
    assert (tmp_path / "p.svg").exists()
    from sparseinst.bench.engine_report import print_engines

    print_engines(rows, "a processor")
    printed = capsys.readouterr().out
    assert "onnxruntime" in printed
    assert rows[2]["facts"]["artifact"] in printed


def test_the_plot_says_what_its_times_are_of() -> None:
    row = {"model": "m", "size": 64, "engine": "torch", "precision": "fp32", "mode": "eager"}
    row |= {"whole_ms": {"median": 8.0, "p5": 7.0, "p95": 9.0}, "AP_lost": {"value": 0.0, "low": 0.0, "high": 0.0}}
    labels = []
    for batch in (1, 4):
        figure = draw_engines([{**row, "batch": batch}], "a processor")
        assert figure is not None
        labels.append(figure.axes[0].get_xlabel().partition(" (")[0])
    assert labels == ["milliseconds an image", "milliseconds a batch of 4 images"]


def test_the_same_images_decide_about_int8_where_it_is_scored_and_where_it_is_timed() -> None:
    config, _ = load_network(Setting("demo", 256), images=7)
    assert config.data.val_limit == 7
    assert load_network(Setting("demo", 256))[0].data.val_limit is None


@pytest.mark.usefixtures("in_this_process")
def test_random_weights_have_no_ap(
    monkeypatch: pytest.MonkeyPatch, tiny: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(comparing, "load_network", lambda *_: (tiny, None))
    monkeypatch.setattr("sparseinst.bench.rows.load_network", lambda *_: (tiny, None))
    rows = compare_engines([Setting(size=64)], Task(), CPU, warmup=1, repetitions=2)
    assert [(row["AP"], row["AP_lost"], row["agreement"]) for row in rows] == [(None, None, None)] * 2
    assert rows[0]["facts"]["artifact"] == rows[1]["facts"]["artifact"], "random weights are the same each time"
    results = {"device": "a processor", "rows": rows}
    report_engines(results, None, tmp_path / "plot.png", as_json=True)
    assert "plot.png: not drawn, because r50-iam has no AP" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_another_artifact_than_the_scored_one_is_an_error(monkeypatch: pytest.MonkeyPatch, tiny: Any) -> None:
    monkeypatch.setattr(comparing, "load_network", lambda *_: (tiny, None))

    def race(settings: list[Setting], *_: Any) -> list[Runner]:
        return [Runner([0.1, 0.1], 1.0, {"artifact": "another"}, 5.0) for _ in settings]

    monkeypatch.setattr(comparing, "race_isolated", race)
    with pytest.raises(RunFailed, match="timed the artifact another, but scored"):
        compare_engines([replace(Setting(), size=64)], Task(), CPU, warmup=1, repetitions=2)


def test_options_that_go_with_engines(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli(["bench", "--images", "3"]) == 2
    assert "need --engines" in capsys.readouterr().err
    assert run_cli(["bench", "--engines", "--train"]) == 2
    assert run_cli(["bench", "--engine", "tensorrt"]) == 2
    assert "tensorrt is not supported yet" in capsys.readouterr().err
