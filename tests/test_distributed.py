"""Check training with several processes: every layout gives the result of one process, and a resumed run is bit-identical."""

import json
import socket
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from timm.layers.norm_act import BatchNormAct2d
from torch import multiprocessing

from sparseinst import distributed
from sparseinst.attempts import Attempt, Job
from sparseinst.config import Config
from sparseinst.data.coco import val_split
from sparseinst.evaluation.evaluate import evaluate
from sparseinst.inference.weights import load_weights
from sparseinst.overrides import load_config
from sparseinst.paths import RunPaths
from sparseinst.training.pretrain import pretrain
from sparseinst.training.train import train

from .conftest import CPU, TINY, run


def in_processes(count: int, work: Any, *arguments: Any) -> None:
    """Call work(rank, count, address, ...) in each of `count` processes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    multiprocessing.start_processes(work, (count, address, *arguments), nprocs=count, start_method="spawn")


def train_part(rank: int, count: int, address: str, config: str, output: Path) -> None:
    torch.set_num_threads(1)
    paths, job = RunPaths(output), Job("1")
    attempt = Attempt.begin(paths, job=job, world_size=count) if rank == 0 else Attempt.join(paths, job, rank)
    with attempt, distributed.group(address, rank, count, timeout_seconds=60):
        train(Config.model_validate_json(config), output, device=CPU, progress=False, attempt=attempt)


def pretrain_part(rank: int, count: int, address: str, config: str, output: Path) -> None:
    torch.set_num_threads(1)
    paths, job = RunPaths(output), Job("1")
    attempt = Attempt.begin(paths, job=job, world_size=count) if rank == 0 else Attempt.join(paths, job, rank)
    with attempt, distributed.group(address, rank, count, timeout_seconds=60):
        pretrain(Config.model_validate_json(config), output, device=CPU, progress=False, attempt=attempt)


@pytest.mark.slow
def test_pretraining_does_not_depend_on_the_number_of_processes(tiny: Config, tmp_path: Path) -> None:
    """Norms use the images of all processes, and losses are means over the cells of all processes."""
    settings = {"enabled": True, "iterations": 3, "batch_size": 4, "warmup_iterations": 1, "log_every": 1}
    config = tiny.replace({"model.backbone.name": "small_resnet", **{f"pretrain.{k}": v for k, v in settings.items()}})
    losses = []
    for processes in (1, 2):
        output = tmp_path / str(processes)
        in_processes(processes, pretrain_part, config.to_json(), output)
        lines = [json.loads(line) for line in RunPaths(output).metrics.read_text().splitlines()]
        losses.append([line["loss"] for line in lines if "loss" in line])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


def evaluate_part(rank: int, count: int, address: str, weights: Path, output: Path) -> None:
    torch.set_num_threads(1)
    model, config, _ = load_weights(weights)
    with distributed.group(address, rank, count, timeout_seconds=60):
        split = val_split(config.data)
        found = evaluate(model, split, config, device=CPU, predictions=output / "predictions.json", progress=False)
    (output / f"{rank}.json").write_text(json.dumps(asdict(found)))


def shared_norms() -> torch.nn.Module:
    norms = torch.nn.Sequential(torch.nn.BatchNorm2d(3), BatchNormAct2d(3))
    distributed.share_norms(norms)
    return norms.train()


def normalise_part(rank: int, count: int, address: str, images: torch.Tensor, output: Path) -> None:
    norms = shared_norms()
    with distributed.group(address, rank, count, timeout_seconds=60):
        features = norms(images.chunk(count)[rank])
    torch.save({"features": features, "state": norms.state_dict()}, output / f"{rank}.pt")


@pytest.mark.slow
def test_norms_with_an_activation_use_the_images_of_all_processes(tmp_path: Path) -> None:
    """DarkNet's norms are timm's, which also apply the activation."""
    images = torch.randn(4, 3, 5, 6)
    in_processes(2, normalise_part, images, tmp_path)
    norms = shared_norms()
    whole = norms(images)
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    torch.testing.assert_close(torch.cat([part["features"] for part in parts]), whole)
    for part in parts:
        torch.testing.assert_close(part["state"], dict(norms.state_dict()))


def trained(config: Config, output: Path, processes: int) -> dict[str, torch.Tensor]:
    in_processes(processes, train_part, config.to_json(), output)
    return load_file(RunPaths(output).weights)


@pytest.fixture
def tiny(shapes_root: Path) -> Config:
    return load_config(overrides={**TINY, "data.root": str(shapes_root)})


def first_gradients(paths: RunPaths) -> list[torch.Tensor]:
    """Return the gradients of the first step, divided by 10, from AdamW's state.

    The weights cannot be compared instead, because AdamW's steps have the same length even where a gradient is near zero.
    """
    state = torch.load(paths.checkpoint(1), weights_only=True)
    return [entry["exp_avg"] for entry in state["optimizer"]["state"].values()]


def assert_close(ours: RunPaths, theirs: RunPaths) -> None:
    """Check that the gradients are equal up to rounding.

    Gradients before the max-pooling may differ more: where neighbours are equal, rounding decides which one gets the gradient.
    """
    pairs = [(a, b) for a, b in zip(first_gradients(ours), first_gradients(theirs), strict=True) if b.norm() > 1e-5]
    assert len(pairs) > 50
    errors = sorted(float((one - other).norm() / other.norm()) for one, other in pairs)
    assert errors[int(0.8 * len(errors))] < 1e-4
    assert errors[-1] < 1e-2


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_global_reduction_does_not_depend_on_the_layout(tiny: Config, tmp_path: Path, processes: int) -> None:
    """The norms are trainable, and their statistics come from the whole batch."""
    config = tiny.replace({"loss.reduction": "global", "train.checkpoint_every": 1, "train.keep_checkpoints": 9})
    run(config, tmp_path / "one")
    trained(config, tmp_path / "several", processes)
    runs = RunPaths(tmp_path / "one"), RunPaths(tmp_path / "several")
    assert_close(*runs)
    lines = [[json.loads(line) for line in paths.metrics.read_text().splitlines()] for paths in runs]
    for one, other in zip(*lines, strict=True):
        assert one["iteration"] == other["iteration"]
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-3)
    last = json.loads(RunPaths(tmp_path / "several").end(1, processes - 1).read_text())
    assert last["outcome"] == "done"


@pytest.mark.slow
def test_per_process_reduction_depends_on_the_layout(tiny: Config, tmp_path: Path) -> None:
    """This shows that the test above can fail."""
    config = tiny.replace({"train.checkpoint_every": 1, "train.keep_checkpoints": 9})
    run(config, tmp_path / "one")
    trained(config, tmp_path / "several", 2)
    with pytest.raises(AssertionError):
        assert_close(RunPaths(tmp_path / "one"), RunPaths(tmp_path / "several"))


@pytest.mark.slow
def test_two_parts_in_one_process_equal_two_processes(tiny: Config, tmp_path: Path) -> None:
    """Losses are means over a part, so one process with two parts gives the gradients of two processes."""
    config = tiny.replace({"train.checkpoint_every": 1, "train.keep_checkpoints": 9})
    train(config, tmp_path / "one", device=CPU, progress=False, parts=2)
    trained(config, tmp_path / "several", 2)
    assert_close(RunPaths(tmp_path / "one"), RunPaths(tmp_path / "several"))


@pytest.mark.slow
def test_two_parts_in_one_process_drop_the_blocks_that_two_processes_drop(tiny: Config, tmp_path: Path) -> None:
    """Each part has random numbers of its own, so that the processes do not drop the same blocks."""
    changes = {"model.backbone.name": "pvt_v2_b0", "model.backbone.frozen_norm": False, "model.backbone.drop_path": 0.5}
    config = tiny.replace({**changes, "train.checkpoint_every": 1, "train.keep_checkpoints": 9})
    train(config, tmp_path / "one", device=CPU, progress=False, parts=2)
    trained(config, tmp_path / "several", 2)
    assert_close(RunPaths(tmp_path / "one"), RunPaths(tmp_path / "several"))


@pytest.mark.slow
def test_processes_evaluate_the_weights_that_are_saved(tiny: Config, tmp_path: Path) -> None:
    """The running means of trained norms differ between processes, and rank 0's are saved."""
    config = tiny.replace({"train.evaluate_every": 4, "inference.score_threshold": 0.0, "train.learning_rate": 0.01})
    trained(config, tmp_path / "run", 2)
    paths = RunPaths(tmp_path / "run")
    [logged] = [line for text in paths.metrics.read_text().splitlines() if "AP" in (line := json.loads(text))]
    model, config, _ = load_weights(paths.best)
    alone = evaluate(model, val_split(config.data), config, device=CPU, progress=False)
    assert {name: logged[name] for name in alone.mechanism} == pytest.approx(alone.mechanism, abs=2e-4, nan_ok=True)


@pytest.mark.slow
def test_a_resumed_run_is_bit_identical(tiny: Config, tmp_path: Path) -> None:
    config = tiny.replace({"loss.reduction": "global", "train.keep_checkpoints": 9, "train.clip_norm": 1.0})
    whole = trained(config, tmp_path / "run", 4)
    paths = RunPaths(tmp_path / "run")
    for file in (paths.weights, paths.checkpoint(6), paths.checkpoint(4)):
        file.unlink()
    again = trained(config, tmp_path / "run", 4)
    assert "resuming after step 2" in paths.log.read_text()
    assert all(torch.equal(again[name], tensor) for name, tensor in whole.items())


@pytest.mark.slow
def test_evaluation_counts_every_image_once(tiny: Config, tmp_path: Path) -> None:
    """6 images on 4 processes give the same predictions in the same order, and the same metrics on every rank."""
    config = tiny.replace({"inference.score_threshold": 0.0})
    run(config, tmp_path / "run")
    weights = RunPaths(tmp_path / "run").weights
    model, config, _ = load_weights(weights)
    alone = evaluate(model, val_split(config.data), config, device=CPU, predictions=tmp_path / "predictions.json", progress=False)
    (tmp_path / "shared").mkdir()
    in_processes(4, evaluate_part, weights, tmp_path / "shared")
    expected = json.loads((tmp_path / "predictions.json").read_text())
    found = json.loads((tmp_path / "shared" / "predictions.json").read_text())
    assert len(expected) >= 20
    assert [entry["image_id"] for entry in found] == [entry["image_id"] for entry in expected]
    assert [entry["score"] for entry in found] == pytest.approx([entry["score"] for entry in expected], abs=1e-5)
    for rank in range(4):
        shared = json.loads((tmp_path / "shared" / f"{rank}.json").read_text())
        assert shared["images"] == alone.images == 6
        assert shared["figures"]["AR100"] == pytest.approx(alone.figures["AR100"], abs=1e-6)
