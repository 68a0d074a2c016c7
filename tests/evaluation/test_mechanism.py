"""Check the metrics of the activation maps on maps that are made by hand, so that the values are known."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sparseinst.config import Config, IAMConfig
from sparseinst.data.coco import val_split
from sparseinst.evaluation import mechanism
from sparseinst.evaluation.evaluate import evaluate
from sparseinst.evaluation.mechanism import METRICS, Pairs, instance_maps, match_maps, of_matched, summarise, touching
from sparseinst.models.sparseinst import build_model
from tests.conftest import alternatives

CPU = torch.device("cpu")
SIDE = 8


def covered(*boxes: tuple[slice, slice]) -> np.ndarray:
    """Return objects that cover whole cells: (K, 8, 8)."""
    cells = np.zeros((len(boxes), SIDE, SIDE), dtype=np.float32)
    for cell, box in zip(cells, boxes, strict=True):
        cell[box] = 1.0
    return cells


LEFT, RIGHT = (slice(2, 4), slice(1, 3)), (slice(2, 6), slice(5, 7))  # 4 and 8 of 64 cells


def measure(maps: np.ndarray, cells: np.ndarray, own: list[int]) -> dict[str, float | None]:
    return summarise([mechanism.of_maps(maps, cells, np.array(own))])


def test_maps_on_their_own_objects() -> None:
    cells = covered(LEFT, RIGHT)
    maps = cells / cells.sum((1, 2), keepdims=True)
    found = measure(maps, cells, [0, 1])
    assert (found["own"], found["others"], found["background"], found["border"]) == (1, 0, 0, 0)
    assert (found["prefers_own"], found["chance"], found["peak_on_own"]) == (1, 0.5, 1)
    assert found["lift"] == pytest.approx((64 / 4 + 64 / 8) / 2)


def test_uniform_maps() -> None:
    cells = covered(LEFT, RIGHT)
    maps = np.full((2, SIDE, SIDE), 1 / 64, dtype=np.float32)
    found = measure(maps, cells, [0, 1])
    assert found["own"] == pytest.approx((4 + 8) / 2 / 64, abs=1e-4)
    assert found["others"] == pytest.approx((4 + 8) / 2 / 64, abs=1e-4)
    assert found["border"] == pytest.approx(28 / 64, abs=1e-4)
    assert found["lift"] == pytest.approx(1)


def test_maps_on_the_other_object_and_on_the_border() -> None:
    cells = covered(LEFT, RIGHT)
    frame = np.zeros((SIDE, SIDE), dtype=np.float32)
    frame[0] = 1 / SIDE
    found = measure(np.stack([cells[1] / 8, frame]), cells, [0, 1])
    assert (found["own"], found["others"], found["background"], found["border"]) == (0, 0.5, 0.5, 0.5)
    assert found["peak_on_own"] == 0
    assert measure(cells[1:] / 8, cells, [0])["prefers_own"] == 0


def test_a_single_object_has_no_preference_metrics() -> None:
    cells = covered(LEFT)
    found = measure(cells / 4, cells, [0])
    assert (found["prefers_own"], found["chance"]) == (None, None)
    assert found["own"] == 1


def test_preference_compares_the_response_per_cell() -> None:
    """A map that covers both objects evenly has more mass on the larger one, but the response per cell decides."""
    cells = covered(LEFT, RIGHT)
    spread = (1.1 * cells[0] + cells[1]) / (1.1 * 4 + 8)
    assert measure(spread[None], cells, [0])["prefers_own"] == 1
    assert measure(spread[None], cells, [1])["prefers_own"] == 0


def test_an_object_smaller_than_a_cell_can_hold_the_peak() -> None:
    cells = np.zeros((1, SIDE, SIDE), dtype=np.float32)
    cells[0, 3, 3] = 0.2
    peak = np.zeros((1, SIDE, SIDE), dtype=np.float32)
    peak[0, 3, 3] = 1
    assert measure(peak, cells, [0])["peak_on_own"] == 1
    assert measure(np.roll(peak, 1, axis=2), cells, [0])["peak_on_own"] == 0


def test_groups_are_normalised_and_then_averaged() -> None:
    responses = torch.zeros(4, 1, 4)  # two groups of two maps
    for index, position in enumerate((0, 1, 2, 3)):
        responses[index, 0, position] = 10.0 ** (index - 1)
    maps = instance_maps(responses, 2)
    assert torch.allclose(maps[0, 0], torch.tensor([0.5, 0.0, 0.5, 0.0]))
    assert torch.allclose(maps[1, 0], torch.tensor([0.0, 0.5, 0.0, 0.5]))


def mask(box: tuple[slice, slice]) -> np.ndarray:
    whole = np.zeros((40, 40), dtype=np.uint8)
    whole[box] = 1
    return whole


NEXT = slice(20, 40), slice(20, 40)


@pytest.mark.parametrize(("gap", "touches"), [(0, True), (2, True), (3, False)])
def test_touching(gap: int, touches: bool) -> None:
    first, second = mask((slice(5, 15), slice(5, 15))), mask((slice(5, 15), slice(15 + gap, 25 + gap)))
    assert touching(np.array([1, 1]), [first, second]) == ([(0, 1)] if touches else [])
    assert touching(np.array([1, 2]), [first, second]) == [], "objects of different categories do not count"
    assert touching(np.array([1, 1]), [first, np.zeros_like(first)]) == [], "an empty mask touches nothing"


def test_duplicates_and_found_objects() -> None:
    overlaps = np.array([[0.9, 0.0], [0.6, 0.0], [0.7, 0.1], [0.0, 0.8]])
    labels, found, scores = np.array([3, 5]), np.array([3, 3, 4, 2]), np.array([0.9, 0.5, 0.3, 0.6], dtype=np.float32)
    assert mechanism._duplicates(overlaps, scores) == [1, 0], "the third instance is not confident"
    assert mechanism._recalled(labels, overlaps, found).tolist() == [True, False], (
        "the second object was found with another category"
    )


def test_all_metrics_are_none_without_observations() -> None:
    assert summarise([]) == dict.fromkeys(METRICS)
    nothing = Pairs([], [], [], [], [], [], [], [], [], {})
    assert summarise([nothing]) == dict.fromkeys(METRICS)


KINDS: list[dict[str, Any]] = [{}, {"groups": 2}, *alternatives(IAMConfig)]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: next(iter(kind.values()), "default"))
def test_every_kind_of_map_is_measured(tiny: Config, kind: dict[str, Any]) -> None:
    config = tiny.replace({f"model.decoder.iam.{name}": value for name, value in kind.items()})
    torch.manual_seed(0)
    model = build_model(config.model).eval()
    found = evaluate(model, val_split(config.data), config, device=CPU, progress=False).mechanism
    assert tuple(found) == METRICS
    own, others, background = (found[name] for name in ("own", "others", "background"))
    assert own is not None
    assert others is not None
    assert background is not None
    assert own + others + background == pytest.approx(1, abs=1e-3)
    assert all(value is None or 0 <= value <= 1 for name, value in found.items() if name not in ("lift", "duplicates"))


def test_an_object_without_a_pixel_at_the_networks_size_has_no_map(tiny: Config) -> None:
    """The training leaves it out, too. It would get an arbitrary map, and lower the means."""
    torch.manual_seed(0)
    model = build_model(tiny.model).eval()
    with torch.no_grad():
        raw = model(torch.rand(1, 3, 64, 64))
    labels, masks = np.array([1, 2, 1]), [mask((slice(0, 20), slice(0, 20))), mask((slice(0, 0), slice(0, 0))), mask(NEXT)]
    three = match_maps(raw, (64, 64), labels, masks, tiny, model.mask_size((64, 64)))
    two = match_maps(raw, (64, 64), labels[[0, 2]], [masks[0], masks[2]], tiny, model.mask_size((64, 64)))
    assert sorted(three.objects.tolist()) == [0, 2]
    assert three.maps.tolist() == two.maps.tolist()
    with_it, without = of_matched(three), of_matched(two)
    assert with_it._replace(matched={}) == without._replace(matched={})
    assert set(with_it.matched) == {"0", "2"}


def test_polygons_in_images_of_other_sizes(tiny: Config, tmp_path: Path) -> None:
    """Maps are compared with masks at the network's size, and found instances with masks at the image's own size."""
    import json

    from PIL import Image

    (tmp_path / "annotations").mkdir()
    for split in ("train2017", "val2017"):
        (tmp_path / split).mkdir()
        Image.new("RGB", (150, 90), "grey").save(tmp_path / split / "a.png")
        square = [10, 10, 60, 10, 60, 60, 10, 60]
        entry = {"id": 1, "image_id": 1, "category_id": 1, "segmentation": [square], "area": 2500, "bbox": [10, 10, 50, 50]}
        data = {"images": [{"id": 1, "file_name": "a.png", "height": 90, "width": 150}], "annotations": [{**entry, "iscrowd": 0}]}
        names = [{"id": number, "name": str(number)} for number in range(1, 7)]
        (tmp_path / "annotations" / f"instances_{split}.json").write_text(json.dumps({**data, "categories": names}))
    config = tiny.replace({"data.root": str(tmp_path)})
    torch.manual_seed(0)
    model = build_model(config.model).eval()
    found = evaluate(model, val_split(config.data), config, device=CPU, progress=False).mechanism
    # The maps of a random model are nearly uniform: the object gets its share of the padded input, 64 x 128.
    inside = (50 * 64 / 90) ** 2 / (64 * 128)
    assert found["own"] == pytest.approx(inside, rel=0.15)
    assert found["lift"] == pytest.approx(1, rel=0.15)
