"""Check that masks kept as runs equal dense masks, and that a large photo with many instances needs little memory."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sparseinst import load_model
from sparseinst.data.masks import encode, encode_runs
from sparseinst.inference import compact
from sparseinst.inference.compact import CompactMasks
from sparseinst.inference.found import FoundInstances
from sparseinst.visualize.draw import _nearest_pixel, overlay
from sparseinst.visualize.labels import place_labels


def blobs(count: int, height: int, width: int) -> np.ndarray:
    """Return masks of all kinds: rectangles that touch the border, noise, an empty one and a full one."""
    random = np.random.default_rng(count)
    masks = np.zeros((count, height, width), dtype=bool)
    for mask in masks[2:]:
        top, left = random.integers(0, height - 4), random.integers(0, width - 4)
        mask[top : top + random.integers(4, height), left : left + random.integers(4, width)] = True
        mask &= random.random((height, width)) < random.choice([0.5, 1.0])
    masks[1] = True
    return masks


@pytest.fixture(params=[1, 700, 2**21])
def strips(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Process images in strips of one row, of some rows, and whole."""
    monkeypatch.setattr(compact, "STRIP_PIXELS", request.param)


@pytest.mark.usefixtures("strips")
def test_compact_masks_equal_dense_ones() -> None:
    masks = blobs(9, 53, 71)
    found = CompactMasks.of(masks)
    assert found.shape == masks.shape
    for index, mask in enumerate(masks):
        assert np.array_equal(found[index], mask)
        assert np.array_equal(found.rows(index, 20, 31), mask[20:31])
        assert found.area(index) == mask.sum()
        rows, columns = np.nonzero(mask)
        box = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1) if len(rows) else None
        assert found.box(index) == box
    assert len(CompactMasks.of(masks[:0])) == 0


@pytest.mark.parametrize("place", [(10.3, 8.6, 40.2, 14.0), (0.0, 0.0, 9.5, 4.0), (60.0, 45.5, 70.0, 52.0)])
def test_the_nearest_pixel_of_the_runs_is_that_of_all_pixels(place: tuple[float, float, float, float]) -> None:
    masks = blobs(12, 53, 71)
    masks[2:6, 5:30, 5:50] = False
    compared = 0
    for index, mask in enumerate(masks):
        if not mask.any():
            continue
        rows, columns = np.nonzero(mask)
        distances = np.hypot(columns - columns.clip(place[0], place[2]), rows - rows.clip(place[1], place[3]))
        nearest = distances.argmin()
        expected = (columns[nearest], rows[nearest]) if distances[nearest] > 3 else None
        assert _nearest_pixel(CompactMasks.of(masks).runs(index), place) == expected
        compared += expected is not None
    assert compared or place[0] == 10.3


def test_strips_change_neither_the_overlay_nor_the_places_of_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    masks = blobs(14, 300, 420)
    masks[1] = False
    scores = np.linspace(1, 0.5, 14, dtype=np.float32)
    found = FoundInstances(scores, np.arange(14), masks, [f"object {index}" for index in range(14)], np.arange(14))
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 256, (300, 420, 3), dtype=np.uint8))
    plates = [(60.5, 12.0)] * 14
    whole, places = np.asarray(overlay(photo, found)), place_labels(masks, plates)
    assert sum(place is not None for place in places) > 5
    monkeypatch.setattr(compact, "STRIP_PIXELS", 2000)
    assert np.array_equal(np.asarray(overlay(photo, found)), whole)
    assert place_labels(masks, plates) == places


def test_predict_compact_finds_the_masks_of_predict(trained: Path) -> None:
    model = load_model(trained, "cpu")
    photo = Image.fromarray(np.random.default_rng(1).integers(0, 256, (333, 517, 3), dtype=np.uint8))
    dense, found = model.predict(photo), model.predict_compact(photo)
    assert len(dense.scores) == len(found.masks) > 3
    assert dense.names == found.names
    assert dense.masks.any()
    for index, mask in enumerate(dense.masks):
        assert np.array_equal(found.masks[index], mask)
    [best] = model.predict_compact(photo, top=1).masks
    assert np.array_equal(best, dense.masks[0])


_MEASURE = """
import sys
from pathlib import Path
from sparseinst import load_model
from sparseinst.inference.memory import keep_freed_memory
from sparseinst.visualize.predict_files import predict_files

def most(name):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(name)) // 1024

keep_freed_memory()  # as the command line does
weights, photo, output = map(Path, sys.argv[1:])
model = load_model(weights, "cpu")
model.predict(photo.parent / "small.png")
before = most("VmHWM")
found = predict_files(model, [photo], output, score=0.0)
print(found.instances, most("VmHWM") - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of a process is read from Linux' /proc")
def test_a_large_photo_with_every_map_needs_little_memory(trained: Path, tmp_path: Path) -> None:
    """As arrays, ten masks of 6 megapixels, their copies, the overlay and the sums for its labels took 400 MB; now it is 140."""
    Image.new("RGB", (64, 64)).save(tmp_path / "small.png")
    Image.linear_gradient("L").resize((3000, 2000)).convert("RGB").save(tmp_path / "photo.jpg")
    command = [sys.executable, "-c", _MEASURE, str(trained), str(tmp_path / "photo.jpg"), str(tmp_path / "out")]
    ended = subprocess.run(command, check=True, capture_output=True, text=True)
    instances, megabytes = map(int, ended.stdout.split())
    assert instances == 10
    assert len(json.loads((tmp_path / "out/predictions.json").read_text())["annotations"]) == 10
    assert megabytes < 220


@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 1.0])
def test_runs_down_the_columns_are_those_of_the_whole_mask(share: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mask is encoded from the box around it, with the same text as from all its pixels."""
    monkeypatch.setattr(compact, "STRIP_PIXELS", 40)
    random = np.random.default_rng(0)
    masks = random.random((6, 13, 17)) < share
    masks[4] = False
    masks[4, :, 3:9] = True  # its runs go on in the next column
    masks[5, :5] = masks[5, :, :4] = False
    kept = CompactMasks.of(masks)
    assert [encode_runs(kept.column_runs(index), (13, 17)) for index in range(6)] == encode(masks)


def test_a_window_is_a_part_of_the_mask() -> None:
    mask = np.zeros((9, 12), dtype=bool)
    mask[2:7, 3:8] = np.random.default_rng(1).random((5, 5)) < 0.5
    mask[4] = False
    mask[4, 3], mask[4, 7] = True, True
    kept = CompactMasks.of(mask[None])
    for left, top, right, bottom in ((3, 2, 8, 7), (0, 0, 12, 9), (1, 4, 10, 5), (3, 8, 8, 9), (3, 3, 8, 3)):
        assert np.array_equal(kept.window(0, (left, top, right, bottom)), mask[top:bottom, left:right])
