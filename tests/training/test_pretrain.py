"""Check the stage `pretrain`: its targets, its weights, and that trainings start from them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save

from sparseinst.ablation import store as ablation_store
from sparseinst.ablation.plan import make_plan
from sparseinst.ablation.store import Store
from sparseinst.ablation.study import read_profile, read_tables
from sparseinst.attempts import Attempt
from sparseinst.config import Config
from sparseinst.errors import RunFailed, UserError
from sparseinst.launch.run import run_plan
from sparseinst.models.backbone import Backbone, backbone_metadata, read_tensors
from sparseinst.paths import SHIPPED
from sparseinst.training import pretrain as module
from sparseinst.training.pretrain import dense_losses, dense_targets, pretrain
from sparseinst.training.train import train
from tests.conftest import assert_flips_are_refused

CPU = torch.device("cpu")
STAGE: dict[str, Any] = {
    "model.backbone.name": "small_resnet",
    "model.backbone.frozen_norm": True,
    "pretrain.enabled": True,
    "pretrain.iterations": 4,
    "pretrain.batch_size": 2,
    "pretrain.warmup_iterations": 1,
    "pretrain.checkpoint_every": 2,
    "pretrain.log_every": 1,
}


@pytest.fixture
def config(tiny: Config) -> Config:
    return tiny.replace(STAGE)


def test_targets_at_each_stride() -> None:
    mask = torch.zeros(1, 64, 64, dtype=torch.uint8)
    mask[0, 10:30, 20:44] = 1  # rows, columns; the centre is (20, 32)
    targets = dense_targets([torch.tensor([3])], [mask], (64, 96))
    assert [tuple(target.classes.shape) for target in targets] == [(1, 8, 12), (1, 4, 6), (1, 2, 3)]
    classes, offsets = targets[0]
    assert classes.unique().tolist() == [0, 4]
    centres = [(8 * row + 4, 8 * column + 4) for _, row, column in classes.nonzero().tolist()]
    assert centres == [(y, x) for y in (12, 20, 28) for x in (20, 28, 36)]
    # The offset from the cell with the centre (12, 20) is 12 pixels right and 8 down, in units of 32 pixels.
    assert offsets[0, :, 1, 2].tolist() == [12 / 32, 8 / 32]


def test_losses_of_correct_outputs_are_zero() -> None:
    mask = torch.zeros(1, 64, 64, dtype=torch.uint8)
    mask[0, 10:50, 10:50] = 1
    targets = dense_targets([torch.tensor([1])], [mask], (64, 64))
    outputs = []
    for target in targets:
        logits = 50.0 * torch.nn.functional.one_hot(target.classes, 4).permute(0, 3, 1, 2)
        outputs.append(torch.cat([logits, target.offsets], dim=1))
    losses = dense_losses(outputs, targets, object_weight=6.0)
    assert all(float(loss) < 1e-6 for loss in losses.values())
    outputs[0][:, -1] += 1
    assert float(dense_losses(outputs, targets, 6.0)["offset"]) == pytest.approx(0.5, rel=1e-5), (
        "the smooth L1 loss of 1 in one direction"
    )


def test_a_batch_without_objects_has_finite_gradients() -> None:
    targets = dense_targets([torch.zeros(0, dtype=torch.int64)], [torch.zeros(0, 32, 32, dtype=torch.uint8)], (32, 32))
    outputs = [torch.randn(1, 6, 32 // stride, 32 // stride, requires_grad=True) for stride in (8, 16, 32)]
    losses = dense_losses(outputs, targets, 6.0)
    assert float(losses["offset"].detach()) == 0
    sum(losses.values()).backward()  # type: ignore[union-attr]
    assert all(output.grad is not None and output.grad.isfinite().all() for output in outputs)


def test_a_killed_pretraining_resumes_bit_identically(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = load_file(pretrain(config, tmp_path / "whole", device=CPU, progress=False))
    save = module._Pretraining._save

    def killed(self: Any, iteration: int, pending: Any) -> None:
        save(self, iteration, pending)
        raise RunFailed("killed")

    monkeypatch.setattr(module._Pretraining, "_save", killed)
    with pytest.raises(RunFailed, match="killed"):
        pretrain(config, tmp_path / "parts", device=CPU, progress=False)
    monkeypatch.undo()
    parts = load_file(pretrain(config, tmp_path / "parts", device=CPU, progress=False))
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_the_backbone_starts_from_the_pretrained_weights(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    starts: list[dict[str, torch.Tensor]] = []
    build = Backbone.__init__

    def note_start(self: Backbone, *args: Any, **kwargs: Any) -> None:
        build(self, *args, **kwargs)
        state = self.body.state_dict()
        if not any(tensor.is_meta for tensor in state.values()):  # else it is only built to learn its size
            starts.append({name: tensor.clone() for name, tensor in state.items()})

    weights = pretrain(config, tmp_path / "start", device=CPU, progress=False)
    monkeypatch.setattr(Backbone, "__init__", note_start)
    train(config, tmp_path / "run", device=CPU, progress=False, start=weights)
    learned = load_file(weights)
    assert starts[0]
    for name, tensor in starts[0].items():
        assert torch.equal(tensor, learned[name].float()), name
    before = starts.copy()
    train(config, tmp_path / "own", device=CPU, progress=False)
    [folder] = (tmp_path / "own" / "pretrain").iterdir()
    assert (folder.name, (folder / "model.safetensors").exists()) == (config.pretrain_key(), True), (
        "train pretrains if it gets no weights"
    )
    assert any(all(torch.equal(a[n], before[0][n]) for n in a) for a in starts[len(before) :]), "its weights are the same"


def test_the_pretrain_key_depends_only_on_settings_of_the_pretraining(config: Config) -> None:
    """Heads, losses and the settings of the training do not change the key."""
    key = config.pretrain_key()
    same = {"model.decoder.depth": 2, "train.seed": 5, "loss.dice": False, "model.backbone.deformable_stages": [4, 5]}
    for path, value in same.items():
        assert config.replace({path: value}).pretrain_key() == key, path
    other = {
        "pretrain.iterations": 5,
        "pretrain.seed": 1,
        "pretrain.object_weight": 2.0,
        "data.train_limit": 3,
        "data.flip": 0.0,
        "model.backbone.name": "small_resnetd",
    }
    keys = {config.replace({path: value}).pretrain_key() for path, value in other.items()}
    assert len(keys | {key}) == len(other) + 1
    assert config.replace({"pretrain.seed": 1}).train_key() != config.train_key()
    assert (
        config.replace({"pretrain.enabled": False, "pretrain.seed": 1}).train_key()
        == config.replace({"pretrain.enabled": False}).train_key()
    ), "settings of a disabled stage change nothing"


@pytest.mark.parametrize("name", ["small_resnet", "small_resnetd"])
def test_deformable_stages_start_from_plain_pretrained_ones(config: Config, tmp_path: Path, name: str) -> None:
    settings = config.replace({"model.backbone.name": name, "model.backbone.deformable_stages": [4, 5]})
    run = train(settings, tmp_path, device=CPU, progress=False)
    assert any("offset" in key for key in load_file(run))


def test_small_resnetd_has_a_deep_stem_and_average_pooling() -> None:
    plain, deep = (Backbone(Config().model.backbone.model_copy(update={"name": name, "pretrained": False})).body
                   for name in ("small_resnet", "small_resnetd"))  # fmt: skip
    stems = [
        [m for n, m in body.named_modules() if n.startswith("conv1") and isinstance(m, torch.nn.Conv2d)] for body in (plain, deep)
    ]
    assert [len(stem) for stem in stems] == [1, 3]
    pools = [any(isinstance(m, torch.nn.AvgPool2d) for m in body.modules()) for body in (plain, deep)]
    assert pools == [False, True]


@pytest.mark.slow
def test_rows_share_one_pretraining(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    experiments = Path(__file__).parents[2] / "experiments"
    tables, profile = read_tables(["table5"], experiments), read_profile("smoke", experiments)
    monkeypatch.chdir(tmp_path)
    store = Store(Path("results"))
    plan = make_plan(tables, profile, store, device="cpu")
    starts = [run for run in plan.runs.values() if run.stage == "pretrain"]
    assert len(starts) == 1
    assert {run.needs for run in plan.runs.values() if run.stage == "train"} == {starts[0].key}
    assert next(iter(plan.runs)) == starts[0].key, "the pretraining comes first"
    assert run_plan(plan, store, device="cpu", progress=False) == {}
    record = store.load(starts[0].key)
    assert record is not None
    assert record.result["steps"] == 2
    assert set(record.result["cells_right"]) == {"8", "16", "32"}


def test_a_pretraining_in_the_package_is_not_repeated(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = pretrain(config, tmp_path / "made", device=CPU, progress=False)
    (tmp_path / "shipped").mkdir()
    weights.rename(tmp_path / "shipped" / f"{config.pretrain_key()}.safetensors")
    monkeypatch.setattr(module, "SHIPPED", tmp_path / "shipped")
    train(config, tmp_path / "run", device=CPU, progress=False)
    assert not (tmp_path / "run" / "pretrain").exists()


def test_damaged_weights_of_a_backbone_are_refused(tmp_path: Path) -> None:
    """50 seeded flips of one bit: each gives a one-line error, wherever it is."""
    random = np.random.default_rng(0)
    state = {"conv1.weight": torch.from_numpy(random.normal(size=(8, 3, 3, 3)).astype(np.float16)), "bn1.bias": torch.zeros(8)}
    file = tmp_path / "start.safetensors"
    content = save(state, backbone_metadata(state, "small_resnet", "0123456789abcdef"))
    file.write_bytes(content)
    assert all(torch.equal(tensor, state[name]) for name, tensor in read_tensors(file).items())
    assert_flips_are_refused(file, random.integers(0, len(content), 50), random, lambda: read_tensors(file))


@pytest.mark.parametrize("name", ["start.safetensors", "start.pt"])
def test_weights_of_a_backbone_that_are_not_finite_are_refused(tmp_path: Path, name: str) -> None:
    state = {"conv1.weight": torch.tensor([1.0, float("nan")]), "steps": torch.tensor(3)}
    file = tmp_path / name
    if file.suffix == ".pt":
        torch.save({"model": state}, file)
    else:
        file.write_bytes(save(state, {"checksum": "that of another program"}))
    with pytest.raises(UserError, match=rf"{name}: conv1\.weight holds NaN or infinite values"):
        read_tensors(file)


def test_a_pretraining_writes_its_checksum(config: Config, tmp_path: Path) -> None:
    weights = pretrain(config, tmp_path, device=CPU, progress=False)
    with safe_open(weights, "pt") as file:
        assert file.metadata() == backbone_metadata(load_file(weights), "small_resnet", config.pretrain_key())


def test_the_weights_of_the_package_need_no_checksum() -> None:
    shipped = [file for file in SHIPPED.glob("*.safetensors") if file.stem != "demo"]
    assert shipped
    for file in shipped:
        tensors = load_file(file)
        found = read_tensors(file)
        assert found.keys() == tensors.keys()
        assert all(torch.equal(found[name], tensors[name]) for name in tensors)


def test_a_damaged_record_of_the_package_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = tmp_path / "0123.json"
    record.write_text("{")
    monkeypatch.setattr(ablation_store, "SHIPPED", tmp_path)
    with pytest.raises(UserError, match="install the package again"):
        Store(tmp_path / "results").load("0123")
    assert record.exists(), "the package's file is not renamed"


def test_a_folder_in_use_is_refused(config: Config, tmp_path: Path) -> None:
    from sparseinst.attempts import Held
    from sparseinst.paths import RunPaths

    with Attempt.begin(RunPaths(tmp_path)), pytest.raises(Held):
        pretrain(config, tmp_path, device=CPU, progress=False)
