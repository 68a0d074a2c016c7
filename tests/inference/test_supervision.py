"""Check found instances: their number, their text, and their conversion to `supervision.Detections`."""

import sys
from pathlib import Path

import numpy as np
import pytest

from sparseinst import load_model
from sparseinst.errors import UserError
from sparseinst.inference.compact import CompactMasks
from sparseinst.inference.found import CompactInstances, FoundInstances


def found() -> FoundInstances:
    masks = np.zeros((3, 10, 12), np.bool_)
    masks[0, 2:5, 3:9] = True
    masks[1, 9, 11] = True
    names = ["cat", "dog", "cat"]
    return FoundInstances(np.array([0.9, 0.5, 0.1], np.float32), np.array([1, 4, 1]), masks, names, np.array([7, 0, 3]))


def test_boxes_are_the_edges_of_the_masks() -> None:
    assert found().boxes().tolist() == [[3, 2, 9, 5], [11, 9, 12, 10], [0, 0, 0, 0]]


def test_number_and_text_of_found_instances() -> None:
    """A notebook shows the text, so it is one short line instead of all arrays."""
    every = found()
    assert len(every) == 3
    assert repr(every) == "3 instances in 10 x 12, scores 0.90 to 0.10"
    one = FoundInstances(every.scores[:1], every.labels[:1], every.masks[:1], every.names[:1], every.maps[:1])
    assert repr(one) == "1 instance in 10 x 12, score 0.90"
    none = FoundInstances(every.scores[:0], every.labels[:0], every.masks[:0], [], every.maps[:0])
    assert len(none) == 0
    assert repr(none) == "0 instances in 10 x 12"
    about = (every.scores, every.labels, CompactMasks.of(every.masks), every.names, every.maps)
    assert repr(CompactInstances(*about)) == repr(every)


def test_a_missing_package_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "supervision", None)
    with pytest.raises(UserError, match=r"pip install -e '\.\[supervision\]'"):
        found().to_supervision()


@pytest.mark.filterwarnings("ignore")  # supervision warns if OpenCV is not installed
def test_detections(shapes_root: Path) -> None:
    supervision = pytest.importorskip("supervision", reason="the extra supervision is not installed")
    detections = found().to_supervision()
    assert detections.xyxy.tolist() == found().boxes().tolist()
    assert detections.class_id.tolist() == [1, 4, 1]
    assert detections["class_name"].tolist() == ["cat", "dog", "cat"]
    assert detections.confidence.tolist() == pytest.approx([0.9, 0.5, 0.1])
    assert detections.area.tolist() == [18, 1, 0]
    best = detections[detections.confidence > 0.4]
    assert len(best) == 2
    image = np.zeros((10, 12, 3), np.uint8)
    drawn = supervision.MaskAnnotator(opacity=1.0).annotate(image.copy(), detections)
    assert drawn[3, 4].any()
    assert not drawn[0, 0].any()
    predicted = load_model("demo", "cpu").predict(shapes_root / "val2017" / "000000000001.png", score=2.0).to_supervision()
    assert len(predicted) == 0
    assert predicted.mask.shape[0] == 0
