"""Devices and precisions by name."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager

import torch

from sparseinst.config import Precision
from sparseinst.errors import UserError

DTYPES: dict[str, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16}
"""Of the precisions that are types of their own."""


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


def autocast(device: torch.device, precision: Precision) -> AbstractContextManager[object]:
    """The context in which a model computes in that precision: fp32 switches any outer one off, and TF32 too."""
    kind = torch.autocast(device.type, dtype=DTYPES.get(precision, torch.float32), enabled=precision in DTYPES)
    if device.type != "cuda":
        return kind
    both = ExitStack()
    both.enter_context(tf32(precision == "tf32"))
    both.enter_context(kind)
    return both


@contextmanager
def tf32(on: bool) -> Iterator[None]:
    """Whether a GPU may round the factors of float32 products to 10 bits; torch's own default is yes for convolutions."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = on
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before
