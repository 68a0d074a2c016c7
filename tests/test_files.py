"""Check that a full or read-only disk gives one line and the right exit code, and damages nothing."""

import errno
import json
import os
from pathlib import Path

import pytest

from sparseinst.bench.report import report_results
from sparseinst.cli import run_cli
from sparseinst.errors import RunFailed, UserError
from sparseinst.files import atomic, check_writable, make_folder

FULL = {errno.ENOSPC: "no space left", errno.EDQUOT: "no space left", errno.EIO: "Input/output error"}
REFUSED = {errno.EROFS: "Read-only file system", errno.EACCES: "Permission denied"}
CODES = {**dict.fromkeys(FULL, 1), **dict.fromkeys(REFUSED, 2)}


def break_writes(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Let the last step of each atomic write fail, after its content is written."""

    def fail(_: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fail)


@pytest.mark.parametrize("number", CODES)
def test_a_failed_write_changes_nothing_and_says_why(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "whole.txt"
    file.write_text("whole")
    break_writes(monkeypatch, number)
    with pytest.raises((RunFailed, UserError), match=(FULL | REFUSED)[number]) as caught, atomic(file) as temporary:
        temporary.write_text("half")
    assert isinstance(caught.value, RunFailed if number in FULL else UserError)
    assert str(file) in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("whole.txt", "whole")]


def test_the_reason_behind_another_error_is_found(tmp_path: Path) -> None:
    """torch.save raises a RuntimeError that hides the disk's error."""
    with pytest.raises(RunFailed, match="no space left"), atomic(tmp_path / "file"):
        raise RuntimeError("unexpected pos") from OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with pytest.raises(RuntimeError, match="shapes"), atomic(tmp_path / "file"):
        raise RuntimeError("shapes differ")


def test_other_errors_of_the_block_stay_as_they_are(tmp_path: Path) -> None:
    with pytest.raises(KeyError), atomic(tmp_path / "file"):
        raise KeyError
    with pytest.raises(FileNotFoundError), atomic(tmp_path / "file"):
        (tmp_path / "missing").read_text()
    assert not list(tmp_path.iterdir())


def test_places_that_cannot_hold_a_file_are_refused_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("whole")
    for place in (tmp_path, tmp_path / "file/below"):
        with pytest.raises(UserError):
            check_writable(place)
    check_writable(tmp_path / "new/file")
    assert not list((tmp_path / "new").iterdir())

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(RunFailed, match="no space left"):
        check_writable(tmp_path / "new/file")
    monkeypatch.setattr(Path, "mkdir", full)
    with pytest.raises(RunFailed, match="no space left"):
        make_folder(tmp_path / "more")


@pytest.mark.slow
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
def test_commands_end_with_one_line(
    number: int,
    trained: Path,
    shapes_root: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Each command has an earlier result, which stays as it was."""
    photo = next((shapes_root / "val2017").iterdir())
    commands = {
        "drawn/predictions.json": ["predict", str(photo), "--weights", str(trained), "--output", "drawn", "--device", "cpu"],
        "found.json": ["evaluate", "--weights", str(trained), "--predictions", "found.json", "--device", "cpu"],
        "curves.png": ["curves", str(trained), "--output", "curves.png"],
        "failures/predictions.json": ["failures", "--weights", str(trained), "--output", "failures", "--device", "cpu"],
        "maps/mean-maps.png": ["maps", "--weights", str(trained), "--output", "maps", "--sheets", "0", "--device", "cpu"],
        "run/config.yaml": ["train", "--output", "run", "--config", str(trained / "config.yaml"), "--device", "cpu"],
    }
    monkeypatch.chdir(tmp_path)
    break_writes(monkeypatch, number)
    for file, command in commands.items():
        Path(file).parent.mkdir(exist_ok=True)
        if command[0] != "train":
            Path(file).write_text("earlier")
        capfd.readouterr()
        assert run_cli(command) == CODES[number], command[0]
        said = capfd.readouterr().err
        errors = [line for line in said.splitlines() if line.startswith("error: ")]
        assert len(errors) == 1, said
        assert "Traceback" not in said
        assert command[0] == "train" or Path(file).read_text() == "earlier"
    left = [path for path in tmp_path.rglob("*.tmp") if path.is_file()]
    assert not left


def test_init_and_bench_write_no_half_files(tmp_path: Path, shapes_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "bench.json"
    output.write_text("earlier")
    break_writes(monkeypatch, errno.ENOSPC)
    with pytest.raises(RunFailed, match="no space left"):
        report_results({"device": "cpu", "rows": []}, output, as_json=True)
    assert output.read_text() == "earlier"
    assert run_cli(["init", "--data", str(shapes_root), "--output", str(tmp_path / "config.yaml"), "--size", "small"]) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["bench.json"]


def test_an_export_is_whole_or_absent(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sparseinst.inference import export

    output = tmp_path / "model.pt2"
    output.write_text("earlier")

    monkeypatch.setattr(export.torch.export, "export", lambda *_, **__: None)
    monkeypatch.setattr(export.torch.export, "save", lambda _, file: file.write(b"new"))
    break_writes(monkeypatch, errno.ENOSPC)
    assert run_cli(["export", "--weights", str(trained), "--form", "torch", "--output", str(output)]) == 1
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("model.pt2", "earlier")]


def test_an_error_that_no_file_explains_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The standard output, too, may go to a full disk."""

    def full(_: str) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(json, "dumps", lambda *_, **__: full(""))
    assert run_cli(["config", "--json"]) == 1
    assert capsys.readouterr().err == "error: standard output: cannot write: no space left; earlier files are unchanged\n"
