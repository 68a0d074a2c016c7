"""Define the errors that a user can cause. Each message is one line: the place, the problem, and a remedy."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager


class UserError(Exception):
    """The input is not valid: a setting, a path or a file. The command line prints the message and exits with 2."""


class DataError(UserError):
    """An annotation file or an image cannot be used. The message names the file."""


class AnnotationsRefused(DataError):
    """An annotation file has entries that nothing can be read from. The message names the first one."""

    def __init__(self, problems: Sequence[str]) -> None:
        more = f" (and {len(problems) - 1} more, which `sparseinst data check` lists)" if len(problems) > 1 else ""
        super().__init__(problems[0] + more)
        self.problems = list(problems)
        """One line for each such entry."""


class RunFailed(Exception):
    """A run failed after it had started. The command line prints the message and exits with 1."""


@contextmanager
def memory_explained(remedy: str) -> Iterator[None]:
    """Turn an out-of-memory error, on the CPU or on a GPU, into a `RunFailed` that says which settings to lower.

    Args:
        remedy: the settings to lower, as a sentence's second half.
    """
    try:
        yield
    except (RuntimeError, MemoryError, ValueError) as error:
        if (problem := out_of_memory(error)) is None:
            raise
        raise RunFailed(f"{problem}: {remedy}") from error


def out_of_memory(error: BaseException) -> str | None:
    """Return the part of the message about the missing memory; None if the error has another cause.

    torch has its own error class for GPU memory, and raises a plain RuntimeError for CPU memory. numpy uses MemoryError, and
    ValueError for arrays that no machine can address.
    """
    text = str(error)
    if not isinstance(error, MemoryError) and type(error).__name__ != "OutOfMemoryError" and not _MEMORY.search(text):
        return None
    found = re.search(r"allocate (?:more than )?([\d.]+) ?(bytes|[KMGTPE]iB)", text)
    if found is None:
        return "out of memory"
    number, unit = found.groups()
    wanted = f"{int(number) / 2**30:.1f} GiB" if unit == "bytes" else f"{number} {unit}"
    return f"out of memory: {wanted} more were needed"


_MEMORY = re.compile(
    "DefaultCPUAllocator|[Ss]torage size calculation overflowed|integer multiplication overflow|bad_alloc|"
    "array is too big|Maximum allowed (dimension|size) exceeded|numel: integer"
)
"""Parts of torch's and numpy's messages for sizes that cannot be allocated."""


def device_failed(error: BaseException) -> bool:
    """Return whether a GPU or its driver caused the error. Older versions of torch have no error class for this."""
    return type(error).__name__ == "AcceleratorError" or (isinstance(error, RuntimeError) and bool(_DEVICE.search(str(error))))


_DEVICE = re.compile(r"\b(CUDA|HIP|XPU|MPS|NVIDIA|NCCL|cuDNN|(CUBLAS|CUDNN|CUSOLVER|CUFFT)_STATUS\w*)\b")
"""Names in torch's messages about a device that fails."""
