"""Compare models exported to ONNX and by torch.export with PyTorch."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from timm.layers import Conv2dSame

from sparseinst.cli import run_cli
from sparseinst.config import Config
from sparseinst.data.coco import Category
from sparseinst.inference.export import Inference, MatrixPool, Network, export_model
from sparseinst.inference.predict import Predictor
from sparseinst.inference.weights import save_weights
from sparseinst.models.sparseinst import SparseInst, build_model
from sparseinst.overrides import load_config
from tests.conftest import CPU, TINY

KINDS: dict[str, dict[str, Any]] = {
    "IAM": {},
    "G-IAM": {"model.decoder.iam.groups": 4},
    "softmax": {"model.decoder.iam.groups": 4, "model.decoder.iam.activation": "softmax"},
}
SIZES = [(256, 320), (240, 333), (448, 200)]


def build_random_model(**settings: Any) -> tuple[SparseInst, Config]:
    """Return a model whose maps, scores and masks differ, and its config."""
    config = load_config(overrides={**TINY, "inference.score_threshold": 0.05, **settings})
    torch.manual_seed(0)
    model = build_model(config.model).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
        probe = model.normalise(255 * torch.rand(1, 3, 64, 64), [(64, 64)])
        middle = float(model(probe).mask_logits.sigmoid().median())
    # With this threshold, masks are neither empty nor full for any kind of map. ONNX Runtime's sigmoid is inexact near 0.
    config = config.replace({"inference.mask_threshold": max(middle, 0.001)})
    return model, config


def image(size: tuple[int, int]) -> torch.Tensor:
    return 255 * torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(sum(size)))


DEFORMABLE: dict[str, Any] = {"model.decoder.deformable": True, "model.decoder.deformable_version": 1}
KINDS |= {"DCN v1": DEFORMABLE, "DCN v2": {"model.backbone.deformable_stages": [5], "model.backbone.deformable_version": 2}}
"""Random weights give these models offsets that are not zero."""


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_onnx_equals_pytorch(kind: str, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    model, config = build_random_model(**KINDS[kind])
    export_model(model, config.inference, tmp_path / "model.onnx", probabilities=True)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx", providers=["CPUExecutionProvider"])
    inference = Inference(model, config.inference, normalise=True, probabilities=True)
    for size in SIZES:
        scores, labels, masks = session.run(None, {"image": image(size).numpy()})
        with torch.no_grad():
            expected = inference(image(size))
        np.testing.assert_allclose(scores, expected[0], atol=1e-4)
        np.testing.assert_array_equal(labels, expected[1])
        np.testing.assert_allclose(masks, expected[2], atol=1e-4)
        assert masks.shape == (10, *size)
        threshold, truth = config.inference.mask_threshold, expected[2].numpy()
        apart = np.abs(truth - threshold) > 1e-5
        np.testing.assert_array_equal((masks > threshold)[apart], (truth > threshold)[apart])
        assert 0.01 < (masks > threshold).mean() < 0.99


def test_the_exported_graph_equals_predict() -> None:
    """Both give the same scores, labels and masks for an image that is not resized."""
    model, config = build_random_model()
    size = (64, 90)
    pixels = image(size).round()
    predictor = Predictor(model, config, tuple(Category(n, str(n)) for n in range(6)), CPU)
    found = predictor.predict(pixels[0].permute(1, 2, 0).to(torch.uint8).numpy())
    with torch.no_grad():
        scores, labels, masks = Inference(model, config.inference, normalise=True, probabilities=False)(pixels)
    order = scores.argsort(descending=True, stable=True)[: len(found.scores)]
    assert len(found.scores) > 0
    np.testing.assert_allclose(found.scores, scores[order], atol=1e-5)
    np.testing.assert_array_equal(found.labels, labels[order])
    assert (found.masks != masks[order].numpy()).mean() < 1e-3
    assert (scores == 0).sum() >= 10 - len(found.scores)


@pytest.mark.parametrize("bins", [1, 2, 3, 6])
@pytest.mark.parametrize("size", [(7, 11), (6, 6), (20, 27)])
def test_pooling_by_matrices_equals_adaptive_pooling(bins: int, size: tuple[int, int]) -> None:
    x = torch.randn(2, 3, *size)
    torch.testing.assert_close(MatrixPool(bins)(x), torch.nn.functional.adaptive_avg_pool2d(x, bins))


@pytest.mark.slow
def test_torch_export_supports_any_size_and_deformable_convolutions(tmp_path: Path) -> None:
    model, config = build_random_model(**{"model.decoder.deformable": True})
    export_model(model, config.inference, tmp_path / "model.pt2", form="torch")
    program = torch.export.load(tmp_path / "model.pt2").module()
    inference = Inference(model, config.inference, normalise=True, probabilities=False)
    for size in SIZES[:2]:
        with torch.no_grad():
            scores, labels, masks = program(image(size))
            expected = inference(image(size))
        torch.testing.assert_close(scores, expected[0], atol=1e-4, rtol=1e-4)
        assert torch.equal(labels, expected[1])
        assert (masks != expected[2]).float().mean() < 1e-4


@pytest.mark.slow
def test_half_precision_gives_a_smaller_file_and_close_results(tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    model, config = build_random_model(**{"model.backbone.name": "resnet10t"})  # larger than the graph around it
    weights = tmp_path / "run.safetensors"
    save_weights(weights, model.state_dict(), config, tuple(Category(n, str(n)) for n in range(6)))
    for name, more in (("half", ["--half"]), ("full", [])):
        assert run_cli(["export", "--weights", str(weights), "--output", str(tmp_path / f"{name}.onnx"), *more]) == 0
    half, full = (tmp_path / f"{name}.onnx" for name in ("half", "full"))
    assert half.stat().st_size < 0.6 * full.stat().st_size
    results = [
        onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, {"image": image(SIZES[0]).numpy()})
        for path in (half, full)
    ]
    np.testing.assert_allclose(results[0][0], results[1][0], atol=2e-2)
    assert (results[0][2] != results[1][2]).mean() < 0.02


def test_pooling_by_matrices_takes_rectangles_and_half_precision() -> None:
    x, pool = torch.randn(2, 5, 13, 20), torch.nn.AdaptiveAvgPool2d((7, 2))
    torch.testing.assert_close(MatrixPool((7, 2))(x), pool(x))
    half = x.bfloat16()
    torch.testing.assert_close(MatrixPool((7, 2))(half), pool(half.float()).bfloat16())


@pytest.mark.parametrize("size", [(32, 64), (96, 160)])
def test_padding_that_depends_on_the_size_becomes_fixed(size: tuple[int, int]) -> None:
    """TensorFlow's models pad each layer of stride 2 by its input's size."""
    torch.manual_seed(0)
    model, _ = build_random_model(**{"model.backbone.name": "tf_efficientnet_lite0", "model.encoder.channels": 16})
    image = torch.randn(2, 3, *size)
    network = Network(model).eval()
    assert any(isinstance(module, Conv2dSame) for module in model.modules())
    assert not any(isinstance(module, Conv2dSame) for module in network.modules())
    with torch.no_grad():
        for ours, theirs in zip(network(image), model(image), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=5e-4)
