"""Check comparisons of two evaluations over their images."""

import json
from pathlib import Path

import pytest

from sparseinst.ablation.compare import Pair, compare_key, compare_pairs
from sparseinst.ablation.store import Record, Store
from sparseinst.config import Config
from sparseinst.data.coco import val_split
from sparseinst.evaluation.coco_metrics import coco_figures
from sparseinst.paths import run_folder


def test_only_evaluated_images_count(tiny: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With data.val_limit, the objects of the other images do not count as missed."""
    config = tiny.replace({"data.val_limit": 3})
    monkeypatch.chdir(tmp_path)
    split = val_split(config.data)
    truth = json.loads(split.file.read_text())
    images = [image.id for image in split.images]
    assert len(images) < len(truth["images"])
    perfect = [
        {**{name: a[name] for name in ("image_id", "category_id", "segmentation")}, "score": 1.0}
        for a in truth["annotations"]
        if a["image_id"] in images and not a["iscrowd"]
    ]
    store, metrics = Store(tmp_path / "results"), {}
    for key, results in (("whole", perfect), ("half", perfect[::2])):
        metrics[key] = coco_figures(split.file, results, images)
        store.write(Record("evaluate", key, {"figures": metrics[key], "images": 3}))
        run_folder(key).root.mkdir(parents=True)
        run_folder(key).predictions.write_text(json.dumps(results))
    assert compare_pairs([Pair("whole", "half", config.data.model_dump(mode="json"))], store) == 0
    record = store.load(compare_key("whole", "half"))
    assert record is not None
    whole, half = metrics["whole"]["AP"], metrics["half"]["AP"]
    assert whole == pytest.approx(100)
    assert half is not None
    assert record.result["difference"]["AP"] == pytest.approx(half - 100, abs=0.01)
