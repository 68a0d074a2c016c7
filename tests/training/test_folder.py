"""Check the folder of a run: its files, the time of a step in its log, and that another run is kept out."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sparseinst.config import Config
from sparseinst.errors import UserError
from sparseinst.overrides import load_config
from sparseinst.paths import RunPaths
from sparseinst.training.monitor import Monitor
from tests.conftest import CPU, run
from tests.training.test_train import read_metrics


def test_a_run_writes_its_files(tiny: Config, tmp_path: Path) -> None:
    config = tiny.replace({"train.evaluate_every": 3})
    run(config, tmp_path / "run")
    paths = RunPaths(tmp_path / "run")
    assert load_config(paths.config) == config
    assert [p.name for p in sorted(paths.checkpoints.iterdir())] == ["00000004.pt", "00000006.pt"], "keep_checkpoints=2"
    records = read_metrics(tmp_path / "run")
    assert [r["iteration"] for r in records if "loss" in r] == [1, 2, 3, 4, 5, 6]
    assert [r["iteration"] for r in records if "AP" in r] == [3]
    assert {"loss_class", "loss_dice", "loss_pixel", "loss_objectness", "learning_rate", "seconds"} <= records[0].keys()
    assert list(paths.tensorboard.iterdir())
    assert "step 6/6" in paths.log.read_text()
    before = paths.weights.stat().st_mtime_ns
    run(config, tmp_path / "run")
    assert paths.weights.stat().st_mtime_ns == before, "a finished run trains nothing"


@pytest.mark.parametrize("changes", [{"train.patience": 2, "train.evaluate_every": 2}, {"pretrain.enabled": True}], ids=str)
def test_a_folder_of_another_run_is_named_also_if_a_part_of_the_settings_is_new(
    tiny: Config, tmp_path: Path, changes: dict[str, Any]
) -> None:
    run(tiny, tmp_path / "run")
    for first, second in ((tiny, tiny.replace(changes)), (tiny.replace(changes), tiny)):
        (tmp_path / "run" / "config.yaml").write_text(first.to_yaml())
        with pytest.raises(UserError, match="holds a run with other settings"):
            run(second, tmp_path / "run")


def test_the_seconds_of_a_step_contain_neither_evaluations_nor_the_steps_before_a_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`status` computes from them when a training ends, and its record how long it took."""
    now = 0.0
    monkeypatch.setattr("sparseinst.training.monitor.time", SimpleNamespace(perf_counter=lambda: now))
    before = [(number, {"loss": torch.tensor(1.0)}) for number in range(3)]
    arguments: dict[str, Any] = {"total": 9, "visible": False, "device": CPU, "check": lambda: None}
    with Monitor(RunPaths(tmp_path), start=3, every=4, pending=before, **arguments) as monitor:
        now += 2
        monitor.step(3, {"loss": torch.tensor(1.0)}, 0.1)
        with monitor.pause():
            now += 30
        for number in range(4, 8):
            now += 0.5
            monitor.step(number, {"loss": torch.tensor(1.0)}, 0.1)
    assert [record["seconds"] for record in read_metrics(tmp_path)] == [2.0, 0.5]
