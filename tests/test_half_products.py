"""Check products of half precision that are computed in float32, against torch's own ones."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from sparseinst import device as devices
from sparseinst.bench.timed_training import random_batches
from sparseinst.config import Config
from sparseinst.half_products import _PRODUCTS, InFloat32, torch_is_fast
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


def test_products_in_inference_mode() -> None:
    """There, torch shows a convolution and a linear layer as a whole, and splits them only afterwards."""
    widened = Counting(torch.float32)
    for layer, images in (layers("bias"), layers("linear")):
        with torch.inference_mode(), widened, InFloat32(torch.bfloat16), torch.autocast("cpu", dtype=torch.bfloat16):
            output = layer(images)
        assert torch.equal(output, layer(images).bfloat16())
    assert widened.products == {"convolution": 1, "addmm": 1}


class Counting(TorchDispatchMode):
    """Counts the products whose factors have this type."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype, self.products = dtype, Counter[str]()

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _PRODUCTS and args[0].dtype == self.dtype:
            self.products[func.overloadpacket.__name__] += 1  # type: ignore[attr-defined]
        return func(*args, **(kwargs or {}))


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


def test_factors_of_two_types_stay_an_error() -> None:
    with InFloat32(torch.bfloat16), pytest.raises(RuntimeError, match="same dtype"):
        torch.mm(torch.randn(3, 5).bfloat16(), torch.randn(5, 4))


@pytest.mark.parametrize("again", [False, True])
def test_a_training_step_widens_all_its_products(
    again: bool, tiny: Config, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Also those of the backward pass, and those that it computes again."""
    monkeypatch.setattr(devices, "torch_is_fast", lambda device, dtype: False)
    caplog.set_level(logging.INFO)
    changes = {"train.precision": "bf16", "train.checkpoint_activations": again, "model.backbone.frozen_norm": True}
    config = tiny.replace(changes)
    model = build_model(config.model, load_pretrained=False)
    step = Step(model, config, CPU)
    assert "torch has no fast bf16 on this CPU" in caplog.text
    wide, half = Counting(torch.float32), Counting(torch.bfloat16)
    with wide, half:
        step.gradients(random_batches(config, model.mask_stride())[:1])
    assert half.products == Counter()
    convolutions, gradients = wide.products["convolution"], wide.products["convolution_backward"]
    assert gradients > 10
    assert convolutions > gradients if again else convolutions == gradients


def test_a_model_has_nearly_the_gradients_of_torchs_own_products(monkeypatch: pytest.MonkeyPatch, tiny: Config) -> None:
    """The two differ only in the order of sums, which decides a few roundings."""
    torch.manual_seed(0)
    model = build_model(tiny.model, load_pretrained=False)
    images = torch.rand(2, 3, 64, 64)

    def gradients(native: bool) -> dict[str, Tensor]:
        monkeypatch.setattr(devices, "torch_is_fast", lambda device, dtype: native)
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


def test_fast_products_of_torch_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "torch_is_fast", lambda device, dtype: True)
    assert not isinstance(devices.fast_products(CPU, "bf16"), InFloat32)
    monkeypatch.setattr(devices, "torch_is_fast", lambda device, dtype: False)
    assert isinstance(devices.fast_products(CPU, "bf16"), InFloat32)
    assert not isinstance(devices.fast_products(CPU, "fp32"), InFloat32)


def test_nothing_is_compiled_without_fast_products(
    tiny: Config, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """torch.compile cannot run while products are replaced."""
    monkeypatch.setattr(devices, "torch_is_fast", lambda device, dtype: False)
    model = build_model(tiny.model, load_pretrained=False).eval()
    images = torch.rand(2, 3, 64, 64)
    fast = optimize(model, device=CPU, mode="compiled", precision="bf16")
    assert "nothing is compiled" in caplog.text
    with torch.no_grad():
        raw, wanted = fast(images), model(images)
    torch.testing.assert_close(raw.class_logits.sigmoid(), wanted.class_logits.sigmoid(), atol=0.01, rtol=0.02, check_dtype=False)
    caplog.clear()
    Step(model, tiny.replace({"train.compile": True, "train.precision": "bf16"}), CPU)
    assert "train.compile has no effect" in caplog.text


def test_only_cpus_are_slow() -> None:
    assert torch_is_fast(torch.device("cuda"), torch.bfloat16)
    assert torch_is_fast(CPU, torch.float32)
