"""Decide after each look at the results which rows get more seeds. Imports no torch.

A group-sequential design: every row gets one seed, and each undecided row then 2, 3, 5 and 8. Looking several times would find
more false differences, so each look demands more than a single test, by the boundaries of O'Brien and Fleming (1979): most at
the first, hardly more than usual at the last. A row also stops if it is unlikely to be settled even with all of its seeds
(futility); that is all that the first look decides. The reference row, which every comparison uses, gets about the square root
of their number times the seeds of a row, which is the best division of a fixed number of trainings (Dunnett, 1955).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from scipy import stats

from sparseinst.ablation.statistics import FALSE_DISCOVERIES, Comparison, Difference, Judgement, SeedNoise, Verdict, judge

LOOKS = (1, 2, 3, 5, 8)
"""The seeds of a row at each look."""
MOST_REFERENCE_SEEDS = 12
BOUNDARIES = (5.653, 3.997, 3.264, 2.528, 1.999)
"""The boundaries at a two-sided level of 5 % over all looks, in standard errors: 1.999 / sqrt(seeds / 8). The constant is such
that a Brownian motion crosses one of them with a probability of 5 % (Jennison and Turnbull, "Group Sequential Methods", 2000,
chapters 2 and 19). Among 25 simulated designs (other looks, boundaries between those of O'Brien and Fleming and those of
Pocock, and values of `LEAST_POWER`), this one needs the fewest trainings for as many right verdicts."""
PENALTIES = tuple(FALSE_DISCOVERIES / (2 * float(stats.norm.sf(boundary))) for boundary in BOUNDARIES)
"""The factors for p-values at each look."""
LEAST_POWER = 0.4
"""A row stops if its chance to be settled at the last look is smaller."""


def reference_seeds(look: int, comparisons: int) -> int:
    """Return the seeds of the reference row at a look, counted from 0, for a number of comparisons.

    There are two or more, since one seed tells nothing about the noise.
    """
    return min(MOST_REFERENCE_SEEDS, max(LOOKS[look], 2, math.ceil(LOOKS[look] * math.sqrt(comparisons))))


@dataclass(frozen=True)
class Decision:
    """What happens to a row after a look."""

    kind: Literal["settled", "futile", "more seeds", "out of looks"]
    verdict: Verdict
    """`undecided` for a row that stopped because it is not trained."""
    power: float
    """The chance that the row is settled at the last look, from what is known now."""

    @property
    def text(self) -> str:
        if self.kind == "settled":
            return f"settled: {self.verdict}"
        chance = f"a chance of {100 * self.power:.0f} % to be settled"
        return {
            "futile": f"stopped: {chance}",
            "more seeds": f"more seeds: {chance}",
            "out of looks": "undecided after all looks",
        }[self.kind]


def decide(comparisons: Mapping[str, Comparison], look: int) -> dict[str, Decision]:
    """Decide about each row after a look.

    Args:
        comparisons: the distinct comparisons of a table, by row. All of them count for the false discovery rate, also those of
            rows that have stopped.
        look: the number of the look, counted from 0.
    """
    paid = [Comparison(c.difference, c.paper, c.margin, PENALTIES[look]) for c in comparisons.values()]
    decisions = {}
    for (name, comparison), judgement in zip(comparisons.items(), judge(paid), strict=True):
        power = predictive_power(comparison, look)
        decisions[name] = Decision(_kind(judgement, power, look), judgement.verdict, power)
    return decisions


def _kind(judgement: Judgement, power: float, look: int) -> Literal["settled", "futile", "more seeds", "out of looks"]:
    if judgement.verdict != "undecided":
        return "settled"
    if look + 1 >= len(LOOKS):
        return "out of looks"
    return "futile" if power < LEAST_POWER else "more seeds"


def predictive_power(comparison: Comparison, look: int) -> float:
    """Return the chance that a comparison is settled at the last look, if the estimates of the variances are right.

    The true difference has a flat prior, so the difference at the last look is normal around the present one, with the variance
    that the additional seeds will remove (Jennison and Turnbull 2000, section 10.3).
    """
    now = comparison.difference
    if not now.seeds_known:
        return 1.0
    last = _at_last_look(now, look)
    move = math.sqrt(max(now.error**2 - last.error**2, 1e-12))
    limit = FALSE_DISCOVERIES / PENALTIES[-1]
    from_zero = last.quantile(1 - limit / 2) * last.error + (comparison.margin if comparison.asks_equivalence else 0.0)
    within = comparison.margin - last.quantile(1 - limit) * last.error
    chance = float(stats.norm.sf((from_zero - now.value) / move) + stats.norm.cdf((-from_zero - now.value) / move))
    if within >= from_zero:  # every outcome settles something
        return 1.0
    if within > 0:
        chance += float(stats.norm.cdf((within - now.value) / move) - stats.norm.cdf((-within - now.value) / move))
    return chance


def _at_last_look(now: Difference, look: int) -> Difference:
    """Return the difference as it would be at the last look if the estimates stayed the same."""
    grown = LOOKS[-1] / LOOKS[look]
    rows = []
    for place, row in enumerate(now.rows):
        last = LOOKS[-1] if place == 0 else min(round(row.seeds * grown), MOST_REFERENCE_SEEDS)  # the reference row comes second
        seeds = max(row.seeds, last)
        rows.append(SeedNoise(row.variance, row.degrees + seeds - row.seeds, seeds))
    return Difference(now.value, tuple(rows), now.image_error)


def next_seeds(names: Sequence[str], decisions: Mapping[str, Decision], look: int, reference: str) -> dict[str, int]:
    """Return the seeds that each row needs for a look, counted from 0: rows that go on, and the reference row.

    Args:
        names: the rows that are compared, without the reference row.
        decisions: those after the look before; empty for the first look.
    """
    active = [name for name in names if name not in decisions or decisions[name].kind == "more seeds"]
    if not active:
        return {}
    return {**dict.fromkeys(active, LOOKS[look]), reference: reference_seeds(look, len(names))}
