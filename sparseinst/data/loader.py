"""Images and instances as batches, in an order that can be resumed exactly.

B images of a batch, K instances of one image, H W height and width in pixels.
"""

from __future__ import annotations

import signal
import traceback
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, Sampler

from sparseinst.config import SIZE_DIVISOR, DataConfig, InferenceConfig, TrainConfig
from sparseinst.data.coco import CocoSplit, ImageRecord, read_image
from sparseinst.data.transforms import Sample, as_segment, augment, rasterise, resize_image, short_side_size
from sparseinst.errors import DataError

PREFETCH = 4
"""Batches under way for each worker."""


class Draw(NamedTuple):
    """One use of an image in training."""

    image: int
    """Index of the image."""
    number: int
    """How many images were drawn before, in all epochs; seeds the augmentation, whichever worker or process does it."""


class Example(NamedTuple):
    image: Tensor
    """(3, H, W) uint8 RGB."""
    labels: Tensor
    """(K,) int64."""
    masks: Tensor
    """(K, H, W) uint8, 0 or 1; of a `TrainSet` with a stride, in quarters, see `rasterise`."""
    record: ImageRecord
    skipped: tuple[str, ...]
    """Why images before this one were left out."""


class Batch(NamedTuple):
    images: Tensor
    """(B, 3, H, W) uint8 RGB, padded at the right and bottom to the largest image and a multiple of 32."""
    sizes: list[tuple[int, int]]
    """Height and width of each image without the padding."""
    labels: list[Tensor]
    masks: list[Tensor]
    """Of each image (K, h, w) uint8, without the padding; with a stride, in quarters, see `rasterise`."""
    records: list[ImageRecord]
    skipped: list[str]

    @property
    def padded(self) -> tuple[int, int]:
        return self.images.shape[-2], self.images.shape[-1]

    def padded_to(self, size: tuple[int, int]) -> Batch:
        """The same, padded further at the right and bottom."""
        (height, width), (old_height, old_width) = size, self.padded
        return self._replace(images=F.pad(self.images, (0, width - old_width, 0, height - old_height)))


class TrainSet(Dataset[Example]):
    """Augmented training images; crowds are left out. Indexed by `Draw`.

    Args:
        stride: of the masks that the model predicts, where it is even: masks then come at that size, and need no more than be
            moved. 1 for masks of the image's size.
    """

    def __init__(self, split: CocoSplit, config: DataConfig, seed: int, stride: int = 1) -> None:
        self.split = split.with_instances()
        self.config = config
        self.seed = seed
        self.stride = stride
        if not self.split.images:
            raise DataError(f"{split.file}: no image holds an instance to train on")

    def __len__(self) -> int:
        return len(self.split.images)

    def __getitem__(self, draw: Draw) -> Example:
        random = np.random.default_rng((self.seed, draw.number))
        skipped: list[str] = []
        for step in range(len(self)):
            record = self.split.images[(draw.image + step) % len(self)]
            try:
                sample = augment(read_sample(record, self.split), self.config, random)
            except DataError as error:
                if self.config.on_bad_image == "error":
                    raise DataError(f"{error}; data.on_bad_image=skip leaves such images out") from None
                skipped.append(str(error))
                continue
            labels, masks = rasterise(sample, self.stride)
            image = torch.from_numpy(sample.image).permute(2, 0, 1)
            return Example(image, torch.from_numpy(labels), torch.from_numpy(masks), record, tuple(skipped))
        raise DataError(f"{self.split.file}: not one of its {len(self)} images can be read, the first: {skipped[0]}")


class EvalSet(Dataset[Example]):
    """Images at their test size, without instances; of `parts` shares that together hold every image once, one."""

    def __init__(
        self, split: CocoSplit, config: DataConfig, inference: InferenceConfig, *, part: int = 0, parts: int = 1
    ) -> None:
        self.images = split.images[part::parts]
        self.on_bad_image = config.on_bad_image
        self.inference = inference

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Example:
        record = self.images[index]
        labels = torch.zeros(0, dtype=torch.int64)
        try:
            image = read_image(record.path, (record.height, record.width))
        except DataError as error:
            if self.on_bad_image == "error":
                raise DataError(f"{error}; data.on_bad_image=skip leaves such images out") from None
            nothing = torch.zeros((3, 1, 1), dtype=torch.uint8)
            return Example(nothing, labels, nothing[:0], record, (str(error),))
        size = short_side_size(image.height, image.width, *self.inference.sides())
        pixels = torch.from_numpy(np.array(resize_image(image, size))).permute(2, 0, 1)
        return Example(pixels, labels, torch.zeros((0, *size), dtype=torch.uint8), record, ())


def read_sample(record: ImageRecord, split: CocoSplit) -> Sample:
    """An image with its instances, crowds left out. Raises `DataError`."""
    image = read_image(record.path, (record.height, record.width))
    annotations = [annotation for annotation in record.annotations if not annotation.crowd]
    segments = []
    for annotation in annotations:
        try:
            segments.append(as_segment(annotation.segmentation, record.height, record.width))
        except (ValueError, TypeError) as error:
            raise DataError(f"{split.file}: annotation {annotation.id}: segmentation: {error}") from None
    return Sample(np.array(image), segments, np.array([a.label for a in annotations], dtype=np.int64))


class BatchOrder(Sampler[list[Draw]]):
    """The parts of batches that one process takes, from optimiser step `start` on.

    Each epoch is shuffled anew; images are gathered with those of like orientation, so that little is padded. The order
    depends on the seed and the batch alone: not on the workers, and not on the number of processes. A batch is cut into as many
    parts as there are processes x accumulated passes, the same parts whoever takes them.
    """

    def __init__(
        self,
        split: CocoSplit,
        config: TrainConfig,
        *,
        start: int = 0,
        accumulate: int | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.wide = [image.width > image.height for image in split.images]
        self.config = config
        self.start, self.rank = start, rank
        self.accumulate = accumulate or config.accumulate
        self.parts = world_size * self.accumulate
        if config.batch_size % self.parts:
            raise DataError(
                f"train.batch_size={config.batch_size} cannot be shared by {world_size} processes x "
                f"{self.accumulate} accumulated parts"
            )

    def __len__(self) -> int:
        return (self.config.iterations - self.start) * self.accumulate

    def __iter__(self) -> Iterator[list[Draw]]:
        for step, batch in zip(range(self.config.iterations), self._batches(), strict=False):
            if step < self.start:
                continue
            for part in range(self.rank * self.accumulate, (self.rank + 1) * self.accumulate):
                yield batch[part :: self.parts]

    def _batches(self) -> Iterator[list[Draw]]:
        waiting: dict[bool, list[Draw]] = {False: [], True: []}
        count, epoch = len(self.wide), 0
        while True:
            order = np.random.default_rng((self.config.seed, epoch)).permutation(count).tolist()
            for position, image in enumerate(order):
                group = waiting[self.wide[image]]
                group.append(Draw(image, epoch * count + position))
                if len(group) == self.config.batch_size:
                    yield group.copy()
                    group.clear()
            epoch += 1


class Loader:
    """A `DataLoader` whose workers hand over what went wrong instead of raising it: `DataError` arrives as it is.

    What torch raises anew keeps its iterator alive, and with it the workers, which are deaf (see `_settle`): the process would
    never end.
    """

    def __init__(self, dataset: Dataset[Example], workers: int, pin_memory: bool, **kwargs: Any) -> None:
        self._loader: DataLoader[Any] = DataLoader(
            _Handing(dataset),
            collate_fn=_collate_or_hand,
            num_workers=workers,
            pin_memory=pin_memory,
            worker_init_fn=_settle,
            prefetch_factor=PREFETCH if workers else None,
            **kwargs,
        )

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Batch]:
        for batch in self._loader:
            if isinstance(batch, Exception):
                raise batch
            yield batch


class _Handing(Dataset[Example | Exception]):
    def __init__(self, dataset: Dataset[Example]) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)  # type: ignore[arg-type] # ours have lengths

    def __getitem__(self, index: Any) -> Example | Exception:
        try:
            return self.dataset[index]
        except DataError as error:
            return error.with_traceback(None)
        except Exception as error:  # noqa: BLE001 (raised where the batch is taken)
            return RuntimeError("".join(traceback.format_exception(error)))


def _collate_or_hand(examples: Sequence[Example | Exception]) -> Batch | Exception:
    for example in examples:
        if isinstance(example, Exception):
            return example
    return collate([example for example in examples if isinstance(example, Example)])


def collate(examples: Sequence[Example]) -> Batch:
    sizes = [(example.image.shape[1], example.image.shape[2]) for example in examples]
    height, width = (-(-max(side) // SIZE_DIVISOR) * SIZE_DIVISOR for side in zip(*sizes, strict=True))
    images = torch.zeros((len(examples), 3, height, width), dtype=torch.uint8)
    for image, example, (h, w) in zip(images, examples, sizes, strict=True):
        image[:, :h, :w] = example.image
    return Batch(
        images,
        sizes,
        [example.labels for example in examples],
        [example.masks for example in examples],
        [example.record for example in examples],
        [reason for example in examples for reason in example.skipped],
    )


def train_loader(dataset: TrainSet, order: BatchOrder, *, pin_memory: bool) -> Loader:
    """Batches in the order given; each item is one part of one optimiser step."""
    return Loader(dataset, dataset.config.workers, pin_memory, batch_sampler=order)


def eval_loader(dataset: EvalSet, workers: int, *, pin_memory: bool) -> Loader:
    """One image at a time, as the reference evaluates: padding would change what the network sees."""
    return Loader(dataset, workers, pin_memory, batch_size=1)


def _settle(_: int) -> None:
    """One thread; and deaf: a scheduler sends its warnings to every process of a job, and which of them ends it is not a
    worker's to say. A worker ends when its loader does, or its parent."""
    torch.set_num_threads(1)
    for name in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGCONT, signal.SIGTERM):
        signal.signal(name, signal.SIG_IGN)
