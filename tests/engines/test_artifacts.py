"""Check the files of the engines: what they say about themselves, and that no file of another network takes their place."""

import logging
import os
import resource
import shutil
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from sparseinst import load_model
from sparseinst.cli import run_cli
from sparseinst.engines.artifact_files import artifact_files, artifact_identity
from sparseinst.engines.names import check_engine
from sparseinst.errors import RunFailed, UserError
from sparseinst.inference.artifacts import (
    ARTIFACT_SUFFIXES,
    copy_artifact,
    describe,
    float_artifact,
    read_about,
    write_openvino,
)
from sparseinst.inference.kept import kept
from sparseinst.inference.weights import load_weights
from sparseinst.machine import multiplies_bfloat16
from tests.engines.test_engines import require


@pytest.fixture
def network(artifacts: Path, trained: Path) -> Path:
    """Return the OpenVINO artifact of the trained network."""
    require("openvino")
    model, config, categories = load_weights(trained / "model.safetensors")
    return float_artifact(model, describe(model, config, categories), "openvino")


@pytest.fixture
def other(artifacts: Path, trained: Path) -> Path:
    """Return the artifact of a network whose weights differ in one bias."""
    require("openvino")
    model, config, categories = load_weights(trained / "model.safetensors")
    torch.nn.init.ones_(model.decoder.instance_branch.classes.bias)
    return float_artifact(model, describe(model, config, categories), "openvino")


def export(weights: Path, engine: str, output: Path, *more: str) -> None:
    assert run_cli(["export", "--weights", str(weights), "--engine", engine, "--output", str(output), *more]) == 0


@pytest.mark.slow
def test_an_exported_network_has_its_own_settings_and_not_those_of_an_earlier_use(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    require("onnxruntime")
    monkeypatch.setenv("SPARSEINST_CACHE", str(tmp_path / "cache"))
    small = ["-o", "inference.short_side=32", "-o", "data.val_limit=2"]
    _, config, categories = load_weights(trained / "model.safetensors")
    for engine in filter(find_spec, ("onnxruntime", "openvino")):
        assert run_cli(["evaluate", "--weights", str(trained), "--engine", engine, *small]) == 0
        output = tmp_path / f"model{ARTIFACT_SUFFIXES[check_engine(engine)]}"
        export(trained, engine, output)
        about = read_about(output)
        assert (about.config.inference.short_side, about.config.data.val_limit) == (64, None)
        assert about.config == config.replace({"inference.engine": engine})
        assert about.categories == categories
        [made] = (tmp_path / "cache" / "networks").glob(f"*/network*{output.suffix}")
        assert artifact_identity(made)[0] == artifact_identity(output)[0], "the network is the same"


@pytest.mark.slow
def test_a_network_that_is_exported_in_bf16_runs_in_bf16(artifacts: Path, trained: Path, tmp_path: Path) -> None:
    require("openvino")
    if not multiplies_bfloat16():
        pytest.skip("this processor does not multiply bfloat16 numbers")
    export(trained, "openvino", tmp_path / "model.xml", "--precision", "bf16")
    assert load_model(tmp_path / "model.xml").model.engine.facts.precision == "bf16"
    assert load_model(tmp_path / "model.xml", precision="fp32").model.engine.facts.precision == "fp32"


def test_weights_of_another_export_are_refused(trained: Path, network: Path, other: Path, tmp_path: Path) -> None:
    model, config, categories = load_weights(trained / "model.safetensors")
    copy_artifact(network, tmp_path / "model.xml", describe(model, config, categories))
    assert load_model(tmp_path / "model.xml").config.inference.engine == "openvino"
    shutil.copy(other.with_suffix(".bin"), tmp_path / "model.bin")
    with pytest.raises(UserError, match=r"model.xml: model.bin beside it holds other weights"):
        load_model(tmp_path / "model.xml")


def test_the_compiled_network_of_older_weights_is_not_used(network: Path, other: Path, tmp_path: Path) -> None:
    """The files have the same names, sizes and times, as in archives without times."""
    from sparseinst.engines.openvino_engine import load

    image = torch.rand(1, 3, 64, 64)
    found = []
    for weights in (network, other):
        for source, target in zip((network, weights.with_suffix(".bin")), artifact_files(tmp_path / "m.xml"), strict=True):
            shutil.copy(source, target)
            os.utime(target, (1e9, 1e9))
        found.append(load(tmp_path / "m.xml", "fp32", cache=tmp_path / "compiled").run(image).class_logits)
    torch.testing.assert_close(found[1], load(tmp_path / "m.xml", "fp32").run(image).class_logits)
    assert not torch.equal(*found)


def test_without_a_place_for_compiled_networks_there_is_a_warning(network: Path, caplog: pytest.LogCaptureFixture) -> None:
    from sparseinst.engines.openvino_engine import load

    with caplog.at_level(logging.WARNING):
        load(network, "fp32", cache=Path("/dev/null/compiled"))
    assert "the compiled network is not kept" in caplog.text


@pytest.mark.parametrize("made", [False, True])
def test_a_folder_in_place_of_the_digests_is_one_line(tmp_path: Path, made: bool) -> None:
    artifact = tmp_path / "network.onnx"
    if made:
        artifact.touch()
    (tmp_path / "network.onnx.sha256").mkdir()
    with pytest.raises(UserError, match=r"network\.onnx\.sha256: is a folder, a file was expected"):
        kept(artifact, artifact.touch)


def test_a_copy_that_is_interrupted_leaves_no_xml_beside_weights_of_another_network(
    trained: Path, network: Path, other: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    about = describe(*load_weights(trained / "model.safetensors"))
    output = tmp_path / "model.xml"
    copy_artifact(network, output, about)
    before = [path.read_bytes() for path in artifact_files(output)]

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "copyfile", interrupt)
        with pytest.raises(KeyboardInterrupt):
            copy_artifact(other, output, about)
    assert [path.read_bytes() for path in artifact_files(output)] == before
    rename = Path.replace
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", lambda path, to: interrupt() if to == output else rename(path, to))
        with pytest.raises(KeyboardInterrupt):
            copy_artifact(other, output, about)
    assert not output.exists()
    copy_artifact(other, output, about)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.bin", "model.xml"]


@pytest.fixture
def small_files() -> Iterator[None]:
    """Let every write of more than 1,000 bytes to a file fail."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_openvino_cannot_write(trained: Path, network: Path, tmp_path: Path, small_files: None) -> None:
    import openvino

    about = describe(*load_weights(trained / "model.safetensors"))
    with pytest.raises(RunFailed, match=r"model.xml: OpenVINO cannot write it .* MB are free on this disk"):
        write_openvino(openvino.Core().read_model(network), tmp_path / "model.xml", about)
    assert not list(tmp_path.iterdir())
