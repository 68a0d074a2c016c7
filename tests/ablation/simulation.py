"""Simulate tables whose true differences are known, and count how often intervals and verdicts are right.

`python -m tests.ablation.simulation 1000` prints, in about an hour, the tables of docs/verdicts.md.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from sparseinst.ablation.sequential import LOOKS, MOST_REFERENCE_SEEDS, PENALTIES, Decision, decide, next_seeds
from sparseinst.ablation.statistics import Comparison, Judgement, Sample, difference, judge, typical_noise

ROWS = 12
PATTERNS = {
    "all 2.8": (2.8,) * ROWS,
    "1.1 to 4.9": tuple(np.linspace(1.1, 4.9, ROWS)),
    "1.2 to 5, noisy reference": (5.0, *np.linspace(1.2, 5.0, ROWS - 1)),
    "1.2 to 5, quiet reference": (1.2, *np.linspace(1.2, 5.0, ROWS - 1)),
    "1.0, one row 13": (1.0,) * (ROWS - 1) + (13.0,),
    "1.0, three rows 13": (1.0,) * (ROWS - 3) + (13.0,) * 3,
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
    false_equivalent: float
    """The mean share, over tables, of false verdicts of equivalence among all verdicts."""


def simulate(
    deviations: Sequence[float],
    seeds: int,
    repetitions: int,
    effects: Sequence[float] = (0.0,) * ROWS,
    image_error: float = IMAGE_ERROR,
    reference_seeds: int | None = None,
) -> Outcome:
    """Simulate tables of one reference and other rows.

    Args:
        reference_seeds: the seeds of the reference row; None for `seeds`.
        effects: the true differences from the reference, which come first.
    """
    random = np.random.default_rng(0)
    covered, false, decided, equivalent = np.zeros(len(deviations) - 1), [], [], []
    for _ in range(repetitions):
        counts = [reference_seeds or seeds, *[seeds] * (len(deviations) - 1)]
        samples = [Sample(tuple(random.normal(*truth))) for truth in zip(effects, deviations, counts, strict=True)]
        typical = typical_noise(samples)
        comparisons = []
        for number, sample in enumerate(samples[1:]):
            found = difference(sample, samples[0], typical, image_error)
            assert found is not None
            found = type(found)(found.value + random.normal(0, image_error), found.rows, found.image_error)
            covered[number] += found.low <= effects[number + 1] <= found.high
            comparisons.append(Comparison(found, -1.0, MARGIN))
        verdicts = [judgement.verdict for judgement in judge(comparisons, advise=False)]
        wrong = sum(_is_false(verdict, effect) for verdict, effect in zip(verdicts, effects[1:], strict=True))
        settled = sum(verdict != "undecided" for verdict in verdicts)
        false.append(wrong / settled if settled else 0.0)
        decided.append(settled / len(verdicts))
        unequal = sum(v == "equivalent" and abs(effect) >= MARGIN for v, effect in zip(verdicts, effects[1:], strict=True))
        equivalent.append(unequal / settled if settled else 0.0)
    return Outcome(covered / repetitions, float(np.mean(false)), float(np.mean(decided)), float(np.mean(equivalent)))


def _is_false(verdict: str, effect: float) -> bool:
    """Return whether a verdict on a comparison is false; the simulated paper has a difference of -1."""
    if verdict == "undecided":
        return False
    if verdict == "equivalent":
        return abs(effect) > MARGIN
    return effect == 0 or (verdict == "opposite sign") != (effect > 0)


@dataclass(frozen=True)
class Design:
    """The result of many simulated studies under one design."""

    trainings: float
    right: float
    """The mean number of right verdicts that settle a comparison."""
    false: float
    """The mean share of false verdicts among those that settle a comparison."""
    covered: float
    """How often the interval that a report shows contains the true difference, over the comparisons that have a test."""
    any_false: float
    """The share of studies with a false verdict."""
    false_coverage: float
    """The mean share, over studies, of the settled comparisons whose interval misses the true difference; 0 for a study without
    any. Benjamini and Yekutieli's intervals hold this rate at 5 %."""


def study(
    seeds: int | None,
    deviation: float,
    effect: float,
    repetitions: int,
    *,
    compared: int = 19,
    image_error: float = IMAGE_ERROR,
    own: Sequence[float] = (),
) -> Design:
    """Simulate studies of some rows that are compared with a reference row.

    Args:
        seeds: the seeds of every row; None for the group-sequential design.
        deviation: the median deviation over seeds; the rows' own are log-normal around it.
        effect: the deviation of the true differences; a third of them are zero.
        compared: the number of rows without the reference row.
        own: the deviations of the reference row and of the others; empty to draw them.
    """
    random = np.random.default_rng(1)
    trainings, right, false, covered, any_false, missed = [], [], [], [], [], []
    for _ in range(repetitions):
        drawn = deviation * np.exp(random.normal(0, 0.4, compared + 1))
        deviations = np.array(own) if own else drawn
        effects = random.normal(0, effect, compared + 1) * (random.random(compared + 1) > 1 / 3)
        effects[0] = 0.0
        values = effects[:, None] + random.normal(size=(compared + 1, MOST_REFERENCE_SEEDS)) * deviations[:, None]
        images = random.normal(0, image_error, compared + 1)
        images[0] = 0.0
        if seeds is not None:
            counts = [seeds] * (compared + 1)
            comparisons = _compare(values, counts, images, image_error)
            judgements = judge(comparisons, advise=False)
        else:
            counts, comparisons, judgements = _sequential(values, images, image_error)
        verdicts = [judgement.verdict for judgement in judgements]
        misses = 0
        for comparison, judgement, true in zip(comparisons, judgements, effects[1:], strict=True):
            if comparison.difference.testable:
                low, high = replace(comparison.difference, confidence=judgement.confidence).interval()
                covered.append(low <= true <= high)
                misses += judgement.verdict != "undecided" and not covered[-1]
        wrong = [_is_wrong(verdict, true) for verdict, true in zip(verdicts, effects[1:], strict=True)]
        settled = [verdict != "undecided" for verdict in verdicts]
        trainings.append(sum(counts))
        right.append(sum(s and not w for s, w in zip(settled, wrong, strict=True)))
        false.append(sum(wrong) / max(sum(settled), 1))
        any_false.append(any(wrong))
        missed.append(misses / max(sum(settled), 1))
    return Design(*(float(np.mean(values)) for values in (trainings, right, false, covered, any_false, missed)))


def fixed_trainings(right: float, deviation: float, effect: float, repetitions: int, compared: int) -> float:
    """Return how many trainings a fixed number of seeds needs for this many right verdicts, between two numbers by a line."""
    before = Design(0.0, 0.0, 0.0, 1.0, 0.0, 0.0)
    for seeds in range(2, 31):
        design = study(seeds, deviation, effect, repetitions, compared=compared)
        if design.right >= right:
            return float(np.interp(right, [before.right, design.right], [before.trainings, design.trainings]))
        before = design
    return float("nan")


def _is_wrong(verdict: str, effect: float) -> bool:
    if verdict in ("higher", "lower"):
        return effect == 0 or (effect > 0) != (verdict == "higher")
    return verdict == "equivalent" and abs(effect) > MARGIN


def _compare(values: np.ndarray, counts: Sequence[int], images: np.ndarray, image_error: float) -> list[Comparison]:
    """Return the comparisons of the rows with the first one, with the first `counts` seeds of each."""
    samples = [Sample(tuple(row[:count])) for row, count in zip(values, counts, strict=True)]
    typical = typical_noise(samples)
    comparisons = []
    for sample, shift in zip(samples[1:], images[1:], strict=True):
        found = difference(sample, samples[0], typical, image_error)
        assert found is not None
        comparisons.append(Comparison(type(found)(found.value + shift, found.rows, found.image_error), None, MARGIN))
    return comparisons


def _sequential(
    values: np.ndarray, images: np.ndarray, image_error: float
) -> tuple[list[int], list[Comparison], list[Judgement]]:
    """Return the seeds of each row at the end, and the comparisons and judgements of the report."""
    names = [str(number) for number in range(1, len(values))]
    counts = [0] * len(values)
    decisions: dict[str, Decision] = {}
    last = dict.fromkeys(names, 0)
    for look in range(len(LOOKS)):
        wanted = next_seeds(names, decisions, look, "0")
        if not wanted:
            break
        for name, seeds in wanted.items():
            counts[int(name)] = max(counts[int(name)], seeds)
            last[name] = look
        comparisons = _compare(values, counts, images, image_error)
        now = decide(dict(zip(names, comparisons, strict=True)), look)
        decisions = {name: now[name] if name in wanted else decisions[name] for name in names}
    final = [
        Comparison(c.difference, c.paper, c.margin, PENALTIES[last[name]]) for name, c in zip(names, comparisons, strict=True)
    ]
    judgements = [
        replace(judgement, verdict=decisions[name].verdict)
        if judgement.verdict == "undecided" and decisions[name].kind == "settled"
        else judgement
        for name, judgement in zip(names, judge(final, advise=False), strict=True)
    ]
    return counts, final, judgements


def main(repetitions: int) -> None:
    print("| true deviations | seeds of a row, of the reference row | coverage, mean | coverage, worst row | false discoveries |")
    print("|---|---|---|---|---|")
    for name, deviations in PATTERNS.items():
        for seeds, reference in ((2, 2), (3, 3), (5, 5), (2, 9), (3, 12)):
            found = simulate(deviations, seeds, 2 * repetitions, reference_seeds=reference)
            print(
                f"| {name} | {seeds}, {reference} | {found.coverage.mean():.3f} | {found.coverage.min():.3f} "
                f"| {found.false:.3f} |",
                flush=True,
            )
    print("\n| deviation, effects | design | trainings | right verdicts of 19 | false verdicts | coverage | false coverage |")
    print("|---|---|---|---|---|---|---|")
    for deviation, effect in ((2.86, 2.8), (1.0, 1.5), (0.8, 2.0)):
        for seeds in (2, 3, 5, 6, 8, 10, None):
            design = study(seeds, deviation, effect, max(repetitions // 5, 1))
            name = f"{seeds} seeds a row" if seeds is not None else "sequential"
            print(
                f"| {deviation}, {effect} | {name} | {design.trainings:.0f} | {design.right:.1f} | {design.false:.3f} "
                f"| {design.covered:.3f} | {design.false_coverage:.3f} |",
                flush=True,
            )
    print("\n| rows compared | deviation, effects | trainings, sequential | fixed | share | coverage | false coverage |")
    print("|---|---|---|---|---|---|---|")
    for compared, fewer in ((19, 5), (3, 2)):
        for deviation, effect in ((2.86, 2.8), (1.0, 1.5), (0.8, 2.0)):
            design = study(None, deviation, effect, max(repetitions // fewer, 1), compared=compared)
            fixed = fixed_trainings(design.right, deviation, effect, max(repetitions // fewer, 1), compared)
            print(
                f"| {compared} | {deviation}, {effect} | {design.trainings:.1f} | {fixed:.1f} | {design.trainings / fixed:.2f} "
                f"| {design.covered:.3f} | {design.false_coverage:.3f} |",
                flush=True,
            )
    print("\n| rows compared, none differs | studies | with a false verdict |\n|---|---|---|")
    for compared, studies in ((3, 800), (11, 400), (19, 400)):
        print(f"| {compared} | {studies} | {study(None, 1.0, 0.0, studies, compared=compared).any_false:.3f} |", flush=True)
    print("\n| deviations, none differs | with a false verdict |\n|---|---|")
    for own in ((1, 5, 5, 5), (1, 13, 13, 13), (1, 1, 1, 13)):
        print(f"| {own} | {study(None, 1.0, 0.0, 1200, compared=3, own=own).any_false:.3f} |", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]))
