"""Check the engines: their choice, their artifacts, the precision that they really use, and that they find what torch finds."""

import json
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from sparseinst import load_model
from sparseinst.bench.engines import agreement
from sparseinst.cli import run_cli
from sparseinst.config import ENGINE_PRECISIONS, Config, EngineName
from sparseinst.engines import openvino_engine
from sparseinst.engines.artifact_files import GRAPH, artifact_identity
from sparseinst.engines.base import check_precision
from sparseinst.engines.names import ENGINES, check_engine
from sparseinst.errors import UserError
from sparseinst.evaluation.predictions import read_predictions
from sparseinst.evaluation.weights import evaluate_weights
from sparseinst.inference import artifacts as keeping
from sparseinst.inference import export
from sparseinst.inference.engine_network import prepare
from sparseinst.inference.kept import kept
from sparseinst.inference.predict import Predictor
from sparseinst.inference.weights import load_weights
from sparseinst.machine import multiplies_bfloat16
from sparseinst.models.layers import DeformableConv2d
from sparseinst.models.sparseinst import build_model
from tests.conftest import CPU

SIZES = [(48, 64), (64, 64), (100, 40)]


def photo(size: tuple[int, int]) -> np.ndarray:
    return np.random.default_rng(sum(size)).integers(0, 256, (*size, 3), dtype=np.uint8)


def require(engine: str) -> None:
    """Skip the test where the engine's package is missing."""
    pytest.importorskip("onnxscript", reason="needs the extra export")
    pytest.importorskip(engine, reason=f"needs the extra {engine}")


def test_names_of_engines() -> None:
    assert [check_engine(name) for name in ENGINES] == list(ENGINE_PRECISIONS)
    with pytest.raises(UserError, match="engine tensorrt is not supported yet"):
        check_engine("tensorrt")
    with pytest.raises(UserError, match="did you mean 'openvino'"):
        check_engine("openvin")


def test_a_precision_that_the_engine_lacks_is_refused() -> None:
    with pytest.raises(UserError, match="engine torch has no precision int8.*needs the engine openvino"):
        Config().replace({"inference.precision": "int8"})
    with pytest.raises(UserError, match="engine onnxruntime has no precision bf16"):
        Config().replace({"inference.precision": "bf16", "inference.engine": "onnxruntime"})


def test_an_evaluation_by_another_engine_has_another_key_and_default_keys_stay() -> None:
    default = Config()
    assert "engine" not in default.inference.content("evaluate")
    assert not {"max_drop", "calibration_images"} & set(default.inference.content("evaluate"))
    other = default.replace({"inference.engine": "openvino"})
    assert other.evaluate_key() != default.evaluate_key()
    assert other.latency_key("cpu") != default.latency_key("cpu")
    assert other.train_key() == default.train_key()
    int8 = other.replace({"inference.precision": "int8"})
    looser = int8.replace({"inference.max_drop": 2.0})
    assert len({config.evaluate_key() for config in (other, int8, looser)}) == 3
    assert default.replace({"inference.max_drop": 2.0}).evaluate_key() == default.evaluate_key(), "torch does not quantise"


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_a_missing_package_is_one_line_that_names_the_extra(
    engine: str, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SPARSEINST_CACHE", str(tmp_path))
    made = keeping.network_folder(keeping.describe(*load_weights(trained / "model.safetensors"))) / "network.onnx"
    kept(made, made.touch)  # so that nothing is exported
    monkeypatch.setitem(sys.modules, engine, None)
    assert run_cli(["evaluate", "--weights", str(trained), "--engine", engine]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert f"engine {engine} needs the extra `{engine}`" in error
    assert f"pip install -e '.[{engine}]'" in error


def test_another_compiled_precision_is_an_error() -> None:
    layers = Counter({"bf16": 5, "fp32": 1})
    check_precision("openvino", "bf16", "bf16", layers)
    with pytest.raises(UserError, match="compiled bf16 although fp16 was asked for .*5 in bf16, 1 in fp32"):
        check_precision("openvino", "fp16", "bf16", layers)


def test_int8_may_leave_most_of_a_network_in_float() -> None:
    check_precision("openvino", "int8", "bf16", Counter({"bf16": 5, "int8": 1}))
    with pytest.raises(UserError, match="compiled bf16 although int8 was asked for"):
        check_precision("openvino", "int8", "bf16", Counter({"bf16": 5}))


def test_torch_says_what_ran(trained: Path) -> None:
    found = evaluate_weights(trained / "model.safetensors", {}, device=CPU)
    assert found.engine is not None
    assert (found.engine["engine"], found.engine["precision"]) == ("torch", "fp32")
    assert set(found.engine["layers"]) == {"fp32"}
    half = evaluate_weights(trained / "model.safetensors", {"inference.precision": "bf16"}, device=CPU)
    assert half.engine is not None
    assert set(half.engine["layers"]) == {"bf16"}
    assert half.engine["artifact"] == found.engine["artifact"]


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_an_engine_finds_what_torch_finds_at_all_sizes(engine: Any, artifacts: Path, trained: Path) -> None:
    require(engine)
    expected, ours = load_model(trained, "cpu"), load_model(trained, engine=engine)
    for size in SIZES:
        theirs, found = expected.predict(photo(size)), ours.predict(photo(size))
        assert len(found.scores) == len(theirs.scores) > 0
        np.testing.assert_allclose(found.scores, theirs.scores, atol=1e-4)
        np.testing.assert_array_equal(np.sort(found.maps), np.sort(theirs.maps))
        by_map = dict(zip(theirs.maps, theirs.masks, strict=True))
        assert np.mean([(mask != by_map[index]).mean() for index, mask in zip(found.maps, found.masks, strict=True)]) < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_an_exported_network_is_evaluated_like_its_weights(
    engine: str, artifacts: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    require(engine)
    output = tmp_path / f"model{keeping.ARTIFACT_SUFFIXES[check_engine(engine)]}"
    assert run_cli(["export", "--weights", str(trained), "--engine", engine, "--output", str(output)]) == 0
    digest = artifact_identity(output)[0]
    assert f"digest {digest}" in capsys.readouterr().out
    ran, found = [], []
    for command in (["--weights", str(output)], ["--weights", str(trained), "--engine", engine], ["--weights", str(trained)]):
        assert run_cli(["evaluate", *command, "--json", "--predictions", str(tmp_path / "found.json")]) == 0
        ran.append(json.loads(capsys.readouterr().out)["engine"])
        found.append(read_predictions(tmp_path / "found.json"))
    assert ran[0]["artifact"] == ran[1]["artifact"] == digest
    assert [each["engine"] for each in ran] == [engine, engine, "torch"]
    assert found[0] == found[1]
    same = agreement(found[2], found[0])  # the AP of this model is 0 in every engine
    assert same["equal_images"] == same["images"] > 0


@pytest.mark.slow
def test_a_network_is_exported_once(artifacts: Path, trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    require("onnxruntime")
    load_model(trained, engine="onnxruntime")
    monkeypatch.setattr(export, "export_network", lambda *_: pytest.fail("the network was exported again"))
    load_model(trained, engine="onnxruntime")


@pytest.mark.slow
def test_openvino_compiles_what_is_asked_for(artifacts: Path, trained: Path) -> None:
    require("openvino")
    weights = trained / "model.safetensors"
    if not multiplies_bfloat16():
        pytest.skip("this processor does not multiply bfloat16 numbers")
    found = evaluate_weights(weights, {"inference.engine": "openvino", "inference.precision": "bf16"}, device=CPU).engine
    assert found is not None
    assert (found["precision"], max(found["layers"], key=found["layers"].get)) == ("bf16", "bf16")
    with pytest.raises(UserError, match="compiled bf16 although fp16 was asked for"):
        evaluate_weights(weights, {"inference.engine": "openvino", "inference.precision": "fp16"}, device=CPU)


@pytest.mark.parametrize(
    ("engine", "suffix"), [("onnxruntime", ".onnx"), ("openvino", ".onnx"), ("openvino", ".xml"), ("openvino", ".bin")]
)
def test_a_damaged_file_that_was_kept_is_made_again(
    engine: Any,
    suffix: str,
    artifacts: Path,
    trained: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Otherwise every later start would fail until somebody removes the file."""
    require(engine)
    expected = load_model(trained, "cpu", engine=engine).predict(photo((100, 140)))
    shutil.copytree(artifacts / "networks", tmp_path / "networks")
    monkeypatch.setenv("SPARSEINST_CACHE", str(tmp_path))
    for file in tmp_path.rglob(f"network*{suffix}"):
        file.write_bytes(file.read_bytes()[:1000])
    if suffix == ".onnx" and engine == "openvino":  # it needs this file only to make its own
        for file in tmp_path.rglob("network-*"):
            file.unlink()
    caplog.clear()
    again = load_model(trained, "cpu", engine=engine).predict(photo((100, 140)))
    np.testing.assert_array_equal(again.scores, expected.scores)
    assert "is damaged, so it is made again" in caplog.text


@pytest.mark.parametrize("suffix", [".onnx", ".bin"])
def test_damage_of_the_same_size_is_noticed(
    suffix: str, artifacts: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    engine: Any = "onnxruntime" if suffix == ".onnx" else "openvino"
    require(engine)
    expected = load_model(trained, "cpu", engine=engine).predict(photo((100, 140)))
    shutil.copytree(artifacts / "networks", tmp_path / "networks")
    monkeypatch.setenv("SPARSEINST_CACHE", str(tmp_path))
    for file in tmp_path.rglob(f"network*{suffix}"):
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 64
        file.write_bytes(content)
    again = load_model(trained, "cpu", engine=engine).predict(photo((100, 140)))
    np.testing.assert_array_equal(again.scores, expected.scores)
    assert "is damaged, so it is made again" in caplog.text


def test_a_whole_file_that_cannot_be_loaded_stays(artifacts: Path, trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A lack of memory is no damage, and an int8 network takes minutes to make."""
    require("onnxruntime")
    import onnxruntime

    load_model(trained, "cpu", engine="onnxruntime")
    before = {file: file.stat().st_mtime_ns for file in artifacts.rglob("network*.onnx")}

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("std::bad_alloc")

    monkeypatch.setattr(onnxruntime, "InferenceSession", fail)
    with pytest.raises(UserError, match=r"cannot load it \(std::bad_alloc\)"):
        load_model(trained, "cpu", engine="onnxruntime")
    assert {file: file.stat().st_mtime_ns for file in artifacts.rglob("network*.onnx")} == before


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_an_artifact_runs_without_the_packages_of_the_layers(engine: str, artifacts: Path, trained: Path, tmp_path: Path) -> None:
    """timm and torchvision take longer to import than an engine's network takes to load."""
    require(engine)
    file = tmp_path / f"model{keeping.ARTIFACT_SUFFIXES[check_engine(engine)]}"
    assert run_cli(["export", "--weights", str(trained), "--engine", engine, "--output", str(file)]) == 0
    code = (
        "import sys, numpy, sparseinst; "
        f"sparseinst.load_model({str(file)!r}).predict(numpy.zeros((90, 120, 3), 'uint8')); "
        "assert not {'timm', 'torchvision'} & set(sys.modules), 'they were imported'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_weights_that_were_not_copied_are_named(artifacts: Path, trained: Path, tmp_path: Path) -> None:
    require("openvino")
    assert run_cli(["export", "--weights", str(trained), "--engine", "openvino", "--output", str(tmp_path / "model.xml")]) == 0
    (tmp_path / "model.bin").unlink()
    with pytest.raises(UserError, match=r"model\.xml: its weights are missing: copy model\.bin"):
        load_model(tmp_path / "model.xml")


def test_the_digest_does_not_depend_on_the_numbers_in_names(tmp_path: Path) -> None:
    """OpenVINO counts everything that a process has made, so that the same network gets other numbers."""
    digests = set()
    for number in (175685, 187514):
        layer = f'<net><layer id="0" name="Constant_{number}" type="Const"/></net>'
        (tmp_path / "model.xml").write_text(layer)
        (tmp_path / "model.bin").write_bytes(b"weights")
        digests.add(artifact_identity(tmp_path / "model.xml")[0])
    assert len(digests) == 1
    (tmp_path / "model.bin").write_bytes(b"others")
    assert artifact_identity(tmp_path / "model.xml")[0] not in digests


def test_a_cache_that_cannot_be_written_names_its_variable(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    require("onnxruntime")
    (tmp_path / "file").touch()
    monkeypatch.setenv("SPARSEINST_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match="set SPARSEINST_CACHE to a folder that you may write to"):
        load_model(trained, "cpu", engine="onnxruntime")


def test_an_unknown_optimisation_is_refused(trained: Path) -> None:
    with pytest.raises(UserError, match="optimisation 'fast' is unknown: expected one of folded, compiled, graph, best"):
        load_model(trained, "cpu", optimize="fast")  # type: ignore[arg-type]


def test_an_engine_has_no_optimisation_of_torch(tiny: Config) -> None:
    predictor = Predictor(build_model(tiny.model), tiny.replace({"inference.engine": "onnxruntime"}), (), CPU)
    with pytest.raises(UserError, match="engine onnxruntime optimises the network itself"):
        predictor.optimize("folded")


@pytest.mark.slow
def test_threads_of_onnxruntime_do_not_spin_between_images(artifacts: Path, trained: Path) -> None:
    """They would slow down the engine that is timed next."""
    require("onnxruntime")
    session = load_model(trained, engine="onnxruntime").model.engine._session
    assert session.get_session_options().get_session_config_entry("session.force_spinning_stop") == "1"


def test_after_a_training_on_a_gpu_another_engine_evaluates_on_the_processor(
    trained: Path, tmp_path: Path, shapes_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    devices: list[Any] = []

    def evaluate(_: Path, __: Config, *, device: Any) -> Any:
        devices.append(device)
        raise UserError("stop here")

    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("sparseinst.training.train.train", lambda _, output, *, device, **__: devices.append(device) or output)
    monkeypatch.setattr("sparseinst.evaluation.weights.evaluate_run", evaluate)
    run_cli(["train", "--output", str(tmp_path), "-o", f"data.root={shapes_root}", "-o", "inference.engine=openvino"])
    assert [device.type for device in devices] == ["cuda", "cpu"]


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_deformable_convolutions_run_in_every_engine(artifacts: Path, tiny: Config, engine: EngineName) -> None:
    require(engine)
    config = tiny.replace({"model.decoder.deformable": True, "inference.engine": engine})
    torch.manual_seed(0)
    model = build_model(config.model).eval()
    for module in model.modules():
        if isinstance(module, DeformableConv2d):
            torch.nn.init.normal_(module.offset.weight, std=0.1)
    network = prepare(model, config, (), device=CPU).network
    for size in SIZES[:2]:
        images = torch.randn(1, 3, *(-(-side // 32) * 32 for side in size))
        with torch.no_grad():
            for expected, found in zip(model(images), network(images), strict=True):
                torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


def test_files_that_are_no_networks_are_refused(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    (tmp_path / "text.onnx").write_text("no network")
    with pytest.raises(UserError, match="is not an ONNX file, or it is incomplete: copy or export it again"):
        load_model(tmp_path / "text.onnx")
    empty = onnx.helper.make_model(onnx.helper.make_graph([], "empty", [], []))
    onnx.save(empty, tmp_path / "other.onnx")
    with pytest.raises(UserError, match="is no network of this package, or it is incomplete"):
        load_model(tmp_path / "other.onnx")
    with pytest.raises(UserError, match="no such file"):
        load_model(tmp_path / "none.onnx")
    whole = onnx.load(tmp_path / "other.onnx")
    whole.metadata_props.add(key=GRAPH, value="{}")
    onnx.save(whole, tmp_path / "whole.onnx")
    with pytest.raises(UserError, match="contains pre- and post-processing.* sparseinst export --engine onnxruntime"):
        load_model(tmp_path / "whole.onnx")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--engine", "torch", "--output", "m.onnx"], "torch needs no exported network"),
        (["--engine", "onnxruntime", "--output", "m.xml"], "name it m.onnx"),
        (["--precision", "int8", "--output", "m.onnx"], "need --engine"),
        (["--engine", "tensorrt", "--output", "m.onnx"], "not supported yet"),
    ],
)
def test_exports_that_cannot_be_are_refused(
    options: list[str], message: str, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_cli(["export", "--weights", str(trained), *options]) == 2
    assert message in capsys.readouterr().err


def test_the_metrics_library_has_another_option(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli(["evaluate", "--weights", str(trained), "--engine", "pycocotools"]) == 2
    assert "--evaluator pycocotools" in capsys.readouterr().err


@pytest.mark.parametrize("offered", [["bf16", "f32"], ["f32"], []])
def test_int8_runs_its_other_layers_in_what_openvino_offers(
    offered: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """OpenVINO is a stand-in, because its offer depends on the CPU: with AMX it refuses some networks in int8 and bf16."""
    tried = []

    def compile_model(_artifact: Path, _device: str, settings: dict[str, Any]) -> Any:
        tried.append(settings["INFERENCE_PRECISION_HINT"])
        if tried[-1] not in offered:
            raise RuntimeError("Exception from core.cpp\nNo suitable implementations.")
        return SimpleNamespace(create_infer_request=lambda: None)

    core = SimpleNamespace(compile_model=compile_model)
    monkeypatch.setitem(sys.modules, "openvino", SimpleNamespace(Core=lambda: core, __version__="1"))
    monkeypatch.setattr(openvino_engine, "artifact_identity", lambda _: ("digest", 1))
    monkeypatch.setattr(openvino_engine, "_count_layers", lambda _: (Counter(int8=3), Counter(int8=3)))
    monkeypatch.setattr(openvino_engine, "multiplies_bfloat16", lambda: True)
    if not offered:
        with pytest.raises(UserError, match=r"OpenVINO cannot load it \(No suitable implementations"):
            openvino_engine.load(tmp_path / "a.xml", "int8")
    else:
        assert openvino_engine.load(tmp_path / "a.xml", "int8").facts.precision == "int8"
    assert tried == (["bf16"] if "bf16" in offered else ["bf16", "f32"])
