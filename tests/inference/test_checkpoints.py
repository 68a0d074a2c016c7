"""Check the use of unfinished runs, and the best checkpoint and the early end of a training."""

import contextlib
import json
import logging
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from sparseinst import load_model
from sparseinst.cli import run_cli
from sparseinst.config import Config
from sparseinst.errors import UserError
from sparseinst.inference.checkpoints import find_weights, read_checkpoint
from sparseinst.inference.weights import load_weights
from sparseinst.paths import RunPaths
from sparseinst.training import train as training
from sparseinst.training.best import BestSoFar
from sparseinst.training.train import train
from tests.conftest import CPU


def stopped(config: Config, output: Path, monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """Train, and stop the process before the checkpoint after this step would follow."""
    save = training.save_checkpoint

    def stop(paths: Any, iteration: int, *more: Any) -> None:
        if iteration > after:
            raise KeyboardInterrupt
        save(paths, iteration, *more)

    with monkeypatch.context() as patch:
        patch.setattr(training, "save_checkpoint", stop)
        with pytest.raises(KeyboardInterrupt):
            train(config, output, device=CPU, progress=False)


def with_ap(monkeypatch: pytest.MonkeyPatch, values: list[float]) -> None:
    """Let the evaluations during training give these APs, in turn for each step at which the training evaluates."""
    evaluate = training.evaluate

    def with_value(*arguments: Any, **options: Any) -> Any:
        result = evaluate(*arguments, **options)
        result.figures["AP"] = values.pop(0)
        return result

    monkeypatch.setattr(training, "evaluate", with_value)


def test_an_unfinished_run_gives_its_newest_checkpoint(
    tiny: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config = tiny.replace({"train.ema_decay": 0.5})
    folder = tmp_path / "run"
    stopped(config, folder, monkeypatch, after=4)
    model, found, categories = load_weights(folder)
    assert f"{folder} has not finished its training; using {folder}/checkpoints/00000004.pt, after step 4 of 6" in caplog.text
    assert "moving average of the weights" in caplog.text
    assert found == config
    assert len(categories) == 6
    saved = torch.load(folder / "checkpoints/00000004.pt", weights_only=True)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, saved["ema"][f"module.{name}"]), name
    assert any(not torch.equal(tensor, saved["model"][name]) for name, tensor in model.state_dict().items())

    plain = {name: value for name, value in saved.items() if name not in ("categories", "best")}  # as earlier versions saved
    torch.save({**plain, "ema": None}, folder / "checkpoints/00000004.pt")
    model, _, again = load_weights(folder)
    assert again == categories
    assert all(torch.equal(tensor, saved["model"][name]) for name, tensor in model.state_dict().items())

    (folder / "checkpoints/00000005.pt").write_bytes(b"damaged")
    assert find_weights(folder).name == "00000004.pt"
    assert (folder / "checkpoints/00000005.pt").exists()  # only the training itself renames its files
    with pytest.raises(UserError, match="00000005.pt: is damaged"):
        load_weights(folder / "checkpoints/00000005.pt")
    (folder / "checkpoints/00000005.pt").unlink()
    assert load_model(folder, "cpu", checkpoint="2").config == config
    with pytest.raises(UserError, match="no checkpoint '3'; give last, best, or a step whose checkpoint is kept: 2, 4"):
        find_weights(folder, "3")
    with pytest.raises(UserError, match="no best checkpoint"):
        find_weights(folder, "best")
    torch.save(saved, folder / "checkpoints/00000004.pt")
    train(config, folder, device=CPU, progress=False)
    caplog.clear()
    assert find_weights(folder) == find_weights(folder, "last") == folder / "model.safetensors"
    assert not caplog.records
    with pytest.raises(UserError, match="is not the folder of a run"):
        find_weights(folder / "model.safetensors", "best")
    with pytest.raises(UserError, match="no model.safetensors and no complete checkpoint yet"):
        find_weights(tmp_path)


def test_no_flipped_bit_of_a_checkpoint_gives_a_traceback(tmp_path: Path) -> None:
    """Damaged names and headers in the zip archive raise errors of many kinds in zipfile and in torch."""
    paths = RunPaths(tmp_path)
    paths.checkpoints.mkdir()
    torch.save({"model": {}, "iteration": 4}, paths.checkpoint(4))
    whole = paths.checkpoint(4).read_bytes()
    chance, fallen = random.Random(0), 0
    for _ in range(400):
        damaged = bytearray(whole)
        damaged[chance.randrange(len(damaged))] ^= 1 << chance.randrange(8)
        paths.checkpoint(5).write_bytes(damaged)
        found = find_weights(tmp_path)
        assert found in (paths.checkpoint(4), paths.checkpoint(5))
        fallen += found == paths.checkpoint(4)
        with contextlib.suppress(UserError):  # any other error fails the test
            assert "model" in read_checkpoint(paths.checkpoint(5))
    assert 50 < fallen < 350
    torch.save(5, paths.checkpoint(5))
    with pytest.raises(UserError, match="is not a checkpoint of a training"):
        read_checkpoint(paths.checkpoint(5))


@pytest.mark.slow
def test_commands_take_an_unfinished_run(tiny: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    stopped(tiny, tmp_path / "run", monkeypatch, after=4)
    images = Path(tiny.data.root) / "val2017"
    run = ["--weights", str(tmp_path / "run"), "--checkpoint", "2"]
    assert run_cli(["evaluate", *run, "--device", "cpu", "--json"]) == 0
    json.loads(capsys.readouterr().out)  # the line about the checkpoint is not in it
    assert run_cli(["predict", str(images), *run, "--output", str(tmp_path / "p"), "--device", "cpu"]) == 0
    assert run_cli(["failures", *run, "--output", str(tmp_path / "f"), "--device", "cpu"]) == 0
    assert run_cli(["maps", *run, "--output", str(tmp_path / "m"), "--device", "cpu", "--limit", "1"]) == 0


def test_an_ap_that_counts_only_a_part_of_the_objects_says_so(
    tiny: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    monkeypatch.setattr("sparseinst.training.train.COCO_LIMIT", 2)
    with_ap(monkeypatch, [3.0])
    with caplog.at_level(logging.INFO):
        train(tiny.replace({"train.evaluate_every": 3}), tmp_path / "run", device=CPU, progress=False)
    assert "AP 3.0; the best so far (COCO's AP counts 2 objects of an image, and one holds" in caplog.text


@pytest.mark.slow
def test_the_best_weights_are_kept_over_a_stop(
    tiny: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    config = tiny.replace({"train.evaluate_every": 1, "train.ema_decay": 0.5})
    aps = [1.0, 3.0, 2.0, 2.5, 0.5]
    with monkeypatch.context() as patch:
        with_ap(patch, list(aps))
        train(config, tmp_path / "whole", device=CPU, progress=False)
    with monkeypatch.context() as patch:
        with_ap(patch, aps[:5])
        stopped(config, tmp_path / "parts", patch, after=4)
    with monkeypatch.context() as patch, caplog.at_level(logging.INFO):
        with_ap(patch, aps[4:])
        train(config, tmp_path / "parts", device=CPU, progress=False)
    assert "step 5 of 6: AP 0.5; the best is 3.0, after step 2" in caplog.text
    caplog.clear()
    best, parts = (load_weights(find_weights(tmp_path / run, "best"))[0].state_dict() for run in ("whole", "parts"))
    assert f"using the best checkpoint of {tmp_path}/whole, after step 2 of 6: AP 3.0" in caplog.text
    assert all(torch.equal(tensor, parts[name]) for name, tensor in best.items())

    # The weights are those after step 2, and keeping them changes no bit of the run.
    never = config.replace({"train.evaluate_every": None})
    train(never, tmp_path / "never", device=CPU, progress=False)
    assert not (tmp_path / "never/best.safetensors").exists()
    final, same = (load_weights(tmp_path / run)[0].state_dict() for run in ("whole", "never"))
    assert all(torch.equal(tensor, same[name]) for name, tensor in final.items())
    stopped(never, tmp_path / "two", monkeypatch, after=2)
    second = load_weights(tmp_path / "two")[0].state_dict()
    assert all(torch.equal(tensor, second[name]) for name, tensor in best.items())
    damaged = tmp_path / "whole/best.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:100])
    with pytest.raises(UserError, match="is damaged"):
        find_weights(tmp_path / "whole", "best")


def test_patience_ends_a_training(tiny: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    config = tiny.replace({"train.iterations": 12, "train.evaluate_every": 2, "train.patience": 2, "train.checkpoint_every": 100})
    with monkeypatch.context() as patch, caplog.at_level(logging.INFO):
        with_ap(patch, [1.0, 2.0, 2.0, 1.5])
        train(config, tmp_path / "run", device=CPU, progress=False)
    assert "the last 2 evaluations gave no better AP, so the training ends (train.patience)" in caplog.text
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert max(line["iteration"] for line in lines if "loss" in line) == 8
    assert (tmp_path / "run/checkpoints/00000008.pt").exists()
    # A run that was killed before it wrote its weights does no further step.
    final = load_weights(tmp_path / "run")[0].state_dict()
    (tmp_path / "run/model.safetensors").unlink()
    train(config, tmp_path / "run", device=CPU, progress=False)
    assert all(torch.equal(tensor, final[name]) for name, tensor in load_weights(tmp_path / "run")[0].state_dict().items())


def test_patience_and_its_evaluations_belong_to_the_key(tiny: Config) -> None:
    every = tiny.replace({"train.evaluate_every": 2})
    assert every.train_key() == tiny.train_key()
    patient = every.replace({"train.patience": 3})
    keys = {tiny.train_key(), patient.train_key(), patient.replace({"train.patience": 2}).train_key()}
    assert len(keys | {patient.replace({"train.evaluate_every": 3}).train_key()}) == 4
    with pytest.raises(UserError, match="set evaluate_every, too"):
        tiny.replace({"train.patience": 3})


def test_data_without_objects_count_as_no_progress() -> None:
    best = BestSoFar()
    assert not best.note(1, None)
    assert "no AP" in best.describe(1, 9, None)
    assert best.note(2, 0.0)
    assert not best.note(3, 0.0)
    assert best.without_better == 1
