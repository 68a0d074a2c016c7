"""Check the names of runs, how `logs` finds runs by them, and that shipped records are told apart from measurements here."""

import shutil
from pathlib import Path

import pytest

from sparseinst.ablation.store import Store
from sparseinst.cli import run_cli
from sparseinst.launch.names import give_name
from sparseinst.launch.status import follow
from sparseinst.paths import NAMES, RunPaths, run_folder
from tests.launch.test_run import EXPERIMENTS, smoke


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "experiments").symlink_to(EXPERIMENTS)
    monkeypatch.chdir(tmp_path)


def test_runs_have_names_and_shipped_records_are_not_taken_for_ours(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["run", "table5", "--profile", "smoke", "--row", "dice alone", "--device", "cpu"]
    assert run_cli(command) == 0
    assert "not measured here" not in capsys.readouterr().out
    plan = smoke(Store(), "table5", row="dice alone")
    [train] = [run for run in plan.runs.values() if run.stage == "train"]
    name = "table5 dice alone seed 0, train, profile smoke"
    assert run_folder(train.key).title() == f"{name} ({train.key[:8]})"
    assert (NAMES / name).resolve() == run_folder(train.key).root.resolve()
    assert f"training {name}" in run_folder(train.key).log.read_text()

    for text in ("table5/dice alone", "DICE ALONE", f"{name}", train.key[:5], str(run_folder(train.key).root)):
        assert run_cli(["logs", text]) == 0, text  # also without --profile
        assert f"training {name}" in capsys.readouterr().out
    shutil.copytree(run_folder(train.key).root, run_folder("f" * 16).root)
    assert run_cli(["logs", "dice alone"]) == 2
    assert f"matches 2 runs: {train.key} ({name}), ffff" in capsys.readouterr().err.replace("\n", " ")
    shutil.rmtree(run_folder("f" * 16).root)
    [evaluation] = [run.key for run in plan.runs.values() if run.stage == "evaluate"]
    assert run_cli(["logs", evaluation]) == 2
    assert "has no log yet; only trainings" in capsys.readouterr().err

    assert run_cli(["curves", str(run_folder(train.key).root), "--output", "c.svg"]) == 0
    assert name in Path("c.svg").read_text()

    shutil.move("runs", "elsewhere")  # as in a fresh clone, which has the records and no runs
    capsys.readouterr()
    assert run_cli(command) == 0
    assert "3 of 3 results were not measured here" in capsys.readouterr().out
    before = {path: path.read_bytes() for path in Path("results/records").iterdir()}
    assert run_cli([*command, "--again"]) == 0
    assert "not measured here" not in capsys.readouterr().out
    assert len(list(Path("results/here/records").iterdir())) == 3
    assert {path: path.read_bytes() for path in Path("results/records").iterdir()} == before
    assert run_cli([*command, "--again", "--results", "r"]) == 2
    assert "cannot be used with --results" in capsys.readouterr().err


def test_a_link_follows_the_newest_run_of_its_name() -> None:
    for key in ("a" * 16, "b" * 16):
        run_folder(key).root.mkdir(parents=True)
        give_name(run_folder(key), "table1 a/b: c seed 1, train, profile p")
    give_name(run_folder("a" * 16), "another row that shares the run")
    [link] = NAMES.iterdir()
    assert link.name == "table1 a-b- c seed 1, train, profile p"
    assert link.resolve() == run_folder("b" * 16).root.resolve()
    assert run_folder("a" * 16).title() == "table1 a/b: c seed 1, train, profile p (aaaaaaaa)"
    assert RunPaths(Path("runs/mine")).title() == "runs/mine"


def test_the_log_of_a_row_is_found_by_its_exact_name(capsys: pytest.CaptureFixture[str]) -> None:
    """A row whose name begins like others can be named, and the profile of the command comes first."""
    names = ("mine gated", "mine gated + overlap", "mine gated + overlap, residual", "mine gated seed 1")
    for profile in ("tiny", "small"):
        for number, row in enumerate(names):
            paths = run_folder(f"{number}{profile}".ljust(16, "0"))
            paths.root.mkdir(parents=True)
            seed = "" if row.endswith("seed 1") else " seed 0"
            give_name(paths, f"{row}{seed}, train, profile {profile}")
            paths.log.write_text(f"{row} at {profile}\n")
    assert run_cli(["logs", "mine/gated + overlap"]) == 2
    message = capsys.readouterr().err
    assert "matches 2 runs" in message, "one of each profile, and not also the row with residual"
    run_folder("1small".ljust(16, "0")).log.unlink()
    for text in ("mine/gated + overlap", "gated + overlap"):
        assert run_cli(["logs", text]) == 0
        assert capsys.readouterr().out == "mine gated + overlap at tiny\n"


def test_names_and_logs_that_are_not_utf8_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    paths = run_folder("a" * 16)
    paths.root.mkdir(parents=True)
    paths.name.write_bytes(b"table1 caf\xe9\n")
    paths.log.write_bytes(b"\xff first line\n")
    assert paths.title() == "table1 caf\ufffd (aaaaaaaa)"
    assert run_cli(["logs", "table1 caf"]) == 0
    assert capsys.readouterr().out == "\ufffd first line\n"
    assert next(iter(follow(paths.log))) == "\ufffd first line\n"
