"""Build the inference workloads that are timed: a network or a peer, and the batches that it takes in turn.

Decoding, resizing, normalisation and padding happen before the clock starts. `timed_training` builds the training workloads.
B images, H W padded height and width in pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from sparseinst.bench.baselines import paste_in_two_steps
from sparseinst.bench.modes import InferenceMode
from sparseinst.config import Config, EngineName, InferenceConfig, NetworkPrecision, OptimizeMode
from sparseinst.data.images import read_image
from sparseinst.data.network_input import at_test_size, image_tiles, inference_size, middle_tile, pad, padded_size
from sparseinst.data.transforms import Pixels
from sparseinst.device import autocast
from sparseinst.inference import optimize as optimizing
from sparseinst.inference.engine_network import Prepared, prepare
from sparseinst.integrations.peers.engines import prepare_peer
from sparseinst.integrations.peers.peer import Peer
from sparseinst.models.sparseinst import SparseInst, build_model
from sparseinst.paste import paste
from sparseinst.postprocess import ImageSize, postprocess

PHOTO = (480, 640)
"""Height and width of the random image that is timed without photos. Most COCO photos have this size."""
RANDOM_BATCHES = 4
"""Number of different random batches. One batch alone would stay in the device's caches."""
MODULES = ("backbone", "encoder", "decoder", "post")
WHOLE_NETWORK = ("network", "post")
"""The modules of a network that runs as one: a compiled network, a CUDA graph, and that of another engine."""

OnModuleDone = Callable[[str], Any]
"""A callback that receives a module's name as soon as the host has issued this module's work."""


@dataclass(frozen=True)
class Workload:
    """Work that can be timed, batch by batch."""

    run: Callable[[int, OnModuleDone], int]
    """Runs batch number n, and calls the callback after each module. Returns the number of instances that post-processing kept,
    or that a training step learned from."""
    modules: tuple[str, ...]
    """The names that the callback receives. Empty if the modules cannot be timed separately."""
    size: tuple[int, int] | None = None
    """Height and width of the padded input. None if they differ between batches."""
    num_batches: int = RANDOM_BATCHES
    """Number of different batches. Batch `num_batches` is batch 0 again."""
    facts: dict[str, Any] | None = None
    """What runs the network, as `Prepared.as_json` returns it; None in training."""


class InputBatch(NamedTuple):
    """A batch of resized and padded images."""

    pixels: Tensor
    """(B, 3, H, W) uint8."""
    sizes: list[ImageSize]

    @property
    def padded(self) -> tuple[int, int]:
        return self.pixels.shape[-2], self.pixels.shape[-1]


def random_inputs(inference: InferenceConfig, batch: int) -> list[InputBatch]:
    """Return batches of noise, in the size of most COCO photos, or of one tile of them."""
    original = image_tiles(PHOTO, inference)[0].size
    size = inference_size(original, inference)
    height, width = padded_size([size])
    pixels = torch.randint(0, 256, (RANDOM_BATCHES, batch, 3, height, width), dtype=torch.uint8)
    return [InputBatch(each, [ImageSize(size, original)] * batch) for each in pixels]


def photo_inputs(files: Sequence[Path], inference: InferenceConfig, batch: int) -> list[InputBatch]:
    """Return photos, or the tiles in their middle, in batches, each resized as in evaluation.

    The first photos also fill up the last batch.

    Raises:
        DataError: a file is not a readable image.
    """
    inputs = []
    for first in range(0, len(files), batch):
        photos = [middle_tile(read_image(files[index % len(files)]), inference) for index in range(first, first + batch)]
        originals = [(photo.height, photo.width) for photo in photos]
        sizes = [ImageSize(inference_size(original, inference), original) for original in originals]
        inputs.append(InputBatch(pad([at_test_size(photo, inference) for photo in photos]), sizes))
    return inputs


def network_workload(
    config: Config,
    prepared: Prepared | None = None,
    *,
    device: torch.device,
    batch: int = 1,
    mode: InferenceMode = "eager",
    photos: Sequence[Path] = (),
) -> Workload:
    """Return the workload of our model in inference: forward pass and post-processing.

    Args:
        prepared: the network in the config's engine and precision and in this mode. None takes random weights, with which
            post-processing keeps every map, which is the slowest case.
        photos: image files. Without them the images are random, in COCO's usual size.

    Raises:
        DataError: a photo cannot be read.
    """
    prepared = prepared or random_network(config, device=device, mode=mode)
    torch.manual_seed(0)
    inference = config.inference
    plain_layout = mode == "plain" or inference.engine != "torch"
    layout = torch.contiguous_format if plain_layout else torch.channels_last
    network = prepared.network.to(memory_format=layout)
    resize = paste_in_two_steps if mode == "plain" else paste
    inputs = photo_inputs(photos, inference, batch) if photos else random_inputs(inference, batch)
    images = [
        network.normalise(each.pixels.to(device), [size.resized for size in each.sizes]).contiguous(memory_format=layout)
        for each in inputs
    ]
    separable = mode in ("plain", "eager", "folded") and inference.engine == "torch"

    def run(number: int, module_done: OnModuleDone) -> int:
        index = number % len(inputs)
        image = images[index]
        with autocast(device, inference.precision):
            if separable:
                assert isinstance(network, SparseInst)
                predictions = _run_modules(network, image, module_done)
            else:
                predictions = network(image)
                module_done("network")
        found = postprocess(predictions, inputs[index].padded, inputs[index].sizes, inference, resize)
        module_done("post")
        return sum(len(instances.scores) for instances in found)

    shapes = {each.padded for each in inputs}
    modules = MODULES if separable else WHOLE_NETWORK
    return Workload(run, modules, shapes.pop() if len(shapes) == 1 else None, len(inputs), prepared.as_json())


def random_network(config: Config, *, device: torch.device, mode: InferenceMode = "eager") -> Prepared:
    """Return the network of a config with random weights, always the same ones. In int8 it is calibrated on noise.

    Raises:
        UserError: the engine or its precision is not available.
    """
    torch.manual_seed(0)
    model = build_model(config.model, load_pretrained=False).to(device).eval()
    return prepare(model, config, (), device=device, optimize=optimize_mode(config, mode), score=lambda *_: None)


def optimize_mode(config: Config, mode: InferenceMode) -> OptimizeMode | None:
    """Return what `inference.optimize` does in a mode; None if the network runs as it is, or in another engine than torch."""
    return None if mode in ("plain", "eager") or config.inference.engine != "torch" else cast(OptimizeMode, mode)


def _run_modules(network: SparseInst, image: Tensor, module_done: OnModuleDone) -> Any:
    """Return the network's output, and call `module_done` after each of its three modules."""
    network_input = image.to(network.dtype) if isinstance(network, optimizing.OptimizedSparseInst) else image
    features = network.backbone(network_input)
    module_done("backbone")
    encoded = network.encoder(features)
    module_done("encoder")
    predictions = network.decoder(encoded)
    module_done("decoder")
    return predictions


def peer_workload(
    peer: Peer,
    device: torch.device,
    photos: Sequence[Path] = (),
    *,
    engine: EngineName = "torch",
    precision: NetworkPrecision = "fp32",
) -> Workload:
    """Return the workload of another system; in torch it runs in float32 without TF32.

    Args:
        photos: image files. Without them the images are random, in COCO's usual size.

    Raises:
        DataError: a photo cannot be read.
        UserError: the engine is not available, or it cannot run this peer.
    """
    inputs = [peer.prepare(photo) for photo in _peer_photos(photos)]
    prepared = prepare_peer(peer, inputs[0], engine, precision)

    @torch.no_grad()
    def run(number: int, module_done: OnModuleDone) -> int:
        inputs_now = inputs[number % len(inputs)]
        with autocast(device, "fp32"):
            outputs = prepared.peer.run(inputs_now)
            module_done("network")
            found = prepared.peer.finish(outputs, inputs_now)
        module_done("post")
        return len(found.scores)

    return Workload(run, WHOLE_NETWORK, num_batches=len(inputs), facts=prepared.facts.as_json())


def _peer_photos(photos: Sequence[Path]) -> Iterator[Pixels]:
    random = np.random.default_rng(0)
    if not photos:
        yield from (random.integers(0, 256, (*PHOTO, 3), dtype=np.uint8) for _ in range(RANDOM_BATCHES))
    for photo in photos:
        yield np.array(read_image(photo))
