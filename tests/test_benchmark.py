"""Latency: what is timed, at which size, and that the parts belong to the whole."""

import torch

from sparseinst.config import Config
from sparseinst.engine.benchmark import MODULES, measure_latency

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
