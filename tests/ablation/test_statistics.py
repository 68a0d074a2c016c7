"""Check noise and verdicts against values that were calculated by hand."""

import math

import pytest

from sparseinst.ablation.statistics import Noise, Sample, difference, pooled_spread, verdict


def test_pooled_spread_weighs_by_degrees_of_freedom() -> None:
    spread = pooled_spread([Sample((1.0, 3.0)), Sample((1.0, 2.0, 3.0)), Sample((9.0,))])
    assert spread is not None
    assert spread.degrees == 3
    assert spread.deviation == pytest.approx(math.sqrt((1 * 2.0 + 2 * 1.0) / 3))
    assert pooled_spread([Sample((1.0,)), Sample((2.0,))]) is None


def test_the_interval_contains_the_noise_of_images_and_of_seeds() -> None:
    row, reference = Sample((30.0, 32.0)), Sample((29.0, 30.0, 31.0))
    spread = pooled_spread([row, reference])
    found = difference(row, reference, Noise(spread, [0.5, 0.7]))
    assert found is not None
    half = math.hypot(1.959964 * 0.6, 3.182446 * math.sqrt(4 / 3) * math.sqrt(1 / 2 + 1 / 3))
    assert (found.value, found.low, found.high) == pytest.approx((1.0, 1 - half, 1 + half), abs=1e-5)
    assert found.within_noise
    assert difference(row, reference, Noise(None)) is None


@pytest.mark.parametrize(
    ("measured", "paper", "expected"),
    [(-20.0, -8.1, "replicates"), (20.0, -8.1, "does not replicate"), (-0.5, -8.1, "cannot be told"), (-20.0, 0.0, None)],
)
def test_verdict(measured: float, paper: float, expected: str | None) -> None:
    reference = Sample((30.0, 31.0, 32.0))
    row = Sample((31 + measured,))
    assert verdict(difference(row, reference, Noise(pooled_spread([reference]), [0.3])), paper) == expected


def test_the_noise_of_images_alone_gives_no_verdict() -> None:
    found = difference(Sample((10.0,)), Sample((30.0,)), Noise(None, [0.1]))
    assert found is not None
    assert not found.within_noise
    assert not found.seeds_known
    assert verdict(found, -8.0) == "cannot be told"


def test_two_evaluations_of_the_same_weights_are_compared_seed_by_seed() -> None:
    """The trainings differ by 4 AP, but the two evaluations of each differ by only 0.5. This difference is not noise."""
    row, reference = Sample((30.0, 34.1, 32.0)), Sample((30.5, 34.5, 32.5))
    spread = pooled_spread([row, reference])
    apart = difference(row, reference, Noise(spread))
    assert apart is not None
    assert apart.within_noise
    paired = difference(row, reference, Noise(spread, same_weights=True))
    assert paired is not None
    half = 4.302653 * (0.1 / math.sqrt(3)) / math.sqrt(3)  # t(0.975, 2); the differences are -0.5, -0.4, -0.5
    assert (paired.low, paired.high) == pytest.approx((-1.4 / 3 - half, -1.4 / 3 + half), abs=1e-5)
    assert verdict(paired, -0.6) == "replicates"
    single = difference(Sample((30.0,)), Sample((30.5,)), Noise(spread, [0.1], same_weights=True))
    assert single is not None
    assert not single.seeds_known
