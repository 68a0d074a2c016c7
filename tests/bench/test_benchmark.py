"""Check latency: timed sizes and batches, modules and the whole model, comparisons, the roofline, and the command."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from sparseinst.bench import isolated
from sparseinst.bench.benchmark import measure, measure_latency, percentiles, ratio_of, take_turns
from sparseinst.bench.roofline import DevicePeak, NetworkCost, count_network_cost, count_parameters, measure_peak
from sparseinst.bench.rows import Setting
from sparseinst.bench.timed import MODULES, network_workload, photo_inputs
from sparseinst.cli import run_cli
from sparseinst.config import MODELS, Config
from sparseinst.errors import RunFailed, UserError
from tests.conftest import CPU


def test_latency_of_the_modules_and_of_the_whole_model(tiny: Config) -> None:
    latency = measure_latency(tiny, device=CPU, warmup=2, repetitions=5)
    assert latency.size == (64, 96), "a photo of 480 x 640 with its short side at 64, padded to multiples of 32"
    assert tuple(latency.modules_ms) == MODULES
    assert all(value > 0 for value in latency.modules_ms.values())
    ranges = latency.modules_range_ms
    assert all(ranges[name][0] <= latency.modules_ms[name] <= ranges[name][1] for name in MODULES)
    assert latency.whole_ms["p5"] <= latency.whole_ms["median"] <= latency.whole_ms["p95"]
    assert 0.3 < sum(latency.modules_ms.values()) / latency.whole_ms["median"] < 3
    assert (latency.kept, latency.repetitions) == (tiny.model.decoder.iam.num_maps, 8), (
        "each of the four images is timed equally often"
    )


def test_a_deeper_model_is_slower_and_tf32_is_restored(tiny: Config) -> None:
    before = torch.backends.cudnn.allow_tf32
    shallow, deep = (
        measure_latency(tiny.replace({"model.decoder.depth": depth}), device=CPU, warmup=3, repetitions=9).modules_ms["decoder"]
        for depth in (1, 12)
    )
    assert deep > 1.5 * shallow
    assert torch.backends.cudnn.allow_tf32 == before


@pytest.mark.slow
def test_flops_and_parameters() -> None:
    """R-50 has 4.1 G multiply-adds at 224 x 224, and the heads come on top. Deformable convolutions are counted."""
    assert count_parameters(Config()) == 31_584_373
    plain, deformable = (
        Config().replace({**MODELS[name], "model.backbone.pretrained": False}) for name in ("r50-giam", "r50-dcn-giam")
    )
    small = {"inference.short_side": 224, "inference.long_side": 224}
    without, with_offsets = count_network_cost(plain.replace(small)).flops, count_network_cost(deformable.replace(small)).flops
    assert 2 * 4.1e9 * (192 / 224) < without < 3 * 2 * 4.1e9, "the photo becomes 192 x 224; the backbone and the heads count"
    assert 1.0 < with_offsets / without < 1.15, "only the convolutions that predict the offsets are added"


def test_batches_of_one_and_four_images(tiny: Config) -> None:
    single, four = (
        measure(network_workload(tiny, device=CPU, batch=batch), device=CPU, warmup=2, repetitions=5) for batch in (1, 4)
    )
    assert (single.kept, four.kept) == (10, 40)
    assert single.drift > 0
    assert single.peak_memory_mb is single.clocks is None, "these are known for a GPU only"


@pytest.mark.parametrize("mode", ["plain", "eager", "folded"])
def test_modes_keep_the_same_number_of_instances(tiny: Config, mode: Any) -> None:
    found = measure(network_workload(tiny, device=CPU, mode=mode), device=CPU, warmup=1, repetitions=3)
    assert found.kept == 10
    assert tuple(found.modules_ms) == MODULES


class ScriptedSide:
    """One side of a comparison. It reports a given time for each batch, and records its calls."""

    def __init__(self, name: str, seconds: list[float], calls: list[tuple[str, int]]) -> None:
        self.num_batches = len(seconds)
        self._name, self._seconds, self._calls = name, seconds, calls

    def time_batch(self, number: int) -> float:
        self._calls.append((self._name, number))
        return self._seconds[number % self.num_batches]


def test_sides_run_alternately() -> None:
    calls: list[tuple[str, int]] = []
    slow, fast = ScriptedSide("slow", [0.02, 0.04, 0.06, 0.08], calls), ScriptedSide("fast", [0.01, 0.02, 0.03, 0.04], calls)
    one, other = take_turns([slow, fast], warmup=2, repetitions=9)
    assert ratio_of(one, other) == {"median": 2.0, "p5": 2.0, "p95": 2.0}, "the sides are compared batch by batch"
    assert (percentiles(one)["median"], percentiles(other)["median"]) == (50.0, 25.0)
    assert len(one) == 12, "each of the four images is timed equally often"
    numbers = [*range(4), *range(12)]
    assert calls == [(name, number) for number in numbers for name in ("slow", "fast")], "every image warms up once"
    with pytest.raises(UserError, match="the same batches on both sides"):
        take_turns([slow, ScriptedSide("other", [1.0], calls)])


@pytest.mark.slow
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
    printed = capsys.readouterr().out
    assert "r50-iam 64 x1 fp32 plain" in printed
    assert "r50-iam 64 x1 bf16 folded" in printed
    assert json.loads((tmp_path / "x.json").read_text())["compare"]["ratio"]["median"] > 0
    mistakes = {"mdoe=plain": "did you mean 'mode'", "size=big": "expected a number", "mode=fast": "one of plain"}
    for wrong, message in mistakes.items():
        assert run_cli([*command, "--compare", "mode=plain", wrong]) == 2
        assert message in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.usefixtures("in_this_process")
def test_the_bench_command(capsys: pytest.CaptureFixture[str]) -> None:
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


def test_a_killed_process_fails_with_one_line() -> None:
    setting = Setting(size=64)
    with (
        isolated._start_process(setting) as process,
        pytest.raises(RunFailed, match=r"r50-iam 64 x1 fp32 eager: its process was killed"),
    ):
        isolated._wait_for_result(process.submit(os._exit, 9), setting)


def photos(folder: Path) -> Path:
    """Write three photos of different sizes to a new folder, and return the folder."""
    folder.mkdir()
    for number, size in enumerate([(64, 48), (48, 90), (100, 50)]):
        Image.new("RGB", size, (80, 90, 200)).save(folder / f"{number}.png")
    return folder


def test_photos_at_their_own_sizes(tiny: Config, tmp_path: Path) -> None:
    files = sorted(photos(tmp_path / "photos").iterdir())
    inputs = photo_inputs(files, tiny.inference, 1)
    assert {each.padded for each in inputs} == {(64, 96), (96, 64)}
    assert [each.sizes[0].original for each in inputs] == [(48, 64), (90, 48), (50, 100)]
    pairs = photo_inputs(files, tiny.inference, 2)
    assert [len(each.sizes) for each in pairs] == [2, 2], "the first photo fills up the last pair"
    found = measure(network_workload(tiny, device=CPU, photos=files), device=CPU, warmup=1, repetitions=4)
    assert (found.size, found.repetitions) == (None, 6), "each photo is timed twice, for the drift"


@pytest.mark.slow
@pytest.mark.usefixtures("in_this_process")
def test_bench_of_weights_on_photos(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A trained model is timed at its own size, on photos, in two modes, against the roofline, and in a comparison."""
    command = ["bench", "--model", str(trained), "--photos", str(photos(tmp_path / "photos")), "--repetitions", "3"]
    assert run_cli([*command, "--mode", "eager", "--mode", "folded", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [(row["size"], row["photos"], row["input"]) for row in rows] == [(64, 3, None)] * 2
    assert rows[0]["kept"] == rows[1]["kept"]
    for more in ("--roofline", "--record"):
        assert run_cli([*command, more]) == 2
        assert "which time inference on 480 x 640 images" in capsys.readouterr().err
    plain = ["bench", "--model", str(trained), "--repetitions", "3"]
    assert run_cli([*plain, "--roofline", "--json"]) == 0
    [row] = json.loads(capsys.readouterr().out)["rows"]
    assert row["roofline"]["bound_ms"] > 0
    assert row["roofline"]["bytes"] > 4 * row["parameters"], "each weight is read"
    assert run_cli([*plain, "--roofline"]) == 0
    assert "operator by operator" in capsys.readouterr().out
    assert run_cli([*plain, "--compare", "mode=plain", f"model={trained}"]) == 0
    assert f"{trained} 64 x1" in capsys.readouterr().out
    assert run_cli([*plain, "--compare", "batch=2", "batch=1"]) == 2
    assert "the same batch size on both sides" in capsys.readouterr().err
    assert run_cli(["bench", "--photos", str(tmp_path / "none")]) == 2
    assert "no such image or folder" in capsys.readouterr().err


def test_roofline() -> None:
    """An operator takes the time of its arithmetic or of its traffic, whichever is longer."""
    cost = NetworkCost(((100, 10), (0, 50)))
    assert (cost.flops, cost.traffic("fp32"), cost.traffic("bf16")) == (100, 240, 120)
    assert cost.bound_ms(DevicePeak(flops=10.0, bytes=100.0), "fp32") == pytest.approx(1000 * (100 / 10 + 200 / 100))
    peak = measure_peak(CPU, "fp32", side=256, repetitions=3)
    assert 1e8 < peak.flops < 1e14
    assert 1e8 < peak.bytes < 1e13


def test_cost_of_one_more_class(tiny: Config) -> None:
    """One more class adds one output channel to the classifier."""
    narrow, wide = (count_network_cost(tiny.replace({"model.num_classes": classes})) for classes in (6, 7))
    width = tiny.model.decoder.width
    num_maps = tiny.model.decoder.iam.num_maps
    assert wide.flops - narrow.flops == 2 * num_maps * width, "one dot product with the features of each map"
