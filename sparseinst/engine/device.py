"""Devices and precisions by name."""

from __future__ import annotations

import torch

from sparseinst.config import Precision
from sparseinst.errors import UserError

_DTYPES: dict[str, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16}


def pick_device(name: str | None) -> torch.device:
    """The device called `name`; the first GPU, where there is one, for None. Raises `UserError` for one that is not there."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {name!r} cannot be used: {str(error).splitlines()[0]}") from None
    return device


def autocast(device: torch.device, precision: Precision) -> torch.autocast:
    """The context in which a model computes in that precision; fp32 switches any outer one off."""
    return torch.autocast(device.type, dtype=_DTYPES.get(precision, torch.float32), enabled=precision != "fp32")
