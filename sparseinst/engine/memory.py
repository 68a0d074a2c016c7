"""What becomes of memory that is freed, on a processor. Imports no torch.

glibc hands large blocks back to the system, which clears every page of them before it gives them out again: a fifth of the time
of a float32 image. Kept, they serve the next image as they are. (Preloaded allocators, such as jemalloc, do the same and are
left alone: `mallopt` is not theirs.)
"""

from __future__ import annotations

import ctypes

_TRIM_THRESHOLD, _MMAP_MAX = -1, -4
"""Of malloc.h."""
_NEVER = -1


def keep_freed_memory() -> bool:
    """From now on the process keeps it, at the size of its peak; whether the C library can do that (glibc can)."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # another C library, or none that can be asked
        return False
    return bool(mallopt(_MMAP_MAX, 0) and mallopt(_TRIM_THRESHOLD, _NEVER))
