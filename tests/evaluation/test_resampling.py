"""Check AP in resamplings of the images."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sparseinst.config import Config
from sparseinst.data.coco import val_split
from sparseinst.evaluation.coco_metrics import coco_figures
from sparseinst.evaluation.resampling import DRAWS, FIGURES, matches, resampled_figures, weighted_figures


@pytest.fixture
def found(tiny: Config) -> tuple[Path, list[int], list[dict[str, Any]]]:
    """Return annotations, images, and results with missed objects, wrong categories and false positives."""
    split = val_split(tiny.data)
    truth = json.loads(split.file.read_text())
    random = np.random.default_rng(0)
    categories = [category["id"] for category in truth["categories"]]
    results = []
    for annotation in truth["annotations"]:
        for _ in range(int(random.integers(0, 3))):
            category = int(random.choice(categories)) if random.random() < 0.3 else annotation["category_id"]
            image = annotation["image_id"]
            results.append(
                {"image_id": image, "category_id": category, "segmentation": annotation["segmentation"], "score": random.random()}
            )
    return split.file, [image.id for image in split.images], results


def test_each_image_once_gives_cocos_metrics(found: tuple[Path, list[int], list[dict[str, Any]]]) -> None:
    file, images, results = found
    expected = coco_figures(file, results, images)
    values = weighted_figures(matches(file, results, sorted(images)), np.ones((1, len(images)), dtype=np.int64))
    for name in FIGURES:
        if expected[name] is None:
            assert np.isnan(values[name][0])
        else:
            assert values[name][0] == pytest.approx(expected[name], abs=1e-9)
    assert expected["AP"] is not None
    assert 5 < expected["AP"] < 95


def test_an_image_that_counts_twice_gives_the_metrics_of_a_set_with_a_copy(
    found: tuple[Path, list[int], list[dict[str, Any]]], tmp_path: Path
) -> None:
    file, images, results = found
    random = np.random.default_rng(1)
    weights = random.multinomial(len(images), np.full(len(images), 1 / len(images)))
    assert weights.max() > 1
    truth = json.loads(file.read_text())
    copies: dict[str, Any] = {"images": [], "annotations": [], "categories": truth["categories"]}
    copied = []
    for image, weight in zip(sorted(images), weights, strict=True):
        for _ in range(weight):
            new = len(copies["images"]) + 1
            record = next(entry for entry in truth["images"] if entry["id"] == image)
            copies["images"].append({**record, "id": new})
            for annotation in truth["annotations"]:
                if annotation["image_id"] == image:
                    copies["annotations"].append({**annotation, "image_id": new, "id": len(copies["annotations"]) + 1})
            copied += [{**result, "image_id": new} for result in results if result["image_id"] == image]
    (tmp_path / "copies.json").write_text(json.dumps(copies))
    expected = coco_figures(tmp_path / "copies.json", copied, [image["id"] for image in copies["images"]])
    values = weighted_figures(matches(file, results, sorted(images)), weights[None])
    for name in FIGURES:
        assert np.isnan(values[name][0]) if expected[name] is None else values[name][0] == pytest.approx(expected[name], abs=1e-9)


def test_two_evaluations_share_their_resamplings(found: tuple[Path, list[int], list[dict[str, Any]]]) -> None:
    """The difference of two evaluations of nearly equal results has far less noise than each of them."""
    file, images, results = found
    one = np.array(resampled_figures(file, results, images)["AP"], dtype=float)
    other = np.array(resampled_figures(file, results[:-1], images)["AP"], dtype=float)
    assert len(one) == DRAWS
    assert 0 < (one - other).std() < 0.5 * one.std()


def test_no_result_at_all(found: tuple[Path, list[int], list[dict[str, Any]]]) -> None:
    file, images, _ = found
    assert set(resampled_figures(file, [], images, draws=3)["AP"]) == {0.0}
