"""Simulate tables whose true differences are known, and count how often intervals and verdicts are right.

`python -m tests.ablation.simulation 2000` prints the table of docs/verdicts.md.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sparseinst.ablation.statistics import Comparison, Sample, difference, estimate_prior, judge

ROWS = 12
PATTERNS = {
    "all 2.8": (2.8,) * ROWS,
    "1.1 to 4.9": tuple(np.linspace(1.1, 4.9, ROWS)),
    "1.2 to 5, noisy reference": (5.0, *np.linspace(1.2, 5.0, ROWS - 1)),
    "1.2 to 5, quiet reference": (1.2, *np.linspace(1.2, 5.0, ROWS - 1)),
}
"""The true deviation over seeds of each row; the first row is the reference."""
IMAGE_ERROR = 0.2
MARGIN = 0.5


@dataclass(frozen=True)
class Outcome:
    """The result of many simulated tables."""

    coverage: np.ndarray
    """How often the 95 % interval of each row holds the true difference."""
    false: float
    """The mean share of false verdicts among those of a table, counted as 0 in a table without any."""
    settled: float
    """The share of comparisons that are not undecided."""


def simulate(deviations: Sequence[float], seeds: int, repetitions: int, effects: Sequence[float] = (0.0,) * ROWS) -> Outcome:
    """Simulate tables of one reference and other rows.

    Args:
        effects: the true differences from the reference, which come first.
    """
    random = np.random.default_rng(0)
    covered, false, decided = np.zeros(len(deviations) - 1), [], []
    for _ in range(repetitions):
        samples = [
            Sample(tuple(random.normal(effect, deviation, seeds))) for effect, deviation in zip(effects, deviations, strict=True)
        ]
        prior = estimate_prior(samples)
        comparisons = []
        for number, sample in enumerate(samples[1:]):
            found = difference(sample, samples[0], prior, IMAGE_ERROR)
            assert found is not None
            found = type(found)(found.value + random.normal(0, IMAGE_ERROR), found.rows, found.image_error)
            covered[number] += found.low <= effects[number + 1] <= found.high
            comparisons.append(Comparison(found, -1.0, MARGIN))
        verdicts = [judgement.verdict for judgement in judge(comparisons)]
        wrong = sum(_is_false(verdict, effect) for verdict, effect in zip(verdicts, effects[1:], strict=True))
        settled = sum(verdict != "undecided" for verdict in verdicts)
        false.append(wrong / settled if settled else 0.0)
        decided.append(settled / len(verdicts))
    return Outcome(covered / repetitions, float(np.mean(false)), float(np.mean(decided)))


def _is_false(verdict: str, effect: float) -> bool:
    """Return whether a verdict on a comparison is false; the simulated paper has a difference of -1."""
    if verdict == "undecided":
        return False
    if verdict == "equivalent":
        return abs(effect) > MARGIN
    return effect == 0 or (verdict == "opposite sign") != (effect > 0)


def main(repetitions: int) -> None:
    print("| true deviations | seeds | coverage, mean | coverage, worst row | false discoveries |\n|---|---|---|---|---|")
    for name, deviations in PATTERNS.items():
        for seeds in (2, 3, 5):
            found = simulate(deviations, seeds, repetitions)
            print(
                f"| {name} | {seeds} | {found.coverage.mean():.3f} | {found.coverage.min():.3f} | {found.false:.3f} |", flush=True
            )


if __name__ == "__main__":
    main(int(sys.argv[1]))
