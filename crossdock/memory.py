"""What a process asks of Linux and glibc for its memory on a CPU. Elsewhere all of it does nothing, and does no harm.

`use_huge_pages`: weights that are streamed stand on pages of 2 MiB. A product of few rows reads each weight once, and
on pages of 4 KiB it waits for their addresses as much as for the weights: 41 packed experts of 768x1024 and 1024x384
took 7.8 ms for 4 rows each on one core, and 5.9 ms on huge pages. The kernel copies what is there already, in about a
quarter of the time that packing a weight takes. Rejected: THP_MEM_ALLOC_ENABLE of torch and GLIBC_TUNABLES, which have
to be set before a process starts, and reach no weight below 2 MiB, which most packed experts are.

`keep_freed_memory`: what was used once is kept for its next use. glibc takes large blocks from the kernel and returns
them when they are freed, so each exchange of rows has its buffers zeroed page by page anew. That costs as much as the
exchange's own copies: of 140 ms of a rank's time for 512 tokens of 7168 values and 8 experts, 55 ms. What is kept is
the most that the process has ever used, and what lies between, which may grow: one that goes on with other sizes, or
finds that `memory_is_low`, calls `return_freed_memory`. Rejected: a pool of buffers for rows, which would serve the
exchange alone, and not the products between its two halves.
"""

import ctypes
import mmap
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

MADV_HUGEPAGE, MADV_COLLAPSE = 14, 25  # of linux/mman.h; the second is known from 6.1 on
HUGE = 1 << 21  # bytes
HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")  # "always [madvise] never", the choice in brackets
MEMINFO = Path("/proc/meminfo")
LOW = 1 / 6
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of malloc.h
NEVER = -1
SMALLEST, LARGEST_STRIP, KEPT_OF_A_SIZE = 24, 256, 7  # bytes, and glibc.malloc.tcache_count


def use_huge_pages(tensors: Iterable[Tensor]) -> int:
    """Moves what is on a CPU to huge pages, values and addresses unchanged; gives how many bytes can be on them.

    Tensors may be packed (`crossdock.linear.pack`) and are best given together: small ones share pages where they
    touch. 0 where the system has no such pages, or is set to use none.
    """
    madvise = _of_libc("madvise")
    if madvise is None or not _has_huge_pages():
        return 0
    moved = 0
    for start, end in _ranges(tensors):
        madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), MADV_HUGEPAGE)
        start, end = -(-start // HUGE) * HUGE, end // HUGE * HUGE
        if end > start and not madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), MADV_COLLAPSE):
            moved += end - start
    return moved


def keep_freed_memory() -> bool:
    """For the whole process, from now on; for ranks on CPUs. Whether that is so: it needs glibc."""
    mallopt = _of_libc("mallopt")
    if mallopt is None or not (mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, NEVER)):
        return False
    _fill_small_bins()
    return True


def _fill_small_bins() -> None:
    """So that this thread's next small blocks to be freed join their neighbours at once.

    torch asks for blocks at multiples of 64 bytes. glibc cuts such a block out of a larger one, and frees the strips at
    its ends. As long as there is room the thread keeps strips of that size for itself: the large block, when it is
    freed, does not get them back, and an equal one no longer fits where it was.
    """
    malloc, free = _of_libc("malloc"), _of_libc("free")
    malloc.argtypes, malloc.restype, free.argtypes = (ctypes.c_size_t,), ctypes.c_void_p, (ctypes.c_void_p,)
    for size in range(SMALLEST, LARGEST_STRIP, 16):
        for block in [malloc(size) for _ in range(KEPT_OF_A_SIZE)]:
            free(block)


def return_freed_memory() -> None:
    """Gives the kernel what this process has freed so far and kept; later uses take it anew, once."""
    trim = _of_libc("malloc_trim")
    if trim is not None:
        trim(0)


def free_bytes() -> int:
    """What Linux says can be had without swapping; elsewhere nobody is asked, and anything fits."""
    return _meminfo().get("MemAvailable", 1 << 62)


def memory_is_low() -> bool:
    """Whether less than LOW of this machine's memory can be had."""
    return free_bytes() < LOW * _meminfo().get("MemTotal", 0)


def _meminfo() -> dict[str, int]:
    """Bytes by name."""
    try:
        lines = [line.split() for line in MEMINFO.read_text().splitlines()]
    except OSError:
        return {}
    return {name.removesuffix(":"): int(size) << 10 for name, size, *_ in lines}


def _of_libc(name: str) -> Any:
    """A function of the C library, None where it has no such."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform.startswith("linux") else None


def _has_huge_pages() -> bool:
    """MADV_COLLAPSE does not ask whether the machine's owner has switched them off."""
    try:
        return "[never]" not in HUGE_PAGES.read_text()
    except OSError:
        return False


def _ranges(tensors: Iterable[Tensor]) -> list[list[int]]:
    """First and last address of whole pages; one range where a tensor's first page is, or follows, another's last."""
    ranges: list[list[int]] = []
    for start, size in sorted(_place(tensor) for tensor in tensors if tensor.device.type == "cpu"):
        first, last = start // mmap.PAGESIZE * mmap.PAGESIZE, -(-(start + size) // mmap.PAGESIZE) * mmap.PAGESIZE
        if ranges and first <= ranges[-1][1]:
            ranges[-1][1] = max(last, ranges[-1][1])
        else:
            ranges.append([first, last])
    return ranges


def _place(tensor: Tensor) -> tuple[int, int]:
    if tensor.is_mkldnn:
        return int(torch.ops.mkldnn.data_ptr(tensor)), int(torch.ops.mkldnn._nbytes(tensor))
    storage = tensor.untyped_storage()
    return storage.data_ptr(), storage.nbytes()
