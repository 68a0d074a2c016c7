"""Means and deviations over seeds, differences with their confidence intervals, and verdicts. Imports no torch.

The difference between two rows has two sources of noise: the seeds of the trainings, and the images of the validation set. The
first is estimated from the deviation over seeds, pooled over the rows that have several. The second comes from the paired
bootstrap in `compare`.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from scipy import stats

CONFIDENCE = 0.95

Verdict = Literal["replicates", "does not replicate", "cannot be told"]


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
class Spread:
    """The standard deviation over seeds, pooled over rows."""

    deviation: float
    degrees: int
    """Degrees of freedom: the number of seeds minus one, summed over the rows."""


@dataclass(frozen=True)
class Difference:
    """A row minus the reference row."""

    value: float
    low: float
    """The lower end of the 95 % interval."""
    high: float
    """The upper end of the 95 % interval."""
    seeds_known: bool
    """Whether the interval includes the noise of seeds. If not, it covers the noise of images alone."""

    @property
    def within_noise(self) -> bool:
        return self.low <= 0 <= self.high


@dataclass(frozen=True)
class Noise:
    """The known noise in the difference between two rows."""

    spread: Spread | None
    """The spread of this metric over seeds; None if no row has several seeds."""
    standard_errors: Sequence[float] = ()
    """The standard errors of the paired bootstrap over images, one for each seed; their mean is used."""
    same_weights: bool = False
    """Whether both rows evaluate the same trainings, so that the noise of their seeds cancels."""


def pooled_spread(samples: Iterable[Sample]) -> Spread | None:
    """Return the spread of one metric over seeds, pooled over all rows that have several; None if no row has."""
    several = [sample for sample in samples if len(sample.values) > 1]
    degrees = sum(len(sample.values) - 1 for sample in several)
    if not degrees:
        return None
    squares = sum((len(sample.values) - 1) * statistics.variance(sample.values) for sample in several)
    return Spread(math.sqrt(squares / degrees), degrees)


def difference(row: Sample, reference: Sample, noise: Noise) -> Difference | None:
    """Return row minus reference, with an interval from both sources of noise.

    Returns:
        None if neither source of noise is known, because a number without an interval is no finding.
    """
    paired = _paired_deviation(row, reference) if noise.same_weights else None
    spread = paired if noise.same_weights else noise.spread
    if spread is None and not noise.standard_errors:
        return None
    errors = noise.standard_errors
    images = statistics.fmean(errors) * float(stats.norm.ppf((1 + CONFIDENCE) / 2)) if errors else 0.0
    seeds = 0.0
    if spread is not None:
        quantile = float(stats.t.ppf((1 + CONFIDENCE) / 2, spread.degrees))
        terms = 1 / len(row.values) if noise.same_weights else 1 / len(row.values) + 1 / len(reference.values)
        seeds = quantile * spread.deviation * math.sqrt(terms)
    half = math.hypot(images, seeds)
    value = row.mean - reference.mean
    return Difference(value, value - half, value + half, seeds_known=spread is not None)


def _paired_deviation(row: Sample, reference: Sample) -> Spread | None:
    """Return the spread of the differences seed by seed, for two rows that evaluate the same trainings."""
    count = len(row.values)
    if count < 2 or count != len(reference.values):
        return None
    return Spread(statistics.stdev(a - b for a, b in zip(row.values, reference.values, strict=True)), count - 1)


def verdict(measured: Difference | None, paper: float) -> Verdict | None:
    """Return whether the sign of the paper's difference replicates; None if there is nothing to compare.

    Without the seeds' spread there is no verdict ("cannot be told"), because the noise of images alone is not enough.
    """
    if measured is None or paper == 0:
        return None
    if measured.within_noise or not measured.seeds_known:
        return "cannot be told"
    return "replicates" if (measured.value > 0) == (paper > 0) else "does not replicate"
