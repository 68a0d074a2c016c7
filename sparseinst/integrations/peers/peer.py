"""Define what a peer is: an instance segmentation model of another kind, which is timed and evaluated as ours are.

Shapes: H W height and width of the network's input.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sparseinst.data.transforms import Pixels
from sparseinst.errors import UserError
from sparseinst.postprocess import Instances
from sparseinst.words import shorten


class PeerInput(NamedTuple):
    """A photo as a peer's network gets it."""

    images: Any
    """(1, 3, H, W) float32 on the peer's device: resized and, unless the network does that itself, padded and normalised. A
    network that cannot be exported can have an input of another kind."""
    resized: tuple[int, int]
    """Height and width of the photo in this input, without padding."""
    original: tuple[int, int]
    """Height and width of the photo."""


@dataclass(frozen=True)
class Exportable:
    """A network that can run in other engines than torch."""

    network: nn.Module
    """Turns `PeerInput.images` into a tuple of tensors, which `Peer.finish` takes."""
    outputs: tuple[str, ...]
    """The names of these tensors."""
    any_size: bool = True
    """Whether H and W may differ from one photo to the next."""
    traced: bool = False
    """Export by tracing, because torch.export cannot follow the network."""
    transformer: bool = False
    """Whether the network is a transformer, which NNCF quantises in a way of its own."""


@dataclass(frozen=True)
class Published:
    """A mask AP on COCO val2017 that others measured."""

    AP: float
    """In percent."""
    source: str
    """Where it is published."""


@dataclass(frozen=True)
class Peer:
    """An instance segmentation model of another kind, in evaluation mode."""

    name: str
    categories: tuple[str, ...]
    """Category names, indexed by label."""
    prepare: Callable[[Pixels], PeerInput]
    """Turn an (H, W, 3) RGB photo into the network's input on its device."""
    run: Callable[[PeerInput], Any]
    """Turn this input into the network's raw outputs."""
    finish: Callable[[Any, PeerInput], Instances]
    """Turn the raw outputs into the instances at the photo's own size."""
    parameters: int
    """Number of parameters."""
    package: str = "torchvision"
    """The package that holds the architecture."""
    exportable: Exportable | None = None
    """The network for other engines; None if it cannot be exported."""
    published: Published | None = None
    """The AP of the published weights."""

    def segment(self, inputs: PeerInput) -> Instances:
        """Turn the network's input into the instances at the photo's own size. `bench` times this part."""
        return self.finish(self.run(inputs), inputs)


def instances(scores: Tensor, labels: Tensor, masks: Tensor) -> Instances:
    """Return instances without maps: each is numbered by its place."""
    return Instances(scores, labels, masks, torch.arange(len(scores), device=scores.device))


def count_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def missing(name: str, package: str, error: ImportError) -> UserError:
    """Return the error for a peer whose package cannot be imported."""
    return UserError(f"{name} needs the package {package} ({error}); install it: pip install {package}")


def no_download(name: str, error: Exception) -> UserError:
    """Return the error for published weights that cannot be downloaded."""
    return UserError(f"{name}: the weights cannot be downloaded or read ({shorten(str(error))}); name a file with --weights")
