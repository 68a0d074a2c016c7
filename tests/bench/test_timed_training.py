"""Check the timing of training steps: the batches, the step, and the command."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from sparseinst.bench.benchmark import measure
from sparseinst.bench.modes import TRAINING_MODES
from sparseinst.bench.timed_training import INSTANCES, _activate_all_branches, photo_batches, random_batches, training_workload
from sparseinst.cli import run_cli
from sparseinst.config import Config
from sparseinst.criterion import prepare_targets
from sparseinst.data.coco import train_split
from sparseinst.errors import UserError
from sparseinst.models.sparseinst import build_model
from sparseinst.training.step import PHASES, Step
from tests.conftest import CPU


def one_size(tiny: Config) -> Config:
    """Return the config with batches of two images of one size."""
    return tiny.replace({"train.batch_size": 2, "data.short_sides": [64], "data.long_side": 96})


@pytest.mark.slow
@pytest.mark.parametrize("mode", TRAINING_MODES)
def test_a_step_and_its_phases(tiny: Config, mode: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    compile_ = torch.compile  # the test skips code generation, which takes a minute
    monkeypatch.setattr(torch, "compile", lambda network, **options: compile_(network, backend="aot_eager", **options))
    tiny = tiny.replace({"model.backbone.frozen_norm": True})
    model = build_model(tiny.model, load_pretrained=False)
    before = {name: value.clone() for name, value in model.named_parameters()}
    workload = training_workload(one_size(tiny), device=CPU, model=model, mode=mode)
    latency = measure(workload, device=CPU, warmup=1, repetitions=4)
    assert tuple(latency.modules_ms) == PHASES
    assert all(value > 0 for value in latency.modules_ms.values())
    assert (latency.size, latency.kept) == ((64, 96), 2 * INSTANCES)
    assert all(torch.equal(value, before[name]) for name, value in model.named_parameters()), "the weights do not change"


def test_plain_and_eager_learn_the_same(tiny: Config) -> None:
    """The step and the data loader downsample masks to the same targets, and give the same images."""
    config = one_size(tiny)
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


def test_every_backbone_parameter_of_a_model_by_name_has_a_gradient(tiny: Config) -> None:
    config = one_size(tiny.replace({"model.backbone.frozen_norm": True}))
    model = _activate_all_branches(build_model(config.model, load_pretrained=False))
    step = Step(model, config, CPU)
    step.gradients(random_batches(config, 4)[:1])
    without_gradient = [name for name, p in model.backbone.named_parameters() if p.grad is None or not p.grad.any()]
    assert not without_gradient


def test_data_with_other_classes(tiny: Config) -> None:
    config, split = one_size(tiny), train_split(tiny.data)
    other = config.replace({"model.num_classes": 2})
    workload = training_workload(other, device=CPU, split=split)
    assert workload.run(0, lambda _: None) > 0, "a model by name gets the classes of the data"
    with pytest.raises(UserError, match="model.num_classes is 2"):
        training_workload(other, device=CPU, split=split, model=build_model(other.model, load_pretrained=False))


@pytest.mark.slow
@pytest.mark.usefixtures("in_this_process")
def test_the_bench_train_command(trained: Path, tiny: Config, capsys: pytest.CaptureFixture[str]) -> None:
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
    printed = capsys.readouterr().out
    assert "milliseconds per training step" in printed
    assert "backward" in printed
    assert run_cli([*command, "--compare", "mode=plain", "mode=eager,precision=bf16"]) == 0
    assert "x2 bf16 eager" in capsys.readouterr().out
    mistakes = {
        ("--mode", "folded"): "the modes of --train are plain, eager, compiled, recomputed",
        ("--mode", "recomputed"): "needs model.backbone.frozen_norm=true",
        ("--roofline",): "cannot be used with --record or --roofline",
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
