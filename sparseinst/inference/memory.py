"""Keep freed memory in the process, so that the next image reuses it. This module does not import torch.

On a CPU, glibc returns large freed blocks to the system, and the system clears every page before it hands the page out again.
Clearing takes a fifth of the time of a float32 image. (A preloaded allocator such as jemalloc keeps freed memory itself.
`mallopt` does not affect it.)
"""

from __future__ import annotations

import ctypes

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4
"""Parameters of `mallopt`, from malloc.h."""
_NEVER = -1


def keep_freed_memory() -> bool:
    """Keep freed memory in the process instead of returning it to the system, so that the process stays at its peak size.

    Returns:
        Whether the C library supports this; glibc does.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library, or the library cannot be opened
        return False
    return bool(mallopt(_MMAP_MAX, 0) and mallopt(_TRIM_THRESHOLD, _NEVER))
