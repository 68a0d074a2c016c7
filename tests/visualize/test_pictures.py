"""Check that overlays, videos, failure sheets and curves show exactly what the evaluation counts."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sparseinst import load_model
from sparseinst.cli import run_cli
from sparseinst.config import Config
from sparseinst.data.coco import val_split
from sparseinst.data.masks import decode, encode
from sparseinst.errors import DataError, RunFailed
from sparseinst.evaluation.evaluate import evaluate
from sparseinst.evaluation.mechanism import stability
from sparseinst.evaluation.weights import evaluate_weights
from sparseinst.inference.found import FoundInstances
from sparseinst.inference.weights import load_weights
from sparseinst.paths import RunPaths
from sparseinst.report.curves import draw_curves, read_metrics
from sparseinst.training import train as train_module
from sparseinst.training.train import train
from sparseinst.visualize.draw import overlay, palette
from sparseinst.visualize.failure_causes import causes_of_missed
from sparseinst.visualize.failures import find_failures
from tests.conftest import CPU, annotation, box, write_coco


def test_drawn_instances_are_the_evaluated_instances(trained: Path, tmp_path: Path) -> None:
    """Masks, scores and labels of `predict`, of its JSON and of the evaluation are bit-identical."""
    evaluate_weights(trained, {}, device=CPU, predictions=tmp_path / "evaluated.json")
    evaluated = json.loads((tmp_path / "evaluated.json").read_text())
    model = load_model(trained, "cpu")
    split = val_split(model.config.data)
    command = ["predict", *(str(image.path) for image in split.images), "--weights", str(trained)]
    assert run_cli([*command, "--output", str(tmp_path / "drawn"), "--score", "0", "--device", "cpu"]) == 0
    written = json.loads((tmp_path / "drawn/predictions.json").read_text())
    for number, image in enumerate(split.images, start=1):
        theirs = sorted((e for e in evaluated if e["image_id"] == image.id), key=lambda e: -e["score"])
        json_entries = [e for e in written["annotations"] if e["image_id"] == number]
        found = model.predict(image.path)
        assert len(theirs) == len(json_entries) == len(found.scores) > 0
        assert [e["score"] for e in theirs] == [e["score"] for e in json_entries] == found.scores.tolist()
        for their, ours, mask, label in zip(theirs, json_entries, found.masks, found.labels, strict=True):
            assert their["category_id"] == ours["category_id"] == model.categories[label].id
            assert their["segmentation"] == ours["segmentation"]
            assert np.array_equal(decode(their["segmentation"], *mask.shape).astype(bool), mask)


def test_the_overlay_tints_the_mask_and_no_distant_pixel() -> None:
    mask = np.zeros((1, 200, 300), dtype=bool)
    mask[0, 80:120, 100:200] = True
    one = np.zeros(1, dtype=np.int64)
    found = FoundInstances(np.array([0.9], dtype=np.float32), one, mask, ["cat"], one + 3)
    grey = Image.new("RGB", (300, 200), (128, 128, 128))
    drawn = np.asarray(overlay(grey, found, opacity=0.5))
    red, green, blue = palette(1)[0]
    assert drawn[100, 150].tolist() == pytest.approx([(128 + c) / 2 for c in (red, green, blue)], abs=1)
    assert (drawn[130:] == 128).all()
    assert (drawn[60:150, 220:] == 128).all()
    by_map = np.asarray(overlay(grey, found, opacity=1.0, colour="map"))
    assert by_map[100, 150].tolist() == list(palette(4)[3]), "the colour belongs to map 3, not to the instance's rank"


def test_predict_says_what_it_found(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    split = val_split(load_model(trained, "cpu").config.data)
    command = ["predict", *(str(image.path) for image in split.images[:3]), "--weights", str(trained), "--device", "cpu"]
    assert run_cli([*command, "--output", str(tmp_path / "none"), "--score", "1"]) == 0
    printed = capsys.readouterr().out
    assert "0 instances with a score of 1 or more in 3 images; the highest score is 0." in printed
    assert "Use a lower --score" in printed
    assert run_cli(["predict", command[1], *command[4:], "--output", str(tmp_path / "one"), "--score", "1"]) == 0
    assert "0 instances with a score of 1 or more in 1 image; the highest score is 0." in capsys.readouterr().out
    assert run_cli([*command, "--output", str(tmp_path / "top"), "--score", "0", "--top", "2"]) == 0
    assert "6 instances with a score of 0 or more in 3 images; the highest" in capsys.readouterr().out
    kept = json.loads((tmp_path / "top/predictions.json").read_text())["annotations"]
    assert run_cli([*command, "--output", str(tmp_path / "all"), "--score", "0"]) == 0
    everything = json.loads((tmp_path / "all/predictions.json").read_text())["annotations"]
    for number in (1, 2, 3):
        best = sorted((e["score"] for e in everything if e["image_id"] == number), reverse=True)[:2]
        assert [e["score"] for e in kept if e["image_id"] == number] == best


@pytest.fixture
def av() -> Any:
    return pytest.importorskip("av", reason="PyAV, the extra `video`, is not installed")


def write_video(av: Any, path: Path, frames: int, size: tuple[int, int] = (98, 65)) -> Path:
    """Write a video of a moving square. Its height is odd, as cropped videos may have it."""
    with av.open(str(path), "w") as file:
        stream = file.add_stream("libvpx-vp9", rate=10)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv444p"
        for number in range(frames):
            picture = np.zeros((size[1], size[0], 3), dtype=np.uint8)
            picture[20:40, 5 * number : 5 * number + 20] = (250, 40, 40)
            file.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        file.mux(stream.encode())
    return path


def test_predict_draws_a_video(av: Any, trained: Path, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    write_video(av, folder / "clip.webm", 7)
    Image.new("RGB", (50, 40)).save(folder / "clip.png")
    command = ["predict", str(folder), "--weights", str(trained), "--score", "0", "--device", "cpu"]
    assert run_cli([*command, "--output", str(tmp_path / "out")]) == 0
    with av.open(str(tmp_path / "out/clip.mp4")) as drawn:
        frames = [frame.to_ndarray(format="rgb24") for frame in drawn.decode(video=0)]
        assert drawn.streams.video[0].average_rate == 10
    assert [frame.shape for frame in frames] == [(64, 98, 3)] * 7
    written = json.loads((tmp_path / "out/predictions.json").read_text())
    assert [entry.get("frame") for entry in written["images"]] == [None, *range(7)]
    assert [entry["id"] for entry in written["images"]] == list(range(1, 9))
    assert {entry["image_id"] for entry in written["annotations"]} == set(range(1, 9))


def test_predict_says_what_the_model_demo_knows(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The six shapes are all that it knows, so that nobody wonders why a wall in a photo is a cross."""
    Image.new("RGB", (64, 64)).save(tmp_path / "photo.png")
    command = ["predict", str(tmp_path / "photo.png"), "--device", "cpu", "--output", str(tmp_path / "out")]
    assert run_cli([*command, "--weights", "demo"]) == 0
    told = "demo knows 6 synthetic shapes (circle, square, triangle, star, ring, cross) and nothing else"
    assert told in capsys.readouterr().out
    assert run_cli([*command, "--weights", str(trained)]) == 0
    assert "nothing else" not in capsys.readouterr().out


def test_truncated_and_invalid_videos(
    av: Any, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    write_video(av, tmp_path / "short.mkv", 20)
    whole = (tmp_path / "short.mkv").read_bytes()
    (tmp_path / "short.mkv").write_bytes(whole[: int(0.7 * len(whole))])
    (tmp_path / "none.mp4").write_bytes(b"no video at all")
    command = ["predict", str(tmp_path / "short.mkv"), str(tmp_path / "none.mp4"), "--weights", str(trained)]
    assert run_cli([*command, "--output", str(tmp_path / "out"), "--device", "cpu"]) == 1
    printed = capsys.readouterr().err
    assert "none.mp4 is no readable video" in caplog.text
    assert "1 of 2 files could not be read" in printed
    frames = len(json.loads((tmp_path / "out/predictions.json").read_text())["images"])
    assert 3 < frames < 20, "the readable frames are drawn"
    with av.open(str(tmp_path / "out/short.mp4")) as drawn:
        assert sum(1 for _ in drawn.decode(video=0)) == frames
    assert not (tmp_path / "out/none.mp4").exists()
    assert not list((tmp_path / "out").glob(".*")), "no half-written file is left"


def test_a_phones_video_is_turned_upright(av: Any, trained: Path, tmp_path: Path) -> None:
    """The frames are stored sideways, and the file asks the player to turn them by 90 degrees to the right."""
    with av.open(str(tmp_path / "phone.mp4"), "w") as file:
        stream = file.add_stream("libx264", rate=10)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        picture = np.zeros((64, 96, 3), dtype=np.uint8)
        picture[:, :24] = (250, 40, 40)  # the left side, which becomes the top
        for _ in range(3):
            file.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        file.mux(stream.encode())
    data = (tmp_path / "phone.mp4").read_bytes()
    unit, zero = (0x10000).to_bytes(4, "big"), bytes(4)
    upright = unit + 3 * zero + unit + 3 * zero + (0x40000000).to_bytes(4, "big")
    turned = zero + unit + zero + (-0x10000).to_bytes(4, "big", signed=True) + 4 * zero + upright[-4:]
    head = data.index(b"tkhd")
    at = data.index(upright, head)
    (tmp_path / "phone.mp4").write_bytes(data[:at] + turned + data[at + 36 :])
    command = ["predict", str(tmp_path / "phone.mp4"), "--weights", str(trained), "--score", "1", "--device", "cpu"]
    assert run_cli([*command, "--output", str(tmp_path / "out")]) == 0
    with av.open(str(tmp_path / "out/phone.mp4")) as drawn:
        frame = next(drawn.decode(video=0)).to_ndarray(format="rgb24")
    assert frame.shape == (96, 64, 3)
    assert frame[10, 32, 0] > 150 > 60 > frame[80, 32, 0]


def test_an_image_is_not_written_over(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("RGB", (50, 40)).save(tmp_path / "photo.jpg")
    before = (tmp_path / "photo.jpg").read_bytes()
    assert run_cli(["predict", str(tmp_path / "photo.jpg"), "--weights", str(trained), "--output", str(tmp_path)]) == 2
    assert "would be overwritten" in capsys.readouterr().err
    assert (tmp_path / "photo.jpg").read_bytes() == before
    Image.new("RGB", (50, 40)).save(tmp_path / "photo.bmp")  # its overlay has the name of the other photo
    for both in (["photo.bmp", "photo.jpg"], ["photo.jpg", "photo.bmp"]):
        files = [str(tmp_path / name) for name in both]
        assert run_cli(["predict", *files, "--weights", str(trained), "--output", str(tmp_path)]) == 2
        assert (tmp_path / "photo.jpg").read_bytes() == before
    Image.new("RGB", (50, 40)).save(tmp_path / "photo-maps.png")
    command = ["predict", str(tmp_path / "photo-maps.png"), str(tmp_path / "photo.bmp"), "--maps", "--weights", str(trained)]
    maps = (tmp_path / "photo-maps.png").read_bytes()
    (tmp_path / "photo.jpg").unlink()
    assert run_cli([*command, "--output", str(tmp_path)]) == 2
    assert (tmp_path / "photo-maps.png").read_bytes() == maps


@pytest.mark.parametrize("command", ["evaluate", "failures"])
def test_weights_are_read_once(command: str, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Path] = []

    def count(path: Path) -> Any:
        read.append(path)
        return load_weights(path)

    monkeypatch.setattr("sparseinst.inference.weights.load_weights", count)
    output = ["--output", str(tmp_path / "out")] if command == "failures" else []
    assert run_cli([command, "--weights", str(trained), "--device", "cpu", *output]) == 0
    assert read == [trained / "model.safetensors"]


def test_failures_accept_the_same_annotations_as_evaluation(two_images: Path) -> None:
    """Ids may start at 0, and area and iscrowd may be missing. An invalid polygon is an error that names it."""
    file = two_images / "annotations/instances_val2017.json"
    data = json.loads(file.read_text())
    for number, entry in enumerate(data["annotations"]):
        entry["id"] = number
        del entry["area"]
        if not entry["iscrowd"]:
            del entry["iscrowd"]
    file.write_text(json.dumps(data))
    found = find_failures(file, [result(1, 7, 10, 10, 40, 0.9)], [1, 2], 0.4)
    assert found.found == {"small": 0, "medium": 1, "large": 0}
    assert found.invented == []
    data["annotations"][1]["segmentation"] = [[1, 2, 3, 4]]
    file.write_text(json.dumps(data))
    with pytest.raises(DataError, match="annotation 1: segmentation: a polygon needs at least three points"):
        find_failures(file, [], [1, 2], 0.4)


def result(image: int, category: int, x: int, y: int, side: int, score: float) -> dict[str, Any]:
    mask = np.zeros((1, 100, 150), dtype=bool)
    mask[0, y : y + side, x : x + side] = True
    return {"image_id": image, "category_id": category, "score": score, "segmentation": encode(mask)[0]}


@pytest.fixture
def two_images(tmp_path: Path) -> Path:
    """Write two images: image 1 has a 40 x 40 and a 10 x 10 object, image 2 a 40 x 40 object and a crowd."""
    images = [{"id": i, "file_name": f"{i}.png", "height": 100, "width": 150} for i in (1, 2)]
    objects = [
        {**annotation(1, 1, 7, box(10, 10, 40, 40)), "area": 1600.0},
        {**annotation(2, 1, 7, box(100, 60, 10, 10)), "area": 100.0},
        {**annotation(3, 2, 7, box(10, 10, 40, 40)), "area": 1600.0},
        {**annotation(4, 2, 7, box(90, 30, 40, 40)), "area": 1600.0, "iscrowd": 1},
    ]
    return write_coco(tmp_path / "coco", images, objects)


def test_failures_follow_cocos_rules(two_images: Path) -> None:
    """One result is right, two are invented, one has a score that is too low, and one lies on a crowd, which does not count."""
    results = [
        result(1, 7, 10, 10, 40, 0.9),
        result(1, 7, 60, 10, 20, 0.8),
        result(2, 7, 10, 10, 40, 0.3),
        result(2, 7, 90, 30, 40, 0.7),
        result(2, 1000, 0, 60, 30, 0.6),
    ]
    found = find_failures(two_images / "annotations/instances_val2017.json", results, [1, 2], 0.4)
    assert found.objects == {"small": 1, "medium": 2, "large": 0}
    assert found.found == {"small": 0, "medium": 1, "large": 0}
    assert [(case.image, case.size) for case in found.missed] == [(2, "medium"), (1, "small")], "the largest object comes first"
    assert [(case.image, case.name, case.score) for case in found.invented] == [(1, "seven", 0.8), (2, "thousand", 0.6)]
    assert [(case.reason, case.nearest_score, case.iou) for case in found.missed] == [
        ("low score", 0.3, 1),
        ("nothing near", None, None),
    ]
    assert [case.reason for case in found.invented] == ["background", "background"]
    assert found.image_ap[2] == pytest.approx(100.0), "for AP, its only object is found, even at a low score"
    assert 0 < found.image_ap[1] < 60
    nothing = find_failures(two_images / "annotations/instances_val2017.json", [], [1, 2], 0.4)
    assert nothing.image_ap == {1: 0.0, 2: 0.0}
    assert len(nothing.missed) == 3


def test_each_failure_has_a_reason(two_images: Path) -> None:
    """A wrong class and a poor mask each give a missed object and an invented instance, with the IoU that they share."""
    results = [
        result(1, 1000, 10, 10, 40, 0.9),  # on the large object of the other category
        result(1, 7, 104, 60, 10, 0.7),  # covers 60 of the 100 pixels of the small object
        result(2, 7, 10, 10, 40, 0.8),
        result(2, 7, 10, 12, 40, 0.6),  # on an object that is found already
        result(2, 1000, 30, 10, 40, 0.5),  # on half of an object of the other category
    ]
    found = find_failures(two_images / "annotations/instances_val2017.json", results, [1, 2], 0.4)
    missed = [(case.reason, case.nearest, case.nearest_score, case.iou) for case in found.missed]
    assert missed == [("wrong class", "thousand", 0.9, 1), ("poor mask", "seven", 0.7, pytest.approx(60 / 140))]
    assert [(case.name, case.reason, case.nearest, case.iou) for case in found.invented] == [
        ("thousand", "wrong class", "seven", 1),
        ("seven", "poor mask", "seven", pytest.approx(60 / 140)),
        ("seven", "duplicate", "seven", pytest.approx(38 / 42)),
        ("thousand", "class and mask", "seven", pytest.approx(1 / 3)),
    ]
    assert found.reasons() == {
        "missed": {"wrong class": 1, "poor mask": 1},
        "invented": {"duplicate": 1, "wrong class": 1, "poor mask": 1, "class and mask": 1},
    }


def test_an_object_in_the_mask_of_another_one_is_merged() -> None:
    missed = [result(1, 7, 20, 10, 20, 1.0)]
    size = (100, 150)
    whole = [result(1, 7, 0, 10, 40, 0.9)]
    [cause] = causes_of_missed(missed, [], whole, [], size)
    assert (cause.reason, cause.nearest, cause.iou) == ("merged", whole[0], 0.25)
    [cause] = causes_of_missed(missed, [result(1, 1000, 20, 10, 10, 0.5)], whole, [], size)
    assert (cause.reason, cause.iou) == ("class and mask", 0.25)
    assert causes_of_missed(missed, [], [], [], size) == [("nothing near", None, None)]


def test_failures_count_every_object_of_a_crowded_image(tmp_path: Path) -> None:
    """COCO counts 100 instances of a category and image; the other objects are not missed."""
    places = [(6 * (number % 20), 6 * (number // 20)) for number in range(180)]
    annotations = [annotation(number, 1, 3, box(x, y, 4, 4)) for number, (x, y) in enumerate(places, start=1)]
    images = [{"id": 1, "file_name": "1.png", "height": 60, "width": 120}]
    folder = write_coco(tmp_path, images, annotations, [{"id": 3, "name": "cell"}])
    file = folder / "annotations/instances_val2017.json"
    results = [
        {"image_id": 1, "category_id": 3, "score": 0.9, "segmentation": encode(decode(entry["segmentation"], 60, 120)[None])[0]}
        for entry in json.loads(file.read_text())["annotations"]
    ]
    found = find_failures(file, results, [1], 0.4)
    assert sum(found.found.values()) == sum(found.objects.values()) == 180
    assert found.image_ap[1] == pytest.approx(100)


def test_the_failures_command(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["failures", "--weights", str(trained), "--score", "0.01", "--device", "cpu"]
    assert run_cli([*command, "--output", str(tmp_path / "f"), "--most", "3"]) == 0
    printed = capsys.readouterr().out
    assert "objects found" in printed
    assert re.search(
        r"^\d+ objects? missed: .*(nothing near|poor mask|low score|merged|wrong class|class and mask) \d+", printed, re.M
    )
    written = json.loads((tmp_path / "f/failures.json").read_text())
    assert sum(written["reasons"]["missed"].values()) == len(written["missed"])
    assert sum(written["reasons"]["invented"].values()) == len(written["invented"])
    assert {"reason", "nearest", "nearest_score", "iou"} <= written["missed"][0].keys()
    assert sum(written["objects"].values()) == len(written["missed"]) + sum(written["found"].values())
    with Image.open(tmp_path / "f/worst.png") as sheet:
        assert sheet.width > 1200
    assert list((tmp_path / "f").glob("missed-*.png"))


def test_stability_counts_objects_that_keep_their_map(trained: Path) -> None:
    assert stability({"1-0": 3, "1-1": 4, "2-0": 5}, {"1-0": 3, "1-1": 9, "3-0": 1}) == 50.0
    assert stability({}, {"1-0": 3}) is None
    model, config, _ = load_weights(trained)
    split = val_split(config.data)
    found = evaluate(model, split, config, device=CPU, progress=False).matches
    assert len(found) == sum(min(10, count) for count in split.instances_per_image())
    assert stability(found, evaluate(model, split, config, device=CPU, progress=False).matches) == 100.0
    for parameter in model.decoder.parameters():
        torch.nn.init.normal_(parameter)
    assert (stability(found, evaluate(model, split, config, device=CPU, progress=False).matches) or 0) < 100


def killed_at_step_4(when: int) -> Any:
    """Return a `_save` that fails at step 4, after `when` checkpoints of this step."""
    save, saved = train_module._Training._save, []

    def killed(training: Any, iteration: int, pending: Any) -> None:
        if iteration == 4 and saved.count(4) == when:
            raise RunFailed("killed beside the evaluation of its step")
        saved.append(iteration)
        save(training, iteration, pending)

    return killed


@pytest.mark.slow
def test_curves_survive_a_stop_and_are_drawn(
    tiny: Config,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """AP and stability are the same after a stop and a resumption, and the curves of two runs are drawn together."""
    config = tiny.replace({"train.evaluate_every": 2, "train.iterations": 8})
    train(config, tmp_path / "whole", device=CPU, progress=False)
    entries = read_metrics(tmp_path / "whole")
    stable = {entry["iteration"]: entry["matching_stability"] for entry in entries if "matching_stability" in entry}
    assert list(stable) == [2, 4, 6]
    assert stable[2] is None
    assert all(0 <= value <= 100 for value in list(stable.values())[1:])

    stopped = RunPaths(tmp_path / "stopped")
    train(config, stopped.root, device=CPU, progress=False)
    stopped.weights.unlink()
    for late in (6, 8):
        stopped.checkpoint(late).unlink(missing_ok=True)
    kept = sorted(stopped.checkpoints.iterdir())
    train(config, stopped.root, device=CPU, progress=False)
    again = {e["iteration"]: e["matching_stability"] for e in read_metrics(stopped.root) if "matching_stability" in e}
    assert again == stable, f"resumed from {[path.name for path in kept]}"

    for when in (0, 1):  # before the first checkpoint of the step, and before the second, which contains the evaluation
        lost = RunPaths(tmp_path / f"lost{when}")
        with monkeypatch.context() as patch:
            patch.setattr(train_module._Training, "_save", killed_at_step_4(when))
            with pytest.raises(RunFailed, match="killed"):
                train(config, lost.root, device=CPU, progress=False)
        train(config, lost.root, device=CPU, progress=False)
        recorded = [(e["iteration"], e["matching_stability"]) for e in read_metrics(lost.root) if "matching_stability" in e]
        assert recorded == list(stable.items()), "each evaluation is recorded once after either kill"

    output = tmp_path / "curves.png"
    assert run_cli(["curves", str(tmp_path / "whole"), str(stopped.root), "--output", str(output)]) == 0
    assert output.stat().st_size > 10_000
    assert output.with_suffix(".svg").exists()
    panels = [axes.get_title(loc="left") for axes in draw_curves({"a": entries}).axes]
    assert {"mask AP (%)", "learning rate", "objects matched as before (%)", "dice loss (weighted)"} <= set(panels)
    capsys.readouterr()
    assert run_cli(["curves", str(tmp_path / "whole"), "--output", "a.pdf"]) == 2
    assert "written as .png and .svg" in capsys.readouterr().err
    assert run_cli(["curves", str(tmp_path)]) == 2
    assert "metrics.jsonl is missing" in capsys.readouterr().err
    broken = RunPaths(stopped.root).metrics
    broken.write_text('{"iter\n' + broken.read_text())
    assert run_cli(["curves", str(stopped.root), "--output", str(output)]) == 0
    assert "metrics.jsonl: line 1 is damaged or incomplete and left out" in caplog.text
