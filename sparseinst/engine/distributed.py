"""What a process knows of the others, and what they do together. Without torch.distributed there is one.

Gradients are averaged in one fixed order after the backward pass. DistributedDataParallel sums them in buckets that it arranges
anew after the first step, so that a resumed run would add in another order than one that was never stopped.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import groupby
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed, nn

from sparseinst.criterion import Counts

T = TypeVar("T")


@contextmanager
def group(address: str, rank: int, world_size: int, *, timeout_seconds: float) -> Iterator[None]:
    """Be one of `world_size` processes that meet at host:port; NCCL where there are GPUs, gloo for the rest.

    Raises:
        RuntimeError: the others did not come, or one of them went away.
    """
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    timeout = datetime.timedelta(seconds=timeout_seconds)
    distributed.init_process_group(backend, init_method=f"tcp://{address}", rank=rank, world_size=world_size, timeout=timeout)
    yield
    # Not after an error: NCCL would wait for ranks that are gone. The process ends then.
    distributed.destroy_process_group()


def world_size() -> int:
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def rank() -> int:
    return distributed.get_rank() if world_size() > 1 else 0


def mean_counts(counts: list[Counts], device: torch.device) -> Counts:
    """The mean over the parts of one optimiser step and over all processes."""
    return Counts(*average(torch.tensor(counts, dtype=torch.float64).mean(0), device).tolist())


def average(values: Tensor, device: torch.device) -> Tensor:
    """The mean over all processes; returned on the device the values were on."""
    if world_size() == 1:
        return values
    total = values.to(device, copy=True)
    distributed.all_reduce(total)
    return (total / world_size()).to(values.device)


def largest(sizes: list[tuple[int, int]], device: torch.device) -> tuple[int, int]:
    """The greatest height and the greatest width of all processes' sizes."""
    greatest = torch.tensor(sizes).amax(0).to(device)
    if world_size() > 1:
        distributed.all_reduce(greatest, distributed.ReduceOp.MAX)
    height, width = greatest.tolist()
    return height, width


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replace every gradient by its mean over all processes."""
    if world_size() == 1:
        return
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    for _, alike in groupby(gradients, key=lambda gradient: gradient.dtype):
        tensors = list(alike)
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        distributed.all_reduce(flat)
        flat /= world_size()
        for tensor, mean in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(mean.view_as(tensor))


def same_for_all(value: T) -> T:
    """Rank 0's value."""
    if world_size() == 1:
        return value
    box = [value]
    distributed.broadcast_object_list(box, src=0)
    return box[0]


def gather(value: T) -> list[T]:
    """Every rank's value, in order of rank; on rank 0 alone, an empty list elsewhere."""
    if world_size() == 1:
        return [value]
    box: list[Any] = [None] * world_size()
    distributed.gather_object(value, box if rank() == 0 else None)
    return box if rank() == 0 else []


def share_norms(model: nn.Module) -> None:
    """Let every trainable BatchNorm of a model take its statistics over all processes' images."""
    for module in model.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = SharedBatchNorm2d


class _Sum(torch.autograd.Function):
    """Over all processes; each one's gradient is the sum of what all of them do with the result."""

    @staticmethod
    def forward(_: Any, values: Tensor) -> Tensor:
        total = values.clone()
        distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(_: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].contiguous().clone()
        distributed.all_reduce(total)
        return total


def _sum(values: Tensor) -> Tensor:
    total: Tensor = _Sum.apply(values)
    return total


class SharedBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm over all processes' batches. (torch's own, SyncBatchNorm, works on GPUs alone.)"""

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or world_size() == 1:
            return super().forward(input)
        own = input.float()  # B D H W
        size = own.new_full((1,), own.numel() / own.shape[1])
        total, count = _sum(torch.cat([own.sum((0, 2, 3)), size])).split([own.shape[1], 1])
        mean = total / count
        centred = own - mean[:, None, None]
        variance = _sum(centred.square().sum((0, 2, 3))) / count
        with torch.no_grad():
            assert self.running_mean is not None
            assert self.running_var is not None
            assert self.num_batches_tracked is not None
            assert self.momentum is not None
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * count / (count - 1), self.momentum)
        scale = self.weight * torch.rsqrt(variance + self.eps)
        return (centred * scale[:, None, None] + self.bias[:, None, None]).to(input.dtype)
