"""Average the response of each instance activation map over a data set (the paper's Figure 6).

Shapes: N instance maps, H W the common height and width.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch.nn import functional as F

from sparseinst.data.network_input import middle_tile
from sparseinst.errors import UserError
from sparseinst.files import atomic, make_folder
from sparseinst.inference.predict import Predictor, as_image, instance_responses
from sparseinst.progress import progress_bar
from sparseinst.visualize.draw import heat, picture_grid

SIZE = (60, 80)
"""Height and width to which all responses are resized."""
CHOSEN = 12
"""Number of maps in `maps-chosen.png`."""
_BORDER = 16
"""The border is this part of each side: a map's mass that is on no object gathers there."""


def mean_responses(predictor: Predictor, images: Sequence[Path], size: tuple[int, int] = SIZE) -> NDArray[np.float32]:
    """Return the mean response of each map over these images, (N, H, W). In each image, a map's responses sum to 1.

    Of an image that is segmented in tiles, the tile in the middle is used.

    Raises:
        DataError: an image cannot be read.
        UserError: there is no image.
    """
    if not images:
        raise UserError("there is no image, so the maps have no mean response")
    num_maps = predictor.config.model.decoder.iam.num_maps
    total = np.zeros((num_maps, *size), dtype=np.float64)
    with progress_bar("images") as bar:
        for path in bar.track(images, description="maps"):
            raw, image_size, _ = predictor.forward(middle_tile(as_image(path), predictor.config.inference))
            responses = instance_responses(raw, num_maps, image_size)[None]  # 1 N h w
            resized = F.interpolate(responses, size=size, mode="bilinear", align_corners=False)[0].cpu().numpy()
            total += resized / resized.sum((1, 2), keepdims=True).clip(min=1e-12)
    return (total / len(images)).astype(np.float32)


def most_different_maps(means: NDArray[np.float32], count: int = CHOSEN) -> list[int]:
    """Return the indices of the `count` maps that differ most.

    The first is the most concentrated map. Each next one is the map farthest from those already chosen.
    """
    flat = means.reshape(len(means), -1).astype(np.float64)
    chosen = [int(flat.max(1).argmax())]
    distance = np.full(len(flat), np.inf)
    while len(chosen) < min(count, len(flat)):
        distance = np.minimum(distance, ((flat - flat[chosen[-1]]) ** 2).sum(1))
        chosen.append(int(distance.argmax()))
    return chosen


def write_mean_maps(means: NDArray[np.float32], output: Path) -> list[Path]:
    """Write `maps-chosen.png`, `maps-all.png` and, with the values themselves, `maps.npy`. Return their paths.

    The choice and the colours are those of the maps without the border, whose cells would outshine all others. A border cell that
    is brighter than all cells inside has the colour of the brightest of these.
    """
    make_folder(output)
    written = []
    rows, columns = (max(1, side // _BORDER) for side in means.shape[1:])
    inside = means[:, rows:-rows, columns:-columns] if min(means.shape[1:]) > 2 else means
    brightest = inside.max((1, 2)).clip(min=1e-12)
    chosen, everything = most_different_maps(inside), list(range(len(means)))
    for name, indices, across, width in (("maps-chosen.png", chosen, 6, 160), ("maps-all.png", everything, 10, 96)):
        height = round(width * means.shape[1] / means.shape[2])
        pictures = [
            (f"map {index}", heat(None, np.minimum(means[index] / brightest[index], 1), (width, height))) for index in indices
        ]
        with atomic(output / name) as temporary:
            picture_grid(pictures, columns=min(across, len(pictures))).save(temporary, format="PNG")
        written.append(output / name)
    content = io.BytesIO()  # np.save into a file does not say why a write fails
    np.save(content, means)
    with atomic(output / "maps.npy") as temporary:
        temporary.write_bytes(content.getvalue())
    return [*written, output / "maps.npy"]
