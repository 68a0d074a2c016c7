"""Load images and instances in batches, in an order that can be resumed exactly.

B images of a batch, K instances of one image, H W height and width in pixels.
"""

from __future__ import annotations

import itertools
import signal
import traceback
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, Sampler

from sparseinst.config import DataConfig, InferenceConfig, OptimizerConfig
from sparseinst.data.augmentation import augment, paste
from sparseinst.data.coco import CocoSplit, ImageRecord
from sparseinst.data.images import read_image
from sparseinst.data.network_input import at_test_size, cut, image_tiles, pad
from sparseinst.data.objects import Objects, read_segments
from sparseinst.data.tiles import Tile, random_tile
from sparseinst.data.transforms import Sample, rasterise
from sparseinst.errors import DataError

PREFETCH = 4
"""The number of batches that each worker prepares in advance."""


class Draw(NamedTuple):
    """One use of an image in training."""

    image: int
    """Index of the image."""
    number: int
    """The number of images that were drawn before, in all epochs. It seeds the augmentation, so that this does not depend on the
    worker or the process."""


class Example(NamedTuple):
    image: Tensor
    """(3, H, W) uint8 RGB."""
    labels: Tensor
    """(K,) int64."""
    masks: Tensor
    """(K, ceil(H / mask_stride), ceil(W / mask_stride)) uint8: 0 or 1 for a stride of 1, else in quarters, see `rasterise`."""
    record: ImageRecord
    skipped: tuple[str, ...]
    """The reasons why images before this one were left out."""
    mask_stride: int = 1
    pasted: int = 0
    """The number of instances that were pasted from another image; they are the last ones."""
    tile: Tile | None = None
    """The part of the image that this is, in evaluation."""


class Batch(NamedTuple):
    images: Tensor
    """(B, 3, H, W) uint8 RGB, padded at the right and bottom to the largest image's sides and to a multiple of 32."""
    sizes: list[tuple[int, int]]
    """Height and width of each image without the padding."""
    labels: list[Tensor]
    """The labels (K,) int64 of each image."""
    masks: list[Tensor]
    """The masks of each image without the padding, see `Example`."""
    records: list[ImageRecord]
    skipped: list[str]
    mask_stride: int = 1
    """The factor by which the masks are smaller than the images."""
    tiles: Sequence[Tile] = ()
    """The part of the image that each input is; empty in training."""

    @property
    def padded(self) -> tuple[int, int]:
        return self.images.shape[-2], self.images.shape[-1]

    def padded_to(self, size: tuple[int, int]) -> Batch:
        """Return the batch with more padding at the right and bottom."""
        (height, width), (old_height, old_width) = size, self.padded
        return self._replace(images=F.pad(self.images, (0, width - old_width, 0, height - old_height)))


class TrainSet(Dataset[Example]):
    """Augmented training images, or random tiles of them, without crowds, indexed by `Draw`.

    Args:
        mask_stride: the masks are downsampled by this factor: the even stride of the masks that the model predicts, or 1 to keep
            the image's size.
    """

    def __init__(self, split: CocoSplit, config: DataConfig, seed: int, mask_stride: int = 1) -> None:
        self.split = split.with_instances()
        self.config = config
        self.seed = seed
        self.mask_stride = mask_stride
        if not self.split.images:
            raise DataError(f"{split.file}: no image holds an instance to train on")

    def __len__(self) -> int:
        return len(self.split.images)

    def __getitem__(self, draw: Draw) -> Example:
        random = np.random.default_rng((self.seed, draw.number))
        skipped: list[str] = []
        for step in range(len(self)):
            record = self.split.images[(draw.image + step) % len(self)]
            sample = self._augmented(record, random, skipped)
            if sample is None:
                continue
            pasted = 0
            if self.config.copy_paste and random.random() < self.config.copy_paste:
                source = self._augmented(self.split.images[int(random.integers(len(self)))], random, skipped)
                if source is not None:
                    sample, pasted = paste(sample, source, random)
            labels, masks = (torch.from_numpy(values) for values in rasterise(sample, self.mask_stride))
            image = torch.from_numpy(sample.image).permute(2, 0, 1)
            return Example(image, labels, masks, record, tuple(skipped), self.mask_stride, pasted)
        raise DataError(f"{self.split.file}: none of its {len(self)} images can be read; the first: {skipped[0]}")

    def _augmented(self, record: ImageRecord, random: np.random.Generator, skipped: list[str]) -> Sample | None:
        """Return an augmented image; None, with a reason in `skipped`, if it is unreadable and may be left out."""
        side = self.config.tile
        tile = random_tile((record.height, record.width), side, random) if side is not None else None
        try:
            return augment(read_sample(record, self.split, tile), self.config, random)
        except DataError as error:
            if self.config.on_bad_image == "error":
                raise DataError(f"{error}; data.on_bad_image=skip leaves such images out") from None
            skipped.append(str(error))
            return None


class EvalSet(Dataset[Example]):
    """Images at their test size, without instances. An image that is segmented in tiles is as many items, one after the other.

    Args:
        part: which of the `parts` shares this is. The shares together hold every image once.
    """

    def __init__(
        self, split: CocoSplit, config: DataConfig, inference: InferenceConfig, *, part: int = 0, parts: int = 1
    ) -> None:
        self.images = split.images[part::parts]
        self.tiles = [
            (index, tile)
            for index, record in enumerate(self.images)
            for tile in image_tiles((record.height, record.width), inference)
        ]
        self._read: tuple[int, Image.Image | DataError] | None = None
        """The last image, or why it is unreadable, and its index: its other tiles come next."""
        self.on_bad_image = config.on_bad_image
        self.inference = inference

    def __len__(self) -> int:
        return len(self.tiles)

    def __getitem__(self, index: int) -> Example:
        number, tile = self.tiles[index]
        record = self.images[number]
        labels = torch.zeros(0, dtype=torch.int64)
        try:
            image = self._image(number)
        except DataError as error:
            if self.on_bad_image == "error":
                raise DataError(f"{error}; data.on_bad_image=skip leaves such images out") from None
            nothing = torch.zeros((3, 1, 1), dtype=torch.uint8)
            return Example(nothing, labels, nothing[:0], record, (str(error),), tile=tile)
        pixels = at_test_size(cut(image, tile), self.inference)
        return Example(pixels, labels, torch.zeros((0, *pixels.shape[1:]), dtype=torch.uint8), record, (), tile=tile)

    def _image(self, number: int) -> Image.Image:
        if self._read is None or self._read[0] != number:
            record = self.images[number]
            try:
                self._read = number, read_image(record.path, (record.height, record.width))
            except DataError as error:
                self._read = number, error.with_traceback(None)
        if isinstance(self._read[1], DataError):
            raise self._read[1]
        return self._read[1]


def read_sample(record: ImageRecord, split: CocoSplit, tile: Tile | None = None) -> Sample:
    """Read an image and its instances without crowds; with a tile, this part of them. Raises `DataError`."""
    image = read_image(record.path, (record.height, record.width))
    if tile is None:
        return Sample(np.array(image), *read_segments(record, split))
    part = Objects(record, split).inside(tile)
    return Sample(np.array(cut(image, tile)), part.segments, part.labels)


class BatchOrder(Sampler[list[Draw]]):
    """The parts of batches that one process uses, from optimiser step `start` on.

    Each epoch is shuffled anew. A batch holds wide images only or tall images only, so that little is padded. With `by_part`,
    this holds for each part alone, as in the reference, whose processes group their own images. The order depends only on the
    seed and the batch size, and with `by_part` on the number of parts, but never on the number of workers or processes.

    Args:
        parts: the number of parts into which each batch is split, whichever process uses them.
        by_part: let the parts of one batch differ in their orientation.

    Raises:
        DataError: a batch cannot be split into so many parts, or these cannot be divided among the processes.
    """

    def __init__(
        self,
        split: CocoSplit,
        config: OptimizerConfig,
        *,
        start: int = 0,
        parts: int = 1,
        rank: int = 0,
        world_size: int = 1,
        by_part: bool = False,
    ) -> None:
        self.wide = [image.width > image.height for image in split.images]
        self.config = config
        self.start = start
        self.parts, self.by_part = parts, by_part
        self.passes = parts // world_size
        """The number of parts that each process computes in one optimiser step."""
        self.own = range(rank * self.passes, (rank + 1) * self.passes)
        """The parts of each batch that this process computes."""
        if parts % world_size or config.batch_size % parts:
            raise DataError(
                f"a batch of {config.batch_size} images cannot be split into {parts} parts "
                f"that {world_size} processes share equally"
            )

    def __len__(self) -> int:
        return (self.config.iterations - self.start) * self.passes

    def __iter__(self) -> Iterator[list[Draw]]:
        for step, batch in zip(range(self.config.iterations), self._batches(), strict=False):
            if step < self.start:
                continue
            for part in self.own:
                yield batch[part]

    def _batches(self) -> Iterator[list[list[Draw]]]:
        """Yield the parts of each batch."""
        if self.by_part:
            groups = self._groups(self.config.batch_size // self.parts)
            while True:
                yield list(itertools.islice(groups, self.parts))
        for group in self._groups(self.config.batch_size):
            yield [group[part :: self.parts] for part in range(self.parts)]

    def _groups(self, size: int) -> Iterator[list[Draw]]:
        """Yield groups of this many images of one orientation."""
        waiting: dict[bool, list[Draw]] = {False: [], True: []}
        count, epoch = len(self.wide), 0
        while True:
            order = np.random.default_rng((self.config.seed, epoch)).permutation(count).tolist()
            for position, image in enumerate(order):
                group = waiting[self.wide[image]]
                group.append(Draw(image, epoch * count + position))
                if len(group) == size:
                    yield group.copy()
                    group.clear()
            epoch += 1


class Loader:
    """A `DataLoader` whose workers return their errors as values; the loader then raises them in the main process.

    An error that torch itself raises again keeps its iterator alive, and with it the workers, which ignore signals (see
    `_start_worker`). The process would then never end.
    """

    def __init__(self, dataset: Dataset[Example], workers: int, pin_memory: bool, **kwargs: Any) -> None:
        self._loader: DataLoader[Any] = DataLoader(
            _ErrorReturningSet(dataset),
            collate_fn=_collate_or_return_error,
            num_workers=workers,
            pin_memory=pin_memory,
            worker_init_fn=_start_worker,
            prefetch_factor=PREFETCH if workers else None,
            **kwargs,
        )

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Batch]:
        for batch in self._start():  # no name refers to the iterator, so an error does not keep it alive
            if isinstance(batch, Exception):
                raise batch
            yield batch

    def _start(self) -> Iterator[Any]:
        """Start the workers, which inherit the main process's signal handlers, with signals blocked until they ignore them."""
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _SCHEDULER_SIGNALS)
        try:
            return iter(self._loader)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _ErrorReturningSet(Dataset[Example | Exception]):
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


def _collate_or_return_error(examples: Sequence[Example | Exception]) -> Batch | Exception:
    for example in examples:
        if isinstance(example, Exception):
            return example
    return collate([example for example in examples if isinstance(example, Example)])


def collate(examples: Sequence[Example]) -> Batch:
    """Return examples of one mask stride as a batch."""
    sizes = [(example.image.shape[1], example.image.shape[2]) for example in examples]
    return Batch(
        pad([example.image for example in examples]),
        sizes,
        [example.labels for example in examples],
        [example.masks for example in examples],
        [example.record for example in examples],
        [reason for example in examples for reason in example.skipped],
        examples[0].mask_stride,
        [example.tile for example in examples if example.tile is not None],
    )


def train_loader(dataset: TrainSet, order: BatchOrder, *, pin_memory: bool) -> Loader:
    """Load batches in the given order. Each item is one part of one optimiser step."""
    return Loader(dataset, dataset.config.workers, pin_memory, batch_sampler=order)


def eval_loader(dataset: EvalSet, workers: int, *, pin_memory: bool) -> Loader:
    """Load one image or tile at a time, as the reference evaluates: the padding of a batch would change the network's input."""
    return Loader(dataset, workers, pin_memory, batch_size=1)


_SCHEDULER_SIGNALS = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGCONT, signal.SIGTERM)


def _start_worker(_: int) -> None:
    """Use one thread, and ignore the scheduler's signals, which the main process handles.

    A worker ends when its loader or its parent process ends.
    """
    torch.set_num_threads(1)
    for name in _SCHEDULER_SIGNALS:
        signal.signal(name, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SCHEDULER_SIGNALS)
