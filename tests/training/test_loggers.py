"""Check the loggers: they change no bits, a resumed training continues its logged run, and failures end no training.

The real packages are tested where they are installed; none of them needs a network here.
"""

import json
import logging
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from sparseinst.cli import run_cli
from sparseinst.config import Config
from sparseinst.errors import UserError
from sparseinst.paths import RunPaths
from sparseinst.training import loggers
from tests.conftest import run
from tests.training.test_train import assert_same

FOREIGN = pytest.mark.filterwarnings("ignore")  # these packages warn of their own parts and leave files open


class Remembering:
    """A logger that keeps what it gets, and disturbs torch's random numbers."""

    runs: dict[str, list[tuple[int, dict[str, float]]]] = {}  # noqa: RUF012
    outcomes: list[str] = []  # noqa: RUF012
    fails_at: int | None = None

    def __init__(self, config: Config, paths: RunPaths, known: str | None) -> None:
        self.id = known or f"run {len(self.runs)}"
        self.runs.setdefault(self.id, [])
        torch.rand(7)

    def log(self, values: Mapping[str, float], step: int) -> None:
        torch.rand(7)
        if step == self.fails_at:
            raise ConnectionError("no network\nmore lines")
        self.runs[self.id].append((step, dict(values)))

    def close(self, outcome: str) -> None:
        self.outcomes.append(outcome)


@pytest.fixture
def remembering(monkeypatch: pytest.MonkeyPatch) -> type[Remembering]:
    class Fresh(Remembering):
        runs: dict[str, list[tuple[int, dict[str, float]]]] = {}  # noqa: RUF012
        outcomes: list[str] = []  # noqa: RUF012

    monkeypatch.setitem(loggers._LOGGERS, "mlflow", Fresh)
    monkeypatch.setattr(loggers, "check_installed", lambda names: None)
    monkeypatch.setattr("sparseinst.training.train.check_installed", lambda names: None)
    return Fresh


def stop_after_four(paths: RunPaths) -> None:
    """Leave a run as after a kill between the fourth and the last step, whose values were logged."""
    paths.weights.unlink()
    paths.checkpoint(6).unlink()


def test_a_resumed_training_continues_its_logged_run_and_gives_the_same_bits(
    tiny: Config, tmp_path: Path, remembering: type[Remembering]
) -> None:
    plain = run(tiny, tmp_path / "plain")
    config = tiny.replace({"train.loggers": ["mlflow"], "train.evaluate_every": 3})
    assert config.train_key() == tiny.train_key()
    assert_same(run(config, tmp_path / "logged"), plain)
    stop_after_four(RunPaths(tmp_path / "logged"))
    assert_same(run(config, tmp_path / "logged"), plain)
    [logged] = remembering.runs.values()
    train = [(step, values) for step, values in logged if "train/loss" in values]
    assert [step for step, _ in train] == [1, 2, 3, 4, 5, 6], "no step twice"
    assert {"train/loss_dice", "train/learning_rate"} <= train[0][1].keys()
    assert [step for step, values in logged if "val/AP" in values or "val/AR1" in values] == [3]
    assert remembering.outcomes == ["finished", "finished"]
    kept = json.loads(RunPaths(tmp_path / "logged").loggers.read_text())
    assert kept == {"mlflow": {"run": "run 0", "train": 6, "val": 3}}


def test_a_logger_that_fails_is_left_out_with_one_warning(
    tiny: Config, tmp_path: Path, remembering: type[Remembering], caplog: pytest.LogCaptureFixture
) -> None:
    config = tiny.replace({"train.loggers": ["mlflow"]})
    remembering.fails_at = 3
    with caplog.at_level(logging.WARNING):
        run(config, tmp_path / "run")
    warnings = [r.getMessage() for r in caplog.records if "mlflow" in r.getMessage() and r.levelno == logging.WARNING]
    assert warnings == ["mlflow failed, so the training goes on without it: no network"]
    assert [step for step, _ in remembering.runs["run 0"]] == [1, 2]
    remembering.fails_at = None
    stop_after_four(RunPaths(tmp_path / "run"))
    run(config, tmp_path / "run")
    assert [step for step, _ in remembering.runs["run 0"]] == [1, 2, 5, 6], "a resumed training tries again"


def test_a_training_that_fails_or_has_a_damaged_file_says_so(
    tiny: Config,
    tmp_path: Path,
    remembering: type[Remembering],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = tiny.replace({"train.loggers": ["mlflow"]})
    (tmp_path / "run").mkdir()
    RunPaths(tmp_path / "run").loggers.write_text("[1")

    def fail(*_: Any, **__: Any) -> None:
        raise OSError("the disk")

    with monkeypatch.context() as patch:
        patch.setattr("sparseinst.training.train.save_checkpoint", fail)
        with caplog.at_level(logging.WARNING), pytest.raises(OSError, match="the disk"):
            run(config, tmp_path / "run")
    assert remembering.outcomes == ["failed"]
    assert "loggers.json is damaged" in caplog.text


def test_a_missing_package_is_one_line_before_the_training(tiny: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loggers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"wandb is not installed: pip install -e '\.\[wandb\]', or leave it out"):
        run(tiny.replace({"train.loggers": ["wandb"]}), tmp_path / "run")
    assert not RunPaths(tmp_path / "run").config.exists()


def test_a_folder_with_a_packages_name_is_no_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "no_such_logger").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(UserError, match="no_such_logger is not installed"):
        loggers.check_installed(["no_such_logger"])
    loggers.check_installed(["json"])


def train_in_two_parts(tiny: Config, folder: Path, name: str) -> RunPaths:
    """Train with a real logger, with a stop after four of six steps, and compare the weights with those without a logger."""
    config = tiny.replace({"train.loggers": [name], "train.log_project": "tests", "train.evaluate_every": 3})
    plain = run(tiny, folder / "plain")
    handler = signal.getsignal(signal.SIGINT)
    assert_same(run(config, folder / "logged"), plain)
    assert signal.getsignal(signal.SIGINT) == handler
    paths = RunPaths(folder / "logged")
    stop_after_four(paths)
    kept = json.loads(paths.loggers.read_text())
    kept[name] |= {"train": 4}  # as if the values of the last steps had not been sent
    paths.loggers.write_text(json.dumps(kept))
    assert_same(run(config, folder / "logged"), plain)
    loggers.log_evaluation(config, paths, {"AP": 12.5, "APs": None})
    kept = json.loads(paths.loggers.read_text())[name]
    assert (kept["train"], kept["val"], kept["final"]) == (6, 3, 6)
    return paths


@pytest.mark.slow
@FOREIGN
def test_weights_and_biases_offline(tiny: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb", reason="the extra wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    paths = train_in_two_parts(tiny, tmp_path, "wandb")
    folders = sorted((paths.root / "wandb").glob("offline-run-*"))
    identity = json.loads(paths.loggers.read_text())["wandb"]["run"]
    assert len(folders) == 3, "a training, its continuation, and the evaluation"
    assert all(folder.name.endswith(f"-{identity}") for folder in folders), "`wandb sync` joins them by this id"
    assert all(list(folder.glob("*.wandb")) for folder in folders)


@pytest.mark.slow
@FOREIGN
def test_mlflow_with_a_file_store(tiny: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow", reason="the extra mlflow is not installed")
    store = f"file://{tmp_path / 'mlruns'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    train_in_two_parts(tiny, tmp_path, "mlflow")
    from mlflow import MlflowClient

    client = MlflowClient(store)
    [logged] = client.search_runs([client.get_experiment_by_name("tests").experiment_id])
    assert logged.info.status == "FINISHED"
    assert logged.data.params["train.batch_size"] == "4"
    assert logged.data.metrics["final/AP"] == 12.5
    steps = [m.step for m in client.get_metric_history(logged.info.run_id, "train/loss")]
    assert sorted(steps) == [1, 2, 3, 4, 5, 5, 6, 6], "one run; the last steps were sent twice on purpose"


@pytest.mark.slow
@FOREIGN
def test_trackio(tiny: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    trackio = pytest.importorskip("trackio", reason="the extra trackio is not installed")
    train_in_two_parts(tiny, tmp_path, "trackio")
    [logged] = trackio.Api().runs("tests")
    assert logged.project == "tests"


def test_the_command_sends_the_metrics_after_the_training(
    tmp_path: Path, shapes_root: Path, remembering: type[Remembering], in_this_process: Callable[[], None]
) -> None:
    from tests.test_cli import small_settings

    command = ["train", "--data", str(shapes_root), "--output", str(tmp_path / "run"), *small_settings()]
    assert run_cli([*command, "-o", "train.loggers=[mlflow]"]) == 0
    [logged] = remembering.runs.values()
    assert "final/AP" in logged[-1][1]
    assert remembering.outcomes == ["finished", "finished"]
