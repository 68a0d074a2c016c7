"""Check the model: sizes, variants, gradients and backbones."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torchvision.ops import deform_conv2d

from sparseinst.config import MODELS, Activation, Config, DecoderConfig, IAMConfig
from sparseinst.criterion import Criterion
from sparseinst.errors import UserError
from sparseinst.matcher import Target
from sparseinst.models.decoder import Coordinates, Decoder
from sparseinst.models.iam import ACTIVATIONS, normalise
from sparseinst.models.layers import DeformableConv2d, sampled_conv2d
from sparseinst.models.sparseinst import build_model
from sparseinst.overrides import load_config
from tests.conftest import TINY, alternatives

VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "no ppm": {"model.encoder.ppm": False},
    "no fusion": {"model.encoder.fusion": False},
    "neither": {"model.encoder.ppm": False, "model.encoder.fusion": False},
    "no coordinates": {"model.decoder.coordinates": False},
    "deformable": {"model.decoder.deformable": True},
    "deformable v2": {"model.decoder.deformable": True, "model.decoder.deformable_version": 2},
    "depth 3": {"model.decoder.depth": 3},
    "width 24": {"model.decoder.width": 24},
    "1x1": {"model.decoder.iam.kernel_size": 1},
    "two convs": {"model.decoder.iam.convs": 2},
    "2 groups": {"model.decoder.iam.groups": 2},
    "8 groups, softmax": {"model.decoder.iam.groups": 8, "model.decoder.iam.activation": "softmax"},
    "two convs, 4 groups": {"model.decoder.iam.groups": 4, "model.decoder.iam.convs": 2},
    "kernel_dim 16": {"model.decoder.kernel_dim": 16},
    "mask scale 1": {"model.decoder.mask_scale": 1.0},
    "mask scale 4": {"model.decoder.mask_scale": 4.0},
    "deformable backbone": {"model.backbone.name": "resnet18", "model.backbone.deformable_stages": [4, 5]},
    "deformable backbone v2": {
        "model.backbone.name": "resnet18",
        "model.backbone.deformable_stages": [5],
        "model.backbone.deformable_version": 2,
    },
    **{str(change): {f"model.decoder.iam.{name}": value for name, value in change.items()} for change in alternatives(IAMConfig)},
}


def tiny_config(overrides: dict[str, Any]) -> Config:
    return load_config(overrides={**TINY, **overrides})


def some_targets(size: tuple[int, int], counts: tuple[int, ...] = (3, 1)) -> list[Target]:
    generator = torch.Generator().manual_seed(0)
    return [Target(torch.arange(n) % 8, (torch.rand((n, *size), generator=generator) > 0.6).float()) for n in counts]


@pytest.mark.parametrize(
    ("preset", "count"), [("r50-iam", 31_584_373), ("r50-giam", 32_794_785), ("r50-giam-softmax", 32_794_785)]
)
def test_parameter_counts(preset: str, count: int) -> None:
    config = load_config(model=preset, overrides={"model.backbone.pretrained": False})
    assert sum(p.numel() for p in build_model(config.model).parameters()) == count


@pytest.mark.parametrize("name", MODELS)
def test_every_named_model_builds_and_segments(name: str) -> None:
    config = load_config(model=name, overrides={"model.backbone.pretrained": False})
    model = build_model(config.model).eval()
    with torch.no_grad():
        output = model(torch.zeros(1, 3, 64, 96))
    groups = config.model.decoder.iam.groups
    assert output.class_logits.shape == (1, 100, 80)
    assert output.objectness_logits.shape == (1, 100)
    assert output.mask_logits.shape == (1, 100, 16, 24)
    assert output.responses.shape == (1, 100 * groups, 8, 12)


@pytest.mark.parametrize("overrides", VARIANTS.values(), ids=VARIANTS)
def test_every_variant_trains_every_parameter(overrides: dict[str, Any]) -> None:
    config = tiny_config(overrides)
    torch.manual_seed(0)
    model = build_model(config.model).train()
    for module in model.modules():  # timm sets the last norm of a block to zero, which blocks the first gradient
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.ones_(module.weight)
    images = torch.randn(2, 3, 64, 96)
    output = model(images)
    assert tuple(output.mask_logits.shape[-2:]) == model.mask_size((64, 96))
    losses = Criterion(config.loss, config.matcher)(output, some_targets(model.mask_size((64, 96))))
    torch.stack(list(losses.values())).sum().backward()
    without = [name for name, p in model.named_parameters() if p.grad is None]
    assert not without
    zero = [name for name, p in model.named_parameters() if not p.grad.any()]
    # The bias of the keys shifts all scores of a query alike, which softmax ignores. So this bias has no gradient.
    assert not [name for name in zero if "in_proj_bias" not in name]


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_maps_sum_to_one(activation: Activation) -> None:
    logits = torch.randn(2, 5, 6, 7) * 30
    maps = normalise(ACTIVATIONS[activation](logits))
    torch.testing.assert_close(maps.sum(-1), torch.ones(2, 5))


def test_softmax_maps_do_not_depend_on_the_bias() -> None:
    logits = torch.randn(1, 3, 4, 5) * 50
    expected = (logits + 7).flatten(2).softmax(-1)
    torch.testing.assert_close(normalise(ACTIVATIONS["softmax"](logits)), expected)


@pytest.mark.parametrize("groups", [1, 2, 4, 8])
def test_groups_belong_to_their_instance(groups: int) -> None:
    """A change of one map g N + i must change the outputs of instance i only."""
    torch.manual_seed(0)
    config = DecoderConfig(width=16, depth=1, kernel_dim=4, iam=IAMConfig(num_maps=5, groups=groups))
    decoder = Decoder(config, 8, 3)
    torch.nn.init.normal_(decoder.instance_branch.iam.conv.weight)
    torch.nn.init.normal_(decoder.instance_branch.classes.weight)
    features = torch.randn(1, 8, 6, 6)
    before = decoder(features).class_logits
    with torch.no_grad():
        decoder.instance_branch.iam.conv.weight.view(groups, 5, -1)[groups - 1, 2] += 1.0
    changed = (decoder(features).class_logits != before).any(-1)[0].tolist()
    assert changed == [False, False, True, False, False]


def test_half_precision_maps_do_not_overflow() -> None:
    """The maps are normalised before they gather features: in fp16 the sum over 80 x 107 positions would exceed 65,504."""
    config = DecoderConfig(width=8, depth=1, kernel_dim=4, iam=IAMConfig(num_maps=3))
    iam = Decoder(config, 8, 2).instance_branch.iam
    torch.nn.init.zeros_(iam.conv.weight)
    torch.nn.init.zeros_(iam.conv.bias)  # responses of one half, which a trained map reaches as well
    features = torch.full((1, 8, 80, 107), 30.0, dtype=torch.float16)
    with torch.autocast("cpu", dtype=torch.float16):
        gathered, responses = iam(features)
    assert torch.isinf(responses.half().flatten(2) @ features.flatten(2).transpose(1, 2)).all(), (
        "gathering before normalising overflows"
    )
    torch.testing.assert_close(gathered.float(), torch.full((1, 3, 8), 30.0), rtol=0.02, atol=0)


def test_coordinates_are_x_then_y() -> None:
    grid = Coordinates()(torch.zeros(2, 1, 3, 5))[:, :2]
    assert grid.shape == (2, 2, 3, 5)
    assert grid[1, 0, 2].tolist() == [-1.0, -0.5, 0.0, 0.5, 1.0]
    assert grid[0, 1, :, 4].tolist() == [-1.0, 0.0, 1.0]


@pytest.mark.parametrize("version", [1, 2])
def test_a_deformable_convolution_starts_as_the_plain_one(version: int) -> None:
    conv = torch.nn.Conv2d(6, 4, 3, stride=2, padding=1)
    x = torch.randn(2, 6, 9, 11)
    torch.testing.assert_close(DeformableConv2d(conv, version)(x), conv(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "dilation", "modulated"),
    [(3, (1, 1), (1, 1), (1, 1), True), (3, (2, 2), (1, 1), (1, 1), False), (3, (1, 2), (2, 1), (2, 1), True),
     (5, (1, 1), (0, 2), (1, 1), True)],
)  # fmt: skip
def test_the_deformable_convolution_for_cpus_equals_torchvisions_with_its_gradients(
    kernel: int, stride: tuple[int, int], padding: tuple[int, int], dilation: tuple[int, int], modulated: bool
) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 6, 21, 32, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, 6, kernel, kernel, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(5, dtype=torch.float64)
    rows, columns = torch.nn.functional.conv2d(x, weight, None, stride, padding, dilation).shape[2:]
    # Many of these positions lie outside of the input.
    offset = (8 * torch.randn(2, 2 * kernel**2, rows, columns, dtype=torch.float64)).requires_grad_()
    mask = torch.rand(2, kernel**2, rows, columns, dtype=torch.float64).requires_grad_() if modulated else None
    inputs = [x, weight, offset, *([mask] if mask is not None else [])]
    expected = deform_conv2d(x, offset, weight, bias, stride, padding, dilation, mask)
    found = sampled_conv2d(x, offset, weight, bias, stride, padding, dilation, mask)
    torch.testing.assert_close(found, expected)
    direction = torch.randn_like(expected)
    for ours, theirs in zip(
        torch.autograd.grad(found, inputs, direction), torch.autograd.grad(expected, inputs, direction), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


def test_images_are_padded_with_zeros_after_normalisation() -> None:
    model = build_model(tiny_config({}).model)
    images = torch.full((2, 3, 32, 32), 255, dtype=torch.uint8)
    result = model.normalise(images, [(32, 32), (20, 10)])
    torch.testing.assert_close(result[0, 0, 31, 31], torch.tensor((255 - 123.675) / 58.395))
    assert not result[1, :, 20:].any()
    assert not result[1, :, :, 10:].any()
    assert result[1, :, 19, 9].all()


def test_frozen_norms_are_buffers_and_freeze_at_freezes_stages() -> None:
    overrides = {"model.backbone.name": "resnet18", "model.backbone.frozen_norm": True, "model.backbone.freeze_at": 2}
    model = build_model(tiny_config(overrides).model)
    names = {name for name, p in model.backbone.named_parameters() if p.requires_grad}
    assert not any("bn" in name for name, _ in model.backbone.named_parameters())
    assert "body.conv1.weight" not in names
    assert not any(name.startswith("body.layer1") for name in names)
    assert "body.layer2.0.conv1.weight" in names
    assert "body.layer1.0.bn1.running_mean" in dict(model.backbone.named_buffers())


def test_freeze_at_freezes_the_norms_of_its_stages() -> None:
    overrides = {"model.backbone.name": "resnet18", "model.backbone.frozen_norm": False, "model.backbone.freeze_at": 2}
    body = build_model(tiny_config(overrides).model).train().backbone.body
    before = {name: buffer.clone() for name, buffer in body.named_buffers()}
    body(torch.randn(2, 3, 64, 64))
    changed = {name.split(".")[0] for name, buffer in body.named_buffers() if not torch.equal(buffer, before[name])}
    assert changed == {"layer2", "layer3", "layer4"}
    assert {name.split(".")[0] for name, p in body.named_parameters() if p.requires_grad} == changed


def test_drop_path_skips_blocks_in_training() -> None:
    config = tiny_config(
        {"model.backbone.name": "pvt_v2_b0", "model.backbone.drop_path": 0.3, "model.backbone.frozen_norm": False}
    )
    torch.manual_seed(0)
    backbone = build_model(config.model).backbone
    same = torch.randn(1, 3, 32, 32).expand(16, -1, -1, -1)
    assert backbone.train()(same)[2].std(dim=0).max() > 1e-2
    assert backbone.eval()(same)[2].std(dim=0).max() < 1e-4
    with pytest.raises(UserError, match="vgg11 has no stochastic depth"):
        build_model(tiny_config({"model.backbone.name": "vgg11", "model.backbone.drop_path": 0.1}).model)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"model.backbone.name": "resnet5O"}, "no such model.*did you mean 'resnet50"),
        ({"model.backbone.name": "vit_tiny_patch16_224"}, "strides"),
        ({"model.backbone.name": "darknet53", "model.backbone.deformable_stages": [5]}, "need a ResNet"),
        ({"model.backbone.weights": "nowhere.pth"}, "nowhere.pth: no such file"),
    ],
)
def test_backbone_mistakes_give_clear_errors(overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_model(tiny_config(overrides).model)


def small_resnet_state() -> dict[str, Tensor]:
    import timm

    torch.manual_seed(1)
    return timm.create_model("small_resnet").state_dict()


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_local_weights_load_in_full(tmp_path: Path, suffix: str) -> None:
    state = small_resnet_state()
    path = tmp_path / f"weights{suffix}"
    save_file(state, path) if suffix == ".safetensors" else torch.save({"state_dict": state}, path)
    model = build_model(tiny_config({"model.backbone.weights": str(path)}).model)
    torch.testing.assert_close(model.backbone.body.state_dict()["layer4.0.conv2.weight"], state["layer4.0.conv2.weight"])
    fresh = build_model(tiny_config({"model.backbone.weights": str(path)}).model, load_pretrained=False)
    assert not torch.equal(fresh.backbone.body.state_dict()["layer4.0.conv2.weight"], state["layer4.0.conv2.weight"])


@pytest.mark.parametrize("damage", ["missing", "shape", "extra"])
def test_weights_that_do_not_fit_are_an_error(tmp_path: Path, damage: str) -> None:
    state = small_resnet_state()
    if damage == "missing":
        del state["layer1.0.conv1.weight"]
    elif damage == "shape":
        state["layer1.0.conv1.weight"] = torch.zeros(1)
    else:
        state["layer9.weight"] = torch.zeros(1)
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(UserError, match="does not fit the backbone small_resnet: layer"):
        build_model(tiny_config({"model.backbone.weights": str(tmp_path / "w.safetensors")}).model)


def test_missing_pretrained_weights_give_a_one_line_error_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("sparseinst.models.backbone._from_hub", lambda name: (_ for _ in ()).throw(OSError("offline")))
    with pytest.raises(UserError, match="set model.backbone.weights=FILE") as caught:
        build_model(load_config().model)
    assert "\n" not in str(caught.value)
