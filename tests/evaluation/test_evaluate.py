"""Check evaluation, prediction and drawing."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sparseinst import load_model
from sparseinst.config import Config
from sparseinst.data.coco import CocoSplit, read_split, val_split
from sparseinst.data.masks import decode, encode
from sparseinst.errors import DataError, UserError
from sparseinst.evaluation.coco_metrics import FIGURES, coco_figures, coco_metrics, figures_by_limit
from sparseinst.evaluation.evaluate import _by_name, evaluate
from sparseinst.evaluation.weights import evaluate_run, evaluate_weights
from sparseinst.inference.weights import load_weights
from sparseinst.models.sparseinst import build_model
from sparseinst.visualize.draw import outline, overlay, palette
from tests.conftest import CPU, REAL_COCO, annotation, box, needs_coco, run, write_coco


def test_evaluation_metrics_and_results(tiny: Config, tmp_path: Path) -> None:
    run(tiny, tmp_path / "run")
    result = evaluate_run(tmp_path / "run", tiny, device=CPU)
    assert tuple(result.figures) == FIGURES
    assert result.images == 6
    again = evaluate_weights(tmp_path / "run", {}, device=CPU, predictions=tmp_path / "out.json", evaluator="pycocotools")
    for name, value in result.figures.items():
        assert value == pytest.approx(again.figures[name], abs=1e-9), name
    results = json.loads((tmp_path / "out.json").read_text())
    assert results
    assert all(set(entry) == {"image_id", "category_id", "score", "segmentation"} for entry in results)
    with pytest.raises(UserError, match="train.seed: belongs to the weights"):
        evaluate_weights(tmp_path / "run", {"train.seed": 1}, device=CPU)


def test_perfect_and_empty_results_score_100_and_0(tiny: Config) -> None:
    split = val_split(tiny.data)
    truth = json.loads(split.file.read_text())
    perfect = [
        {"image_id": a["image_id"], "category_id": a["category_id"], "score": 0.9, "segmentation": a["segmentation"]}
        for a in truth["annotations"]
        if not a["iscrowd"]
    ]
    ids = [image.id for image in split.images]
    for engine in ("hotcoco", "pycocotools"):
        assert coco_figures(split.file, perfect, ids, engine)["AP"] == pytest.approx(100)  # type: ignore[arg-type]
        assert coco_figures(split.file, [], ids, engine)["AP"] == 0  # type: ignore[arg-type]


@pytest.mark.parametrize("engine", ["hotcoco", "pycocotools"])
def test_each_category_has_its_own_ap(tiny: Config, engine: Any) -> None:
    """A category whose objects are all found has AP 100, one without a prediction 0, and their mean is AP."""
    split = val_split(tiny.data)
    truth = json.loads(split.file.read_text())["annotations"]
    present = sorted({a["category_id"] for a in truth})
    found = [
        {"image_id": a["image_id"], "category_id": a["category_id"], "score": 0.9, "segmentation": a["segmentation"]}
        for a in truth
        if a["category_id"] != present[0]
    ]
    metrics = coco_metrics(split.file, found, [image.id for image in split.images], engine)
    assert metrics.by_category[present[0]] == 0
    assert all(metrics.by_category[category] == pytest.approx(100) for category in present[1:])
    known = [ap for ap in metrics.by_category.values() if ap is not None]
    assert metrics.figures["AP"] == pytest.approx(sum(known) / len(known))


def test_categories_of_one_name_are_told_apart_by_their_ids(tiny: Config) -> None:
    split = val_split(tiny.data)
    first, second, *others = split.categories
    twice = replace(split, categories=(first, replace(second, name=first.name), *others))
    names = _by_name({first.id: 1.0}, twice)
    assert names[f"{first.name} (id {first.id})"] == 1.0
    assert names[f"{first.name} (id {second.id})"] is None
    assert len(names) == len(split.categories)


@needs_coco
def test_hotcoco_equals_pycocotools_on_photos() -> None:
    """Both engines give the same twelve metrics for ground truth and crowds, partly mislabelled, shifted and rescored."""
    split = read_split(REAL_COCO / "annotations/instances_val2017.json", REAL_COCO / "val2017")
    rng = np.random.default_rng(0)
    results = []
    for image in split.images:
        for entry in image.annotations:
            mask = np.roll(decode(entry.segmentation, image.height, image.width), rng.integers(-9, 10, 2), (0, 1))
            label = entry.label if rng.random() < 0.8 else int(rng.integers(80))
            for score in rng.random(2):
                [runs] = encode(mask[None])
                results.append(
                    {"image_id": image.id, "category_id": split.categories[label].id, "score": score, "segmentation": runs}
                )
    ids = [image.id for image in split.images]
    ours, theirs = (coco_figures(split.file, results, ids, engine) for engine in ("hotcoco", "pycocotools"))  # type: ignore[arg-type]
    assert 5 < float(ours["AP"] or 0) < 60
    for name in FIGURES:
        assert ours[name] == pytest.approx(theirs[name], abs=1e-9), name


def test_evaluation_skips_and_counts_bad_images(tiny: Config, tmp_path: Path) -> None:
    entries = [{"id": i, "file_name": f"{i}.png", "height": 40, "width": 60} for i in (1, 2)]
    categories = [{"id": i, "name": str(i)} for i in range(1, 9)]
    write_coco(tmp_path / "coco", entries, [annotation(i, i, 3, box(5, 5, 20, 20)) for i in (1, 2)], categories)
    (tmp_path / "coco/val2017/2.png").write_bytes(b"")
    config = tiny.replace({"data.root": str(tmp_path / "coco"), "data.on_bad_image": "skip"})
    model = build_model(config.model).eval()
    result = evaluate(model, val_split(config.data), config, device=CPU, progress=False)
    assert (result.images, len(result.skipped)) == (1, 1)
    strict = config.replace({"data.on_bad_image": "error"})
    with pytest.raises(DataError, match="2.png"):
        evaluate(model, val_split(strict.data), strict, device=CPU, progress=False)


@pytest.mark.parametrize("tile", [None, 32])
def test_an_image_whose_annotations_are_bad_is_skipped_and_counted(tiny: Config, tmp_path: Path, tile: int | None) -> None:
    """Its other objects must not count as missed."""
    entries = [{"id": i, "file_name": f"{i}.png", "height": 40, "width": 60} for i in (1, 2)]
    categories = [{"id": i, "name": str(i)} for i in range(1, 9)]
    truth = [annotation(1, 1, 3, box(5, 5, 20, 20)), annotation(2, 2, 3, box(5, 5, 20, 20)), annotation(3, 2, 3, [[1, 2]])]
    write_coco(tmp_path / "coco", entries, truth, categories)
    changes = {"data.root": str(tmp_path / "coco"), "data.on_bad_image": "skip", "inference.tile": tile}
    config = tiny.replace(changes)
    result = evaluate(build_model(config.model).eval(), val_split(config.data), config, device=CPU, progress=False)
    assert (result.images, result.skipped_images) == (1, [2])
    assert "2.png" in result.skipped[0] or "annotation 3" in result.skipped[0]


def test_prediction_equals_evaluation(tiny: Config, tmp_path: Path) -> None:
    """`predict` and the evaluation find the same instances, because they share one scoring path."""
    run(tiny, tmp_path / "run")
    evaluate_weights(tmp_path / "run", {}, device=CPU, predictions=tmp_path / "out.json")
    predictor = load_model(tmp_path / "run", device="cpu")
    image = val_split(tiny.data).images[0]
    found = predictor.predict(image.path)
    expected = [entry for entry in json.loads((tmp_path / "out.json").read_text()) if entry["image_id"] == image.id]
    expected.sort(key=lambda entry: -entry["score"])
    assert len(found.scores) == len(expected) > 0
    np.testing.assert_allclose(found.scores, [entry["score"] for entry in expected], rtol=1e-6)
    assert [predictor.categories[label].id for label in found.labels] == [entry["category_id"] for entry in expected]
    assert found.masks.shape == (len(expected), image.height, image.width)
    assert found.masks.dtype == bool


def test_predictor_takes_files_images_and_arrays(tiny: Config, tmp_path: Path) -> None:
    run(tiny, tmp_path / "run")
    predictor = load_model(tmp_path / "run")
    path = val_split(tiny.data).images[0].path
    picture = Image.open(path).convert("RGB")
    a, b, c = (predictor.predict(kind) for kind in (path, picture, np.asarray(picture)))
    assert np.array_equal(a.scores, b.scores)
    assert np.array_equal(a.scores, c.scores)
    assert predictor.predict(np.asarray(picture.convert("L"))).masks.shape[1:] == (picture.height, picture.width)
    assert len(predictor.predict(path, score=2.0).scores) == 0
    nothing: Any
    for nothing in (None, [path], np.zeros((0, 10, 3), np.uint8)):
        with pytest.raises(DataError, match="an image"):
            predictor.predict(nothing)
    with pytest.raises(DataError, match=r"\(H, W, 3\)"):
        predictor.predict(np.zeros((4, 4, 4), dtype=np.uint8))


def test_invalid_weights_files_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    with pytest.raises(UserError, match="no such file"):
        load_weights(tmp_path / "none.safetensors")
    (tmp_path / "text.safetensors").write_text("hello")
    with pytest.raises(UserError, match="no readable safetensors"):
        load_weights(tmp_path / "text.safetensors")
    save_file({"a": torch.zeros(1)}, tmp_path / "bare.safetensors")
    with pytest.raises(UserError, match="carries no config"):
        load_weights(tmp_path / "bare.safetensors")


def test_overlay_outline_and_palette(tiny: Config, tmp_path: Path) -> None:
    run(tiny, tmp_path / "run")
    predictor = load_model(tmp_path / "run")
    image = Image.new("RGB", (90, 60), "white")
    found = predictor.predict(image)
    drawn = overlay(image, found)
    assert drawn.size == image.size
    mask = np.zeros((9, 9), dtype=bool)
    mask[2:7, 2:7] = True
    assert outline(mask, 1).sum() == 16
    assert len(set(palette(30))) == 30


def test_kept_metrics_are_reused_only_for_the_same_settings_and_data(tiny: Config, tmp_path: Path) -> None:
    shutil.copytree(tiny.data.root, tmp_path / "data")
    config = tiny.replace({"data.root": str(tmp_path / "data"), "data.source": "coco"})
    run(config, tmp_path / "run")
    first = evaluate_run(tmp_path / "run", config, device=CPU)
    assert evaluate_run(tmp_path / "run", config, device=CPU) == first, "the kept result is reused, with its seconds"
    stricter = evaluate_run(tmp_path / "run", config.replace({"inference.score_threshold": 1.0}), device=CPU)
    assert (stricter.figures["AP"], first.images) == (0.0, 6)
    file = val_split(config.data).file
    content = json.loads(file.read_text())
    content["images"] = content["images"][:4]
    kept = {image["id"] for image in content["images"]}
    content["annotations"] = [entry for entry in content["annotations"] if entry["image_id"] in kept]
    file.write_text(json.dumps(content))
    assert evaluate_run(tmp_path / "run", config, device=CPU).images == 4, "the annotation file has changed"
    for damage in ('{"of": {"key', "[]", '{"of": 1, "figurs": {}}'):
        (tmp_path / "run" / "evaluation.json").write_text(damage)
        assert evaluate_run(tmp_path / "run", config, device=CPU).images == 4


def test_pycocotools_needs_no_area_and_iscrowd(tiny: Config, tmp_path: Path) -> None:
    split = val_split(tiny.data)
    content = json.loads(split.file.read_text())
    for entry in content["annotations"]:
        entry.pop("area", None)
        entry.pop("iscrowd", None)
    file = tmp_path / "bare.json"
    file.write_text(json.dumps(content))
    results = [
        {"image_id": entry["image_id"], "category_id": entry["category_id"], "score": 0.5, "segmentation": runs}
        for image in split.images
        for entry in content["annotations"]
        if entry["image_id"] == image.id
        for runs in encode(decode(entry["segmentation"], image.height, image.width)[None])
    ]
    ids = [image.id for image in split.images]
    metrics = coco_figures(file, results, ids, "pycocotools")
    assert metrics["AP"] == pytest.approx(100)
    assert metrics == pytest.approx(coco_figures(file, results, ids))


def _crowded(folder: Path, objects: int) -> tuple[CocoSplit, list[dict[str, Any]]]:
    """Return a split with one image that holds a row of squares, and a perfect prediction of each, the best ones first."""
    runs = []
    for number in range(objects):
        mask = np.zeros((8, 8 * objects), dtype=bool)
        mask[:, 8 * number : 8 * number + 6] = True
        runs.append(encode(mask[None])[0])
    data = {
        "images": [{"id": 1, "file_name": "row.png", "height": 8, "width": 8 * objects}],
        "categories": [{"id": 1, "name": "square"}],
        "annotations": [
            {"id": n, "image_id": 1, "category_id": 1, "iscrowd": 0, "area": 48, "bbox": [8 * n, 0, 6, 8], "segmentation": run}
            for n, run in enumerate(runs, start=1)
        ],
    }
    (folder / "row.json").write_text(json.dumps(data))
    results = [{"image_id": 1, "category_id": 1, "score": 1 - n / 1000, "segmentation": run} for n, run in enumerate(runs)]
    return read_split(folder / "row.json", folder), results


@pytest.mark.parametrize("evaluator", ["hotcoco", "pycocotools"])
def test_data_with_more_than_100_objects_get_ap_at_their_own_number(tmp_path: Path, evaluator: Any) -> None:
    """COCO's AP counts 100 predictions, so that perfect predictions of 160 objects reach 100 of 160 only."""
    split, results = _crowded(tmp_path, 160)
    figures = figures_by_limit(split, results, [1], evaluator)
    assert list(figures) == ["AP@1", "AP@10", "AP@100", "AP@160", "AR@160"]
    assert figures["AP@100"] == pytest.approx(coco_figures(split.file, results, [1], evaluator)["AP"])
    assert figures["AP@10"] == pytest.approx(100 * 7 / 101)  # precision 1 at recalls 0 to 0.06
    assert figures["AP@100"] == pytest.approx(100 * 63 / 101)
    assert figures["AP@160"] == pytest.approx(100)
    assert figures["AR@160"] == pytest.approx(100)


def test_data_with_up_to_100_objects_have_no_other_limits(tmp_path: Path) -> None:
    split, results = _crowded(tmp_path, 100)
    assert figures_by_limit(split, results, [1]) == {}
