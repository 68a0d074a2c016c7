"""Means and deviations over seeds; differences with their uncertainty; verdicts. Imports no torch.

A difference of two rows has two sources of noise: the seeds of the trainings, and the images of the validation set. The first is
estimated from the spread over seeds, pooled over the rows that have several; the second by the paired bootstrap of `compare`.
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
    """One figure of one row."""

    values: tuple[float, ...]
    """One a seed."""

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    @property
    def deviation(self) -> float | None:
        """Over seeds; None for one."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None


@dataclass(frozen=True)
class Spread:
    """The deviation from seed to seed, pooled over rows."""

    deviation: float
    degrees: int
    """Of freedom: seeds in excess of one, summed over the rows."""


@dataclass(frozen=True)
class Difference:
    """A row less the reference row."""

    value: float
    low: float
    high: float
    """The ends of the 95 % interval."""
    seeds_known: bool
    """Whether the interval holds the spread over seeds; else only that over images."""

    @property
    def within_noise(self) -> bool:
        return self.low <= 0 <= self.high


def pooled_spread(samples: Iterable[Sample]) -> Spread | None:
    """The spread over seeds of one figure, from all rows that have several; None where none has."""
    several = [sample for sample in samples if len(sample.values) > 1]
    degrees = sum(len(sample.values) - 1 for sample in several)
    if not degrees:
        return None
    squares = sum((len(sample.values) - 1) * statistics.variance(sample.values) for sample in several)
    return Spread(math.sqrt(squares / degrees), degrees)


def difference(row: Sample, reference: Sample, spread: Spread | None, standard_errors: Sequence[float]) -> Difference | None:
    """Row less reference, with an interval from both sources of noise.

    Args:
        spread: over seeds, of this figure.
        standard_errors: of the paired bootstrap over images, one a seed; averaged.

    Returns:
        None where neither source of noise is known: a number without an interval is no finding.
    """
    if spread is None and not standard_errors:
        return None
    value = row.mean - reference.mean
    images = statistics.fmean(standard_errors) * float(stats.norm.ppf((1 + CONFIDENCE) / 2)) if standard_errors else 0.0
    seeds = 0.0
    if spread is not None:
        quantile = float(stats.t.ppf((1 + CONFIDENCE) / 2, spread.degrees))
        seeds = quantile * spread.deviation * math.sqrt(1 / len(row.values) + 1 / len(reference.values))
    half = math.hypot(images, seeds)
    return Difference(value, value - half, value + half, spread is not None)


def verdict(measured: Difference | None, paper: float) -> Verdict | None:
    """Does the sign of the paper's difference replicate? None where there is nothing to compare.

    With the seeds' spread unknown a difference can be told from noise never: images alone do not make it a finding.
    """
    if measured is None or paper == 0:
        return None
    if measured.within_noise or not measured.seeds_known:
        return "cannot be told"
    return "replicates" if (measured.value > 0) == (paper > 0) else "does not replicate"
