"""Provide what many tests use: a config that trains in a second, small data sets, and the path of the COCO photos."""

import json
import os

# Waiting threads that spin slow a shared machine down. torch reads this variable when it is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Under pytest-xdist, each worker and the processes that it starts use one thread. Set before torch is imported, too.
os.environ["OMP_NUM_THREADS"] = "1" if "PYTEST_XDIST_WORKER" in os.environ else "2"

from collections.abc import Callable, Iterable
from concurrent.futures import Future
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from sparseinst.bench import isolated
from sparseinst.config import Config
from sparseinst.data.shapes import write_shapes
from sparseinst.errors import UserError
from sparseinst.overrides import load_config
from sparseinst.section import Section
from sparseinst.training.train import train

REAL_COCO = Path(os.environ.get("SPARSEINST_COCO", Path(__file__).parents[2] / "shared" / "data" / "coco-subset"))
THREADS = int(os.environ["OMP_NUM_THREADS"])
needs_coco = pytest.mark.skipif(not REAL_COCO.is_dir(), reason=f"no COCO photos in {REAL_COCO} (set SPARSEINST_COCO)")

TINY: dict[str, Any] = {
    "model.num_classes": 6,
    "model.backbone.name": "small_resnet",
    "model.backbone.pretrained": False,
    "model.backbone.frozen_norm": False,
    "model.encoder.channels": 16,
    "model.decoder.depth": 1,
    "model.decoder.width": 16,
    "model.decoder.kernel_dim": 8,
    "model.decoder.iam.num_maps": 10,
    "data.short_sides": [48, 64],
    "data.long_side": 96,
    "data.workers": 0,
    "inference.short_side": 64,
    "inference.long_side": 96,
    "train.iterations": 6,
    "train.batch_size": 4,
    "train.learning_rate": 1e-3,
    "train.warmup_iterations": 2,
    "train.checkpoint_every": 2,
    "train.log_every": 1,
}


@pytest.fixture(autouse=True)
def _threads() -> None:
    """Give every test the same number of threads, since the bits of a training depend on it."""
    torch.set_num_threads(THREADS)


@pytest.fixture(scope="session")
def shapes_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data") / "shapes"
    write_shapes(root, train=24, val=6, side=64)
    return root


@pytest.fixture
def tiny(shapes_root: Path) -> Config:
    return load_config(overrides={**TINY, "data.root": str(shapes_root)})


@pytest.fixture(scope="session")
def trained(shapes_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train the tiny model for a few steps, and return the run's folder."""
    config = load_config(overrides={**TINY, "data.root": str(shapes_root)})
    output = tmp_path_factory.mktemp("trained")
    train(config, output, device=CPU, progress=False)
    return output


CPU = torch.device("cpu")


def run(config: Config, output: Path) -> dict[str, torch.Tensor]:
    """Train a model, and return its weights."""
    return load_file(train(config, output, device=CPU, progress=False))


def alternatives(section: type[Section], *names: str) -> list[dict[str, Any]]:
    """Return {setting: value} for each value of a section's `Literal` settings, except the defaults."""
    fields = {name: section.model_fields[name] for name in names or section.model_fields}
    words = {name: get_args(field.annotation) for name, field in fields.items() if get_origin(field.annotation) is Literal}
    return [{name: word} for name, choices in words.items() for word in choices if word != fields[name].default]


def write_coco(root: Path, images: list[dict[str, Any]], annotations: list[dict[str, Any]], categories: Any = None) -> Path:
    """Write a COCO-format folder with equal train and val splits. Images without a file become random PNGs."""
    random = np.random.default_rng(0)
    categories = categories or [{"id": 7, "name": "seven"}, {"id": 1000, "name": "thousand"}]
    for split in ("train2017", "val2017"):
        (root / split).mkdir(parents=True, exist_ok=True)
        for image in images:
            path = root / split / image["file_name"]
            if not path.exists():
                pixels = random.integers(0, 256, (image["height"], image["width"], 3), dtype=np.uint8)
                Image.fromarray(pixels).save(path)
        content = {"images": images, "annotations": annotations, "categories": categories}
        (root / "annotations").mkdir(exist_ok=True)
        (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(content))
    return root


def box(x: float, y: float, w: float, h: float) -> list[list[float]]:
    """Return a rectangle as a COCO polygon."""
    return [[x, y, x + w, y, x + w, y + h, x, y + h]]


def annotation(number: int, image: int, category: int, segmentation: Any, **more: Any) -> dict[str, Any]:
    entry = {"id": number, "image_id": image, "category_id": category, "segmentation": segmentation}
    return {**entry, "area": 16.0, "bbox": [0, 0, 4, 4], "iscrowd": 0, **more}


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `bench` measure in the test's process, because a separate process takes seconds to start."""

    class Inline:
        def submit(self, do: Callable[..., Any], *arguments: Any) -> Future[Any]:
            future: Future[Any] = Future()
            try:
                future.set_result(do(*arguments))
            except UserError as error:
                future.set_exception(error)
            return future

    monkeypatch.setattr(isolated, "_start_process", lambda _: nullcontext(Inline()))


def assert_flips_are_refused(file: Path, places: Iterable[int], random: np.random.Generator, read: Callable[[], object]) -> None:
    """Flip one random bit of a file's byte at each place in turn: `read` must refuse the file with a one-line error.

    The file stays damaged.
    """
    content = file.read_bytes()
    for place in places:
        damaged = bytearray(content)
        damaged[place] ^= 1 << int(random.integers(8))
        file.write_bytes(damaged)
        with pytest.raises(UserError) as raised:
            read()
        assert len(str(raised.value).splitlines()) == 1
