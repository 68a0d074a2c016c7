"""Check that a fast copy gives the model's outputs: folded norms, merged convolutions, Winograd and torch.compile."""

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from sparseinst import load_model
from sparseinst.cli import run_cli
from sparseinst.config import MODELS, Config
from sparseinst.errors import UserError
from sparseinst.evaluation.weights import evaluate_weights
from sparseinst.inference import ahead, winograd
from sparseinst.inference import optimize as optimizing
from sparseinst.inference.optimize import OptimizedSparseInst, fold_norms, optimize
from sparseinst.inference.winograd import WinogradConv2d
from sparseinst.models.sparseinst import SparseInst, build_model
from tests.conftest import CPU, run

needs_compiler = pytest.mark.skipif(not ahead.has_compiler(), reason="no C++ compiler")


def randomise_norms(model: SparseInst) -> SparseInst:
    """Give the norms random statistics, so that a wrong folding changes the outputs."""
    generator = torch.Generator().manual_seed(1)
    for name, tensor in [*model.backbone.named_buffers(), *model.backbone.named_parameters()]:
        if name.endswith("running_var"):
            tensor.data.uniform_(0.5, 1.5, generator=generator)
        elif name.endswith("running_mean") or (tensor.ndim == 1 and name.endswith("bias")):
            tensor.data.normal_(0, 0.1, generator=generator)
    return model.eval()


@pytest.mark.parametrize("name", ["r50-giam", "r50-dcn-giam", "r50d-giam", "cspdarknet53-giam", "pvtv2-b1-giam"])
def test_folding_changes_only_rounding(name: str) -> None:
    config = Config().replace({**MODELS[name], "model.backbone.pretrained": False, "model.decoder.depth": 1})
    torch.manual_seed(0)
    model = randomise_norms(build_model(config.model))
    image = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        expected = model(image)
        fast = optimize(model, device=CPU, mode="folded")
        for ours, theirs in zip(fast(image), expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4 * float(theirs.abs().max()))
    norms = [m for m in fast.backbone.modules() if hasattr(m, "running_mean")]
    assert not norms, "every norm is folded"
    assert any(hasattr(m, "running_mean") for m in model.backbone.modules()) or name == "pvtv2-b1-giam", (
        "the model keeps its norms"
    )


def test_norms_that_cannot_be_folded_stay(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    model = randomise_norms(
        build_model(Config().replace({"model.backbone.name": "resnet10t", "model.backbone.pretrained": False}).model)
    )
    image = torch.randn(1, 3, 64, 64)
    expected = model.backbone(image)
    monkeypatch.setattr(optimizing, "fuse_conv_bn_weights", lambda weight, bias, *_: (nn.Parameter(2 * weight), bias))
    with torch.no_grad(), caplog.at_level(logging.WARNING):
        assert fold_norms(model.backbone) == 0
        assert "cannot be folded" in caplog.text
        assert all(torch.equal(a, b) for a, b in zip(model.backbone(image), expected, strict=True))


def test_folding_without_fusion_and_with_trainable_norms(tiny: Config) -> None:
    model = randomise_norms(build_model(tiny.replace({"model.encoder.fusion": False}).model))
    image = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        torch.testing.assert_close(optimize(model, device=CPU, mode="folded")(image).mask_logits, model(image).mask_logits)


@pytest.mark.parametrize("size", [(16, 20), (21, 30), (5, 7), (1, 1)])
def test_winograd_equals_the_convolution(size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(19, 23, 3, padding=1)
    x = torch.randn(2, 19, *size).relu()
    with torch.no_grad():
        torch.testing.assert_close(WinogradConv2d(conv)(x), conv(x), rtol=1e-5, atol=2e-6)
        torch.testing.assert_close(WinogradConv2d(conv, relu=True)(x), conv(x).relu(), rtol=1e-5, atol=2e-6)
        half = WinogradConv2d(conv.bfloat16())(x.bfloat16())
        assert half.dtype == torch.bfloat16
        exact = conv.double()(x.double())
        assert (half - exact).std() < 0.02 * exact.std(), "the usual interpolation points lose 2.5 %"


@needs_compiler
@pytest.mark.parametrize(
    ("precision", "amx", "used"),
    [("fp32", True, True), ("bf16", False, True), ("bf16", True, False), ("fp16", False, False)],
)
def test_winograd_is_used_only_where_its_sums_fit_and_pay(
    tiny: Config, precision: Any, amx: bool, used: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(optimizing, "is_native", lambda device, precision: True)
    monkeypatch.setattr(optimizing, "multiplies_bfloat16", lambda *, matrices: matrices and amx)
    monkeypatch.setattr(WinogradConv2d, "is_faster_for", lambda conv: conv.kernel_size == (3, 3) and conv.stride == (1, 1))
    fast = optimize(randomise_norms(build_model(tiny.model)), device=CPU, mode="best", precision=precision)
    assert any(isinstance(module, WinogradConv2d) for module in fast.modules()) is used


def test_winograd_is_used_only_where_it_is_faster() -> None:
    assert WinogradConv2d.is_faster_for(nn.Conv2d(256, 256, 3, padding=1))
    for other in (
        nn.Conv2d(256, 256, 3, 2, padding=1),
        nn.Conv2d(256, 256, 3),
        nn.Conv2d(256, 256, 1),
        nn.Conv2d(256, 256, 3, padding=1, groups=4),
        nn.Conv2d(64, 256, 3, padding=1),
        nn.Conv2d(256, 64, 3, padding=1),
    ):
        assert not WinogradConv2d.is_faster_for(other)


def test_half_precision_without_cuda_graphs_and_compiler(
    tiny: Config, tmp_path: Path, monkeypatch: Any, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(WinogradConv2d, "is_faster_for", lambda conv: conv.kernel_size == (3, 3) and conv.stride == (1, 1))
    model = randomise_norms(build_model(tiny.model))
    image = torch.randn(1, 3, 64, 96)
    with torch.no_grad(), caplog.at_level(logging.WARNING):
        expected = model(image)
        half = optimize(model, device=CPU, mode="graph", precision="bf16")
        assert "no CUDA graphs on cpu" in caplog.text
        assert next(half.parameters()).dtype == torch.bfloat16
        assert half.normalise(torch.zeros(1, 3, 64, 96), [(64, 96)]).dtype == torch.float32
        found = half(image)
        assert found.responses.dtype == torch.float32
        torch.testing.assert_close(found.mask_logits.float(), expected.mask_logits, rtol=0.1, atol=0.05)
        monkeypatch.setattr(ahead.shutil, "which", lambda _: None)
        monkeypatch.setenv("SPARSEINST_CACHE", str(tmp_path))
        plain = optimize(model, device=CPU, mode="best")
        assert "finds no C++ compiler" in caplog.text
        assert not any(isinstance(module, WinogradConv2d) for module in plain.modules())
        torch.testing.assert_close(plain(image).mask_logits, expected.mask_logits, rtol=1e-3, atol=1e-4)


def test_without_a_compiler_best_loads_what_is_there(
    tiny: Config, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Without Winograd's libraries, the compiled network without Winograd is loaded."""
    libraries: set[str] = set()

    def load(module: nn.Module, _example: Any, _sides: Any, _checks: Any, what: str) -> Any:
        winograd_inside = any(isinstance(part, WinogradConv2d) for part in module.modules())
        if f"{what}{' with Winograd' if winograd_inside else ''}" not in libraries:
            raise ahead.CannotCompile(f"no library of {what}")
        return module

    def loaded() -> tuple[bool, bool]:
        winograd._compile_parts.cache_clear()
        fast = optimize(model, device=CPU, mode="best")
        return fast._compiled is not None, any(isinstance(module, WinogradConv2d) for module in fast.modules())

    monkeypatch.setattr(ahead.shutil, "which", lambda _: None)
    monkeypatch.setattr(optimizing, "compiled", load)
    monkeypatch.setattr(winograd, "compiled", load)
    monkeypatch.setattr(winograd, "_compiled", {})
    monkeypatch.setattr(WinogradConv2d, "is_faster_for", lambda conv: conv.kernel_size == (3, 3) and conv.stride == (1, 1))
    model = randomise_norms(build_model(tiny.model))
    try:
        assert loaded() == (False, False)
        assert caplog.text.count("no library of the network; the model runs without torch.compile") == 1
        libraries |= {"the network", "the network with Winograd"}
        assert loaded() == (True, False)
        libraries |= {"Winograd's convolution, part 1", "Winograd's convolution, part 2"}
        assert loaded() == (True, True)
        assert len(said(caplog)) == 1
    finally:
        winograd._compile_parts.cache_clear()


def test_a_failing_compiler_gives_a_warning(tiny: Config, caplog: pytest.LogCaptureFixture) -> None:
    model = randomise_norms(build_model(tiny.model))
    fast = optimize(model, device=CPU, mode="folded")

    def broken(_: torch.Tensor) -> Any:
        raise torch._dynamo.exc.BackendCompilerFailed(broken, RuntimeError("no such kernel"), None)

    fast._compiled, fast._compile_with, fast._compiled_for = broken, {}, ("cpu", torch.get_num_threads())
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad(), caplog.at_level(logging.WARNING):
        torch.testing.assert_close(fast(image).mask_logits, model(image).mask_logits, rtol=1e-3, atol=1e-4)
    assert "torch.compile fails" in caplog.text
    assert fast._compiled is None
    assert fast._compile_with is None, "the next image does not try it again"
    with pytest.raises(UserError, match="is optimised already"):
        optimize(fast, device=CPU)


@needs_compiler
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch's compiler gives warnings of its own
def test_a_compiled_model_equals_its_original_for_all_sizes(
    tiny: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The second copy, like a second process, compiles nothing; with other weights it does."""
    monkeypatch.setenv("SPARSEINST_CACHE", str(tmp_path))
    model = randomise_norms(build_model(tiny.replace({"model.backbone.name": "test_resnet"}).model))
    with torch.no_grad(), caplog.at_level(logging.WARNING):
        for attempt in range(2):
            fast = optimize(model, device=CPU, mode="compiled")
            for size in ((1, 3, 64, 96), (2, 3, 32, 32), (5, 3, 160, 64)):
                image = torch.randn(size)
                for ours, theirs in zip(fast(image), model(image), strict=True):
                    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
            monkeypatch.setattr(ahead, "_compile", forbidden)
            monkeypatch.setattr(ahead.shutil, "which", lambda _: None)
            assert len(list((tmp_path / "torch").iterdir())) == 1, f"one library and nothing else, attempt {attempt}"
        assert not said(caplog)
        threads = torch.get_num_threads()
        torch.set_num_threads(threads + 1)
        try:  # nothing is there for so many threads, and no compiler
            torch.testing.assert_close(fast(image).mask_logits, model(image).mask_logits, rtol=1e-4, atol=1e-4)
            [line] = said(caplog)
            assert "the library that was loaded before is used" in line
        finally:
            torch.set_num_threads(threads)
        monkeypatch.setattr(ahead.shutil, "which", lambda name: name)
        monkeypatch.setattr(torch, "compile", lambda forward, **_: forward)
        next(model.decoder.parameters()).add_(0.1)
        assert optimize(model, device=CPU, mode="compiled")(image).mask_logits.isfinite().all()
        assert "cannot be compiled ahead of time (compiles again)" in caplog.text


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return what this package said; torch logs more."""
    return [record.getMessage() for record in caplog.records if record.name.startswith("sparseinst")]


def forbidden(*_: Any) -> None:
    raise RuntimeError("compiles again")


def test_a_model_with_winograd_equals_its_original(tiny: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        WinogradConv2d, "is_faster_for", lambda conv: (conv.kernel_size, conv.stride, conv.groups) == ((3, 3), (1, 1), 1)
    )
    model = randomise_norms(build_model(tiny.replace({"model.backbone.name": "test_resnet"}).model))
    image = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        expected = model(image)
        optimizing._use_winograd(model)
        replaced = [module for module in model.modules() if isinstance(module, WinogradConv2d)]
        assert any(module.floor == 0 for module in replaced), "the ReLUs of the decoder's branches are merged"
        assert any(module.floor < 0 for module in replaced)
        for ours, theirs in zip(model(image), expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@needs_compiler
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch's compiler gives warnings of its own
def test_compiled_winograd_equals_the_convolution(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The size of the input is not a multiple of the tile size."""
    monkeypatch.setenv("SPARSEINST_CACHE", str(tmp_path))
    winograd._compile_parts.cache_clear()
    winograd.compile_winograd(torch.float32)
    torch.manual_seed(0)
    convs = [nn.Conv2d(18, 32, 3, padding=1), nn.Conv2d(32, 20, 3, padding=1)]
    plain = nn.Sequential(convs[0], nn.ReLU(), convs[1]).eval()
    fast = torch.compile(nn.Sequential(WinogradConv2d(convs[0], relu=True), WinogradConv2d(convs[1])), options={"freezing": True})
    x = torch.randn(1, 18, 21, 30).to(memory_format=torch.channels_last)
    with torch.no_grad():
        torch.testing.assert_close(fast(x), plain(x), rtol=1e-5, atol=2e-6)
    assert len(list((tmp_path / "torch").iterdir())) == 2, "both parts are compiled once for both convolutions"


def test_load_model_and_commands_use_the_fast_copy(tiny: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tiny, tmp_path / "run")
    picture = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)
    plain = load_model(tmp_path / "run", "cpu").predict(picture)
    fast = load_model(tmp_path / "run", "cpu", optimize="folded", precision="fp32")
    assert isinstance(fast.model, OptimizedSparseInst)
    found = fast.predict(picture)
    np.testing.assert_allclose(found.scores, plain.scores, rtol=1e-3)
    assert (found.masks != plain.masks).mean() < 1e-3
    exact = evaluate_weights(tmp_path / "run", {}, device=CPU)
    folded = evaluate_weights(tmp_path / "run", {}, device=CPU, optimize="folded")
    assert folded.figures["AP"] == pytest.approx(exact.figures["AP"], abs=0.1)
    assert run_cli(["evaluate", "--weights", str(tmp_path / "run"), "--optimize", "folded", "--device", "cpu"]) == 0
    assert run_cli(["evaluate", "--weights", str(tmp_path / "run"), "--optimize", "fast"]) == 2
    assert load_model(tmp_path / "run", "cpu", optimize="folded", precision="bf16").config.inference.precision == "bf16"
