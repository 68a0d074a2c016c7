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


@dataclass(frozen=True)
class Noise:
    """What is known of the noise in the difference of two rows."""

    spread: Spread | None
    """Over seeds, of this figure."""
    standard_errors: Sequence[float] = ()
    """Of the paired bootstrap over images, one a seed; averaged."""
    same_weights: bool = False
    """Whether both rows evaluate the same trainings, so that their seeds cancel."""


def pooled_spread(samples: Iterable[Sample]) -> Spread | None:
    """The spread over seeds of one figure, from all rows that have several; None where none has."""
    several = [sample for sample in samples if len(sample.values) > 1]
    degrees = sum(len(sample.values) - 1 for sample in several)
    if not degrees:
        return None
    squares = sum((len(sample.values) - 1) * statistics.variance(sample.values) for sample in several)
    return Spread(math.sqrt(squares / degrees), degrees)


def difference(row: Sample, reference: Sample, noise: Noise) -> Difference | None:
    """Row less reference, with an interval from both sources of noise.

    Returns:
        None where neither source of noise is known: a number without an interval is no finding.
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
    """Of the differences seed by seed, for two evaluations of the same weights: the seeds themselves cancel."""
    count = len(row.values)
    if count < 2 or count != len(reference.values):
        return None
    return Spread(statistics.stdev(a - b for a, b in zip(row.values, reference.values, strict=True)), count - 1)


def verdict(measured: Difference | None, paper: float) -> Verdict | None:
    """Does the sign of the paper's difference replicate? None where there is nothing to compare.

    With the seeds' spread unknown a difference can be told from noise never: images alone do not make it a finding.
    """
    if measured is None or paper == 0:
        return None
    if measured.within_noise or not measured.seeds_known:
        return "cannot be told"
    return "replicates" if (measured.value > 0) == (paper > 0) else "does not replicate"
