"""Training timed: what a step is fed, that it is the step that trains, and the command."""

import json
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from sparseinst.cli import run_cli
from sparseinst.cli.timing import TRAINING_MODES
from sparseinst.config import Config
from sparseinst.criterion import prepare_targets
from sparseinst.data.coco import train_split
from sparseinst.engine.benchmark import measure
from sparseinst.engine.step import PHASES, Step
from sparseinst.engine.timed_training import INSTANCES, TrainingMode, _lively, photo_batches, random_batches, training_to_time
from sparseinst.errors import UserError
from sparseinst.models.sparseinst import build_model

from .conftest import CPU


def timing(tiny: Config) -> Config:
    return tiny.replace({"train.batch_size": 2, "data.short_sides": [64], "data.long_side": 96})


@pytest.mark.parametrize("mode", ["plain", "eager", "compiled", "recomputed"])
def test_a_step_and_its_phases(tiny: Config, mode: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    compile_ = torch.compile  # its front end alone: code generators take a minute
    monkeypatch.setattr(torch, "compile", lambda network, **options: compile_(network, backend="aot_eager", **options))
    tiny = tiny.replace({"model.backbone.frozen_norm": True})
    model = build_model(tiny.model, load_pretrained=False)
    before = {name: value.clone() for name, value in model.named_parameters()}
    timed = training_to_time(timing(tiny), device=CPU, model=model, mode=mode)
    found = measure(timed, device=CPU, warmup=1, repetitions=4)
    assert tuple(found.modules_ms) == PHASES
    assert all(value > 0 for value in found.modules_ms.values())
    assert (found.size, found.kept) == ((64, 96), 2 * INSTANCES)
    assert all(torch.equal(value, before[name]) for name, value in model.named_parameters()), "each turn is the same work"


def test_plain_and_ours_learn_the_same(tiny: Config) -> None:
    """Masks made small by the step and by the mapper are the same targets, in the same images."""
    config = timing(tiny)
    for batches in (random_batches, lambda config, stride: photo_batches(train_split(config.data), config, stride)):
        for whole, small in zip(batches(config, 1), batches(config, 4), strict=True):
            assert torch.equal(whole.images, small.images)
            size = (whole.padded[0] // 4, whole.padded[1] // 4)
            pairs = zip(
                prepare_targets(whole.labels, whole.masks, whole.padded, size),
                prepare_targets(small.labels, small.masks, small.padded, size, 4),
                strict=True,
            )
            for ours, theirs in pairs:
                assert torch.equal(ours.labels, theirs.labels)
                assert torch.equal(ours.masks, theirs.masks)


def test_modes_are_those_of_the_command() -> None:
    assert get_args(TrainingMode) == TRAINING_MODES


def test_models_by_name_have_no_dead_branches(tiny: Config) -> None:
    config = timing(tiny.replace({"model.backbone.frozen_norm": True}))
    model = _lively(build_model(config.model, load_pretrained=False))
    step = Step(model, config, CPU, stride=4)
    step.gradients(random_batches(config, 4)[:1])
    dead = [name for name, p in model.backbone.named_parameters() if p.grad is None or not p.grad.any()]
    assert not dead


def test_data_of_other_classes(tiny: Config) -> None:
    config, split = timing(tiny), train_split(tiny.data)
    other = config.replace({"model.num_classes": 2})
    timed = training_to_time(other, device=CPU, split=split)
    assert timed.run(0, lambda _: None) > 0, "a model by name has the classes of the data"
    with pytest.raises(UserError, match="model.num_classes is 2"):
        training_to_time(other, device=CPU, split=split, model=build_model(other.model, load_pretrained=False))


@pytest.mark.usefixtures("in_this_process")
def test_the_command(trained: Path, tiny: Config, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["bench", "--train", "--model", str(trained), "--batch", "2", "--repetitions", "3", "--warmup", "1"]
    assert run_cli([*command, "--data", tiny.data.root, "--mode", "plain", "--mode", "eager", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [(row["mode"], row["train"], row["photos"]) for row in rows] == [
        ("plain", True, tiny.data.root),
        ("eager", True, tiny.data.root),
    ]
    for row in rows:
        assert row["images_per_second"] == pytest.approx(2000 / row["whole_ms"]["mean"], rel=0.01)
    assert run_cli(command) == 0
    told = capsys.readouterr().out
    assert "a step of training" in told
    assert "backward" in told
    assert run_cli([*command, "--compare", "mode=plain", "mode=eager,precision=bf16"]) == 0
    assert "x2 bf16 eager" in capsys.readouterr().out
    mistakes = {
        ("--mode", "folded"): "the modes of --train are plain, eager, compiled, recomputed",
        ("--mode", "recomputed"): "needs model.backbone.frozen_norm=true",
        ("--roofline",): "not with --record or --roofline",
        ("--photos", tiny.data.root + "/val2017"): "--photos are for inference",
        ("--data", "nowhere"): "nowhere",
        ("--compare", "mode=plain", "mode=best"): "the modes of --train",
    }
    for wrong, message in mistakes.items():
        assert run_cli([*command, *wrong]) == 2, wrong
        assert message in capsys.readouterr().err
    assert run_cli(["bench", "--data", tiny.data.root]) == 2
    assert "--data is for --train" in capsys.readouterr().err
    assert run_cli(["bench", "--mode", "recomputed"]) == 2
    assert "the modes without --train" in capsys.readouterr().err
