"""The instances that a model found in one image, as numpy arrays. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from sparseinst.errors import UserError
from sparseinst.inference.compact import CompactMasks
from sparseinst.words import counted, install_extra

if TYPE_CHECKING:
    from supervision import Detections

M = TypeVar("M", NDArray[np.bool_], CompactMasks)
"""The form of the masks."""


@dataclass(frozen=True, repr=False)
class Found(Generic[M]):
    """The K instances that the model found in one image, best score first."""

    scores: NDArray[np.float32]
    """(K,), in [0, 1]."""
    labels: NDArray[np.int64]
    """(K,), indices into `Predictor.categories`."""
    masks: M
    """(K, H, W), at the image's own size."""
    names: list[str]
    """The K category names."""
    maps: NDArray[np.int64]
    """(K,), the index of the instance activation map, out of N, that found each instance."""
    activations: NDArray[np.float32] | None = None
    """(K, h, w), in [0, 1]: the response of each instance's map over the image without its padding, averaged over the map's
    groups; zeros outside the instance's tile. None unless it was requested. If the maps of fewer instances were requested, the
    array holds only these."""
    highest: float | None = None
    """The highest score in the image, also if it was left out; None if no map has a score above `inference.score_threshold`."""
    before_top: int = 0
    """The number of instances at the requested score, before `top` left some out."""
    full: bool = False
    """Whether every map found an instance at the requested score, in the image or in one of its tiles. There may be more."""

    def __len__(self) -> int:
        """Return K, the number of instances."""
        return len(self.scores)

    def __repr__(self) -> str:
        """Return the number of instances, the image's height and width, and the range of the scores."""
        count, height, width = self.masks.shape
        text = f"{counted(count, 'instance')} in {height} x {width}"
        if count == 0:
            return text
        best, worst = f"{self.scores.max():.2f}", f"{self.scores.min():.2f}"
        return f"{text}, score {best}" if count == 1 else f"{text}, scores {best} to {worst}"


class FoundInstances(Found[NDArray[np.bool_]]):
    """Instances whose masks are a boolean array."""

    def boxes(self) -> NDArray[np.float32]:
        """Return the box of each mask, (K, 4): left, top, right, bottom, as edges of pixels; zeros for an empty mask."""
        found = np.zeros((len(self.masks), 4), np.float32)
        for box, mask in zip(found, self.masks, strict=True):
            rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
            if len(rows):
                box[:] = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
        return found

    def to_supervision(self) -> Detections:
        """Return the instances as `supervision.Detections`: boxes of the masks, masks, scores, class ids and class names.

        Raises:
            UserError: the package `supervision` is not installed.
        """
        try:
            import supervision
        except ModuleNotFoundError as error:
            if error.name != "supervision":
                raise
            raise UserError(f"to_supervision needs the package supervision: {install_extra('supervision')}") from None
        return supervision.Detections(
            xyxy=self.boxes(),
            mask=self.masks,
            confidence=self.scores,
            class_id=self.labels.astype(int),
            data={"class_name": np.array(self.names, dtype=str), "map": self.maps},
        )


class CompactInstances(Found[CompactMasks]):
    """Instances whose masks are kept as runs, which need little memory."""
