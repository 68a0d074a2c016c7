"""Decide after each look at the results which rows get more seeds. Imports no torch.

This is a group-sequential design. All rows are compared with the reference row when they have one seed. Rows that are not settled
get more seeds, and are compared again when they have 2, 3, 4, 6 and 8. Repeated tests find more false differences, so each look
demands stronger evidence than a single test. The boundaries are from the family of Wang and Tsiatis (1987). They are strictest at
the first look that tests anything, and the last one is close to the boundary of a single test. A row also stops if it is unlikely
to be settled with 8 seeds (futility). This is all that the first look decides, because a row with one seed has no test. Rows can
have more seeds than a look asks for. All of them are compared, but the look is as strict as without them, and the first one tests
nothing.

With k comparisons, the reference row gets about sqrt(k) times the seeds of another row, because every comparison uses it. This is
the best division of a fixed number of trainings (Dunnett, 1955).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from scipy import special

from sparseinst.ablation.statistics import FALSE_DISCOVERIES, Comparison, Difference, Verdict, judge
from sparseinst.ablation.study import SEEDS

LOOKS = (1, 2, 3, 4, 6, 8)
"""The number of seeds of a row at each look."""
MOST_REFERENCE_SEEDS = len(SEEDS)
BOUNDARIES = (3.369, 2.923, 2.643, 2.293, 2.074)
"""For each look from the second, how many standard errors a difference must exceed in a table with one comparison:
2.074 * (seeds / 8) ** (0.15 - 0.5). A Brownian motion crosses one of them, on either side, with a probability of 5 % (Jennison
and Turnbull, "Group Sequential Methods", 2000, chapters 2 and 19). With 0 instead of 0.15, they would be the boundaries of
O'Brien and Fleming, and with 0.5 those of Pocock."""
LOWER_LEVELS = 1.16
"""With several comparisons, tests have lower levels than 5 %. Factors that are right at 5 % then let a Brownian motion cross more
often than the level says, at a level of 0.1 % 1.16 times as often. All factors are therefore this much larger."""
PENALTIES = (1.0, *(LOWER_LEVELS * FALSE_DISCOVERIES / (2 * float(special.ndtr(-boundary))) for boundary in BOUNDARIES))
"""The factor that multiplies a row's p-values at each look; the first look tests nothing."""
LEAST_POWER = 0.4
"""A row stops if its chance to be settled at the last look is below this."""


def reference_seeds(look: int, comparisons: int) -> int:
    """Return how many seeds the reference row has at a look.

    The number is at least 2, because one seed does not show the noise of seeds.

    Args:
        look: the index of the look, from 0.
        comparisons: the number of rows that are compared with the reference row.
    """
    return min(MOST_REFERENCE_SEEDS, max(LOOKS[look], 2, math.ceil(LOOKS[look] * math.sqrt(comparisons))))


@dataclass(frozen=True)
class Decision:
    """What happens to a row after a look."""

    kind: Literal["settled", "futile", "more seeds", "out of looks"]
    verdict: Verdict
    """`undecided` if the row is not settled, also if it is not trained."""
    power: float
    """The chance that the row is settled at the last look, as `predictive_power` estimates it; 0 if the row is not trained."""

    @property
    def text(self) -> str:
        if self.kind == "settled":
            return f"settled: {self.verdict}"
        chance = f"a chance of {100 * self.power:.0f} % to be settled"
        return {
            "futile": f"stopped: {chance}" if self.power else "stopped: it is not trained, or has no AP",
            "more seeds": f"more seeds: {chance}",
            "out of looks": "undecided after all looks",
        }[self.kind]


def decide(comparisons: Mapping[str, Comparison], look: int) -> dict[str, Decision]:
    """Decide about each row after a look.

    Args:
        comparisons: the distinct comparisons of a table, by row. All of them count for the false discovery rate, including those
            of rows that have stopped.
        look: the index of the look, from 0.
    """
    penalised = [Comparison(c.difference, c.paper, c.margin, PENALTIES[look]) for c in comparisons.values()]
    verdicts: list[Verdict] = [judgement.verdict if look > 0 else "undecided" for judgement in judge(penalised, advise=False)]
    decisions = {}
    for (name, comparison), verdict in zip(comparisons.items(), verdicts, strict=True):
        power = predictive_power(comparison, len(comparisons))
        decisions[name] = Decision(_kind(verdict, power, look), verdict, power)
    return decisions


def _kind(verdict: Verdict, power: float, look: int) -> Literal["settled", "futile", "more seeds", "out of looks"]:
    if verdict != "undecided":
        return "settled"
    if look + 1 >= len(LOOKS):
        return "out of looks"
    return "futile" if power < LEAST_POWER else "more seeds"


def predictive_power(comparison: Comparison, comparisons: int) -> float:
    """Return the chance that a comparison is settled at the last look, with the noise that plans assume.

    The true difference has a flat prior. The difference at the last look is then normally distributed around the present one. Its
    variance is the error variance of the present difference minus the smaller one that it will have at the last look (Jennison
    and Turnbull 2000, section 10.3). The chance is 1 if the noise of seeds is unknown.

    Args:
        comparisons: the number of rows that are compared with the reference row, which decides about its seeds.
    """
    now = comparison.difference
    if not now.seeds_known:
        return 1.0
    last = _at_last_look(now, comparisons)
    move = math.sqrt(max(now.with_more_seeds(0).error ** 2 - last.error**2, 1e-12))
    limit = FALSE_DISCOVERIES / PENALTIES[-1]
    from_zero = last.quantile(1 - limit / 2) * last.error + (comparison.margin if comparison.asks_equivalence else 0.0)
    within = comparison.margin - last.quantile(1 - limit) * last.error
    chance = float(special.ndtr(-((from_zero - now.value) / move)) + special.ndtr((-from_zero - now.value) / move))
    if within >= from_zero:  # every outcome settles something
        return 1.0
    if within > 0:
        chance += float(special.ndtr((within - now.value) / move) - special.ndtr((-within - now.value) / move))
    return chance


def _at_last_look(now: Difference, comparisons: int) -> Difference:
    """Return the difference with the seeds of the last look and the noise that plans assume."""
    last = (LOOKS[-1], reference_seeds(len(LOOKS) - 1, comparisons))  # the reference row comes second
    return replace(now, rows=tuple(row.with_seeds(max(row.seeds, seeds)) for row, seeds in zip(now.rows, last, strict=False)))


def next_seeds(names: Sequence[str], decisions: Mapping[str, Decision], look: int, reference: str) -> dict[str, int]:
    """Return how many seeds each row needs for a look: the rows that have not stopped, and the reference row.

    Args:
        names: the rows that are compared, without the reference row.
        decisions: the newest decision about each row; empty before the first look.
        look: the index of the look, from 0.
        reference: the name of the reference row.

    Returns:
        An empty dict if all rows have stopped.
    """
    active = [name for name in names if name not in decisions or decisions[name].kind == "more seeds"]
    if not active:
        return {}
    return {**dict.fromkeys(active, LOOKS[look]), reference: reference_seeds(look, len(names))}
