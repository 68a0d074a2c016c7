"""Convolutions that do the work of the frozen norms after them, while they train."""

import copy
import logging

import pytest
import torch
from torch import Tensor, nn

from sparseinst.config import BackboneConfig, Config
from sparseinst.engine.norms import absorb_norms, keep_types
from sparseinst.engine.step import Step
from sparseinst.models.backbone import Backbone
from sparseinst.models.sparseinst import build_model

from .conftest import CPU


def backbone(name: str, **changes: object) -> Backbone:
    """Its frozen norms scale and shift as those of trained weights do."""
    torch.manual_seed(0)
    made = Backbone(BackboneConfig.model_validate({"name": name, "pretrained": False, **changes}))
    for buffer_name, buffer in made.named_buffers():
        if buffer_name.endswith(("weight", "running_var")):
            buffer.uniform_(0.5, 1.5)
        elif buffer_name.endswith(("bias", "running_mean")):
            buffer.normal_(std=0.1)
    return made


def gradients(made: Backbone, image: Tensor) -> dict[str, Tensor]:
    made.zero_grad()
    torch.stack([feature.square().mean() for feature in made(image)]).sum().backward()
    return {name: parameter.grad for name, parameter in made.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize(
    ("name", "changes", "count"),
    [
        ("resnet18", {}, 20),
        ("resnet18", {"freeze_at": 2}, 20),
        ("resnet50", {"deformable_stages": (5,)}, 50),  # of 53: a deformable convolution leaves its norm to itself
        ("cspdarknet53", {}, 67),
    ],
)
def test_the_same_features_and_gradients(name: str, changes: dict[str, object], count: int) -> None:
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


def test_nothing_else_changes() -> None:
    plain = backbone("resnet18").train()
    absorbing = copy.deepcopy(plain)
    absorb_norms(absorbing)
    assert absorbing.training
    ours, theirs = absorbing.state_dict(), plain.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    image = torch.randn(1, 3, 64, 64)
    for a, b in zip(absorbing.eval()(image), plain.eval()(image), strict=True):
        assert torch.equal(a, b), "in evaluation mode to the bit"


def test_a_copy_has_norms_of_its_own() -> None:
    """The moving average is one."""
    absorbing = backbone("resnet18").train()
    absorb_norms(absorbing)
    copied = copy.deepcopy(absorbing)
    image = torch.randn(1, 3, 64, 64)
    before = [feature.clone() for feature in copied(image)]
    for name, buffer in absorbing.named_buffers():
        if name.endswith("bias"):
            buffer.add_(1.0)
    assert all(torch.equal(a, b) for a, b in zip(copied(image), before, strict=True))
    assert not torch.equal(absorbing(image)[0], before[0]), "a norm's buffers count, whenever they are loaded"


def test_half_precision_stays_half() -> None:
    absorbing = backbone("resnet18").train()
    absorb_norms(absorbing)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert {feature.dtype for feature in absorbing(torch.randn(1, 3, 64, 64))} == {torch.bfloat16}


class _Branching(nn.Module):
    """A convolution whose output the norm does not take alone."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> list[Tensor]:
        stem = self.inner.conv1(x)
        return [self.inner.bn1(stem), stem]


def test_what_cannot_be_absorbed_stays(caplog: pytest.LogCaptureFixture) -> None:
    made = backbone("resnet18")
    made.body = _Branching(made.body)
    image = torch.randn(1, 3, 64, 64)
    before = made(image)
    with caplog.at_level(logging.WARNING):
        assert absorb_norms(made) == 0
    assert "cannot absorb" in caplog.text
    assert all(torch.equal(a, b) for a, b in zip(made.train()(image), before, strict=True))


def test_a_step_absorbs_frozen_norms_alone(tiny: Config) -> None:
    def classes(config: Config, **options: bool) -> set[str]:
        step = Step(build_model(config.model, load_pretrained=False), config, CPU, stride=4, **options)
        return {type(module).__name__ for module in step.model.backbone.modules()}

    frozen = tiny.replace({"model.backbone.frozen_norm": True})
    assert "_AbsorbingConv2d" in classes(frozen)
    assert "_AbsorbingConv2d" not in classes(frozen, plain=True)
    assert "_AbsorbingConv2d" not in classes(tiny)


def test_a_convolution_with_a_bias() -> None:
    made = backbone("resnet18")
    stem = nn.Conv2d(3, 64, 7, stride=2, padding=3)
    made.body.conv1 = stem
    before = [feature.clone() for feature in made.train()(torch.ones(1, 3, 64, 64))]
    assert absorb_norms(made) == 20
    for a, b in zip(made(torch.ones(1, 3, 64, 64)), before, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3 * float(b.detach().abs().max()))


def test_a_backbone_that_takes_no_small_images(caplog: pytest.LogCaptureFixture) -> None:
    made = backbone("resnet18").train()
    inner = made.body

    class Large(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> list[Tensor]:
            if x.shape[-1] < 100:
                raise RuntimeError("too small")
            found: list[Tensor] = self.inner(x)
            return found

    made.body = Large()
    with caplog.at_level(logging.WARNING):
        assert absorb_norms(made) == 0
    assert "too small" in caplog.text
    assert made.training
    transformer = Backbone(BackboneConfig(name="pvt_v2_b0", pretrained=False))
    caplog.clear()
    assert absorb_norms(transformer) == 0
    assert not caplog.text, "without norms there is nothing to say"


def test_plain_norms_keep_their_input_s_type() -> None:
    """As detectron2's do; in float32 they are timm's."""
    made = backbone("resnet18").train()
    plain = copy.deepcopy(made)
    keep_types(plain)
    image = torch.randn(1, 3, 64, 64)
    for a, b in zip(plain(image), made(image), strict=True):
        torch.testing.assert_close(a, b)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert {feature.dtype for feature in plain(image)} == {torch.bfloat16}
        assert {feature.dtype for feature in made(image)} == {torch.float32}
