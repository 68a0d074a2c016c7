"""Check products of half precision on processors without instructions for it, against torch's own ones."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from sparseinst import device as devices
from sparseinst.config import Config
from sparseinst.half_products import InFloat32, has_instructions
from sparseinst.inference.optimize import optimize
from sparseinst.models.sparseinst import build_model
from sparseinst.training.step import Step

CPU = torch.device("cpu")


def layers(kind: str) -> tuple[nn.Module, Tensor]:
    """Return a layer with weights of eighths and an input of eighths, whose products half precision holds exactly."""
    if kind == "linear":
        layer, shape = nn.Linear(16, 8), (4, 16)
    else:
        layer, shape = nn.Conv2d(16, 8, 3, padding=1, bias=kind == "bias"), (2, 16, 9, 7)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randint(-4, 5, parameter.shape) / 8)
    return layer, (torch.randint(-4, 5, shape) / 8).requires_grad_()


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["no bias", "bias", "linear"])
def test_a_product_is_that_of_float32_rounded_once(kind: str, half: torch.dtype) -> None:
    layer, images = layers(kind)
    wanted = layer(images)
    wanted.square().sum().backward()
    gradients = [images.grad, *(parameter.grad for parameter in layer.parameters())]
    with InFloat32(half), torch.autocast("cpu", dtype=half):
        images.grad = None
        layer.zero_grad()
        output = layer(images)
    assert output.dtype == half
    assert torch.equal(output, wanted.to(half))
    with InFloat32(half):
        output.backward((2 * wanted).to(half))
    for gradient, expected in zip([images.grad, *(parameter.grad for parameter in layer.parameters())], gradients, strict=True):
        assert gradient is not None
        assert expected is not None
        torch.testing.assert_close(gradient, expected, rtol=2**-7, atol=0.05)


@pytest.mark.parametrize("rows", [(2, 3, 5), (3, 5)])
def test_matrix_products(rows: tuple[int, ...]) -> None:
    left, right = torch.randn(rows).bfloat16(), torch.randn((*rows[:-2], 5, 4)).bfloat16()
    with InFloat32(torch.bfloat16):
        product = left @ right
    assert torch.equal(product, (left.float() @ right.float()).bfloat16())


def test_float32_is_left_alone() -> None:
    left, right = torch.randn(3, 5), torch.randn(5, 4)
    with InFloat32(torch.bfloat16):
        assert torch.equal(left @ right, torch.mm(left, right))


def test_a_model_has_nearly_the_gradients_of_torchs_own_products(monkeypatch: pytest.MonkeyPatch, tiny: Config) -> None:
    """The two differ only in the order of sums, which decides a few roundings."""
    torch.manual_seed(0)
    model = build_model(tiny.model, load_pretrained=False)
    images = torch.rand(2, 3, 64, 64)

    def gradients(native: bool) -> dict[str, Tensor]:
        monkeypatch.setattr(devices, "has_instructions", lambda device, dtype: native)
        model.zero_grad()
        with devices.autocast(CPU, "bf16"):
            predictions = model(images)
        with devices.fast_products(CPU, "bf16"):
            (predictions.mask_logits.float().square().mean() + predictions.class_logits.float().square().mean()).backward()
        return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}

    torchs, ours = gradients(True), gradients(False)
    assert torchs.keys() == ours.keys()
    for name, gradient in torchs.items():
        if gradient.norm() > 1e-6:
            assert nn.functional.cosine_similarity(gradient.flatten(), ours[name].flatten(), dim=0) > 0.98, name


def test_a_processor_with_instructions_uses_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "has_instructions", lambda device, dtype: True)
    assert not isinstance(devices.fast_products(CPU, "bf16"), InFloat32)
    monkeypatch.setattr(devices, "has_instructions", lambda device, dtype: False)
    assert isinstance(devices.fast_products(CPU, "bf16"), InFloat32)
    assert not isinstance(devices.fast_products(CPU, "fp32"), InFloat32)


def test_nothing_is_compiled_without_instructions(
    tiny: Config, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """torch.compile cannot run while products are replaced."""
    monkeypatch.setattr(devices, "has_instructions", lambda device, dtype: False)
    model = build_model(tiny.model, load_pretrained=False).eval()
    images = torch.rand(2, 3, 64, 64)
    fast = optimize(model, device=CPU, mode="compiled", precision="bf16")
    assert "no instructions for bf16" in caplog.text
    with torch.no_grad():
        raw, wanted = fast(images), model(images)
    torch.testing.assert_close(raw.class_logits.sigmoid(), wanted.class_logits.sigmoid(), atol=0.01, rtol=0.02, check_dtype=False)
    caplog.clear()
    Step(model, tiny.replace({"train.compile": True, "train.precision": "bf16"}), CPU)
    assert "train.compile has no effect" in caplog.text


def test_only_processors_lack_instructions() -> None:
    assert has_instructions(torch.device("cuda"), torch.bfloat16)
    assert has_instructions(CPU, torch.float32)
