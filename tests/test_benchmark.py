"""Latency: what is timed, at which size, and that the parts belong to the whole."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from sparseinst.cli import run_cli
from sparseinst.config import MODELS, Config
from sparseinst.engine.benchmark import (
    MODULES,
    compare,
    count_flops,
    count_parameters,
    measure_latency,
    network_to_time,
)

from .conftest import CPU


def test_parts_and_whole(tiny: Config) -> None:
    found = measure_latency(tiny, device=CPU, warmup=2, repetitions=5)
    assert found.size == (64, 96), "a photo of 480 x 640 with its short side at 64, padded to multiples of 32"
    assert tuple(found.modules_ms) == MODULES
    assert all(value > 0 for value in found.modules_ms.values())
    assert found.whole_ms["p5"] <= found.whole_ms["median"] <= found.whole_ms["p95"]
    assert 0.3 < sum(found.modules_ms.values()) / found.whole_ms["median"] < 3
    assert (found.kept, found.repetitions) == (tiny.model.decoder.iam.num_maps, 5)


def test_a_deeper_model_is_slower_and_tf32_is_given_back(tiny: Config) -> None:
    before = torch.backends.cudnn.allow_tf32
    shallow, deep = (
        measure_latency(tiny.replace({"model.decoder.depth": depth}), device=CPU, warmup=3, repetitions=9).modules_ms["decoder"]
        for depth in (1, 12)
    )
    assert deep > 1.5 * shallow
    assert torch.backends.cudnn.allow_tf32 == before


def test_flops_and_parameters() -> None:
    """The default by hand: R-50's 4.1 G multiply-adds at 224 x 224, and the heads on top; a deformable convolution counts."""
    assert count_parameters(Config()) == 31_584_373
    plain, deformable = (
        Config().replace({**MODELS[name], "model.backbone.pretrained": False}) for name in ("r50-giam", "r50-dcn-giam")
    )
    small = {"inference.short_side": 224, "inference.long_side": 224}
    without, with_offsets = count_flops(plain.replace(small)), count_flops(deformable.replace(small))
    assert 2 * 4.1e9 * (192 / 224) < without < 3 * 2 * 4.1e9, "192 x 224 of the photo, backbone and heads"
    assert 1.0 < with_offsets / without < 1.15, "the offsets' own convolutions come on top of the same 3x3 ones"


def test_batches(tiny: Config) -> None:
    single, four = (measure_latency(tiny, device=CPU, warmup=2, repetitions=5, batch=batch) for batch in (1, 4))
    assert (single.kept, four.kept) == (10, 40)
    assert 0.2 < single.drift < 5
    assert single.peak_memory_mb is single.clocks is None, "of a GPU alone"


@pytest.mark.parametrize("mode", ["plain", "eager", "folded"])
def test_modes_see_the_same_instances(tiny: Config, mode: Any) -> None:
    found = measure_latency(tiny, device=CPU, warmup=1, repetitions=3, mode=mode)
    assert found.kept == 10
    assert tuple(found.modules_ms) == MODULES


def test_comparison_by_turns(tiny: Config) -> None:
    shallow, deep = (network_to_time(tiny.replace({"model.decoder.depth": depth}), device=CPU) for depth in (1, 60))
    found = compare(deep, shallow, device=CPU, warmup=2, repetitions=9)
    assert found.ratio["median"] > 1.3
    assert found.ratio["p5"] <= found.ratio["median"] <= found.ratio["p95"]
    assert found.first_ms["median"] > found.second_ms["median"]


def test_the_comparison_command(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    command = [
        "bench",
        "--size",
        "64",
        "--repetitions",
        "3",
        "--warmup",
        "1",
        "--device",
        "cpu",
        "--output",
        str(tmp_path / "x.json"),
    ]
    assert run_cli([*command, "--compare", "mode=plain", "mode=folded,precision=bf16"]) == 0
    told = capsys.readouterr().out
    assert "r50-iam 64 x1 fp32 plain" in told
    assert "r50-iam 64 x1 bf16 folded" in told
    assert json.loads((tmp_path / "x.json").read_text())["compare"]["ratio"]["median"] > 0
    mistakes = {"mdoe=plain": "did you mean 'mode'", "size=big": "a number was expected", "mode=fast": "one of plain"}
    for wrong, message in mistakes.items():
        assert run_cli([*command, "--compare", "mode=plain", wrong]) == 2
        assert message in capsys.readouterr().err


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    command = [
        "bench",
        "--model",
        "r50-iam",
        "--size",
        "64",
        "--repetitions",
        "3",
        "--device",
        "cpu",
    ]
    assert run_cli([*command, "--precision", "fp32", "--precision", "bf16", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    rows = [(row["model"], row["size"], row["batch"], row["precision"], row["mode"]) for row in found["rows"]]
    assert rows == [
        ("r50-iam", 64, 1, "fp32", "eager"),
        ("r50-iam", 64, 1, "bf16", "eager"),
    ]
    assert all(row["whole_ms"]["median"] > 0 for row in found["rows"])
    assert found["rows"][0]["parameters"] == 31_584_373
    assert run_cli(command) == 0
    assert "sum" in capsys.readouterr().out
    assert run_cli(["bench", "--mode", "compield"]) == 2
    assert "did you mean 'compiled'" in capsys.readouterr().err
    assert run_cli(["bench", "--model", "r50-iamm"]) == 2
    assert "did you mean" in capsys.readouterr().err
