"""Select devices and precisions by name."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext

import torch

from sparseinst.config import NetworkPrecision
from sparseinst.errors import UserError
from sparseinst.half_products import InFloat32, torch_is_fast
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
    dtype = DTYPES.get(precision, torch.float32)
    contexts = ExitStack()
    contexts.enter_context(tf32(precision == "tf32") if device.type == "cuda" else fast_products(device, precision))
    contexts.enter_context(torch.autocast(device.type, dtype=dtype, enabled=precision in DTYPES))
    return contexts


def fast_products(device: torch.device, precision: NetworkPrecision) -> AbstractContextManager[object]:
    """Return the context in which products of this precision are fast even if torch's own are slow on this device.

    `autocast` contains it; a backward pass needs it, too. A caller must not compile or export a model in it, see `InFloat32`.
    """
    return nullcontext() if is_native(device, precision) else InFloat32(DTYPES[precision])


def is_native(device: torch.device, precision: NetworkPrecision) -> bool:
    """Say whether torch's own products of this precision are fast on this device."""
    return precision not in DTYPES or torch_is_fast(device, DTYPES[precision])


def why_not_native(precision: NetworkPrecision) -> str:
    """Return what a user should know before using this precision where it is not native."""
    return (
        f"torch has no fast {precision} on this CPU, so {precision} is computed in float32 and rounded, which is slower than fp32"
    )


@contextmanager
def tf32(on: bool) -> Iterator[None]:
    """Set whether a GPU may round the factors of float32 products to 10 bits. By default, torch allows it for convolutions."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = on
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before
