"""Check matching and losses beyond the golden values: empty batches, extreme inputs, variants and several processes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, multiprocessing

from sparseinst.config import LossConfig, MatcherConfig
from sparseinst.criterion import Counts, Criterion, binary_iou, count, prepare_targets
from sparseinst.distributed import mean_counts
from sparseinst.matcher import Target, match
from sparseinst.models.network import Predictions
from tests.conftest import alternatives

MAPS, CLASSES, SIZE = 6, 3, (8, 12)
FIELDS = ("class_logits", "objectness_logits", "mask_logits")


def some_predictions(images: int = 2, seed: int = 0) -> Predictions:
    generator = torch.Generator().manual_seed(seed)
    shapes = (images, MAPS, CLASSES), (images, MAPS), (images, MAPS, *SIZE)
    tensors = [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]
    return Predictions(*tensors, torch.zeros(0))


def some_targets(*counts: int, seed: int = 0) -> list[Target]:
    generator = torch.Generator().manual_seed(seed)
    return [
        Target(torch.randint(0, CLASSES, (n,), generator=generator), (torch.rand((n, *SIZE), generator=generator) > 0.5).float())
        for n in counts
    ]


def total(losses: dict[str, Tensor]) -> Tensor:
    return torch.stack(list(losses.values())).sum()


def gradients(predictions: Predictions) -> list[Tensor]:
    found = [getattr(predictions, name).grad for name in FIELDS]
    assert all(grad is not None for grad in found), "every prediction is part of the graph"
    return found


VARIANTS: list[dict[str, Any]] = [{}, {"dice": False}, *alternatives(LossConfig)]


@pytest.mark.parametrize("settings", VARIANTS, ids=str)
@pytest.mark.parametrize("counts", [(2, 3), (0, 2), (0, 0), (20, 1)], ids=str)
def test_every_variant_has_finite_losses_and_gradients(settings: dict[str, Any], counts: tuple[int, ...]) -> None:
    config = LossConfig(**settings)
    predictions = some_predictions()
    losses = Criterion(config, MatcherConfig())(predictions, some_targets(*counts))
    expected = {"class"} | ({"dice"} if config.dice else set())
    expected |= ({"pixel"} if config.pixel != "none" else set()) | ({"objectness"} if config.objectness != "none" else set())
    assert set(losses) == expected
    total(losses).backward()
    assert all(torch.isfinite(grad).all() for grad in gradients(predictions))
    if sum(counts) == 0:
        assert losses["class"] > 0
        assert all(loss == 0 for name, loss in losses.items() if name != "class")
        assert (predictions.class_logits.grad > 0).all(), "an empty batch lowers every score"


def test_each_weight_scales_only_its_loss() -> None:
    names = ("class", "dice", "pixel", "objectness")
    base = Criterion(LossConfig(**{f"{n}_weight": 1.0 for n in names}), MatcherConfig())(some_predictions(), some_targets(2, 1))
    for index, name in enumerate(names):
        weights = {f"{n}_weight": float(i == index) * 3 for i, n in enumerate(names)}
        scaled = Criterion(LossConfig(**weights), MatcherConfig())(some_predictions(), some_targets(2, 1))
        for other in names:
            torch.testing.assert_close(scaled[other], base[other] * (3 if other == name else 0))


def test_own_and_reference_masks_differ_only_when_overfull() -> None:
    own, reference = (Criterion(LossConfig(overfull=kind), MatcherConfig()) for kind in ("own", "reference"))
    for counts, same in (((2, 3), True), ((MAPS, 3), True), ((MAPS + 4, 3), False), ((3, MAPS + 4), True)):
        a, b = (criterion(some_predictions(), some_targets(*counts)) for criterion in (own, reference))
        assert torch.equal(a["dice"], b["dice"]) == same, counts


def test_every_map_is_matched_if_there_are_more_instances() -> None:
    [found] = match(some_predictions(1), some_targets(20), MatcherConfig())
    assert found.predictions.tolist() == list(range(MAPS))
    assert len(set(found.instances.tolist())) == MAPS


def test_match_is_the_best_assignment() -> None:
    """The test compares the match with all permutations, scored by the paper's Eq. 1."""
    from itertools import permutations

    predictions, targets = some_predictions(1, seed=3), some_targets(3, seed=3)
    masks, truth = predictions.mask_logits[0].detach().sigmoid().flatten(1), targets[0].masks.flatten(1)
    dice = 2 * masks @ truth.T / (masks.square().sum(1)[:, None] + truth.square().sum(1) + 1e-4)
    score = dice**0.8 * predictions.class_logits[0].detach().sigmoid()[:, targets[0].labels] ** 0.2
    best = max(permutations(range(MAPS), 3), key=lambda rows: float(score[list(rows), range(3)].sum()))
    [found] = match(predictions, targets, MatcherConfig())
    assert dict(zip(found.instances.tolist(), found.predictions.tolist(), strict=True)) == dict(enumerate(best))


def test_one_pixel_instances_have_finite_gradients() -> None:
    mask = torch.zeros(1, 32, 48, dtype=torch.uint8)
    mask[0, 5, 5] = 1
    [target] = prepare_targets([torch.tensor([0])], [mask], (32, 48), SIZE)
    assert target.masks.sum() > 0
    predictions = some_predictions(1)
    total(Criterion(LossConfig(), MatcherConfig())(predictions, [target])).backward()
    assert all(torch.isfinite(grad).all() for grad in gradients(predictions))


def test_targets_are_padded_like_images() -> None:
    mask = torch.ones(1, 20, 30, dtype=torch.uint8)
    [target] = prepare_targets([torch.tensor([0])], [mask], (32, 48), SIZE)
    assert target.masks.shape == (1, *SIZE)
    assert (target.masks[0, :5, :7] == 1).all()
    assert not target.masks[0, 5:].any()
    assert not target.masks[0, :, 8:].any()


def test_iou_of_binary_masks() -> None:
    probability = torch.tensor([[0.41, 0.41, 0.39, 0.39]])
    truth = torch.tensor([[0.6, 0.4, 0.6, 0.0]])
    torch.testing.assert_close(binary_iou(probability.logit(), truth), torch.tensor([1 / 3]))


def test_objectness_target_has_no_gradient_to_masks() -> None:
    predictions = some_predictions(1)
    Criterion(LossConfig(), MatcherConfig())(predictions, some_targets(2))["objectness"].backward()
    assert predictions.objectness_logits.grad.any()
    assert predictions.mask_logits.grad is None


def test_nan_in_masks_does_not_reach_the_class_loss() -> None:
    predictions = some_predictions(1)
    with torch.no_grad():
        predictions.mask_logits[0, :, 0, 0] = float("nan")
    losses = Criterion(LossConfig(), MatcherConfig())(predictions, some_targets(2))
    assert torch.isnan(losses["dice"])
    assert torch.isfinite(losses["class"])


def split_losses(reduction: str, parts: list[slice]) -> tuple[float, list[Tensor]]:
    """Return the loss and the gradients of four images in parts, averaged as processes average them."""
    predictions, targets = some_predictions(4), some_targets(3, 0, 1, 2)
    counts = mean_counts([count(targets[part], MAPS) for part in parts], torch.device("cpu"))
    criterion = Criterion(LossConfig(reduction=reduction), MatcherConfig())
    value = 0.0
    for part in parts:
        loss = total(criterion(Predictions(*(field[part] for field in predictions[:3]), torch.zeros(0)), targets[part], counts))
        (loss / len(parts)).backward()
        value += float(loss.detach()) / len(parts)
    return value, gradients(predictions)


def test_global_reduction_does_not_depend_on_the_split() -> None:
    whole = split_losses("global", [slice(0, 4)])
    for parts in ([slice(0, 2), slice(2, 4)], [slice(i, i + 1) for i in range(4)]):
        value, found = split_losses("global", parts)
        assert value == pytest.approx(whole[0], rel=1e-5)
        for ours, expected in zip(found, whole[1], strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-7)


def test_per_process_reduction_depends_on_the_split() -> None:
    whole = split_losses("per_process", [slice(0, 4)])
    assert split_losses("per_process", [slice(0, 3), slice(3, 4)])[0] != pytest.approx(whole[0], rel=5e-5)


def _counting_process(rank: int, store: str, results: Any) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    results[rank] = tuple(mean_counts([Counts(rank + 1, 2, 3), Counts(5, 2, 3)], torch.device("cpu")))
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_counts_are_averaged_over_processes(tmp_path: Path) -> None:
    with multiprocessing.Manager() as manager:
        results = manager.dict()
        multiprocessing.spawn(_counting_process, (str(tmp_path / "store"), results), nprocs=2)
        assert results[0] == results[1] == (3.25, 2.0, 3.0)
