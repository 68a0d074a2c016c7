"""Check activation maps: each belongs to its instance, lies at the right place, and is drawn on a readable sheet."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sparseinst import load_model
from sparseinst.cli import run_cli
from sparseinst.config import Config, IAMConfig
from sparseinst.data.coco import Category
from sparseinst.errors import RunFailed, UserError
from sparseinst.inference.found import FoundInstances
from sparseinst.inference.predict import Predictor, instance_responses
from sparseinst.models.network import Predictions
from sparseinst.models.sparseinst import build_model
from sparseinst.visualize.activations import mean_responses, most_different_maps, write_mean_maps
from sparseinst.visualize.draw import activation_sheet, outline, overlay, palette
from sparseinst.visualize.object_maps import ObjectMap, object_sheet
from tests.conftest import CPU, alternatives, run


def raw(responses: torch.Tensor) -> Predictions:
    nothing = torch.zeros(1)
    return Predictions(nothing, nothing, nothing, responses)


def test_groups_of_an_instance_are_averaged_and_padding_is_cut() -> None:
    responses = torch.zeros(1, 4, 4, 6)  # 2 groups of 2 maps, group-major
    responses[0, 0, 1, 2] = 5.0  # instance 0, group 0
    responses[0, 2, 3, 4] = 0.5  # instance 0, group 1
    responses[0, 1] = 1.0
    responses[0, 3, 0, 5] = 9.0  # only in the padding
    found = instance_responses(raw(responses), 2, (32, 40))
    assert found.shape == (2, 4, 5)
    assert (found[0, 1, 2], found[0, 3, 4], found[0].sum()) == (0.5, 0.5, 1.0)
    torch.testing.assert_close(found[1], torch.full((4, 5), 0.5 / 20))


def predictor(tiny: Config) -> Predictor:
    torch.manual_seed(0)
    categories = tuple(Category(n, f"kind {n}") for n in range(6))
    return Predictor(build_model(tiny.model), tiny, categories, CPU)


@pytest.mark.parametrize("iam", [{"groups": 4}, *alternatives(IAMConfig)], ids=str)
def test_predicted_activations(tiny: Config, iam: dict[str, Any]) -> None:
    model = predictor(tiny.replace({f"model.decoder.iam.{name}": value for name, value in iam.items()}))
    picture = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)
    found = model.predict(picture, activations=True)
    assert found.activations is not None
    assert found.activations.shape == (len(found.scores), 8, 12), "64 x 90 at 1/8, without the padding"
    assert found.activations.min() >= 0
    np.testing.assert_allclose(found.activations.max((1, 2)), 1, rtol=1e-5)
    assert len(set(found.maps.tolist())) == len(found.maps)
    assert model.predict(picture).activations is None


def test_sheet_and_overlay() -> None:
    image = Image.new("RGB", (60, 40), (90, 90, 90))
    masks = np.zeros((2, 40, 60), dtype=bool)
    masks[0, 10:30, 10:30] = masks[1, 15:35, 40:58] = True
    activations = np.zeros((2, 5, 8), dtype=np.float32)
    activations[:, 2, 2] = 1
    found = FoundInstances(np.float32([0.9, 0.5]), np.int64([0, 1]), masks, ["a", "b"], np.int64([3, 8]), activations)
    sheet = np.asarray(activation_sheet(image, found, width=120)).astype(int)
    title, gap = round(120 / 18) + 8, 4
    above = sheet[title : title + 80, gap : gap + 120]
    assert above.sum(2).argmax() // 120 in range(30, 45), "it is bright where the map responds, at two fifths of the height"
    assert sheet.shape[1] == 2 * (120 + gap) + gap
    drawn = np.asarray(overlay(image, found))
    assert tuple(drawn[20, 10]) == palette(2)[0], "the outline has the instance's colour"
    assert tuple(drawn[20, 9]) == (255, 255, 255), "the outline has a white border"
    assert tuple(drawn[38, 3]) == (90, 90, 90)
    nothing = FoundInstances(np.float32([]), np.int64([]), masks[:0], [], np.int64([]), activations[:0])
    assert activation_sheet(image, nothing).size[0] > 0


def test_the_mask_of_an_object_is_the_only_colour_below_its_map() -> None:
    """The image has strong colours, which could be taken for masks."""
    image = Image.new("RGB", (200, 100), (0, 255, 0))
    mask = np.zeros((100, 200), np.bool_)
    mask[30:60, 40:90] = True
    entry = ObjectMap("cat", mask.astype(np.uint8), mask, 3, np.zeros((13, 25), np.float32), 0.5, 0.1, 0.0, True, None)
    sheet = np.asarray(object_sheet(image, [entry]))[-108:-8, 4:-4].astype(int)
    coloured = np.ptp(sheet, axis=2) > 0
    assert (coloured & ~mask).sum() == 0
    assert coloured[32:58, 42:88].all()


@pytest.mark.parametrize("edge", [False, True])
@pytest.mark.parametrize("width", [1, 2, 3])
def test_the_outline_consists_of_the_pixels_near_the_border(width: int, edge: bool) -> None:
    """A pixel within `width` steps (up, down, left or right) of a pixel outside the mask belongs to the outline."""
    masks = np.random.default_rng(0).random((20, 12, 17)) < np.linspace(0.5, 1, 20)[:, None, None]
    for mask in masks:
        inner = mask
        for _ in range(width):
            around = np.pad(inner, 1, constant_values=edge)
            inner = inner & around[:-2, 1:-1] & around[2:, 1:-1] & around[1:-1, :-2] & around[1:-1, 2:]
        assert np.array_equal(outline(mask, width, edge=edge), mask & ~inner)


def test_the_maps_that_differ_most_are_chosen() -> None:
    means = np.full((5, 4, 4), 1 / 16, dtype=np.float32)
    for index, place in ((1, 0), (3, 15)):
        means[index] = 0
        means[index].flat[place] = 1
    assert set(most_different_maps(means, 3)[:2]) == {1, 3}
    assert len(most_different_maps(means, 12)) == 5


def width(path: Path) -> int:
    with Image.open(path) as image:
        return image.width


def test_mean_maps_of_a_data_set(tiny: Config, shapes_root: Path, tmp_path: Path) -> None:
    model = predictor(tiny)
    files = sorted((shapes_root / "val2017").iterdir())
    means = mean_responses(model, files[:3])
    assert means.shape == (10, 60, 80)
    np.testing.assert_allclose(means.sum((1, 2)), 1, rtol=1e-4)
    single = [mean_responses(model, [file]) for file in files[:3]]
    np.testing.assert_allclose(means, np.mean(single, axis=0), atol=1e-7)
    chosen, everything, numbers = write_mean_maps(means, tmp_path)
    assert np.array_equal(np.load(numbers), means)
    assert width(chosen) == 6 * (160 + 4) + 4
    assert width(everything) == 10 * (96 + 4) + 4
    means[:, 0, 0] = 1.0  # a cell of the border that outshines all others
    [bright, *_] = write_mean_maps(means, tmp_path / "bright")
    assert bright.read_bytes() != chosen.read_bytes()
    with Image.open(bright) as image, Image.open(chosen) as before:
        middle = (20, 60, 140, 100)
        assert np.array_equal(np.asarray(image.crop(middle)), np.asarray(before.crop(middle)))
    with pytest.raises(UserError, match="no image"):
        mean_responses(model, [])


def test_the_predict_and_maps_commands(
    tiny: Config, shapes_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tiny, tmp_path / "run")
    weights = ["--weights", str(tmp_path / "run"), "--device", "cpu"]
    picture = str(sorted((shapes_root / "val2017").iterdir())[0])
    assert run_cli(["predict", picture, *weights, "--output", str(tmp_path / "out"), "--maps", "--score", "0"]) == 0
    [sheet] = (tmp_path / "out").glob("*-maps.png")
    assert width(sheet) > 240
    assert run_cli(["maps", *weights, "--output", str(tmp_path / "maps"), "--limit", "2"]) == 0
    assert "maps-chosen.png: 2 images" in capsys.readouterr().out
    assert run_cli(["maps", *weights, "--output", str(tmp_path / "maps"), "--data", str(tmp_path / "nowhere")]) == 2
    assert len(load_model(tmp_path / "run", "cpu").predict(picture).maps) > 0


@pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="no device that is always full")
def test_a_full_disk_is_named_also_for_the_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The temporary file of maps.npy is a device without space. np.save alone would raise an error without a reason."""
    full = "sparseinst.files._temporary"
    monkeypatch.setattr(full, lambda path: Path("/dev/full") if path.suffix == ".npy" else path.with_suffix(".tmp"))
    monkeypatch.setattr("sparseinst.files._remove", lambda path: None)
    with pytest.raises(RunFailed, match=r"maps\.npy: cannot write: no space left"):
        write_mean_maps(np.ones((2, 6, 8), dtype=np.float32), tmp_path)
