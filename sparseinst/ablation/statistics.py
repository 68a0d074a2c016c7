"""Estimate differences between rows with their intervals, and judge them. Imports no torch.

A measured difference between two rows has two sources of noise: the seeds of the trainings, and the images of the validation set.

- The part of the seeds is that of Welch's t-test (1947): each row has its own variance, and the degrees of freedom are those of
  Satterthwaite (1946). Two or three seeds often agree by chance, and the test then finds false differences if the reference row
  has more seeds. A variance below that of a typical row is therefore raised towards it. A variance above is not lowered, because
  one row can be ten times as noisy as all others.
- The part of the images is the variance of the difference of the seeds' mean APs over joint resamplings of the images. It adds no
  degrees of freedom: if the seeds of a row agree by chance, the difference would otherwise seem to be well known.
- A row with one seed has no verdict. Plans assume the noise of a typical row for it.
- The tests of all comparisons in a table share a false discovery rate of 5 % (Benjamini and Hochberg, 1995).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from scipy import special

from sparseinst.words import counted

CONFIDENCE = 0.95
TEST = "welch, raised"
"""The name of the test. It is part of the names of logged looks, because a look is valid for one test only."""
FALSE_DISCOVERIES = 0.05
"""The false discovery rate over the comparisons of a table."""
POWER = 0.8
PAPER_ROUNDING = 0.1
"""The paper rounds AP to 0.1, so the difference of two values is known to within this much."""
_MOST_SEEDS = 50

Verdict = Literal[
    "same sign, size compatible",
    "same sign, other size",
    "opposite sign",
    "equivalent",
    "not equivalent",
    "higher",
    "lower",
    "undecided",
]
"""`equivalent` and `not equivalent` refer to the margin; `higher` and `lower` are for rows without a value in the paper."""


@dataclass(frozen=True)
class Sample:
    """The values of one metric of one row."""

    values: tuple[float, ...]
    """One value for each seed."""

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    @property
    def deviation(self) -> float | None:
        """The standard deviation over seeds; None if there is one seed."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None


@dataclass(frozen=True)
class TypicalNoise:
    """The noise over seeds of a typical row of a profile."""

    variance: float
    degrees: int
    """The degrees of freedom of all rows from which it was estimated."""

    @property
    def deviation(self) -> float:
        return math.sqrt(self.variance)


def typical_noise(samples: Iterable[Sample]) -> TypicalNoise | None:
    """Return the median variance of one metric over seeds, from all rows, each distinct training once.

    An estimate from few seeds mostly lies below the true variance. Each is therefore divided by the median of its distribution.

    Returns:
        None if no row has several seeds.
    """
    several = [sample for sample in samples if len(sample.values) > 1]
    if not several:
        return None
    degrees = np.array([len(sample.values) - 1 for sample in several])
    variances = np.array([statistics.variance(sample.values) for sample in several])
    medians = special.chdtri(degrees, 0.5) / degrees
    return TypicalNoise(float(np.median(variances / medians)), int(degrees.sum()))


@dataclass(frozen=True)
class SeedNoise:
    """One row's contribution to the noise of a difference."""

    variance: float
    """The variance over seeds that tests assume."""
    degrees: float
    """The degrees of freedom with which the variance is known."""
    seeds: int
    planned: float | None = None
    """The variance that plans of more seeds assume; None for `variance`."""

    @classmethod
    def of(cls, sample: Sample, typical: TypicalNoise | None) -> SeedNoise:
        """Return the noise of a row from its own variance and the typical one, or from the typical one if the row has one seed.

        Plans assume the mean of both, in which the typical one has the weight of one degree of freedom: with two or three seeds,
        a row's own variance is often wrong by far. Tests assume the larger one of this mean and the row's own variance, with the
        row's own degrees of freedom.

        Args:
            typical: may be None only for a row with several seeds.
        """
        own = len(sample.values) - 1
        if not own:
            assert typical is not None
            return cls(typical.variance, float(typical.degrees), 1)
        variance = statistics.variance(sample.values)
        planned = (own * variance + typical.variance) / (own + 1) if typical is not None else variance
        return cls(max(variance, planned), float(own), len(sample.values), planned)

    @property
    def expected(self) -> float:
        """The variance that plans assume."""
        return self.variance if self.planned is None else self.planned

    def with_seeds(self, seeds: int) -> SeedNoise:
        """Return the noise with another number of seeds, as plans assume it."""
        degrees = self.degrees + seeds - self.seeds if self.seeds > 1 else max(float(seeds - 1), 1.0)
        return SeedNoise(self.expected, degrees, seeds)


@dataclass(frozen=True)
class Difference:
    """A row minus the reference row."""

    value: float
    rows: tuple[SeedNoise, ...]
    """The noise of both rows; one entry if both evaluate the same trainings; empty if the noise of seeds is unknown."""
    image_error: float | None
    """The standard error over images; None if it is unknown."""
    confidence: float = CONFIDENCE
    """The confidence of `interval`."""
    one_seed: bool = False
    """Whether one of two trainings has one seed, and no row of the profile has several, so that there is not even a guess."""

    @property
    def seeds_known(self) -> bool:
        """Whether the interval contains the noise of seeds. If not, it covers the noise of images alone."""
        return bool(self.rows)

    @property
    def complete(self) -> bool:
        """Whether the noise of seeds and the noise of images are both known."""
        return self.seeds_known and self.image_error is not None

    @property
    def testable(self) -> bool:
        """Whether there is a verdict: the noise is known, and each row has several seeds, which show its own noise."""
        return self.complete and all(row.seeds > 1 for row in self.rows)

    @property
    def guessed(self) -> bool:
        """Whether a row has one seed, so that its noise is at best that of a typical row. People are then shown no interval."""
        return self.one_seed or any(row.seeds == 1 for row in self.rows)

    @property
    def error(self) -> float:
        """The standard error, from the noise that is known."""
        return math.sqrt(sum(row.variance / row.seeds for row in self.rows) + (self.image_error or 0.0) ** 2)

    @property
    def degrees(self) -> float:
        """The degrees of freedom of the part of the seeds (Satterthwaite); infinite if that part is unknown."""
        parts = [(row.variance / row.seeds, row.degrees) for row in self.rows]
        unsure = sum(part**2 / degrees for part, degrees in parts)
        if not unsure:  # the seeds of each row agree in all digits
            return min((row.degrees for row in self.rows), default=math.inf)
        return sum(part for part, _ in parts) ** 2 / unsure

    def quantile(self, probability: float) -> float:
        """Return the quantile of the t distribution with the difference's degrees of freedom."""
        return float(special.ndtri(probability) if math.isinf(self.degrees) else special.stdtrit(self.degrees, probability))

    def tail(self, distance: float) -> float:
        """Return the probability that noise alone exceeds a distance in one direction."""
        if self.error == 0:
            return 0.5 if distance == 0 else float(distance < 0)
        scaled = distance / self.error
        return float(special.ndtr(-scaled) if math.isinf(self.degrees) else special.stdtr(self.degrees, -scaled))

    def interval(self) -> tuple[float, float]:
        half = self.quantile((1 + self.confidence) / 2) * self.error if self.error else 0.0
        return self.value - half, self.value + half

    def reach(self, level: float) -> float:
        """Return the smallest true difference that a one-sided test at this level finds with 80 % power."""
        if math.isinf(self.degrees):
            return float(special.ndtri(1 - level) + special.ndtri(POWER)) * self.error
        # The noncentrality at which Student's t exceeds its quantile with this probability.
        return float(special.nctdtrinc(self.degrees, 1 - POWER, self.quantile(1 - level))) * self.error

    @property
    def low(self) -> float:
        """The lower end of the interval."""
        return self.interval()[0]

    @property
    def high(self) -> float:
        """The upper end of the interval."""
        return self.interval()[1]

    @property
    def within_noise(self) -> bool:
        return self.low <= 0 <= self.high

    def with_more_seeds(self, more: int) -> Difference:
        """Return the difference as plans assume it with this many more seeds of each row."""
        return replace(self, rows=tuple(row.with_seeds(row.seeds + more) for row in self.rows))


def difference(
    row: Sample, reference: Sample, typical: TypicalNoise | None, image_error: float | None = None, *, same_weights: bool = False
) -> Difference | None:
    """Return row minus reference with its noise.

    Args:
        typical: from all rows; None if no row has several seeds.
        image_error: the standard error over images, from joint resamplings.
        same_weights: both rows evaluate the same trainings, so they are compared seed by seed.

    Returns:
        None if neither source of noise is known, because a number without an interval is no finding.
    """
    rows: tuple[SeedNoise, ...] = ()
    if same_weights:
        count = len(row.values)
        if count > 1 and count == len(reference.values):
            squares = statistics.variance(a - b for a, b in zip(row.values, reference.values, strict=True))
            rows = (SeedNoise(squares, count - 1, count),)
    elif typical is not None or min(len(row.values), len(reference.values)) > 1:
        rows = (SeedNoise.of(row, typical), SeedNoise.of(reference, typical))
    if not rows and image_error is None:
        return None
    alone = not same_weights and not rows
    return Difference(row.mean - reference.mean, rows, image_error, one_seed=alone)


@dataclass(frozen=True)
class Comparison:
    """A difference and what it is compared with."""

    difference: Difference
    paper: float | None
    """The paper's difference; None if the paper has none."""
    margin: float
    """Differences within this many AP points of zero count as equivalent."""
    penalty: float = 1.0
    """The factor for p-values of a comparison that was looked at repeatedly while its seeds were added."""

    @property
    def asks_equivalence(self) -> bool:
        """Whether the paper's difference is too small to ask for its sign."""
        return self.paper is not None and (abs(self.paper) < self.margin or self.paper == 0)

    def p_sign(self) -> float:
        """Return the two-sided p-value of no difference; beyond the margin, if the question is equivalence."""
        distance = abs(self.difference.value) - (self.margin if self.asks_equivalence else 0.0)
        return min(1.0, 2 * self.difference.tail(distance) * self.penalty)

    def p_equivalence(self) -> float:
        """Return the p-value of a difference beyond the margin, from two one-sided tests (Schuirmann, 1987)."""
        return min(1.0, self.difference.tail(self.margin - abs(self.difference.value)) * self.penalty)


@dataclass(frozen=True)
class Judgement:
    """The verdict on one comparison."""

    verdict: Verdict
    p_sign: float
    """The p-value of the sign, adjusted for the comparisons of the table (Benjamini and Hochberg)."""
    p_equivalence: float
    """The adjusted p-value of equivalence."""
    confidence: float
    """The confidence of the interval that is compared with the paper's difference: 95 % if the comparison is undecided. That of a
    settled one is higher, because it is adjusted for the selection of the settled differences (Benjamini and Yekutieli, 2005) and
    for repeated looks (Jennison and Turnbull, 1989)."""
    more_seeds: int | None = None
    """For an undecided comparison: about how many more seeds of both rows would settle it with 80 % power, if its estimates are
    right. None if up to 50 would not, if the noise of seeds is unknown, or if a row has one seed."""

    @property
    def text(self) -> str:
        """The verdict in words, with what would settle an undecided one."""
        if self.verdict != "undecided":
            return self.verdict
        return f"undecided (+{counted(self.more_seeds, 'seed')})" if self.more_seeds else "undecided"


def _adjusted(raw: Sequence[float]) -> list[float]:
    """Return p-values adjusted by Benjamini and Hochberg. Two tests share a verdict, so half as many tests count.

    A test compares this with `scipy.stats.false_discovery_control`, whose import would take a sixth of the time of a report.
    """
    values = np.asarray(raw, dtype=float)
    order = np.argsort(values)
    steps = values[order] * len(values) / np.arange(1, len(values) + 1)
    adjusted = np.empty_like(values)
    adjusted[order] = np.minimum(np.minimum.accumulate(steps[::-1])[::-1], 1.0)
    return np.maximum(adjusted / 2, values).tolist()


def judge(comparisons: Sequence[Comparison], *, advise: bool = True) -> list[Judgement]:
    """Judge the distinct comparisons of one table together.

    Each comparison has two tests: one of its sign, one of equivalence. At most one of their null hypotheses is true, so at most
    half of all null hypotheses are, and Benjamini and Hochberg's procedure at twice the rate holds the rate. A comparison has no
    test if the noise of seeds or images is unknown, or if a row has one seed.

    Args:
        advise: compute `more_seeds`, which takes most of the time.
    """
    tested = [number for number, comparison in enumerate(comparisons) if comparison.difference.testable]
    raw = [p for number in tested for p in (comparisons[number].p_sign(), comparisons[number].p_equivalence())]
    adjusted = _adjusted(raw)
    by_number = {number: (adjusted[2 * place], adjusted[2 * place + 1]) for place, number in enumerate(tested)}
    settled = sum(min(pair) <= FALSE_DISCOVERIES for pair in by_number.values())
    miss = FALSE_DISCOVERIES * max(settled, 1) / max(len(comparisons), 1)
    judged = [_judge(comparison, *by_number.get(n, (1.0, 1.0)), miss) for n, comparison in enumerate(comparisons)]
    if not advise:
        return judged
    return [_advised(judgement, comparison, len(comparisons)) for judgement, comparison in zip(judged, comparisons, strict=True)]


def _advised(judgement: Judgement, comparison: Comparison, comparisons: int) -> Judgement:
    if judgement.verdict != "undecided" or comparison.difference.guessed:
        return judgement
    return replace(judgement, more_seeds=seeds_to_settle(comparison, comparisons))


def _judge(comparison: Comparison, p_sign: float, p_equivalence: float, miss: float) -> Judgement:
    settled = min(p_sign, p_equivalence) <= FALSE_DISCOVERIES
    confidence = 1 - miss / comparison.penalty if settled else CONFIDENCE
    found, paper = replace(comparison.difference, confidence=confidence), comparison.paper
    verdict: Verdict = "undecided"
    if p_sign <= FALSE_DISCOVERIES:
        if paper is None:
            verdict = "higher" if found.value > 0 else "lower"
        elif comparison.asks_equivalence:
            verdict = "not equivalent"
        elif (found.value > 0) != (paper > 0):
            verdict = "opposite sign"
        else:
            compatible = found.low - PAPER_ROUNDING <= paper <= found.high + PAPER_ROUNDING
            verdict = "same sign, size compatible" if compatible else "same sign, other size"
    elif p_equivalence <= FALSE_DISCOVERIES:
        verdict = "equivalent"
    return Judgement(verdict, p_sign, p_equivalence, confidence)


def seeds_to_settle(comparison: Comparison, comparisons: int = 1) -> int | None:
    """Return about how many more seeds of both rows would settle a comparison with 80 % power, if its estimates are right.

    Args:
        comparisons: the number of those that share the false discovery rate. The worst case is assumed: no other one is settled.

    Returns:
        None if up to 50 more seeds would not settle it, because the noise of the images remains, or if the noise of seeds is
        unknown.
    """
    if not comparison.difference.complete:
        return None
    level = FALSE_DISCOVERIES / (max(comparisons, 1) * comparison.penalty)
    size = abs(comparison.difference.value)
    for more in range(1, _MOST_SEEDS + 1):
        found = comparison.difference.with_more_seeds(more)
        from_zero = size - (comparison.margin if comparison.asks_equivalence else 0.0)
        if from_zero >= found.reach(level / 2) or comparison.margin - size >= found.reach(level):
            return more
    return None
