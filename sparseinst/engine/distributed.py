"""What a process knows of the others. Without torch.distributed there is one."""

from __future__ import annotations

import torch
from torch import distributed

from sparseinst.criterion import Counts


def world_size() -> int:
    return distributed.get_world_size() if distributed.is_available() and distributed.is_initialized() else 1


def rank() -> int:
    return distributed.get_rank() if world_size() > 1 else 0


def mean_counts(counts: list[Counts], device: torch.device) -> Counts:
    """The mean over the parts of one optimiser step and over all processes."""
    mean = torch.tensor(counts, dtype=torch.float64).mean(0)
    if world_size() > 1:
        mean = mean.to(device)
        distributed.all_reduce(mean)
        mean /= world_size()
    return Counts(*mean.tolist())
