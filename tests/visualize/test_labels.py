"""Check the labels, the colours and the contact sheets of predictions."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from sparseinst import load_model
from sparseinst.cli import run_cli
from sparseinst.data.coco import val_split
from sparseinst.inference.found import FoundInstances
from sparseinst.visualize.draw import overlay, palette
from sparseinst.visualize.labels import place_labels


def squares(places: list[tuple[int, int]], side: int, size: tuple[int, int]) -> np.ndarray:
    masks = np.zeros((len(places), *size), dtype=bool)
    for mask, (x, y) in zip(masks, places, strict=True):
        mask[y : y + side, x : x + side] = True
    return masks


def test_labels_hide_no_small_object_and_no_other_label() -> None:
    rng = np.random.default_rng(0)
    masks = squares([(int(x), int(y)) for x, y in rng.integers(0, 470, (25, 2))], 8, (480, 480))
    places = place_labels(masks, [(60.0, 14.0)] * 25)
    assert sum(place is not None for place in places) > 20
    covers = np.zeros((480, 480), dtype=int)
    for place in places:
        if place is not None:
            left, top, right, bottom = place
            assert 0 <= left <= right <= 480
            assert 0 <= top <= bottom <= 480
            covers[int(np.ceil(top)) : int(bottom), int(np.ceil(left)) : int(right)] += 1
    assert max((covers[mask] > 0).mean() for mask in masks) <= 0.5
    assert (covers > 1).sum() < 0.1 * (covers > 0).sum()


def test_a_label_stays_above_its_object_where_there_is_room_and_goes_where_there_is_none() -> None:
    [alone] = place_labels(squares([(100, 100)], 20, (200, 300)), [(60.0, 14.0)])
    assert alone == (79.5, 86.0, 139.5, 100.0)
    crowded = np.stack([*squares([(100, 100)], 20, (200, 300)), *squares([(80, 86), (110, 86)], 12, (200, 300))])
    assert place_labels(crowded, [(60.0, 14.0)] * 3)[0] != alone
    full = squares([(0, 0), (10, 0), (0, 10), (10, 10)], 10, (20, 20))
    assert place_labels(full, [(20.0, 20.0)] * 4) == [None] * 4
    assert place_labels(np.zeros((1, 20, 20), dtype=bool), [(5.0, 5.0)]) == [None]


def test_a_class_has_one_colour_in_every_image() -> None:
    masks = squares([(20, 60), (120, 60)], 40, (120, 200))
    for labels in ([2, 2], [5, 2]):
        found = FoundInstances(np.float32([0.9, 0.8]), np.int64(labels), masks, ["a", "b"], np.int64([0, 1]))
        drawn = np.asarray(overlay(Image.new("RGB", (200, 120)), found, opacity=1.0, colour="class"))
        assert [tuple(drawn[80, x]) for x in (40, 140)] == [palette(label + 1)[label] for label in labels]


def test_predict_writes_sheets_and_says_what_is_left_out(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [image.path for image in val_split(load_model(trained, "cpu").config.data).images[:3]]
    photo = tmp_path / "in/sheet-1.png"
    photo.parent.mkdir()
    Image.open(files[0]).save(photo)
    command = ["predict", *map(str, files), str(photo), "--weights", str(trained), "--device", "cpu", "--score", "1e-9"]
    assert run_cli([*command, "--output", str(tmp_path / "out"), "--sheet", "--colour", "class", "--top", "4"]) == 0
    printed = capsys.readouterr().out
    assert f"contact sheet: {tmp_path}/out/sheet-1.jpg" in printed
    assert "--top left out 24 more instances" in printed
    assert "in 4 images all maps of the model have such a score" in printed
    assert run_cli([*command[:-1], "0", "--output", str(tmp_path / "every")]) == 0
    assert "all maps of the model" not in capsys.readouterr().out, "every map has a score of 0 or more"
    with Image.open(tmp_path / "out/sheet-1.jpg") as sheet:
        assert sheet.width == 4 * 324 + 4
    assert (tmp_path / "out/sheet-1-2.jpg").exists()  # the overlay of the photo that is called like the sheet
    inside = tmp_path / "here/sheet-1.jpg"
    inside.parent.mkdir()
    Image.open(files[0]).convert("RGB").save(inside)
    again = ["predict", str(inside), "--weights", str(trained), "--device", "cpu", "--sheet", "--output", str(inside.parent)]
    assert run_cli(again) == 2
    assert "would be overwritten" in capsys.readouterr().err


def test_labels_do_not_hide_a_crowded_image() -> None:
    """Sixty equal objects get their scores alone; two hundred get no label; with two names, the names are needed."""
    image = Image.new("RGB", (640, 480))

    def drawn(count: int, names: list[str]) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
        masks = np.zeros((count, 480, 640), bool)
        for index, mask in enumerate(masks):
            top, left = divmod(index, 20)
            mask[4 + 40 * top : 20 + 40 * top, 4 + 30 * left : 20 + 30 * left] = True
        about = np.full(count, 0.5, np.float32), np.zeros(count, np.int64), masks
        chosen = [names[index % len(names)] for index in range(count)]
        found = FoundInstances(*about, chosen, np.zeros(count, np.int64))
        nameless = replace(found, names=[""] * count)
        return np.asarray(overlay(image, found)), np.asarray(overlay(image, nameless, scores=False))

    labelled, bare = drawn(8, ["cell"])
    few = int((labelled != bare).any(2).sum())
    labelled, bare = drawn(60, ["cell"])
    numbers = int((labelled != bare).any(2).sum())
    assert 0 < numbers < 60 * few / 8 * 0.7, "the scores are much shorter"
    assert np.array_equal(*drawn(200, ["cell"]))
    assert np.array_equal(*drawn(60, ["cell", "nucleus"]))
