"""Check that one resizing gives the masks of the reference's two resizings, in both memory layouts."""

import numpy as np
import pytest
import torch
from pycocotools import mask as reference_mask

from sparseinst.bench.baselines import paste_in_two_steps
from sparseinst.data.masks import encode
from sparseinst.paste import ImageSize, paste, paste_by_column, paste_strips

SIZES = [
    ((640, 864), ImageSize((640, 853), (480, 640))),
    ((864, 640), ImageSize((853, 640), (640, 480))),
    ((448, 608), ImageSize((427, 600), (427, 640))),
    ((64, 96), ImageSize((64, 85), (480, 640))),
    ((640, 864), ImageSize((640, 853), (37, 49))),
    ((32, 32), ImageSize((32, 32), (32, 32))),
    ((32, 64), ImageSize((1, 64), (3, 200))),
]


def probabilities(count: int, padded: tuple[int, int], *, blobs: bool) -> torch.Tensor:
    generator = torch.Generator().manual_seed(count)
    height, width = padded[0] // 4, padded[1] // 4
    noise = torch.randn(1, count, 7, 9, generator=generator)
    smooth = torch.nn.functional.interpolate(noise, size=(height, width), mode="bicubic")[0]
    return (6 * smooth - (5 if blobs else 0)).sigmoid()


@pytest.mark.parametrize("blobs", [False, True])
@pytest.mark.parametrize(("padded", "size"), SIZES)
def test_paste_equals_two_steps(padded: tuple[int, int], size: ImageSize, blobs: bool) -> None:
    masks = probabilities(40, padded, blobs=blobs)
    expected = paste_in_two_steps(masks, padded, size, 0.45)
    found = paste(masks, padded, size, 0.45)
    assert found.shape == (40, *size.original)
    differing = found != expected
    assert differing.sum() <= 3e-6 * differing.numel()
    # The pixels that differ lie on the threshold: a change of the threshold by a millionth changes them, too.
    near = paste_in_two_steps(masks, padded, size, 0.45 - 1e-6) != paste_in_two_steps(masks, padded, size, 0.45 + 1e-6)
    assert not (differing & ~near).any()


@pytest.mark.parametrize(("padded", "size"), SIZES)
def test_narrow_instances_equal_two_steps(padded: tuple[int, int], size: ImageSize) -> None:
    """Instances of every width and place, also at the edges, in the padding, and of one input."""
    height, width = padded[0] // 4, padded[1] // 4
    masks = torch.full((60, height, width), 0.1)
    random = np.random.default_rng(0)
    for mask in masks[:-1]:
        top, left = int(random.integers(height)), int(random.integers(width))
        mask[top : top + int(random.integers(1, height + 1)), left : left + int(random.integers(1, 1 + width // 2))] = 0.9
    masks[-1, :, -1] = 0.9
    expected = paste_in_two_steps(masks, padded, size, 0.45)
    near = paste_in_two_steps(masks, padded, size, 0.45 - 1e-6) != paste_in_two_steps(masks, padded, size, 0.45 + 1e-6)
    found = paste(masks, padded, size, 0.45)
    assert not ((found != expected) & ~near).any()
    assert expected.any()
    strips = torch.cat([strip.clone() for _, strip in paste_strips(masks, padded, size, 0.45)], dim=1)
    assert torch.equal(strips, found)


def test_paste_by_column_gives_the_same_masks_and_encodes_without_a_copy() -> None:
    padded, size = SIZES[0]
    masks = probabilities(12, padded, blobs=True)
    by_row, by_column = paste(masks, padded, size, 0.45), paste_by_column(masks, padded, size, 0.45)
    assert (by_row != by_column).sum() <= 12
    assert by_column.transpose(1, 2).is_contiguous()
    runs = encode(by_column.numpy())
    assert runs == encode(by_column.contiguous().numpy())
    decoded = reference_mask.decode([{**run, "counts": run["counts"].encode()} for run in runs])
    assert np.array_equal(decoded.transpose(2, 0, 1).astype(bool), by_column.numpy())


@pytest.mark.parametrize("value", [0.0, 0.45, 0.4500001, 1.0])
def test_constant_masks_become_full_or_empty(value: float) -> None:
    masks = torch.full((3, 16, 24), value)
    found = paste(masks, (64, 96), ImageSize((60, 90), (120, 180)), 0.45)
    assert found.float().mean() == float(value > 0.4500001 - 1e-9)


def test_an_image_without_instances() -> None:
    for resize in (paste, paste_by_column, paste_in_two_steps):
        assert resize(torch.zeros(0, 16, 24), (64, 96), ImageSize((60, 90), (120, 180)), 0.45).shape == (0, 120, 180)


def test_autocast_does_not_change_the_masks() -> None:
    """The autocast of a caller must not reduce the precision of the resizing."""
    from sparseinst.config import InferenceConfig
    from sparseinst.models.network import Predictions
    from sparseinst.postprocess import postprocess

    torch.manual_seed(0)
    raw = Predictions(torch.randn(1, 9, 4), torch.randn(1, 9), torch.randn(1, 9, 16, 24), torch.zeros(1, 9, 8, 12))
    size = [ImageSize((60, 90), (120, 180))]
    [expected] = postprocess(raw, (64, 96), size, InferenceConfig())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        [found] = postprocess(raw, (64, 96), size, InferenceConfig())
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
