"""Check that the code in docs/deploy.md, which does without this package, finds what `predict` finds."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sparseinst import load_model
from sparseinst.engines.base import OUTPUTS
from tests.engines.test_engines import photo

PAGE = Path(__file__).parents[2] / "docs" / "deploy.md"


@pytest.mark.parametrize("size", [(100, 140), (64, 61)])
def test_the_steps_around_the_network_as_documented(size: tuple[int, int], trained: Path) -> None:
    [code] = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.M | re.S)
    steps: dict[str, Any] = {}
    exec(code, steps)  # the page of this repository
    model = load_model(trained, "cpu")
    inference = model.config.inference
    picture = Image.fromarray(photo(size))
    images, resized = steps["prepare"](picture, *inference.sides())
    with torch.no_grad():
        raw = dict(zip(OUTPUTS, model.model(torch.from_numpy(images)), strict=True))
    outputs = [raw[name].numpy() for name in ("class_logits", "objectness_logits", "mask_logits")]
    limits = inference.mask_threshold, inference.score_threshold
    found = steps["instances"](*outputs, images.shape[2:], resized, size, *limits)
    expected = model.predict(picture)
    assert len(found) == len(expected.scores) > 0
    by_score = sorted(found, key=lambda one: -one[0])
    np.testing.assert_allclose([score for score, _, _ in by_score], expected.scores, atol=1e-5)
    assert [label for _, label, _ in by_score] == expected.labels.tolist()
    assert np.mean([(mask != theirs).mean() for (_, _, mask), theirs in zip(by_score, expected.masks, strict=True)]) < 1e-3
