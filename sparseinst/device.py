"""Select devices and precisions by name."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager

import torch

from sparseinst.config import NetworkPrecision
from sparseinst.errors import UserError
from sparseinst.words import shorten

DTYPES: dict[str, torch.dtype] = {"bf16": torch.bfloat16, "fp16": torch.float16}
"""The torch types of the half precisions."""


def arithmetic() -> dict[str, str | int]:
    """Return what the result of a computation on this machine depends on besides the code, for records.

    Returns:
        `threads` that one operation uses, the processor's `instructions` that torch uses, and its `blas` libraries.
    """
    lines = [line.strip(" -") for line in torch.__config__.show().splitlines()]
    libraries = [line for line in lines if line.startswith(("Intel(R)", "OpenBLAS", "CuDNN", "CUDA Runtime"))]
    return {
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "blas": "; ".join(line.partition(" (Git")[0].partition(" for Intel")[0] for line in libraries),
    }


def pick_device(name: str | None) -> torch.device:
    """Return the device with this name; for None, the first GPU if there is one, else the CPU.

    Raises:
        UserError: there is no such device.
    """
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.ones(1, device=device).item()  # `meta` holds no values, so it fails here
    except (RuntimeError, AssertionError, ImportError, AttributeError) as error:
        raise UserError(
            f"device {name!r} cannot be used: {shorten(str(error).splitlines()[0])}; use cpu, cuda or cuda:1"
        ) from None
    return device


def autocast(device: torch.device, precision: NetworkPrecision) -> AbstractContextManager[object]:
    """Return the context in which a model computes in this precision. `fp32` also switches an outer autocast and TF32 off.

    `int8` is no torch type; it changes nothing here.
    """
    cast = torch.autocast(device.type, dtype=DTYPES.get(precision, torch.float32), enabled=precision in DTYPES)
    if device.type != "cuda":
        return cast
    contexts = ExitStack()
    contexts.enter_context(tf32(precision == "tf32"))
    contexts.enter_context(cast)
    return contexts


@contextmanager
def tf32(on: bool) -> Iterator[None]:
    """Set whether a GPU may round the factors of float32 products to 10 bits. By default, torch allows it for convolutions."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = on
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before
