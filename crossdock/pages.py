"""`use_huge_pages`: weights that a CPU streams from memory stand on pages of 2 MiB.

A product of few rows reads each weight once, and on pages of 4 KiB it waits for their addresses as much as for the
weights: 41 packed experts of 768x1024 and 1024x384 took 7.8 ms for 4 rows each on one core, and 5.9 ms on huge pages.
The kernel copies what is there already, in about a quarter of the time that packing a weight takes.

Rejected: THP_MEM_ALLOC_ENABLE of torch and GLIBC_TUNABLES, which have to be set before a process starts, and reach no
weight below 2 MiB, which most packed experts are.
"""

import ctypes
import mmap
import sys
from collections.abc import Iterable

import torch
from torch import Tensor

MADV_HUGEPAGE, MADV_COLLAPSE = 14, 25  # of linux/mman.h; the second is known from 6.1 on
HUGE = 1 << 21  # bytes


def use_huge_pages(tensors: Iterable[Tensor]) -> int:
    """Moves what is on a CPU to huge pages, values and addresses unchanged; gives how many bytes can be on them.

    Tensors may be packed (`crossdock.linear.pack`) and are best given together: small ones share pages where they
    touch. Harmless where the system has no such pages or refuses: they are an optimisation.
    """
    madvise = getattr(ctypes.CDLL(None), "madvise", None) if sys.platform.startswith("linux") else None
    if madvise is None:
        return 0
    moved = 0
    for start, end in _ranges(tensors):
        madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), MADV_HUGEPAGE)
        start, end = -(-start // HUGE) * HUGE, end // HUGE * HUGE
        if end > start and not madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), MADV_COLLAPSE):
            moved += end - start
    return moved


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
