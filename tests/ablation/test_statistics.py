"""Check noise and verdicts against values that were calculated by hand, and in simulated tables."""

import math

import numpy as np
import pytest
from scipy import stats

from sparseinst.ablation.sequential import BOUNDARIES, LOWER_LEVELS, PENALTIES
from sparseinst.ablation.statistics import (
    FALSE_DISCOVERIES,
    Comparison,
    Difference,
    Sample,
    SeedNoise,
    TypicalNoise,
    _adjusted,
    difference,
    judge,
    seeds_to_settle,
    typical_noise,
)
from tests.ablation.simulation import MARGIN, PATTERNS, ROWS, simulate, study


def test_penalties_have_the_bits_of_scipys_normal_distribution() -> None:
    """They are part of the names of logged looks."""
    assert PENALTIES[0] == 1
    factors = (LOWER_LEVELS * FALSE_DISCOVERIES / (2 * float(stats.norm.sf(boundary))) for boundary in BOUNDARIES)
    assert tuple(factors) == PENALTIES[1:]


def test_the_typical_noise_is_the_median_over_rows() -> None:
    samples = [Sample((1.0, 3.0)), Sample((1.0, 2.0, 3.0)), Sample((0.0, 50.0)), Sample((9.0,))]
    found = typical_noise(samples)
    assert found is not None
    assert found.degrees == 1 + 2 + 1
    corrected = [2.0 / stats.chi2.ppf(0.5, 1), 1.0 / (stats.chi2.ppf(0.5, 2) / 2), 1250.0 / stats.chi2.ppf(0.5, 1)]
    assert found.variance == pytest.approx(sorted(corrected)[1])
    assert typical_noise([Sample((1.0,)), Sample((2.0,))]) is None


def test_the_typical_noise_is_right_on_average_and_one_wild_row_does_not_move_it() -> None:
    random = np.random.default_rng(0)
    for seeds in (2, 3, 5):
        rows = [Sample(tuple(random.normal(0, 2, seeds))) for _ in range(4000)]
        found, moved = typical_noise(rows), typical_noise([*rows, Sample((0.0, 1e6))])
        assert found is not None
        assert moved is not None
        assert found.deviation == pytest.approx(2.0, rel=0.05)
        assert moved.deviation == pytest.approx(found.deviation, rel=0.01)


def test_the_interval_is_that_of_welchs_test_if_the_images_add_nothing() -> None:
    row, reference = Sample((30.0, 32.0, 31.5)), Sample((29.0, 30.0, 31.0, 30.2, 30.1))
    found = difference(row, reference, TypicalNoise(0.01, 8), 0.0)
    assert found is not None
    welch = stats.ttest_ind(row.values, reference.values, equal_var=False)
    interval = welch.confidence_interval()
    assert (found.low, found.high, found.degrees) == pytest.approx((interval.low, interval.high, welch.df))
    assert Comparison(found, -5.0, 0.5).p_sign() == pytest.approx(welch.pvalue)
    alone = difference(row, reference, None, 0.0)
    assert alone is not None
    assert (alone.low, alone.high) == (found.low, found.high)


def test_the_interval_contains_the_noise_of_images_and_of_seeds() -> None:
    row, reference = Sample((30.0, 32.0)), Sample((29.0, 30.0, 31.0))
    found = difference(row, reference, None, 0.6)
    assert found is not None
    parts = 2.0 / 2, 1.0 / 3
    degrees = sum(parts) ** 2 / (parts[0] ** 2 + parts[1] ** 2 / 2)
    half = stats.t.ppf(0.975, degrees) * math.sqrt(sum(parts) + 0.36)
    assert (found.value, found.low, found.high) == pytest.approx((1.0, 1 - half, 1 + half))
    assert found.within_noise
    assert difference(Sample((30.0,)), reference, None) is None


def test_a_variance_below_the_typical_one_is_raised_and_one_above_is_not_lowered() -> None:
    noise = SeedNoise.of(Sample((29.0, 30.0, 31.0)), TypicalNoise(4.0, 9))
    assert (noise.variance, noise.degrees, noise.expected) == (2.0, 2.0, 2.0)
    wild = SeedNoise.of(Sample((20.0, 30.0, 40.0)), TypicalNoise(4.0, 9))
    assert (wild.variance, wild.degrees, wild.expected) == (100.0, 2.0, 68.0)


def test_plans_assume_a_mean_of_the_rows_own_noise_and_the_typical_one() -> None:
    noise = SeedNoise.of(Sample((29.0, 30.0, 31.0)), TypicalNoise(4.0, 9))
    more = noise.with_seeds(5)
    assert (more.variance, more.degrees, more.seeds) == (2.0, 4.0, 5)
    guess = SeedNoise.of(Sample((29.0,)), TypicalNoise(4.0, 9))
    assert (guess.variance, guess.degrees, guess.with_seeds(5).degrees) == (4.0, 9.0, 4.0)


def test_seeds_that_agree_in_all_digits_are_not_taken_for_perfect_knowledge() -> None:
    found = difference(Sample((30.0, 30.0)), Sample((29.0, 29.0, 29.0)), None, 0.3)
    assert found is not None
    assert found.degrees == 1
    assert found.within_noise


def test_the_noise_of_images_alone_gives_no_verdict() -> None:
    found = difference(Sample((10.0,)), Sample((30.0,)), None, 0.1)
    assert found is not None
    assert not found.within_noise
    assert not found.seeds_known
    [judgement] = judge([Comparison(found, -8.0, 0.5)])
    assert (judgement.verdict, judgement.more_seeds) == ("undecided", None)


def test_two_evaluations_of_the_same_weights_are_compared_seed_by_seed() -> None:
    """The trainings differ by 4 AP, but the two evaluations of each differ by only 0.5. This difference is not noise."""
    row, reference = Sample((30.0, 34.1, 32.0)), Sample((30.5, 34.5, 32.5))
    typical = typical_noise([row, reference])
    apart = difference(row, reference, typical)
    assert apart is not None
    assert apart.within_noise
    paired = difference(row, reference, typical, 0.0, same_weights=True)
    assert paired is not None
    half = 4.302653 * (0.1 / math.sqrt(3)) / math.sqrt(3)  # t(0.975, 2); the differences are -0.5, -0.4, -0.5
    assert (paired.low, paired.high) == pytest.approx((-1.4 / 3 - half, -1.4 / 3 + half), abs=1e-5)
    assert judge([Comparison(paired, -0.6, 0.5)])[0].verdict == "same sign, size compatible"
    single = difference(Sample((30.0,)), Sample((30.5,)), typical, 0.1, same_weights=True)
    assert single is not None
    assert not single.seeds_known


def known(value: float, error: float = 0.05) -> Difference:
    """Return a difference whose noise is known well."""
    return Difference(value, (SeedNoise(2 * error**2, 1000.0, 2),), 0.0)


@pytest.mark.parametrize(
    ("measured", "paper", "expected"),
    [
        (-8.1, -8.1, "same sign, size compatible"),
        (-20.0, -8.1, "same sign, other size"),
        (20.0, -8.1, "opposite sign"),
        (0.0, -8.1, "equivalent"),
        (0.1, 0.2, "equivalent"),
        (-3.0, 0.2, "not equivalent"),
        (0.5, 0.2, "undecided"),
        (2.0, None, "higher"),
        (-2.0, None, "lower"),
        (0.0, None, "equivalent"),
    ],
)
def test_verdicts(measured: float, paper: float | None, expected: str) -> None:
    assert judge([Comparison(known(measured), paper, 0.5)])[0].verdict == expected


def test_the_comparisons_of_a_table_share_one_false_discovery_rate() -> None:
    """One comparison with p = 0.03 is settled alone, but not beside nine others that show nothing."""
    found = known(stats.t.isf(0.015, 1000) * 0.05)
    doubtful = Comparison(found, 0.6, 0.6)
    assert doubtful.p_sign() == pytest.approx(0.03)
    nothing = Comparison(Difference(0.4, (SeedNoise(2.0, 1000.0, 2),), 0.0), 0.6, 0.6)
    wide = Comparison(Difference(found.value * 20, (SeedNoise(2.0, 1000.0, 2),), 0.0), 2.0, 0.6)
    assert judge([wide])[0].verdict != "undecided"
    assert judge([wide, *[nothing] * 9])[0].verdict == "undecided"


def test_seeds_to_settle_counts_what_power_needs() -> None:
    """With a known deviation s, n = 15.7 (s / d)^2 seeds of both rows settle a difference d with 80 % power."""
    found = Difference(2.0, (SeedNoise(4.0, 1000.0, 2), SeedNoise(4.0, 1000.0, 2)), 0.0)
    assert seeds_to_settle(Comparison(found, 2.0, 0.5)) == math.ceil(15.7) - 2
    limited = Difference(2.0, found.rows, 5.0)
    assert seeds_to_settle(Comparison(limited, 2.0, 0.5)) is None
    alone, shared = seeds_to_settle(Comparison(found, 2.0, 0.5)), seeds_to_settle(Comparison(found, 2.0, 0.5), comparisons=12)
    assert alone is not None
    assert shared is not None
    assert shared > alone, "comparisons that share a rate need more"
    one, twelve = (judge([Comparison(found, 2.0, 0.5)] * count)[0].more_seeds for count in (1, 12))
    assert (one, twelve) == (alone, shared)
    guessed = Difference(2.0, (SeedNoise(4.0, 1000.0, 1), SeedNoise(4.0, 1000.0, 2)), 0.0)
    assert judge([Comparison(guessed, 2.0, 0.5)])[0].more_seeds is None, "one seed does not show the noise of its row"
    beside = judge([Comparison(found, 2.0, 0.5), *[Comparison(guessed, 2.0, 0.5)] * 11])[0].more_seeds
    assert beside == shared, "comparisons that cannot be tested yet will share the rate, too"


def test_a_row_with_one_seed_has_an_interval_and_no_verdict() -> None:
    found = difference(Sample((10.0,)), Sample((30.0, 30.1)), TypicalNoise(0.01, 8), 0.1)
    assert found is not None
    assert found.high < -15, "far from zero, compared with the noise of the other rows"
    [judgement] = judge([Comparison(found, -8.0, 0.5)])
    assert judgement.verdict == "undecided"
    assert judgement.confidence == 0.95


def test_the_noise_of_images_adds_no_degrees() -> None:
    """Seeds that agree by chance do not make the difference well known."""
    rows = (SeedNoise(1e-4, 2.0, 2), SeedNoise(1e-4, 2.0, 2))
    assert Difference(1.0, rows, 0.2).degrees == pytest.approx(4)


def test_a_settled_difference_has_the_interval_that_its_size_is_judged_by() -> None:
    """One settled comparison of four has a confidence of 1 - 0.05 / 4, and of less than that if it was looked at repeatedly."""
    nothing = Comparison(Difference(0.4, (SeedNoise(2.0, 1000.0, 2),), 0.0), 2.0, 0.5)
    assert judge([Comparison(known(-8.0), -8.0, 0.5), *[nothing] * 3])[0].confidence == pytest.approx(1 - 0.05 / 4)
    assert judge([Comparison(known(-8.0), -8.0, 0.5, penalty=2.0)])[0].confidence == pytest.approx(1 - 0.05 / 2)


def test_the_reach_of_a_test_has_the_stated_power() -> None:
    found = Difference(0.0, (SeedNoise(2.0, 3.0, 2),), 0.0)
    power = stats.nct.sf(stats.t.ppf(0.975, 3), 3, found.reach(0.025) / found.error)
    assert power == pytest.approx(0.8, abs=1e-6)
    assert Difference(0.0, (), 0.5).reach(0.025) == pytest.approx(0.5 * (1.959964 + 0.841621), abs=1e-5)


def test_unknown_noise_gives_no_verdict() -> None:
    """Without the noise of images the interval is too narrow, so it must not settle anything."""
    rows = (SeedNoise(0.01, 1000.0, 3),) * 2
    [judgement] = judge([Comparison(Difference(-20.0, rows, None), -8.0, 0.5)])
    assert judgement.verdict == "undecided"


def test_repeated_looks_are_paid_for() -> None:
    found = Comparison(known(2.1 * 0.05), 0.5, 0.5)
    assert found.p_sign() < 0.05
    assert judge([Comparison(found.difference, 0.5, 0.05, penalty=2.26)])[0].p_sign > 0.05


def test_p_values_are_adjusted_as_by_scipy() -> None:
    random = np.random.default_rng(0)
    for count in (0, 1, 2, 7, 40):
        raw = [*random.uniform(0, 0.2, count), *[0.01] * (count > 2), *[1.0] * (count > 2)]
        expected = np.maximum(stats.false_discovery_control(raw) / 2, raw) if raw else []
        assert _adjusted(raw) == pytest.approx(list(expected), rel=1e-12)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_intervals_and_verdicts_hold_in_simulated_tables(pattern: str) -> None:
    """The limits allow for the noise of 400 tables; docs/verdicts.md has the result of 1,000."""
    found = simulate(PATTERNS[pattern], 3, 400)
    assert found.coverage.mean() >= 0.94
    assert found.coverage.min() >= 0.915
    assert found.false <= 0.05


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_reference_row_with_more_seeds_does_not_make_verdicts_false(pattern: str) -> None:
    """Welch's test alone gives false verdicts in up to 40 % of such tables, because two seeds often agree by chance."""
    found = simulate(PATTERNS[pattern], 2, 200, reference_seeds=9)
    assert found.coverage.mean() >= 0.94
    assert found.false <= 0.05


def test_equivalence_holds_its_rate_at_the_margin() -> None:
    """All true differences equal the margin, so each verdict of equivalence is false."""
    effects = [0.0, *[MARGIN] * (ROWS - 1)]
    found = simulate((0.15,) * ROWS, 5, 100, effects, image_error=0.05)
    assert found.settled > 0.05, "otherwise this tests nothing"
    assert found.false_equivalent <= 0.05


def test_the_sequential_design_needs_fewer_trainings_for_as_many_verdicts() -> None:
    """The limits allow for the noise of 40 studies; docs/verdicts.md has the result of 200."""
    fixed, sequential = study(8, 1.0, 1.5, 40), study(None, 1.0, 1.5, 40)
    assert sequential.right >= 0.9 * fixed.right > 2
    assert sequential.trainings <= 0.5 * fixed.trainings
    assert sequential.false <= 0.05
    assert sequential.covered >= 0.94
    assert sequential.false_coverage <= 0.05


def test_effects_are_found_in_simulated_tables() -> None:
    """The simulation is no test if nothing is ever settled: here half of the rows differ by ten deviations."""
    effects = [0.0, *([10.0, -10.0] * ROWS)[: ROWS - 1]]
    found = simulate((1.0,) * ROWS, 3, 50, effects)
    assert found.settled > 0.9
    assert found.false <= 0.05
