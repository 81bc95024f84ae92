"""`keep_freed_memory`: a process that has used memory keeps it for its next use, instead of giving it back.

glibc takes large blocks from the kernel and returns them when they are freed, so each exchange of rows on a CPU has its
buffers zeroed page by page anew. That costs as much as the exchange's own copies: of 140 ms of a rank's time for 512
tokens of 7168 values and 8 experts, 55 ms. What is kept is the most that the process has ever used, and what lies
between: one that goes on with other sizes calls `return_freed_memory` first.

Rejected: a pool of buffers for rows. It would serve the exchange alone, and not the products between its two halves.
"""

import ctypes
import sys

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of malloc.h
NEVER = -1


def keep_freed_memory() -> bool:
    """For the whole process, from now on; for ranks on CPUs. Whether that is so: it needs glibc, and is harmless."""
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(M_MMAP_MAX, 0)) and bool(mallopt(M_TRIM_THRESHOLD, NEVER))


def return_freed_memory() -> None:
    """Gives the kernel what this process has freed so far and kept; later uses take it anew, once."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform.startswith("linux") else None
    if trim is not None:
        trim(0)
