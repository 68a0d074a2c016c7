"""Run the commands of the README and of docs/ in their order, each page in a fresh folder as after a clone.

A training gets a tiny model and a few steps by additional `-o`. `NOT_RUN` lists every command that is not run, with the reason;
its options are checked by `test_docs.test_commands_can_be_parsed`.
"""

import json
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sparseinst.cli import run_cli
from sparseinst.overrides import load_config
from tests.conftest import CPU, TINY, train
from tests.test_docs import PAGES, ROOT

NOT_RUN = {
    r"^(make|git|sudo|slurm/)": "installs, downloads or starts other programs; tests/slurm and the tests of a clone do it",
    r"^sparseinst (launch|retry|cancel)": "needs a cluster; tests/slurm",
    r"^sparseinst status .*--(cluster|watch)": "needs a cluster; tests/slurm",
    r"^sparseinst (bench|data speed)": "measures for minutes; tests/bench",
    r"--peer": "downloads weights; tests/integrations",
    r"^sparseinst import-weights|r50-giam\.safetensors|tuned\.yaml": "needs a released checkpoint; tests/integrations",
    r"train\.loggers": "needs an extra; tests/training/test_loggers.py",
    r"--preflight": "500 steps; tests/training/test_preflight.py",
    r"--output runs/tuned": "the tiny model of this test does not fit the weights; tests/test_own_data.py",
    r"(evaluate|maps) --weights demo": "evaluates on 2,000 images, which it draws first; test_the_python_examples uses the model",
    r"profiles/mini\.yaml|run .*--profile (mini|small|coco|nuclei)|run all": "trains for minutes to hours; make mini",
    r"^sparseinst run (figure1|table8)": "measures for minutes; tests/bench",
    r"^sparseinst (logs|verify)|^sparseinst report figure1": "needs a finished run of a table; tests/launch",
    r"^sparseinst report( --html)?$|^sparseinst report --profile small( --html| --fidelity)?$": "draws all figures; tests/report",
    r"data convert (masks nuclei|maps|emps)|datasets/nuclei|particles|tissue|runs/more": "needs a download; tests/data",
    r"data shapes --output DIR": "draws 18,000 images; tests/test_cli.py writes a few",
    r"plan kernels": "needs the table that docs/tables.md shows how to write; tests/ablation",
    r"data collage": "needs photos of single objects; tests/data/test_collage.py",
    r"clip\.mp4": "needs a video; tests/visualize",
    r"--form torch|--half|(model|whole)\.onnx": "takes a minute; tests/inference/test_export.py",
    r"--engine (openvino|onnxruntime)|model\.xml": "needs an extra; the tests of the engines",
}
STAND_INS = {"IMAGE": "photo.jpg", "W": "runs/mine", "RUN": "runs/mine"}
QUICK = {
    **TINY,
    "train.iterations": 2,
    "train.warmup_iterations": 1,
    "train.batch_size": 2,
    "train.accumulate": 1,
    "pretrain.enabled": False,
}
OPTIONS = [part for key, value in QUICK.items() if "num_" not in key for part in ("-o", f"{key}={json.dumps(value)}")]


def lines(page: Path) -> list[str]:
    """Return the commands of a page: the lines of its blocks of shell, and `sparseinst ...` in the text."""
    text = page.read_text()
    found = []
    for match in re.finditer(r"^```(\w*)\n(.*?)^```|`(sparseinst [^`\n]+)`", text, re.M | re.S):
        language, block, inline = match.groups()
        if language:
            continue
        if inline is None:
            found += [line for line in block.splitlines() if re.match(r"(sparseinst|make|git|sudo|slurm/)", line)]
        elif "..." not in inline and len(inline.split()) > 2:
            found.append(inline)
    return list(dict.fromkeys(shlex.join(shlex.split(line, comments=True)) for line in found))


def is_run(line: str) -> bool:
    return not any(re.search(pattern, line.replace("'", "")) for pattern in NOT_RUN)


def labelme_folder(root: Path) -> None:
    """Write ten images of five videos, with a square each, as LabelMe does."""
    root.mkdir()
    for number in range(10):
        name = f"clip{number // 2}_000{number % 2}.rf.{number}"
        pixels = np.random.default_rng(number).integers(0, 255, (64, 64, 3), np.uint8)
        Image.fromarray(pixels).save(root / f"{name}.png")
        shape = {"label": "square", "points": [[8, 8], [8, 40], [40, 40], [40, 8]], "shape_type": "polygon", "group_id": None}
        content = {"shapes": [shape], "imagePath": f"{name}.png", "imageData": None, "imageHeight": 64, "imageWidth": 64}
        (root / f"{name}.json").write_text(json.dumps(content))


def other_names(root: Path, data: Path) -> None:
    """Add the data of a COCO-format folder to `root` under the names of docs/data.md."""
    for split, name in (("train", "trainset"), ("val", "testset")):
        shutil.copytree(data / f"{split}2017", root / name / "images")
        shutil.copy(data / "annotations" / f"instances_{split}2017.json", root / name / "labels.json")


@pytest.fixture(scope="module")
def finished(shapes_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train the tiny model with evaluations on the way, so that there are best weights."""
    output = tmp_path_factory.mktemp("finished")
    train(load_config(overrides={**TINY, "data.root": str(shapes_root), "train.evaluate_every": 2}), output, device=CPU)
    return output


@pytest.fixture
def clone(shapes_root: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder with what a clone holds and what a page's reader has: data, photos, and a run."""
    for name in ("experiments", "slurm"):
        (tmp_path / name).symlink_to(ROOT / name)
    shutil.copytree(ROOT / "results" / "records", tmp_path / "results" / "records")
    for name in ("mydata", "DIR"):
        shutil.copytree(shapes_root, tmp_path / name)
    for name in ("photos", "folder"):
        shutil.copytree(shapes_root / "val2017", tmp_path / name)
    photo = Image.open(next((tmp_path / "photos").iterdir())).convert("RGB")
    photo.save(tmp_path / "photo.jpg")
    photo.save(tmp_path / "image.png")
    shutil.copytree(finished, tmp_path / "runs" / "mine")
    shutil.copytree(finished, tmp_path / "runs" / "other")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def prepare_data_page(folder: Path, line: str, shapes_root: Path) -> None:
    """Give `DIR` of docs/data.md what the command expects there: annotations of another format, or other file names."""
    shutil.rmtree(folder / "DIR")
    if "data convert" in line:
        labelme_folder(folder / "DIR")
    else:
        (folder / "DIR").mkdir()
        other_names(folder / "DIR", shapes_root)


def run(line: str, folder: Path) -> None:
    """Run a command; an alternative to an earlier command of the page may write the same file or folder."""
    _, *arguments = (STAND_INS.get(word, word) for word in shlex.split(line))
    if "--output" in arguments and arguments[0] in ("init", "data", "train", "publish"):
        output = folder / arguments[arguments.index("--output") + 1]
        shutil.rmtree(output) if output.is_dir() else output.unlink(missing_ok=True)
    if arguments[0] == "train":
        arguments += OPTIONS
    assert run_cli(arguments) == 0, line
    if arguments[:2] == ["data", "convert"]:  # the example of `--by field:video_id` has such a field
        for file in (folder / "mydata" / "annotations").glob("instances_*.json"):
            content = json.loads(file.read_text())
            for image in content["images"]:
                image["video_id"] = image["file_name"][:5]
            file.write_text(json.dumps(content))


RUN_PAGES = [page for page in PAGES if any(map(is_run, lines(page)))]


@pytest.mark.slow
@pytest.mark.parametrize("page", RUN_PAGES, ids=lambda page: page.stem)
def test_the_commands_run_in_their_order(page: Path, clone: Path, shapes_root: Path) -> None:
    if page.stem in ("data", "train"):  # these pages make the run themselves
        shutil.rmtree(clone / "runs" / "mine")
    for line in filter(is_run, lines(page)):
        if page.stem == "data":
            prepare_data_page(clone, line, shapes_root)
        run(line, clone)


def test_most_commands_run_and_each_reason_is_needed() -> None:
    commands = [line for page in PAGES for line in lines(page)]
    assert sum(map(is_run, commands)) > 40
    unused = [pattern for pattern in NOT_RUN if not any(re.search(pattern, line.replace("'", "")) for line in commands)]
    assert not unused


@pytest.mark.slow
def test_the_python_examples_run(clone: Path) -> None:
    """The README's and docs/predict.md's examples. That of docs/weights.md needs detectron2, the others a GPU or many records."""
    pages = (ROOT / "README.md", ROOT / "docs/predict.md")
    blocks = [code for page in pages for code in re.findall(r"^```python\n(.*?)^```", page.read_text(), re.M | re.S)]
    assert len(blocks) == 2
    for code in blocks:
        names: dict[str, object] = {}
        exec(code, names)
        assert len(names["found"].scores) == len(names["found"].masks)  # type: ignore[attr-defined]
