"""Define what an engine is, and what every engine checks and reports. An engine runs a trained network.

The network is the part from a normalised, padded image to raw predictions. What comes before and after is the same code for all
engines (`data.network_input`, `postprocess`). Shapes: B images, H W padded height and width, multiples of 32.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from torch import Tensor

from sparseinst.config import EngineName, NetworkPrecision
from sparseinst.errors import UserError
from sparseinst.models.network import Predictions
from sparseinst.words import install_extra

INPUT = "images"
"""The name of a network's input."""
OUTPUTS = Predictions._fields
"""The names of a network's outputs, in this order."""


@dataclass(frozen=True)
class EngineFacts:
    """The facts about an engine and its artifact that a record needs."""

    engine: EngineName
    version: str
    """The version of the engine's package."""
    precision: NetworkPrecision
    """The precision in which most convolutions of the compiled network run; `int8` if any of them does."""
    artifact: str
    """16 hexadecimal digits of a SHA-256: of the network in the artifact's files, or of a torch model's tensors."""
    bytes: int
    """The size of the artifact."""
    threads: int
    layers: dict[str, int]
    """The number of convolutions and matrix products in each precision, as the engine compiled them; empty if it does not say."""

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


class Engine(Protocol):
    """A loaded network. Each engine's module has a function `load` that returns one, or raises `UserError`."""

    facts: EngineFacts

    def outputs(self, images: Tensor) -> list[Tensor]:
        """Return the network's outputs, in the artifact's order, for normalised images (B, 3, H, W)."""

    def run(self, images: Tensor) -> Predictions:
        """Return the raw predictions, float32 on the images' device, for normalised images (B, 3, H, W)."""


def missing_package(engine: str, error: ImportError, extra: str | None = None) -> UserError:
    """Return the error that names the extra which a missing package belongs to."""
    extra, missing = extra or engine, error.name or error
    return UserError(f"engine {engine} needs the extra `{extra}` ({missing} is missing); install it: {install_extra(extra)}")


def used_precision(layers: Counter[str]) -> str:
    """Return the precision of most layers."""
    return layers.most_common(1)[0][0] if layers else "none"


def check_precision(engine: str, asked: NetworkPrecision, used: str, layers: Counter[str]) -> None:
    """Raise `UserError` if an engine compiled another precision than the one that was asked for."""
    if used != asked and not (asked == "int8" and layers["int8"]):  # int8 may leave most of a small network in float
        counted = ", ".join(f"{count} in {name}" for name, count in layers.most_common())
        raise UserError(
            f"engine {engine} compiled {used} although {asked} was asked for (convolutions: {counted}): this device does "
            f"not offer {asked}; use --precision {used}"
        )
