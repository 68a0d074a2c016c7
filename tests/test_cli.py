"""Check the command line: its output, its exit codes, and a one-line error for each of many mistakes."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from sparseinst.cli import run_cli
from sparseinst.config import Config
from sparseinst.paths import RunPaths

from .conftest import TINY, annotation, box, write_coco

ROOT = Path(__file__).parents[1]


def small_settings(without: str = "", **more: Any) -> list[str]:
    settings = {key: value for key, value in {**TINY, **more}.items() if key != without}
    return [part for key, value in settings.items() for part in ("-o", f"{key}={json.dumps(value)}")]


def test_train_evaluate_predict(shapes_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    command = ["train", "--data", str(shapes_root), "--output", str(run), *small_settings()]
    assert run_cli(command) == 0
    assert "AP75" in capsys.readouterr().out
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*.jsonl")}
    assert before
    assert run_cli(command) == 0
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*.jsonl")} == before, "a finished run is not repeated"

    capsys.readouterr()
    assert run_cli(["evaluate", "--weights", str(run), "--json", "--predictions", str(tmp_path / "out.json")]) == 0
    metrics = json.loads(capsys.readouterr().out)["figures"]
    assert len(metrics) == 12
    assert json.loads((tmp_path / "out.json").read_text())

    picture = shapes_root / "val2017" / "000000000001.png"
    inputs = [str(shapes_root / "val2017"), str(picture)]
    assert run_cli(["predict", *inputs, "--weights", str(run), "--output", str(tmp_path / "p"), "--score", "0"]) == 0
    drawn = sorted(path.name for path in (tmp_path / "p").glob("*.jpg"))
    assert len(drawn) == 7
    assert "000000000001-2.jpg" in drawn
    with Image.open(tmp_path / "p" / drawn[0]) as overlay, Image.open(picture) as original:
        assert overlay.size == original.size
    result = json.loads((tmp_path / "p" / "predictions.json").read_text())
    assert [image["id"] for image in result["images"]] == list(range(1, 8))
    assert {entry["category_id"] for entry in result["annotations"]} <= {entry["id"] for entry in result["categories"]}
    assert len({entry["id"] for entry in result["annotations"]}) == len(result["annotations"])


def test_train_takes_classes_from_the_data(tmp_path: Path) -> None:
    entries = [{"id": i, "file_name": f"{i}.png", "height": 40, "width": 60} for i in (1, 2)]
    folder = write_coco(tmp_path / "coco", entries, [annotation(i, i, 1000, box(5, 5, 20, 20)) for i in (1, 2)])
    overrides = small_settings(without="model.num_classes")
    assert run_cli(["train", "--data", str(folder), "--output", str(tmp_path / "run"), *overrides]) == 0
    from sparseinst.overrides import load_config

    assert load_config(RunPaths(tmp_path / "run").config).model.num_classes == 2


def test_predict_counts_unreadable_files(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.new("RGB", (50, 40)).save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes(b"no image")
    assert run_cli(["predict", str(tmp_path), "--weights", str(trained), "--output", str(tmp_path / "out")]) == 1
    captured = capsys.readouterr()
    assert "1 of 2 files could not be read" in captured.err
    assert (tmp_path / "out" / "good.jpg").exists()


def test_data_shapes_and_check(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli(["data", "shapes", "--output", str(tmp_path / "s"), "--train", "5", "--val", "3"]) == 0
    assert run_cli(["data", "check", str(tmp_path / "s")]) == 0
    capsys.readouterr()
    assert run_cli(["data", "check", str(tmp_path / "s"), "--json", "--no-read"]) == 0
    assert json.loads(capsys.readouterr().out)["train"]["images"] == 5
    annotations = tmp_path / "s" / "annotations" / "instances_train2017.json"
    edit(annotations, lambda data: data["annotations"][0].update(area=9 * data["annotations"][0]["area"]))
    assert run_cli(["data", "check", str(tmp_path / "s")]) == 0
    assert "note: train: 1 of " in capsys.readouterr().out, "an area that is not the mask's changes APs, APm and APl"
    (tmp_path / "s" / "val2017" / "000000000002.png").unlink()
    assert run_cli(["data", "check", str(tmp_path / "s")]) == 2
    captured = capsys.readouterr()
    assert "000000000002.png: no such image" in captured.out
    assert "1 problem found" in captured.err


def test_data_check_names_what_training_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "s"
    assert run_cli(["data", "shapes", "--output", str(folder), "--train", "5", "--val", "3"]) == 0
    val = folder / "annotations" / "instances_val2017.json"
    names = [category["name"] for category in json.loads(val.read_text())["categories"]]
    for change, message in (
        (lambda data: data["categories"].append({"id": 99, "name": "cat"}), "it also has 'cat'"),
        (lambda data: data["categories"].pop(), "'other' for"),
    ):
        edit(val, change)
        if message == "'other' for":
            edit(val, lambda data: data["categories"][0].update(name="other"))
        assert run_cli(["data", "check", str(folder), "--no-read"]) == 2
        assert message in " ".join(capsys.readouterr().out.split())
        assert run_cli(["init", "--data", str(folder), "--output", str(tmp_path / f"{len(message)}.yaml")]) == 0
        assert "the training will refuse these data" in capsys.readouterr().out
    edit(val, lambda data: data["categories"][0].update(name=names[0]))
    edit(val, lambda data: data.update(annotations=[]))
    edit(folder / "annotations" / "instances_train2017.json", lambda data: data["categories"].append({"id": 98, "name": "dog"}))
    assert run_cli(["data", "check", str(folder), "--no-read"]) == 2
    printed = " ".join(capsys.readouterr().out.split())
    assert "it lacks 'dog'" in printed
    assert "note: val: no image has an instance" in printed


@pytest.mark.parametrize("command", ["check", "speed", "look", "split"])
def test_a_mistyped_folder_is_not_filled_with_the_embedded_data_set(command: str, tmp_path: Path) -> None:
    config = [] if command == "speed" else ["--config", str(ROOT / "experiments/profiles/smoke.yaml")]
    output = ["--output", str(tmp_path / "look.png")] if command == "look" else []
    assert run_cli(["data", command, str(tmp_path / "typo"), *config, *output]) == 2
    assert not (tmp_path / "typo").exists()


def edit(path: Path, change: Any) -> None:
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def bad_inputs() -> dict[str, tuple[list[str], str]]:
    """Return the arguments and the expected message of each mistake. {trained}, {shapes}, {bad} and {tmp} stand for folders."""
    train = ["train", "--output", "{tmp}/run", *small_settings()]
    data = [*train[:3], *small_settings(without="model.num_classes"), "--data"]
    return {
        "unknown setting": ([*train, "-o", "model.decoder.deph=2"], "did you mean 'model.decoder.depth'"),
        "wrong type": ([*train, "-o", "train.seed=one"], "train.seed: input should be a valid integer, got 'one'"),
        "out of range": ([*train, "-o", "data.flip=1.5"], "data.flip: input should be less than or equal to 1, got 1.5"),
        "no value": ([*train, "-o", "train.seed"], "not of the form path=value"),
        "unknown model": ([*train, "--model", "r50-gaim"], "did you mean 'r50-giam'"),
        "unknown preset": ([*train, "--preset", "papers"], "did you mean 'paper'"),
        "unknown device": ([*train, "--device", "gpu"], "device 'gpu' cannot be used"),
        "unknown backbone": ([*data, "{shapes}", "-o", "model.backbone.name=resnet51"], "timm has no such model"),
        "config missing": ([*train, "--config", "{tmp}/none.yaml"], "none.yaml: no such file"),
        "config is a folder": ([*train, "--config", "{tmp}"], "is a folder, a file was expected"),
        "config broken": ([*train, "--config", "{bad}/broken.yaml"], "broken.yaml: line 2"),
        "config unknown key": ([*train, "--config", "{bad}/key.yaml"], "key.yaml: unknown setting 'train.sead'"),
        "data missing": ([*data, "{tmp}/none"], "instances_train2017.json: no such file"),
        "data broken JSON": ([*data, "{bad}/json"], "broken JSON at line 1, column"),
        "data not COCO": ([*data, "{bad}/list"], "not a COCO annotation file"),
        "data without folder": ([*data, "{bad}/folder"], "no such folder of images"),
        "data unknown image": ([*data, "{bad}/image_id"], "image_id 99 is not among the file's images"),
        "data unknown category": ([*data, "{bad}/category_id"], "category_id 5 is not among the file's categories"),
        "data without segmentation": ([*data, "{bad}/boxes"], "lacks segmentation (boxes alone are not enough)"),
        "data without instances": ([*data, "{bad}/nothing"], "no image holds an instance"),
        "image truncated": ([*data, "{bad}/truncated"], "1.png: truncated or unreadable image"),
        "image missing": ([*data, "{bad}/missing"], "1.png: no such image"),
        "image of another size": ([*data, "{bad}/size"], "is 60 x 40, its annotations say 61 x 40"),
        "polygon of two points": ([*data, "{bad}/polygon"], "a polygon needs at least three points"),
        "classes differ": ([*data, "{shapes}", "-o", "model.num_classes=80"], "set model.num_classes=6"),
        "output is a file": (["train", "--output", "{bad}/broken.yaml", "--data", "{shapes}"], "cannot create this folder"),
        "weights missing": (["evaluate", "--weights", "{tmp}/none.safetensors"], "none.safetensors: no such file"),
        "weights are text": (["evaluate", "--weights", "{bad}/text.safetensors"], "no readable safetensors file"),
        "weights without config": (["evaluate", "--weights", "{bad}/bare.safetensors"], "carries no config"),
        "weights of other classes": (["evaluate", "--weights", "{trained}", "--data", "{bad}/missing"], "are not the 6 of"),
        "evaluation of a model setting": (["evaluate", "--weights", "{trained}", "-o", "train.seed=1"], "belongs to the weights"),
        "picture missing": (
            ["predict", "{tmp}/n.jpg", "--weights", "{trained}", "--output", "{tmp}/o"],
            "no such image or folder",
        ),
        "no pictures": (["predict", "{bad}/list", "--weights", "{trained}", "--output", "{tmp}/o"], "no image or video (.avi"),
        "shapes over something": (["data", "shapes", "--output", "{bad}"], "name another folder"),
        "unknown table": (["run", "tabel5", "--profile", "mini"], "did you mean 'table5'"),
        "unknown profile": (["run", "table5", "--profile", "minni"], "did you mean 'mini'"),
        "unknown row": (["run", "table5", "--profile", "mini", "--row", "l2"], "no row is called"),
        "unknown option": (["train", "--outpt", "x"], "No such option"),
        "unknown engine": (
            ["evaluate", "--weights", "{trained}", "--engine", "x"],
            "engine 'x' is unknown (valid: onnxruntime",
        ),
    }


@pytest.fixture(scope="session")
def bad(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write folders and files that contain one mistake each."""
    root = tmp_path_factory.mktemp("bad")
    images = [{"id": 1, "file_name": "1.png", "height": 40, "width": 60}]
    changes: dict[str, Any] = {
        "image_id": lambda d: d["annotations"][0].update(image_id=99),
        "category_id": lambda d: d["annotations"][0].update(category_id=5),
        "boxes": lambda d: d["annotations"][0].pop("segmentation"),
        "nothing": lambda d: d["annotations"].clear(),
        "size": lambda d: d["images"][0].update(width=61),
        "polygon": lambda d: d["annotations"][0].update(segmentation=[[1, 1, 2, 2]]),
        "json": None, "list": None, "folder": None, "truncated": None, "missing": None,
    }  # fmt: skip
    for name, change in changes.items():
        folder = write_coco(root / name, images, [annotation(1, 1, 7, box(5, 5, 20, 20))])
        for split in ("train2017", "val2017"):
            file = folder / "annotations" / f"instances_{split}.json"
            picture = folder / split / "1.png"
            if change is not None:
                edit(file, change)
            elif name == "json":
                file.write_text('{"images": [')
            elif name == "list":
                file.write_text("[]")
            elif name == "folder":
                picture.unlink()
                picture.parent.rmdir()
            elif name == "truncated":
                picture.write_bytes(picture.read_bytes()[:1000])
            else:
                picture.unlink()
    (root / "broken.yaml").write_text("train: {seed: 1\nmodel: ]")
    (root / "key.yaml").write_text("train: {sead: 1}")
    (root / "text.safetensors").write_text("weights, honestly")
    save_file({"a": torch.zeros(1)}, root / "bare.safetensors")
    return root


@pytest.mark.parametrize("case", bad_inputs())
def test_bad_input_gives_a_one_line_error(
    case: str,
    bad: Path,
    trained: Path,
    shapes_root: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(ROOT)
    arguments, message = bad_inputs()[case]
    folders = {"bad": bad, "trained": trained, "shapes": shapes_root, "tmp": tmp_path}
    code = run_cli([a if a.startswith(("[", "{}")) else a.format(**folders) for a in arguments])
    error = capsys.readouterr().err
    assert code == 2, error
    assert message in error
    assert "Traceback" not in error
    if error.startswith("error:"):
        assert len(error.strip().splitlines()) == 1, error
    assert not (tmp_path / "run" / "model.safetensors").exists()


@pytest.mark.parametrize("group", [[], ["data"]])
def test_the_list_of_commands_cuts_no_sentence_off(group: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli([*group, "--help"]) == 0
    lines = capsys.readouterr().out.partition("Commands:")[2].strip().splitlines()
    assert len(lines) > 6
    assert [line for line in lines if not line.endswith(".") or line.endswith("...")] == []


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    from sparseinst.errors import UserError

    with pytest.raises(UserError):
        run_cli(["--debug", "evaluate", "--weights", str(tmp_path / "none")])


def test_failed_run_exits_with_1(tmp_path: Path, shapes_root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    settings = small_settings(**{"train.learning_rate": 1e30, "train.warmup_iterations": 0})
    assert run_cli(["train", "--data", str(shapes_root), "--output", str(tmp_path / "run"), *settings]) == 1
    assert capsys.readouterr().err.startswith("error: training diverged")


@pytest.mark.slow
def test_run_a_table(
    tmp_path: Path, shapes_root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`run` trains rows of Table 5 within seconds, and a second call trains nothing."""
    from sparseinst.overrides import load_config

    config = load_config(overrides={**TINY, "data.root": str(shapes_root)})
    profile = {
        "model": {**config.model.model_dump(mode="json")},
        "data": config.data.model_dump(mode="json"),
        "train": config.train.model_dump(mode="json"),
    }
    profile_path = tmp_path / "tiny.yaml"
    profile_path.write_text(json.dumps(profile))
    monkeypatch.chdir(tmp_path)
    command = ["run", str(ROOT / "experiments/table5.yaml"), "--profile", str(profile_path), "--row", "BCE"]
    assert run_cli([*command, "--pictures", "pictures"]) == 0
    assert f"report {command[1]} --profile {profile_path} --show" in capsys.readouterr().out
    assert len(list((tmp_path / "pictures" / "table5" / "BCE alone").glob("*.jpg"))) == 6
    assert run_cli(["report", command[1], "--profile", str(profile_path), "--show"]) == 0
    out = capsys.readouterr().out
    assert "paper's" in out
    assert "-8.1" in out
    assert run_cli(command) == 0
    assert "4 runs done, 4 of them before this command" in capsys.readouterr().out


def processor_seconds(command: list[str]) -> float:
    """Return the CPU time of a command, without its waiting time."""
    before = os.times()
    subprocess.run(command, capture_output=True, check=True)
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system


@pytest.mark.slow
def test_a_missing_path_is_refused_before_torch_is_imported(tmp_path: Path) -> None:
    (tmp_path / "a.png").touch()
    output = ["--output", str(tmp_path / "out")]
    commands = {
        "gone.jpg: no such image or folder": [
            ["predict", "gone.jpg", "--weights", "demo", *output],
            ["bench", "--photos", "gone.jpg"],
            ["maps", "--weights", "demo", "--data", "gone.jpg", *output],
        ],
        "gone: no such file": [
            *([command, "--weights", "gone", *output] for command in ("maps", "failures", "export", "train")),
            ["predict", "a.png", "--weights", "gone", *output],
            ["evaluate", "--weights", "gone"],
            ["evaluate", "--weights", "gone", "--peer", "yolo26n-seg"],
            ["init", "--data", str(tmp_path), "--weights", "gone"],
            ["publish", "gone", *output],
            ["import-weights", "gone", *output],
        ],
        "gone: no such folder": [
            ["failures", "--weights", "demo", "--data", "gone", *output],
            ["export", "--weights", "demo", "--engine", "openvino", "--data", "gone", *output],
            ["evaluate", "--weights", "demo", "--data", "gone"],
            ["bench", "--engines", "--data", "gone"],
            ["init", "--data", "gone", *output],
        ],
    }
    code = (
        "import json, sys; from sparseinst.cli import run_cli\n"
        "codes = [run_cli(command) for command in json.loads(sys.argv[1])]\n"
        "assert set(codes) == {2}, codes\n"
        "assert 'torch' not in sys.modules"
    )
    asked = json.dumps([command for group in commands.values() for command in group])
    done = subprocess.run([sys.executable, "-c", code, asked], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines() == [f"error: {line}" for line, group in commands.items() for _ in group]


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [["--help"], ["data", "check", "{shapes}", "--no-read"]])
def test_starts_soon_without_torch(arguments: list[str], shapes_root: Path) -> None:
    command = [sys.executable, "-m", "sparseinst", *(a.format(shapes=shapes_root) for a in arguments)]
    seconds, yardstick = (min(processor_seconds(c) for _ in range(5)) for c in (command, [sys.executable, "-c", "import numpy"]))
    traced = subprocess.run([*command[:1], "-X", "importtime", *command[1:]], capture_output=True, text=True, check=True)
    assert not [line for line in traced.stderr.splitlines() if line.split("|")[-1].strip() == "torch"]
    # A start takes 0.3 to 0.6 s of processor time, and importing torch takes more than a second. A slow machine gets more time.
    assert seconds < 0.8 * max(1.0, yardstick / 0.12), (seconds, yardstick)


def test_config_type_is_public() -> None:
    import sparseinst

    assert sparseinst.Config is Config
    assert set(sparseinst.__all__) <= set(dir(sparseinst)) | set(sparseinst._HOME)
    with pytest.raises(AttributeError):
        _ = sparseinst.nothing


def test_threads_wait_passively(monkeypatch: pytest.MonkeyPatch) -> None:
    """The policy is set before torch is loaded, and the user's own policy stays."""
    shows = "c.run_cli = lambda _: print(os.environ['OMP_WAIT_POLICY'], 'torch' in sys.modules)"
    code = f"import os, sys, sparseinst.cli as c; {shows}; c.main()"
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    for policy, expected in ((None, "PASSIVE False"), ("ACTIVE", "ACTIVE False")):
        environment = {**os.environ, **({"OMP_WAIT_POLICY": policy} if policy else {})}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        assert done.stdout.strip() == expected
