"""Check that wrong settings, specs and paths are refused in one line, and that a lack of memory says what to lower."""

import itertools
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sparseinst.ablation.study import read_spec
from sparseinst.cli import run_cli
from sparseinst.cli.problems import check_arguments, explain
from sparseinst.config import Config
from sparseinst.device import pick_device
from sparseinst.errors import RunFailed, UserError, memory_explained, out_of_memory
from sparseinst.files import read_text
from sparseinst.overrides import load_config
from sparseinst.plain import MOST_CHARACTERS, parse_yaml
from sparseinst.training import train as training
from sparseinst.training.step import Step, check_memory
from sparseinst.words import shorten
from tests.attacks import wrong
from tests.conftest import CPU, TINY

ROOT = Path(__file__).parents[1]


def one_line(caught: pytest.ExceptionInfo[UserError]) -> str:
    text = str(caught.value)
    assert len(text.splitlines()) == 1
    assert len(text) < 700
    return text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 2024-01-01", "a: datetime.date.* is read as a date, which no setting takes; if it is text, put it in quotes"),
        ("a: 2024-13-45", "a value cannot be read: month must be in 1..12"),
        ("a: !!set {b}", "is read as a set"),
        ("a: !!binary aGk=", "is read as a bytes"),
        ("a: &r [*r]", "a: the alias .* contains itself"),
        (f"a: {wrong.BOMB}", "aliases .* stand for more than 20000 values"),
        ("[" * 100_000, "more than 20 levels"),
        ("- " * 1000, "more than 20 levels"),
        ("a: " + "x" * MOST_CHARACTERS, "is this the right file"),
        ("a: 0x" + "f" * 6000, "6000 hexadecimal digits is too large"),
        ('a: {b: "\\ud800"}', "a.b: the text .* half a surrogate pair"),
        ("? [1, 2]\n: 3", "the key .* is not text"),
        ("a: !!bool maybe", "a value cannot be read"),
    ],
)
def test_yaml_that_is_no_plain_data_is_refused(text: str, message: str) -> None:
    with pytest.raises(UserError, match=f"^here: .*{message}") as caught:
        parse_yaml(text, "here")
    one_line(caught)


def test_the_deepest_yaml_is_read() -> None:
    assert parse_yaml("[" * 20 + "]" * 20, "here")
    with pytest.raises(UserError, match="more than 20 levels"):
        parse_yaml("[" * 21 + "]" * 21, "here")


def test_plain_yaml_is_read_with_aliases_and_numbered_keys() -> None:
    text = "a: &x {b: [1, 2.5, null, true, text]}\nc: *x\nnames: {0: car, 1: person}"
    inner = {"b": [1, 2.5, None, True, "text"]}
    assert parse_yaml(text, "here") == {"a": inner, "c": inner, "names": {0: "car", 1: "person"}}


@pytest.mark.parametrize("place", range(len(wrong.SPEC_PARTS)))
def test_no_wrong_value_is_accepted_in_a_spec(tmp_path: Path, place: int) -> None:
    """Each value is tried in one place; the attacks try the others."""
    file = tmp_path / "spec.yaml"
    file.write_text(wrong.SPEC.format(*wrong.SPEC_PARTS))
    assert len(read_spec(str(file)).rows) == 1
    for value in wrong.NO_YAML_VALUES[place :: len(wrong.SPEC_PARTS)]:
        parts = [value if number == place else part for number, part in enumerate(wrong.SPEC_PARTS)]
        file.write_bytes(wrong.SPEC.format(*parts).encode())
        with pytest.raises(UserError) as caught:
            read_spec(str(file))
        assert len(shorten(str(caught.value)).splitlines()) == 1, value[:50]


def test_devices_pipes_and_long_chains_are_no_settings(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for name in ("/dev/zero", "/dev/null", str(tmp_path / "pipe")):
        (tmp_path / "own.yaml").write_text(f"extends: {name}")
        with pytest.raises(UserError, match="is a device or a pipe"):
            load_config(tmp_path / "own.yaml")
    (tmp_path / "loop.yaml").symlink_to("loop.yaml")
    (tmp_path / "own.yaml").write_text("extends: loop.yaml")
    for name in ("loop.yaml", "own.yaml"):
        with pytest.raises(UserError, match="loop.yaml: cannot be read .Too many levels of symbolic links"):
            load_config(tmp_path / name)
    for link in range(40):
        (tmp_path / f"{link}.yaml").write_text(f"extends: {link + 1}.yaml")
    with pytest.raises(UserError, match="extends files over more than 20 steps"):
        load_config(tmp_path / "0.yaml")
    with pytest.raises(UserError, match="cannot be read .File name too long") as caught:
        read_text(Path("a" * 5000))
    one_line(caught)
    (tmp_path / "large.yaml").write_bytes(b"#" * 10**6)
    with pytest.raises(UserError, match="has 1000000 bytes, at most"):
        load_config(tmp_path / "large.yaml")


@pytest.mark.parametrize(
    "setting",
    [
        "model.decoder.mask_scale=1e30",
        "model.decoder.depth=1000000",
        "model.decoder.iam.num_maps=1000000000000",
        "model.width_factor=1e30",
        "inference.size_factor=60",
        "inference.long_side=1000000000",
        "data.workers=100000",
        "train.batch_size=1000000000",
        "train.iterations=99999999999999999999",
    ],
)
def test_settings_that_no_machine_can_have_are_refused(setting: str) -> None:
    with pytest.raises(UserError, match=setting.partition("=")[0].rpartition(".")[2]) as caught:
        load_config(overrides=[setting])
    one_line(caught)


def test_a_batch_above_the_images_is_refused_before_the_training(tiny: Config, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"train.batch_size=1000: there are only \d+ training images with instances"):
        training.train(tiny.replace({"train.batch_size": 1000}), tmp_path, device=CPU, progress=False)
    assert not (tmp_path / "config.yaml").exists()


def test_a_model_that_exceeds_the_memory_is_refused_before_it_is_built() -> None:
    huge = {"model.decoder.depth": 100, "model.decoder.width": 16_384}
    with pytest.raises(UserError, match="billion parameters.*: lower model.decoder.width") as caught:
        check_memory(load_config(overrides={**TINY, **huge}), CPU)
    one_line(caught)
    check_memory(load_config(overrides=TINY), CPU)


@pytest.mark.parametrize("name", ["meta", "gpu", "", "cuda:99", "vulkan"])
def test_devices_that_compute_nothing_are_refused(name: str) -> None:
    with pytest.raises(UserError, match=f"device {name!r} cannot be used") as caught:
        pick_device(name)
    one_line(caught)


def test_a_lack_of_memory_is_recognised() -> None:
    def torch_tensor() -> None:
        torch.empty(2**50)

    def torch_size() -> None:
        torch.empty(2**62, 2**62)

    def numpy_array() -> None:
        np.empty(2**50)

    for allocate in (torch_tensor, torch_size, numpy_array):
        with pytest.raises(RunFailed, match="^out of memory.*: lower it$"), memory_explained("lower it"):
            allocate()
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 1 GiB")
    assert out_of_memory(error) == "out of memory: 2.50 GiB more were needed"
    assert explain(error) == (
        "out of memory: 2.50 GiB more were needed: lower the size of the images (inference.short_side, inference.long_side) or "
        "the batch size",
        1,
    )
    with pytest.raises(RuntimeError, match="shapes"), memory_explained("lower it"):
        raise RuntimeError("shapes differ")
    assert explain(RuntimeError("shapes differ")) is None


def test_a_training_without_memory_says_what_to_lower(
    tiny: Config, tmp_path: Path, shapes_root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    steps = itertools.count()
    gradients = Step.gradients

    def fails(self: Step, *arguments: Any, **options: Any) -> object:
        if next(steps) == 3:
            torch.empty(2**50)
        return gradients(self, *arguments, **options)

    monkeypatch.setattr(Step, "gradients", fails)
    settings = [part for key, value in TINY.items() for part in ("-o", f"{key}={json.dumps(value)}")]
    arguments = ["train", "--data", str(shapes_root), "--output", str(tmp_path / "run"), "--device", "cpu", *settings]
    assert run_cli(arguments) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: out of memory: 4194304.0 GiB more were needed: lower train.batch_size"), error
    assert len(list((tmp_path / "run" / "checkpoints").glob("*.pt"))) == 1, "the checkpoint before it is kept"
    assert run_cli(arguments) == 0, "the same command continues"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--output", ""], "the value of --output is empty"),
        (["train", "--output="], "the value of --output is empty"),
        (["predict", " "], "argument 2 is empty"),
        (["predict", "\udce9.jpg"], "is not UTF-8 text"),
    ],
)
def test_empty_arguments_are_refused(arguments: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        check_arguments(arguments)
    one_line(caught)
    check_arguments(["-o", "train.start=", "--row", "l1 = 5"])


def test_long_paths_and_nan_are_refused_in_one_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    long = "A" * 5000
    for arguments in (["plan", long], ["evaluate", "--weights", long], ["plan", "table5", "--profile", long]):
        assert run_cli(arguments) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert "File name too long" in error
        assert len(error) < 700
        assert error.count("\n") == 1
    assert run_cli(["plan", "table5", "--budget", "inf"]) == 2
    assert "inf is not a finite number" in capsys.readouterr().err
    assert run_cli(["plan", "table5", "--budget", "nan"]) == 2
