"""What is timed: a network or a peer, and the images that take turns in it. For training see `timed_training`.

Decoding, resizing, normalisation and padding of an image come before, and are not timed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from sparseinst.config import SIZE_DIVISOR, Config, InferenceConfig
from sparseinst.data.coco import read_image
from sparseinst.data.transforms import Pixels, resize_image, short_side_size
from sparseinst.engine import optimize as optimizing
from sparseinst.engine.device import autocast
from sparseinst.models.sparseinst import SparseInst, build_model
from sparseinst.paste import paste, paste_in_two_steps
from sparseinst.postprocess import ImageSize, postprocess

PHOTO = (480, 640)
"""Height and width of the image that is timed where no photos are given: those of most COCO photos."""
TURNS = 4
"""Different images that take turns, so that no cache holds the only one."""
MODULES = ("backbone", "encoder", "decoder", "post")

Mode = Literal["plain", "eager"] | optimizing.Mode
"""`plain`: as the reference runs, contiguous tensors and masks resized in two steps; `eager`: the model as it is, channels-last,
masks resized in one; the others: see `optimize`."""
Passed = Callable[[str], Any]


@dataclass(frozen=True)
class Timed:
    """Something to be timed."""

    run: Callable[[int, Passed], int]
    """Does the n-th batch, tells which module is done, and gives how many instances were kept, or trained with."""
    modules: tuple[str, ...]
    """What `run` tells; empty for what runs as one."""
    size: tuple[int, int] | None = None
    """Height and width of the padded input; None where they change."""
    turns: int = TURNS
    """Batches until the first comes again."""


class Input(NamedTuple):
    """A batch, resized and padded."""

    pixels: Tensor
    """(B, 3, H, W) uint8."""
    sizes: list[ImageSize]

    @property
    def padded(self) -> tuple[int, int]:
        return self.pixels.shape[-2], self.pixels.shape[-1]


def random_inputs(inference: InferenceConfig, batch: int) -> list[Input]:
    """Noise, of the size of most COCO photos."""
    size = short_side_size(*PHOTO, *inference.sides())
    height, width = padded_size([size])
    pixels = torch.randint(0, 256, (TURNS, batch, 3, height, width), dtype=torch.uint8)
    return [Input(each, [ImageSize(size, PHOTO)] * batch) for each in pixels]


def photo_inputs(files: Sequence[Path], inference: InferenceConfig, batch: int) -> list[Input]:
    """Photos as evaluation sees them, each at its own size; begun again from the first where the last batch is not full.

    Raises:
        DataError: a file that is no readable image.
    """
    inputs = []
    for first in range(0, len(files), batch):
        photos = [read_image(files[index % len(files)]) for index in range(first, first + batch)]
        sizes = [short_side_size(photo.height, photo.width, *inference.sides()) for photo in photos]
        height, width = padded_size(sizes)
        arrays = [torch.from_numpy(np.array(resize_image(*pair))).permute(2, 0, 1) for pair in zip(photos, sizes, strict=True)]
        padded = [F.pad(array, (0, width - array.shape[2], 0, height - array.shape[1])) for array in arrays]
        originals = [(photo.height, photo.width) for photo in photos]
        inputs.append(Input(torch.stack(padded), list(map(ImageSize, sizes, originals))))
    return inputs


def padded_size(sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """Height and width of a batch that holds images of these."""
    height, width = (-(-max(sides) // SIZE_DIVISOR) * SIZE_DIVISOR for sides in zip(*sizes, strict=True))
    return height, width


def network_to_time(
    config: Config,
    *,
    device: torch.device,
    model: SparseInst | None = None,
    batch: int = 1,
    mode: Mode = "eager",
    photos: Sequence[Path] = (),
) -> Timed:
    """A model on photos, or on random images of COCO's usual size.

    Args:
        model: one with trained weights; random ones keep every map whatever it shows, the slowest case.
    """
    torch.manual_seed(0)
    network = (model or build_model(config.model, load_pretrained=False)).to(device).eval()
    inference = config.inference
    layout = torch.contiguous_format if mode == "plain" else torch.channels_last
    if mode not in ("plain", "eager"):
        network = optimizing.optimize(network, device=device, mode=cast(optimizing.Mode, mode), precision=inference.precision)
    network = network.to(memory_format=layout)
    resize = paste_in_two_steps if mode == "plain" else paste
    inputs = photo_inputs(photos, inference, batch) if photos else random_inputs(inference, batch)
    images = [
        network.normalise(each.pixels.to(device), [size.resized for size in each.sizes]).contiguous(memory_format=layout)
        for each in inputs
    ]
    as_one = mode not in ("plain", "eager", "folded")

    def run(number: int, passed: Passed) -> int:
        turn = number % len(inputs)
        image = images[turn]
        with autocast(device, inference.precision):
            predictions = network(image) if as_one else _by_modules(network, image, passed)
        found = postprocess(predictions, inputs[turn].padded, inputs[turn].sizes, inference, resize)
        passed("post")
        return sum(len(instances.scores) for instances in found)

    shapes = {each.padded for each in inputs}
    return Timed(run, () if as_one else MODULES, shapes.pop() if len(shapes) == 1 else None, len(inputs))


def _by_modules(network: SparseInst, image: Tensor, passed: Passed) -> Any:
    network_input = image.to(network.dtype) if isinstance(network, optimizing.OptimizedSparseInst) else image
    features = network.backbone(network_input)
    passed("backbone")
    encoded = network.encoder(features)
    passed("encoder")
    predictions = network.decoder(encoded)
    passed("decoder")
    return predictions


def peer_to_time(peer: Any, device: torch.device, photos: Sequence[Path] = ()) -> Timed:
    """Another system (`integrations.peers.Peer`) on the same photos, in float32 without TF32."""
    inputs = [peer.prepare(photo) for photo in _peer_photos(photos)]

    def run(number: int, passed: Passed) -> int:
        with autocast(device, "fp32"):
            found = peer.segment(inputs[number % len(inputs)])
        passed("whole")
        return len(found.scores)

    return Timed(run, (), turns=len(inputs))


def _peer_photos(photos: Sequence[Path]) -> Iterator[Pixels]:
    random = np.random.default_rng(0)
    if not photos:
        yield from (random.integers(0, 256, (*PHOTO, 3), dtype=np.uint8) for _ in range(TURNS))
    for photo in photos:
        yield np.array(read_image(photo))
