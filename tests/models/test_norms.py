"""Check that convolutions absorb the frozen norms after them during training."""

import copy
import logging

import pytest
import torch
from torch import Tensor, nn

from sparseinst.bench.baselines import ReferenceStep, keep_input_types
from sparseinst.config import BackboneConfig, Config
from sparseinst.models.backbone import Backbone
from sparseinst.models.norms import absorb_norms
from sparseinst.models.sparseinst import build_model
from sparseinst.training.step import Step
from tests.conftest import CPU


def backbone(name: str, **changes: object) -> Backbone:
    """Return a backbone whose frozen norms scale and shift, as those of trained weights do."""
    torch.manual_seed(0)
    network = Backbone(BackboneConfig.model_validate({"name": name, "pretrained": False, **changes}))
    for buffer_name, buffer in network.named_buffers():
        if buffer_name.endswith(("weight", "running_var")):
            buffer.uniform_(0.5, 1.5)
        elif buffer_name.endswith(("bias", "running_mean")):
            buffer.normal_(std=0.1)
    return network


def gradients(network: Backbone, image: Tensor) -> dict[str, Tensor]:
    network.zero_grad()
    torch.stack([feature.square().mean() for feature in network(image)]).sum().backward()
    return {name: parameter.grad for name, parameter in network.named_parameters() if parameter.grad is not None}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "changes", "count"),
    [
        ("resnet18", {}, 20),
        ("resnet18", {"freeze_at": 2}, 20),
        ("resnet50", {"deformable_stages": (5,)}, 50),  # of 53: deformable convolutions do not absorb their norms
        ("cspdarknet53", {}, 67),
    ],
)
def test_absorbed_norms_give_the_same_features_and_gradients(name: str, changes: dict[str, object], count: int) -> None:
    plain = backbone(name, **changes).train()
    absorbing = copy.deepcopy(plain)
    assert absorb_norms(absorbing) == count
    plain, absorbing = plain.double(), absorbing.double()
    image = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    for a, b in zip(absorbing(image), plain(image), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=0)
    ours, theirs = gradients(absorbing, image), gradients(plain, image)
    assert ours.keys() == theirs.keys()
    for key, gradient in theirs.items():
        torch.testing.assert_close(ours[key], gradient, rtol=1e-9, atol=1e-9 * float(gradient.abs().max()))


def test_absorbing_changes_neither_weights_nor_evaluation() -> None:
    plain = backbone("resnet18").train()
    absorbing = copy.deepcopy(plain)
    absorb_norms(absorbing)
    assert absorbing.training
    ours, theirs = absorbing.state_dict(), plain.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    image = torch.randn(1, 3, 64, 64)
    for a, b in zip(absorbing.eval()(image), plain.eval()(image), strict=True):
        assert torch.equal(a, b), "evaluation mode is bit-identical"


def test_a_copy_has_its_own_norms() -> None:
    """The moving average of the weights is such a copy."""
    absorbing = backbone("resnet18").train()
    absorb_norms(absorbing)
    copied = copy.deepcopy(absorbing)
    image = torch.randn(1, 3, 64, 64)
    before = [feature.clone() for feature in copied(image)]
    for name, buffer in absorbing.named_buffers():
        if name.endswith("bias"):
            buffer.add_(1.0)
    assert all(torch.equal(a, b) for a, b in zip(copied(image), before, strict=True))
    assert not torch.equal(absorbing(image)[0], before[0]), "buffers that are changed later have an effect"


def test_half_precision_features_stay_half() -> None:
    absorbing = backbone("resnet18").train()
    absorb_norms(absorbing)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert {feature.dtype for feature in absorbing(torch.randn(1, 3, 64, 64))} == {torch.bfloat16}


class _Branching(nn.Module):
    """A network that uses a convolution's output both with and without the norm."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> list[Tensor]:
        stem = self.inner.conv1(x)
        return [self.inner.bn1(stem), stem]


def test_norms_that_cannot_be_absorbed_stay(caplog: pytest.LogCaptureFixture) -> None:
    network = backbone("resnet18")
    network.body = _Branching(network.body)
    image = torch.randn(1, 3, 64, 64)
    before = network(image)
    with caplog.at_level(logging.WARNING):
        assert absorb_norms(network) == 0
    assert "cannot absorb" in caplog.text
    assert all(torch.equal(a, b) for a, b in zip(network.train()(image), before, strict=True))


def test_a_step_absorbs_only_frozen_norms(tiny: Config) -> None:
    def classes(config: Config, kind: type[Step] = Step) -> set[str]:
        step = kind(build_model(config.model, load_pretrained=False), config, CPU)
        return {type(module).__name__ for module in step.model.backbone.modules()}

    frozen = tiny.replace({"model.backbone.frozen_norm": True})
    assert "_AbsorbingConv2d" in classes(frozen)
    assert "_AbsorbingConv2d" not in classes(frozen, ReferenceStep)
    assert "_AbsorbingConv2d" not in classes(tiny)


def test_a_convolution_with_a_bias_absorbs_its_norm() -> None:
    network = backbone("resnet18")
    stem = nn.Conv2d(3, 64, 7, stride=2, padding=3)
    network.body.conv1 = stem
    before = [feature.clone() for feature in network.train()(torch.ones(1, 3, 64, 64))]
    assert absorb_norms(network) == 20
    for a, b in zip(network(torch.ones(1, 3, 64, 64)), before, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3 * float(b.detach().abs().max()))


def test_a_backbone_that_refuses_small_images_keeps_its_norms(caplog: pytest.LogCaptureFixture) -> None:
    network = backbone("resnet18").train()
    inner = network.body

    class Large(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> list[Tensor]:
            if x.shape[-1] < 100:
                raise RuntimeError("too small")
            found: list[Tensor] = self.inner(x)
            return found

    network.body = Large()
    with caplog.at_level(logging.WARNING):
        assert absorb_norms(network) == 0
    assert "too small" in caplog.text
    assert network.training
    transformer = Backbone(BackboneConfig(name="pvt_v2_b0", pretrained=False))
    caplog.clear()
    assert absorb_norms(transformer) == 0
    assert not caplog.text, "a backbone without norms needs no warning"


def test_plain_norms_keep_the_type_of_their_input() -> None:
    """detectron2's norms keep it, too. In float32, plain norms equal timm's."""
    network = backbone("resnet18").train()
    plain = copy.deepcopy(network)
    keep_input_types(plain)
    image = torch.randn(1, 3, 64, 64)
    for a, b in zip(plain(image), network(image), strict=True):
        torch.testing.assert_close(a, b)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert {feature.dtype for feature in plain(image)} == {torch.bfloat16}
        assert {feature.dtype for feature in network(image)} == {torch.float32}
