"""Check that the code in docs/deploy.md, which does without this package, finds what `predict` finds."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sparseinst import load_model
from sparseinst.cli import run_cli
from sparseinst.engines.base import OUTPUTS
from sparseinst.inference.artifacts import ARTIFACT_SUFFIXES
from tests.engines.test_engines import photo

PAGE = Path(__file__).parents[2] / "docs" / "deploy.md"


@pytest.fixture(scope="module")
def steps() -> dict[str, Any]:
    """Return what the page's code defines."""
    found: dict[str, Any] = {}
    for code in re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.M | re.S):
        exec(code, found)  # the page of this repository
    return found


def write_photo(path: Path, kind: str, size: tuple[int, int]) -> Path:
    picture = Image.fromarray(photo(size))
    if kind == "16 bit":
        values = np.asarray(picture.convert("L"), np.uint16) * 257
        Image.fromarray(values).save(path.with_suffix(".png"))
        return path.with_suffix(".png")
    exif = Image.Exif()
    exif[0x0112] = 6 if kind == "rotated" else 1
    picture.save(path.with_suffix(".jpg"), exif=exif, quality=95)
    return path.with_suffix(".jpg")


@pytest.mark.parametrize(
    ("kind", "size"),
    [("plain", (100, 140)), ("plain", (64, 61)), ("rotated", (100, 140)), ("16 bit", (100, 140)), ("plain", (2, 900))],
)
def test_the_steps_around_the_network_as_documented(
    kind: str, size: tuple[int, int], trained: Path, steps: dict[str, Any], tmp_path: Path
) -> None:
    model = load_model(trained, "cpu")
    inference = model.config.inference
    file = write_photo(tmp_path / "photo", kind, size)
    picture = steps["read"](file)
    size = picture.height, picture.width
    images, resized = steps["prepare"](picture, *inference.sides())
    with torch.no_grad():
        raw = dict(zip(OUTPUTS, model.model(torch.from_numpy(images)), strict=True))
    outputs = [raw[name].numpy() for name in ("class_logits", "objectness_logits", "mask_logits")]
    limits = inference.mask_threshold, inference.score_threshold
    found = steps["instances"](*outputs, images.shape[2:], resized, size, *limits)
    expected = model.predict(file)
    assert len(found) == len(expected.scores) > 0
    by_score = sorted(found, key=lambda one: -one[0])
    np.testing.assert_allclose([score for score, _, _ in by_score], expected.scores, atol=1e-5)
    assert [label for _, label, _ in by_score] == expected.labels.tolist()
    assert np.mean([(mask != theirs).mean() for (_, _, mask), theirs in zip(by_score, expected.masks, strict=True)]) < 1e-3


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_the_metadata_as_documented(engine: str, trained: Path, steps: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip(engine, reason="needs the engine's package")
    pytest.importorskip("onnxscript", reason="needs the extra `export`")
    artifact = tmp_path / f"network{ARTIFACT_SUFFIXES[engine]}"  # type: ignore[index]
    assert run_cli(["export", "--weights", str(trained), "--engine", engine, "--output", str(artifact)]) == 0
    model = load_model(trained, "cpu")
    inference = model.config.inference
    short, long, mask_threshold, score_threshold, names = steps["settings"](str(artifact))
    assert (short, long) == inference.sides()
    assert (mask_threshold, score_threshold) == (inference.mask_threshold, inference.score_threshold)
    assert names == [category.name for category in model.categories]
