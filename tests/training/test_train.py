"""Check training and resuming."""

import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from sparseinst.attempts import Attempt
from sparseinst.config import Config, TrainConfig
from sparseinst.data.coco import train_split, val_split
from sparseinst.data.loader import BatchOrder, Example, TrainSet, collate
from sparseinst.errors import RunFailed, UserError
from sparseinst.files import atomic
from sparseinst.models.sparseinst import build_model
from sparseinst.paths import RunPaths
from sparseinst.training.checkpoint import newest_checkpoint, write_state
from sparseinst.training.schedule import learning_rate_factor, parameter_groups
from sparseinst.training.step import Step, recomputed
from tests.conftest import CPU, THREADS, run
from tests.data.test_augmentation import ALL


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def read_metrics(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in RunPaths(output).metrics.read_text().splitlines()]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"train.precision": "bf16"},
        {"train.precision": "fp16"},
        {"train.clip_norm": 0.1},
        {"train.ema_decay": 0.9},
        {"train.accumulate": 2},
        {"data.workers": 2},
        {"loss.reduction": "global", "train.schedule": "cosine", "train.weight_decay_on": "weights"},
        {f"data.{name}": value for name, value in ALL.items()},
        {
            "model.decoder.iam.kind": "cross_attention",
            "data.crop": 0.5,
            "data.crop_short_sides": [64],
            "data.crop_sizes": [32, 48],
        },
        {"model.backbone.name": "pvt_v2_b0", "model.backbone.frozen_norm": False, "model.backbone.drop_path": 0.5},
    ],
    ids=str,
)
def test_every_setting_trains_and_resumes_bit_identically(tiny: Config, tmp_path: Path, settings: dict[str, Any]) -> None:
    config = tiny.replace(settings)
    whole = run(config, tmp_path / "whole")
    assert all(torch.isfinite(tensor).all() for tensor in whole.values() if tensor.is_floating_point())
    run(config, tmp_path / "resumed")
    paths = RunPaths(tmp_path / "resumed")
    paths.weights.unlink()
    paths.checkpoint(6).unlink()  # as after a kill in the fifth or sixth step
    with paths.metrics.open("a") as file:
        file.write('{"iteration": 6, "lo')
    assert_same(run(config, tmp_path / "resumed"), whole)
    assert [r["iteration"] for r in read_metrics(tmp_path / "resumed")] == [1, 2, 3, 4, 5, 6]


def test_an_evaluation_does_not_change_the_training(tiny: Config, tmp_path: Path) -> None:
    """`evaluate_every` is not part of the run's key, also if blocks are dropped at random."""
    changes = {"model.backbone.name": "pvt_v2_b0", "model.backbone.frozen_norm": False, "model.backbone.drop_path": 0.5}
    config = tiny.replace({**changes, "train.iterations": 4})
    evaluated = config.replace({"train.evaluate_every": 2})
    assert evaluated.train_key() == config.train_key()
    assert_same(run(config, tmp_path / "a"), run(evaluated, tmp_path / "b"))


def test_a_seed_repeats_a_run_and_another_seed_changes_it(tiny: Config, tmp_path: Path) -> None:
    first, again = (run(tiny, tmp_path / name) for name in ("a", "b"))
    assert_same(first, again)
    other = run(tiny.replace({"train.seed": 1}), tmp_path / "c")
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_parts_have_the_gradients_of_the_whole_batch(tiny: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """With `global` means and frozen norms, the gradients of the parts sum to those of the batch. float64 rounds little."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    config = tiny.replace({"loss.reduction": "global", "data.short_sides": [64], "model.backbone.frozen_norm": True})
    model = build_model(config.model, load_pretrained=False)
    monkeypatch.setattr(Step, "_prepare_frozen_norms", lambda self, backbone: None)  # it compares features in float32
    step = Step(model.double(), config, CPU)
    dataset = TrainSet(train_split(config.data), config.data, 0, model.mask_stride())
    [draws] = itertools.islice(BatchOrder(dataset.split, config.train), 1)
    examples = [dataset[draw] for draw in draws]

    def gradients(parts: list[list[Example]]) -> list[torch.Tensor]:
        model.zero_grad()
        step.gradients([collate(part) for part in parts])
        return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]

    whole = gradients([examples])
    assert sum(bool(gradient.any()) for gradient in whole) > 20
    for parts in ([examples[::2], examples[1::2]], [[example] for example in examples]):
        for ours, theirs in zip(gradients(parts), whole, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12 * float(theirs.abs().max()) + 1e-14)


def test_a_run_resumes_from_the_checkpoint_before_a_damaged_one(tiny: Config, tmp_path: Path, caplog: Any) -> None:
    whole = run(tiny, tmp_path / "run")
    paths = RunPaths(tmp_path / "run")
    paths.weights.unlink()
    newest = paths.checkpoint(6)
    data = bytearray(newest.read_bytes())
    data[len(data) // 2] ^= 0xFF
    newest.write_bytes(data)
    assert_same(run(tiny, tmp_path / "run"), whole)
    assert "00000006.pt is damaged" in caplog.text
    assert paths.checkpoint(6).with_suffix(".damaged").exists()

    for path in (paths.checkpoint(4), paths.checkpoint(6)):
        path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(RunFailed, match="every checkpoint is damaged"):
        newest_checkpoint(paths)


def test_a_full_disk_keeps_the_old_checkpoint(tiny: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run(tiny.replace({"train.iterations": 4}), tmp_path / "run")
    paths = RunPaths(tmp_path / "run")
    kept = paths.checkpoint(4).read_bytes()

    def raise_no_space(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("torch.save", raise_no_space)
    paths.weights.unlink()
    paths.config.unlink()
    with pytest.raises(RunFailed, match="no space left; earlier files are unchanged"):
        run(tiny, tmp_path / "run")
    assert paths.checkpoint(4).read_bytes() == kept
    assert not list(paths.checkpoints.glob(".*"))


@pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="no device that is always full")
def test_a_really_full_disk_is_reported_as_full(tmp_path: Path) -> None:
    """The test uses a full device, not a made-up error, because torch's own writer hides the cause."""
    with pytest.raises(RunFailed, match="no space left"), atomic(tmp_path / "checkpoint"):
        write_state({"tensor": torch.zeros(200_000)}, Path("/dev/full"))


def test_nan_stops_training_with_the_name_of_the_loss(tiny: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sparseinst import criterion

    calls = []

    def nan_later(*arguments: Any) -> torch.Tensor:
        calls.append(1)
        loss = real(*arguments)
        return loss * float("nan") if len(calls) == 4 else loss

    real = criterion.dice_loss
    monkeypatch.setattr(criterion, "dice_loss", nan_later)
    with pytest.raises(RunFailed, match=r"the dice loss became nan in step 3; the last good checkpoint is kept"):
        run(tiny, tmp_path / "run")
    paths = RunPaths(tmp_path / "run")
    assert [p.name for p in paths.checkpoints.iterdir()] == ["00000002.pt"]
    assert not paths.weights.exists()


def test_diverged_weights_are_not_saved(tiny: Config, tmp_path: Path) -> None:
    with pytest.raises(RunFailed, match=r"training diverged"):
        run(tiny.replace({"train.learning_rate": 1e30, "train.warmup_iterations": 0}), tmp_path / "run")


def test_a_folder_of_another_run_and_a_folder_in_use_are_refused(tiny: Config, tmp_path: Path) -> None:
    run(tiny, tmp_path / "run")
    with pytest.raises(UserError, match=r"holds a run with other settings \(model.decoder.depth: 1 there, 2 here\)"):
        run(tiny.replace({"model.decoder.depth": 2}), tmp_path / "run")
    with Attempt.begin(RunPaths(tmp_path / "run")), pytest.raises(UserError, match="another process is at work in this folder"):
        run(tiny, tmp_path / "run")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model.backbone.frozen_norm": True}, "frozen norms need pretrained weights"),
        ({"model.num_classes": 80}, "has 6 categories, but model.num_classes is 80: set model.num_classes=6"),
        ({"data.root": "nowhere"}, "nowhere/annotations/instances_train2017.json: no such file"),
    ],
)
def test_settings_that_cannot_be_trained_are_refused(
    tiny: Config, tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        run(tiny.replace(settings), tmp_path / "run")
    assert not RunPaths(tmp_path / "run").config.exists(), "the folder is still free for the corrected settings"


def test_a_small_batch_gives_a_warning(tiny: Config, tmp_path: Path, caplog: Any) -> None:
    run(tiny.replace({"train.learning_rate": 5e-5}), tmp_path / "run")
    assert "set train.learning_rate=3.125e-06" in caplog.text


def test_batches_without_instances_train(tiny: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If crops leave all instances of a batch outside, the batch still trains and lowers the scores."""
    from sparseinst.data import loader

    def no_instances(sample: Any, stride: int) -> Any:
        size = [-(-side // stride) for side in sample.image.shape[:2]]
        return np.zeros(0, dtype=np.int64), np.zeros((0, *size), dtype=np.uint8)

    monkeypatch.setattr(loader, "rasterise", no_instances)
    run(tiny.replace({"train.iterations": 12}), tmp_path / "run")
    records = read_metrics(tmp_path / "run")
    assert all(r["loss_dice"] == r["loss_pixel"] == r["loss_objectness"] == 0 for r in records)
    assert records[-1]["loss_class"] < records[0]["loss_class"]


def frozen(tiny: Config, tmp_path: Path) -> Config:
    """Return the config with frozen norms, as in the paper, and with backbone weights."""
    import timm

    save_file(timm.create_model("small_resnet").state_dict(), tmp_path / "backbone.safetensors")
    return tiny.replace({"model.backbone.weights": str(tmp_path / "backbone.safetensors"), "model.backbone.frozen_norm": True})


def test_recomputed_activations_give_identical_weights(tiny: Config, tmp_path: Path) -> None:
    config = frozen(tiny, tmp_path)
    assert_same(
        run(config, tmp_path / "kept"), run(config.replace({"train.checkpoint_activations": True}), tmp_path / "recomputed")
    )
    with pytest.raises(UserError, match="needs model.backbone.frozen_norm=true"):
        run(tiny.replace({"train.checkpoint_activations": True}), tmp_path / "other")


def test_recomputed_activations_are_not_kept_in_memory(tiny: Config, tmp_path: Path) -> None:
    model = build_model(frozen(tiny, tmp_path).model)
    kept: dict[str, int] = {}
    for name, forward in (("all", model), ("few", partial(recomputed, model))):
        kept[name] = 0

        def pack(tensor: torch.Tensor, name: str = name) -> torch.Tensor:
            kept[name] += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            forward(torch.randn(1, 3, 64, 64))
    assert kept["few"] < 0.2 * kept["all"]


@pytest.mark.slow
def test_compiled_training_gives_the_same_weights(tiny: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the compiler's front end runs, because it could change the result; the code generators take a minute."""
    compiled = []

    def compile_front_end(network: Any, **options: Any) -> Any:
        compiled.append(options)
        return compile_(network, backend="aot_eager", **options)

    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", compile_front_end)
    config = tiny.replace({"train.compile": True})
    found, expected = run(config, tmp_path / "compiled"), run(tiny, tmp_path / "plain")
    assert compiled == [{"dynamic": True}]
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=1e-3)
    assert config.train_key() != tiny.train_key(), "a compiled training rounds differently, so it is another run"


KILLED = """
import sys, torch
from pathlib import Path
from sparseinst.training.train import train
from sparseinst.overrides import load_config
torch.set_num_threads(int(sys.argv[3]))
train(load_config(sys.argv[1]), Path(sys.argv[2]), device=torch.device("cpu"), progress=False)
"""


@pytest.mark.slow
def test_five_random_kills_do_not_change_the_weights(tiny: Config, tmp_path: Path) -> None:
    config = tiny.replace({"train.iterations": 150, "train.checkpoint_every": 3, "train.precision": "bf16", "data.workers": 1})
    whole = run(config, tmp_path / "whole")
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    paths = RunPaths(tmp_path / "killed")
    rng, kills, resumed_at = random.Random(0), 0, []
    command = [sys.executable, "-c", KILLED, str(tmp_path / "config.yaml"), str(tmp_path / "killed"), str(THREADS)]
    while kills < 5:
        with subprocess.Popen(command, stderr=subprocess.DEVNULL, start_new_session=True) as process:
            newest = lambda: max((int(p.stem) for p in paths.checkpoints.glob("*.pt")), default=0)  # noqa: E731
            before = newest()
            while newest() == before and process.poll() is None:  # let it write a checkpoint between two kills
                time.sleep(0.002)
            time.sleep(rng.uniform(0, 0.3))
            assert process.poll() is None, "it must be killed before its end"
            os.killpg(process.pid, signal.SIGKILL)
        kills += 1
        resumed_at.append(newest())
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
    assert resumed_at == sorted(set(resumed_at)), resumed_at
    assert_same(load_file(paths.weights), whole)
    steps = [r["iteration"] for r in read_metrics(tmp_path / "killed")]
    assert steps == list(range(1, 151))


def test_learning_rate_schedules() -> None:
    step = TrainConfig(iterations=27, warmup_iterations=3, warmup_factor=0.5)
    assert [round(learning_rate_factor(step, i), 6) for i in (0, 1, 2, 3, 20, 21, 24, 25, 26)] == [
        0.5, 0.666667, 0.833333, 1, 1, 0.1, 0.1, 0.01, 0.01,
    ]  # fmt: skip
    cosine = step.model_copy(update={"schedule": "cosine"})
    assert learning_rate_factor(cosine, 15) == pytest.approx(0.5)
    assert learning_rate_factor(cosine, 26) < 0.01


@pytest.mark.parametrize("backbone", ["resnet10t", "pvt_v2_b0", "cspdarknet53"])
def test_parameter_groups(tiny: Config, backbone: str) -> None:
    config = tiny.replace({"model.backbone.name": backbone, "train.backbone_multiplier": 0.1})
    model = build_model(config.model)
    names = {id(p): name for name, p in model.named_parameters()}
    groups = parameter_groups(model, config.train, config.train.backbone_multiplier)
    assert sum(len(g["params"]) for g in groups) == len(names)
    for group in groups:
        for parameter in group["params"]:
            name = names[id(parameter)]
            factor = 0.1 if name.startswith("backbone.") else 1.0
            assert group["lr"] == pytest.approx(config.train.learning_rate * factor)
            if backbone.startswith("csp"):  # the reference goes by names, and these norms are called `bn`
                without_decay = False
            elif backbone.startswith("pvt"):  # norms, and the layers that the original calls patch_embed1 to patch_embed4
                without_decay = any(part in name for part in ("norm", "patch_embed", "downsample"))
            else:  # in a ResNet, only norms have one-dimensional parameters
                without_decay = name.startswith("backbone.") and parameter.ndim == 1
            assert (group["weight_decay"] == 0) == without_decay, name


def test_a_failed_atomic_write_keeps_the_old_file(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old")

    def fail() -> None:
        with atomic(tmp_path / "a") as temporary:
            temporary.write_text("half")
            raise OSError

    with pytest.raises(OSError):  # noqa: PT011
        fail()
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("a", "old")]


def test_validation_data_are_checked_before_training(tiny: Config, tmp_path: Path) -> None:
    shutil.copytree(tiny.data.root, tmp_path / "data")
    config = tiny.replace({"data.root": str(tmp_path / "data"), "data.source": "coco"})
    file = val_split(config.data).file
    content = json.loads(file.read_text())
    content["categories"][0]["name"] = "another"
    file.write_text(json.dumps(content))
    with pytest.raises(UserError, match="first difference: 'another'"):
        run(config, tmp_path / "run")
    file.unlink()
    with pytest.raises(UserError, match="no such file"):
        run(config, tmp_path / "run")
    assert not RunPaths(tmp_path / "run").config.exists(), "a run with a mistake does not claim its folder"
