"""Check properties that hold for every input: keys, overrides, run lengths, matching and statistics."""

import itertools
import math
from typing import Any

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

from sparseinst.ablation.statistics import Comparison, Sample, SeedNoise, TypicalNoise, difference, judge, typical_noise
from sparseinst.config import Config, MatcherConfig
from sparseinst.data.masks import decode, encode, overlaps
from sparseinst.matcher import Target, match, pairwise_dice
from sparseinst.models.network import Predictions
from sparseinst.nested import flatten, leaf_paths, merge, nest
from sparseinst.overrides import parse_override
from sparseinst.section import content_hash

settings.register_profile("here", deadline=None, max_examples=50, derandomize=True, database=None)
settings.load_profile("here")

PATHS = sorted(leaf_paths(Config))
plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
values = st.floats(-100, 100).map(lambda value: round(value, 3))
samples = st.lists(values, min_size=1, max_size=6).map(lambda seeds: Sample(tuple(seeds)))
masks = arrays(np.bool_, array_shapes(min_dims=3, max_dims=3, min_side=1, max_side=9))


@given(st.dictionaries(st.text(), plain, min_size=1, max_size=5), st.randoms())
def test_a_hash_does_not_depend_on_the_order_of_keys(data: dict[str, Any], random: Any) -> None:
    shuffled = list(data.items())
    random.shuffle(shuffled)
    assert content_hash(dict(shuffled)) == content_hash(data)
    assert content_hash({**data, "one more": 0}) != content_hash(data)


@given(st.dictionaries(st.sampled_from(PATHS), plain.filter(lambda value: not isinstance(value, dict)), max_size=8))
def test_nest_and_flatten_are_inverse(overrides: dict[str, Any]) -> None:
    assert flatten(nest(overrides, Config)) == overrides


@given(st.dictionaries(st.sampled_from(PATHS), st.integers(), max_size=8), st.integers())
def test_a_later_layer_changes_only_its_own_settings(overrides: dict[str, int], other: int) -> None:
    base = Config().model_dump(mode="json")
    merged = merge(base, nest(overrides, Config), Config)
    assert merge(merged, nest(overrides, Config), Config) == merged
    assert flatten(merged) == {**flatten(base), **overrides}
    again = merge(merged, nest(dict.fromkeys(overrides, other), Config), Config)
    assert flatten(again) == {**flatten(base), **dict.fromkeys(overrides, other)}


@given(st.sampled_from(PATHS), st.booleans() | st.integers(-(2**53), 2**53) | st.floats(-1e9, 1e9))
def test_an_override_keeps_its_value(path: str, value: bool | int | float) -> None:
    written = str(value).lower() if isinstance(value, bool) else repr(value)
    assert parse_override(f"{path}={written}") == (path, value)


@given(masks)
def test_run_lengths_equal_pycocotools_and_decode_to_the_mask(stack: NDArray[np.bool_]) -> None:
    runs = encode(stack)
    theirs = coco_mask.encode(np.asfortranarray(stack.transpose(1, 2, 0).astype(np.uint8)))
    assert [run["counts"] for run in runs] == [run["counts"].decode() for run in theirs]
    for run, mask in zip(runs, stack, strict=True):
        assert np.array_equal(decode(run, *mask.shape), mask)


@given(masks)
def test_overlaps_are_intersection_over_union(stack: NDArray[np.bool_]) -> None:
    found = overlaps(encode(stack), encode(stack), *stack.shape[1:])
    flat = stack.reshape(len(stack), -1)
    for (i, one), (j, other) in itertools.product(enumerate(flat), repeat=2):
        union = (one | other).sum()
        assert found[i, j] == ((one & other).sum() / union if union else 0)
    assert np.allclose(found, found.T)


@given(st.integers(1, 4), st.integers(0, 4), st.integers(0, 2**32 - 1))
def test_no_other_assignment_has_a_higher_score(num_maps: int, instances: int, seed: int) -> None:
    torch.manual_seed(seed)
    predictions = Predictions(
        torch.randn(1, num_maps, 3), torch.randn(1, num_maps), torch.randn(1, num_maps, 4, 4), torch.zeros(1, num_maps, 2, 2)
    )
    target = Target(torch.randint(0, 3, (instances,)), (torch.rand(instances, 4, 4) > 0.5).float())
    config = MatcherConfig()
    [found] = match(predictions, [target], config)
    pairs = min(num_maps, instances)
    assert len(set(found.predictions.tolist())) == len(set(found.instances.tolist())) == len(found.predictions) == pairs
    dice = pairwise_dice(predictions.mask_logits[0].sigmoid().flatten(1), target.masks.flatten(1))
    score = dice.pow(config.alpha) * predictions.class_logits[0].sigmoid()[:, target.labels].pow(config.beta)

    def total(maps: tuple[int, ...], chosen: tuple[int, ...]) -> float:
        return sum(float(score[a, b]) for a, b in zip(maps, chosen, strict=True))

    best = max(
        total(maps, chosen)
        for maps in itertools.permutations(range(num_maps), pairs)
        for chosen in itertools.combinations(range(instances), pairs)
    )
    assert math.isclose(total(tuple(found.predictions.tolist()), tuple(found.instances.tolist())), best, rel_tol=1e-5)


@given(samples, samples, st.floats(0.01, 10), st.integers(1, 30), values)
def test_a_difference_is_antisymmetric_and_does_not_depend_on_the_level(
    row: Sample, reference: Sample, deviation: float, degrees: int, level: float
) -> None:
    typical = TypicalNoise(deviation**2, degrees)
    one, other = difference(row, reference, typical), difference(reference, row, typical)
    assert one is not None
    assert other is not None
    np.testing.assert_allclose((one.value, one.low, one.high), (-other.value, -other.high, -other.low), atol=1e-9)
    moved = difference(*(Sample(tuple(v + level for v in sample.values)) for sample in (row, reference)), typical)
    assert moved is not None
    np.testing.assert_allclose((moved.value, moved.low, moved.high), (one.value, one.low, one.high), atol=1e-6)


@given(samples, samples, st.floats(0.01, 10), st.floats(0.6, 5).flatmap(lambda paper: st.sampled_from([paper, -paper])))
def test_a_verdict_reverses_with_the_sign_of_the_papers_difference(
    row: Sample, reference: Sample, deviation: float, paper: float
) -> None:
    measured = difference(row, reference, TypicalNoise(deviation**2, 8))
    assert measured is not None
    verdicts = [judge([Comparison(measured, claimed, 0.5)])[0].verdict for claimed in (paper, -paper)]
    signs = {"opposite sign" if verdict == "opposite sign" else verdict.partition(",")[0] for verdict in verdicts}
    assert signs in ({"same sign", "opposite sign"}, {"undecided"}, {"equivalent"})


@given(st.lists(samples, max_size=5))
def test_plans_assume_a_variance_between_the_rows_own_and_the_typical_one(rows: list[Sample]) -> None:
    typical = typical_noise(rows)
    several = [row for row in rows if row.deviation is not None]
    assert (typical is None) == (not several)
    for row in several:
        assert typical is not None
        own = SeedNoise.of(row, typical)
        low, high = sorted((own.variance, typical.variance))
        assert low * (1 - 1e-9) <= own.expected <= high * (1 + 1e-9)
