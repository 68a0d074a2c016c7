"""Check the settings that are chosen for a data set, and the commands `init` and `config`."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from sparseinst.cli import run_cli
from sparseinst.config import Config, DataConfig
from sparseinst.data.check import mirrored_categories
from sparseinst.data.facts import DataFacts, measure_splits
from sparseinst.data.recipe import recipe
from sparseinst.nested import explanations, leaf_paths
from sparseinst.overrides import load_config
from tests.conftest import annotation, box, write_coco

FACTS = DataFacts(
    train_images=2000,
    val_images=400,
    shared_images=0,
    classes=3,
    rare=(),
    short_side=480,
    aspect=1.34,
    instances=6.0,
    most_instances=18,
    usual_instances=18,
    small_object=30.0,
    median_object=80.0,
    large_object=300.0,
    spacing=220.0,
    densest=6e-5,
)
NUCLEI = replace(
    FACTS, short_side=256, instances=44.0, most_instances=375, usual_instances=260, small_object=8.0, large_object=58.0,
    spacing=62.6, densest=1.4e-3, classes=1,
)  # fmt: skip


def test_what_a_folder_holds(tmp_path: Path) -> None:
    images = [{"id": n, "file_name": f"{n}.png", "height": 60, "width": 80} for n in range(1, 4)]
    annotations = [annotation(n, 1, 7, box(10 * n, 0, 8, 8)) for n in range(1, 6)] + [annotation(9, 2, 7, box(0, 0, 20, 20))]
    write_coco(tmp_path, images, annotations)
    found = measure_splits(DataConfig(root=str(tmp_path)))
    assert found.rare == ("seven", "thousand (no instance)")
    twice = write_coco(tmp_path / "twice", images, annotations, [{"id": 0, "name": "seven"}, {"id": 7, "name": "seven"}])
    named_twice = measure_splits(DataConfig(root=str(twice)))
    assert named_twice.rare == ("seven (id 0, no instance)", "seven (id 7)")
    assert named_twice.repeated_names == ("seven",)
    assert (found.train_images, found.val_images, found.shared_images) == (2, 3, 3), "an image without instances does not train"
    assert found.classes == 2
    assert not found.missing
    (tmp_path / "val2017" / "2.png").unlink()
    assert measure_splits(DataConfig(root=str(tmp_path))).missing == (str(tmp_path / "val2017" / "2.png"),)
    assert (found.short_side, found.instances, found.most_instances) == (60, 3.0, 5)
    assert found.aspect == pytest.approx(80 / 60)
    assert found.median_object == pytest.approx(8)


def test_roboflows_endings_do_not_hide_that_an_image_is_in_both_splits(tmp_path: Path) -> None:
    entry = {"id": 1, "height": 60, "width": 80}
    name = "street_12_jpg.rf.{}.jpg"
    write_coco(tmp_path, [{**entry, "file_name": name.format("0a1b2c3d" * 4)}], [annotation(1, 1, 7, box(0, 0, 9, 9))])
    other = {**entry, "file_name": name.format("f" * 32)}
    (tmp_path / "val2017" / name.format("0a1b2c3d" * 4)).rename(tmp_path / "val2017" / other["file_name"])
    file = tmp_path / "annotations" / "instances_val2017.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "images": [other]}))
    assert measure_splits(DataConfig(root=str(tmp_path))).shared_images == 1
    file.write_text(file.read_text().replace("street_12", "street_13"))
    assert measure_splits(DataConfig(root=str(tmp_path))).shared_images == 0


def test_masks_without_a_pixel_do_not_count(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = [{"id": n, "file_name": f"{n}.png", "height": 60, "width": 80} for n in range(1, 4)]
    outside = [annotation(n, n, 7, box(500, 500, 8, 8)) for n in range(1, 4)]
    some = write_coco(tmp_path / "some", images, [*outside, annotation(9, 1, 7, box(5, 5, 9, 9))])
    assert measure_splits(DataConfig(root=str(some))).small_object == pytest.approx(9)
    none = write_coco(tmp_path / "none", images, outside)
    assert run_cli(["init", "--data", str(none), "--output", str(tmp_path / "none.yaml")]) == 2
    assert "no instance has a pixel in its image" in capsys.readouterr().err


def test_images_with_an_invalid_annotation_can_be_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The error of `init` recommends data.on_bad_image=skip, so `init` must accept it."""
    images = [{"id": number, "file_name": f"{number}.png", "height": 60, "width": 80} for number in (1, 2)]
    write_coco(tmp_path, images, [annotation(1, 1, 7, box(0, 0, 9, 9)), annotation(2, 2, 7, box(0, 0, 30, 30))])
    file = tmp_path / "annotations" / "instances_train2017.json"
    data = json.loads(file.read_text())
    data["annotations"][0]["segmentation"] = "masks/1.png"
    file.write_text(json.dumps(data))
    command = ["init", "--data", str(tmp_path), "--size", "small", "--output", str(tmp_path / "own.yaml")]
    assert run_cli(command) == 2
    assert "data convert` reads folders of mask images); data.on_bad_image=skip leaves" in capsys.readouterr().err
    assert run_cli([*command, "-o", "data.on_bad_image=skip"]) == 0
    assert "an invalid annotation, which will be left out (data.on_bad_image=skip): 1" in capsys.readouterr().out
    facts = measure_splits(DataConfig(root=str(tmp_path), on_bad_image="skip"))
    assert (facts.train_images, facts.left_out, facts.median_object) == (1, 1, 30.0)


def test_a_line_break_in_a_name_stays_in_its_comment(tmp_path: Path) -> None:
    images = [{"id": n, "file_name": f"{n}.png", "height": 60, "width": 80} for n in range(1, 4)]
    things = [annotation(n, n, 7, box(5, 5, 8, 8)) for n in range(1, 4)]
    root = write_coco(tmp_path / "data", images, things, [{"id": 7, "name": "a\nb: 5"}])
    assert run_cli(["init", "--data", str(root), "--output", str(tmp_path / "own.yaml")]) == 0
    assert load_config(tmp_path / "own.yaml").model.num_classes == 1


def test_ordinary_photos_keep_the_usual_sizes() -> None:
    chosen = recipe(FACTS, Path("d"), "full")
    assert chosen.settings["inference.short_side"] == 640
    assert chosen.settings["data.short_sides"][-1] == 640
    assert chosen.settings["model.decoder.iam.num_maps"] == 100
    assert "model.decoder.mask_scale" not in chosen.settings


def test_small_objects_enlarge_the_input_or_the_masks() -> None:
    nuclei = recipe(NUCLEI, Path("d"), "small", given={"data.tile": None, "inference.tile": None})
    assert nuclei.settings["inference.short_side"] == 512, "twice the images' size"
    tiny_objects = recipe(replace(FACTS, short_side=2000, small_object=10.0), Path("d"), "small")
    assert tiny_objects.settings["inference.short_side"] == 512
    assert tiny_objects.settings["model.decoder.mask_scale"] == 4.0
    assert any("two mask cells" in warning for warning in tiny_objects.warnings)


def test_each_instance_has_a_map() -> None:
    chosen = recipe(NUCLEI, Path("d"), "small", given={"data.tile": None, "inference.tile": None})
    assert chosen.settings["model.decoder.iam.num_maps"] == 260
    assert any("more than the 260 maps" in warning for warning in chosen.warnings)
    assert recipe(FACTS, Path("d"), "small").settings["model.decoder.iam.num_maps"] == 20


def test_crowded_images_are_cut_into_tiles() -> None:
    chosen = recipe(NUCLEI, Path("d"), "small").settings
    assert chosen["data.tile"] == chosen["inference.tile"] == 192
    assert chosen["inference.tile_overlap"] * 192 >= NUCLEI.large_object
    assert chosen["inference.short_side"] == 384, "a nucleus of 8 pixels becomes 16 pixels"
    assert 50 <= chosen["model.decoder.iam.num_maps"] <= 100
    few = recipe(replace(NUCLEI, train_images=22, instances=428.0), Path("d"), "small")
    assert not any("are few" in warning for warning in few.warnings), "its 22 images are a thousand tiles"
    assert "epochs of 22 images of 45 tiles each" in few.reasons["train.iterations"]
    mixed = recipe(replace(NUCLEI, large_object=167.0), Path("d"), "small")
    assert "It would need a side of 448 pixels, and the images have 256" in mixed.warnings[0], "it says why it chose no tiles"
    assert "data.tile" not in recipe(FACTS, Path("d"), "small").settings
    large = recipe(replace(NUCLEI, large_object=150.0), Path("d"), "small").settings
    assert "data.tile" not in large, "no tile is clearly smaller than the images and shows a large object as a whole"
    assert "data.tile" not in recipe(NUCLEI, Path("d"), "small", given={"data.crop": 0.5}).settings, "both would cut the image"


def test_reasons_for_given_tiles_are_true() -> None:
    chosen = recipe(NUCLEI, Path("d"), "small")
    assert "so that a tile shows them as a whole" in chosen.reasons["inference.tile_overlap"]
    assert "Crowded images (1 % of all) hold more than 260 instances" in chosen.reasons["data.tile"]
    small = recipe(NUCLEI, Path("d"), "small", given={"inference.tile": 96})
    assert small.settings["data.tile"] == 96
    assert small.reasons["data.tile"].startswith("As in inference.")
    assert "every tile may cut the longest ones" in small.reasons["inference.tile_overlap"]
    few = recipe(NUCLEI, Path("d"), "small", given={"model.decoder.iam.num_maps": 20})
    assert any("more than the 20 maps: use smaller tiles" in warning for warning in few.warnings)
    assert not any("more than the" in warning for warning in chosen.warnings)


def test_given_settings_stay_and_the_others_fit_them() -> None:
    given = {"train.iterations": 1000, "train.batch_size": 2, "inference.short_side": 128, "data.val_images": "."}
    chosen = recipe(FACTS, Path("d"), "small", given=given)
    assert given.items() <= chosen.settings.items()
    assert chosen.settings["data.short_sides"] == [128]
    assert chosen.settings["train.warmup_iterations"] == 50
    assert "You gave this value." in chosen.text("")


def test_categories_that_a_flip_exchanges_are_not_flipped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ["hood", "Left lamp", "Right lamp", "left_door", "right_door", "leftover"]
    assert mirrored_categories(names)[0] == ("Left lamp", "Right lamp")
    assert not mirrored_categories(["left_door", "hood"])
    images = [{"id": 1, "file_name": "1.png", "height": 60, "width": 80}]
    write_coco(tmp_path, images, [annotation(1, 1, 7, box(0, 0, 9, 9))])
    for file in (tmp_path / "annotations").glob("*.json"):
        data = json.loads(file.read_text())
        data["categories"] = [{"id": 7, "name": "left wing"}, {"id": 8, "name": "right wing"}]
        file.write_text(json.dumps(data))
    chosen = recipe(measure_splits(DataConfig(root=str(tmp_path))), tmp_path, "small")
    assert chosen.settings["data.flip"] == 0.0
    assert "data.flip" not in recipe(FACTS, Path("d"), "small").settings
    assert run_cli(["data", "check", str(tmp_path)]) == 0
    assert "a horizontal flip turns left wing into right wing, which keeps the wrong label" in capsys.readouterr().out


def test_init_uses_a_split_and_other_file_names(shapes_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "data"
    shutil.copytree(shapes_root, root)
    assert run_cli(["data", "split", str(root), "--name", "new", "--val", "0.5"]) == 0
    assert f"sparseinst init --data {root} --config {root / 'new.yaml'}" in capsys.readouterr().out
    for file in (root / "annotations").glob("instances_*.json"):
        file.unlink()
    assert run_cli(["init", "--data", str(root), "--output", str(tmp_path / "no.yaml")]) == 2
    assert "set data.train_annotations and data.train_images" in capsys.readouterr().err
    file = tmp_path / "own.yaml"
    command = ["init", "--data", str(root), "--size", "small", "--config", str(root / "new.yaml"), "--output", str(file)]
    assert run_cli([*command, "-o", "train.iterations=700"]) == 0
    written = load_config(file)
    assert written.data.train_annotations == "annotations/new_train.json"
    assert written.train.iterations == 700


def test_trained_weights_keep_their_maps() -> None:
    start = {"model.decoder.iam.num_maps": 100, "model.width_factor": 1.0, "train.start": "w.safetensors"}
    chosen = recipe(FACTS, Path("d"), "full", start)
    assert chosen.settings["model.decoder.iam.num_maps"] == 100
    assert chosen.settings["model.num_classes"] == 3
    assert chosen.settings["train.iterations"] < recipe(FACTS, Path("d"), "full").settings["train.iterations"]
    whole = {"data.tile": None, "inference.tile": None}
    assert recipe(NUCLEI, Path("d"), "full", start, given=whole).settings["model.decoder.iam.num_maps"] == 260


@pytest.mark.parametrize(
    ("change", "warning"),
    [
        ({"train_images": 160}, "160 training images are few"),
        ({"val_images": 0}, "no AP"),
        ({"val_images": 12}, "uncertain"),
        ({"shared_images": 5}, "5 validation images have the name of a training image"),
        ({"rare": ("owl",)}, "fewer than 20 instances: owl"),
        ({"missing": ("d/1.png", "d/2.png")}, "2 images do not exist, the first is d/1.png"),
        ({"repeated_names": ("owl",)}, "have the same name (owl)"),
    ],
)
def test_warnings(change: dict[str, object], warning: str) -> None:
    assert not recipe(FACTS, Path("d"), "small").warnings
    assert any(warning in line for line in recipe(replace(FACTS, **change), Path("d"), "small").warnings)  # type: ignore[arg-type]


def test_init_writes_a_config_that_trains(shapes_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, output = tmp_path / "own.yaml", tmp_path / "run"
    assert run_cli(["init", "--data", str(shapes_root), "--output", str(file), "--size", "small"]) == 0
    printed = capsys.readouterr().out
    assert "23 training and 6 validation images, 6 categories" in printed
    assert "warning: 23 training images are few" in printed
    text = file.read_text()
    assert "Each instance needs a map of" in text
    assert load_config(file).data.root == str(shapes_root)
    fast = ["-o", "train.iterations=2", "-o", "train.warmup_iterations=1", "-o", "pretrain.enabled=false"]
    smaller = ["-o", "model.backbone.frozen_norm=false", "-o", "data.short_sides=[64]", "-o", "inference.short_side=64"]
    assert run_cli(["train", "--config", str(file), "--output", str(output), "--device", "cpu", *fast, *smaller]) == 0
    assert run_cli(["init", "--data", str(shapes_root), "--output", str(file)]) == 2, "an existing file is not replaced"


def test_init_says_that_pretrained_weights_cannot_be_loaded(
    shapes_root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise ConnectionError

    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: None)
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", unreachable)
    command = ["init", "--data", str(shapes_root), "--output"]
    assert run_cli([*command, str(tmp_path / "full.yaml"), "--size", "full"]) == 0
    problem = "resnet50.tv_in1k are not in timm's cache and cannot be reached (ConnectionError): the training would stop"
    assert problem in capsys.readouterr().out
    assert run_cli([*command, str(tmp_path / "small.yaml"), "--size", "small"]) == 0
    assert "pretrained weights" not in capsys.readouterr().out
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: "model.safetensors")
    assert run_cli([*command, str(tmp_path / "cached.yaml"), "--size", "full"]) == 0
    assert "cannot be reached" not in capsys.readouterr().out


def test_every_setting_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli(["config", "--model", "r50-giam", "-o", "train.seed=3"]) == 0
    text = capsys.readouterr().out
    assert "# The maximum gradient norm of the whole model; None does not clip." in text
    assert "  seed: 3" in text
    assert run_cli(["config", "--model", "r50-giam", "-o", "train.seed=3", "--json"]) == 0
    assert Config.model_validate_json(capsys.readouterr().out) == load_config(model="r50-giam", overrides={"train.seed": 3})
    assert not set(leaf_paths(Config)) - explanations(Config).keys()


def test_the_printed_config_is_a_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli(["config", "--preset", "release"]) == 0
    (tmp_path / "all.yaml").write_text(capsys.readouterr().out)
    assert load_config(tmp_path / "all.yaml") == load_config(preset="release")
    assert json.loads(load_config(tmp_path / "all.yaml").to_json())["train"]["weight_decay"] == 0.05
