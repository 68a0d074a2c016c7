"""Exchange data between the processes of a training. Without torch.distributed there is one process.

Gradients are averaged in a fixed order after the backward pass. DistributedDataParallel instead sums them in buckets, which it
rebuilds after the first step. A resumed run would then sum in another order than a run that was never stopped.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import groupby
from typing import Any, TypeVar

import torch
from timm.layers.norm_act import BatchNormAct2d
from torch import Tensor, distributed, nn

from sparseinst.criterion import Counts

T = TypeVar("T")


@contextmanager
def group(address: str, rank: int, world_size: int, *, timeout_seconds: float) -> Iterator[None]:
    """Join a group of `world_size` processes, which meet at `address` (host:port), while the block runs.

    NCCL transfers tensors on GPUs; gloo transfers the others.

    Raises:
        RuntimeError: another process did not join in time, or ended early.
    """
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    timeout = datetime.timedelta(seconds=timeout_seconds)
    distributed.init_process_group(backend, init_method=f"tcp://{address}", rank=rank, world_size=world_size, timeout=timeout)
    yield
    # This does not run after an error, because NCCL would wait for ranks that have ended. The process then ends anyway.
    distributed.destroy_process_group()


def world_size() -> int:
    """Return the number of processes."""
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def rank() -> int:
    """Return the number of this process, from 0."""
    return distributed.get_rank() if world_size() > 1 else 0


def mean_counts(counts: list[Counts], device: torch.device) -> Counts:
    """Return the mean counts over the parts of one optimiser step and over all processes."""
    return Counts(*average(torch.tensor(counts, dtype=torch.float64).mean(0), device).tolist())


def average(values: Tensor, device: torch.device) -> Tensor:
    """Return the mean over all processes, on the device of `values`.

    Args:
        device: where the processes exchange tensors.
    """
    if world_size() == 1:
        return values
    total = values.to(device, copy=True)
    distributed.all_reduce(total)
    return (total / world_size()).to(values.device)


def largest(sizes: list[tuple[int, int]], device: torch.device) -> tuple[int, int]:
    """Return the greatest height and the greatest width of all processes' sizes."""
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
    for _, same_type in groupby(gradients, key=lambda gradient: gradient.dtype):
        tensors = list(same_type)
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        distributed.all_reduce(flat)
        flat /= world_size()
        for tensor, mean in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(mean.view_as(tensor))


def same_for_all(value: T) -> T:
    """Return rank 0's value."""
    if world_size() == 1:
        return value
    values = [value]
    distributed.broadcast_object_list(values, src=0)
    return values[0]


def gather(value: T) -> list[T]:
    """Return every rank's value in the order of ranks on rank 0, and an empty list on the other ranks."""
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    distributed.gather_object(value, values if rank() == 0 else None)
    return values if rank() == 0 else []


def share_buffers(model: nn.Module) -> None:
    """Give the model of each process the buffers of rank 0's, such as the running means of its norms."""
    if world_size() > 1:
        for buffer in model.buffers():
            distributed.broadcast(buffer, src=0)


def share_norms(model: nn.Module) -> None:
    """Make every trainable BatchNorm of a model compute its statistics over all processes' images."""
    for module in model.modules():
        if type(module) in _SHARED:
            module.__class__ = _SHARED[type(module)]


class _Sum(torch.autograd.Function):
    """The sum over all processes. A process's gradient is the sum of all processes' gradients of the result."""

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
    """Return the sum over all processes."""
    total: Tensor = _Sum.apply(values)
    return total


class SharedBatchNorm2d(nn.BatchNorm2d):
    """A BatchNorm over all processes' batches. (torch's SyncBatchNorm works only on GPUs.)"""

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or world_size() == 1:
            return super().forward(input)
        x = input.float()  # B D H W
        size = x.new_full((1,), x.numel() / x.shape[1])
        total, count = _sum(torch.cat([x.sum((0, 2, 3)), size])).split([x.shape[1], 1])
        mean = total / count
        centred = x - mean[:, None, None]
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


class SharedBatchNormAct2d(SharedBatchNorm2d, BatchNormAct2d):
    """timm's BatchNorm with an activation, over all processes' batches."""

    def forward(self, input: Tensor) -> Tensor:
        x = super().forward(input)
        if not self.training or world_size() == 1:
            return x  # timm's forward has applied the activation
        activated: Tensor = self.act(self.drop(x))
        return activated


_SHARED: dict[type[nn.Module], type[nn.Module]] = {nn.BatchNorm2d: SharedBatchNorm2d, BatchNormAct2d: SharedBatchNormAct2d}
