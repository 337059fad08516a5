"""Huge pages for tables that are read row by row at random."""

from __future__ import annotations

import ctypes
import functools
import sys
from collections.abc import Callable

import torch
from torch import Tensor

from .quantized_weight import Weight, weight_args

PAGE = 1 << 21
"""Bytes of a huge page with x86-64 and with AArch64's pages of 4 KiB."""
_HUGEPAGE, _COLLAPSE = 14, 25  # <linux/mman.h>


def advise_huge_pages(weight: Weight, *, collapse: bool = False) -> int:
    """Asks Linux to hold the memory of `weight` in pages of 2 MiB; the bytes that it agreed to.

    A random row of a table of gigabytes misses the processor's address cache with pages of 4 KiB,
    and waits for its page tables before it waits for the row: a lookup then takes up to twice as
    long. What `weight` was cut from is left alone but for the huge pages that `weight` covers
    whole.

    weight    a tensor or QuantizedWeight in the host's memory. Best before it is filled: pages
              that were not touched yet become huge where they are touched first.
    collapse  True: pages in use are copied together now (Linux 6.1; reads all of it once). False:
              the system may do so later, in its own time.

    0 where nothing can be asked: another system or device, less than one huge page, or memory that
    the system holds in other ways. Kernels never ask by themselves, as the memory is yours.

    *Source:* madvise(2), MADV_HUGEPAGE and MADV_COLLAPSE.
    """
    values, scales, zeros, _ = weight_args(weight)
    madvise = _madvise()
    agreed = 0
    for tensor in (values, scales, zeros):
        if madvise is None or tensor is None or tensor.device.type != "cpu":
            continue
        first, end = _span(tensor)
        first, end = -(-first // PAGE) * PAGE, end // PAGE * PAGE
        if first < end and madvise(first, end - first, _HUGEPAGE) == 0:
            agreed += end - first
            if collapse:
                madvise(first, end - first, _COLLAPSE)
    return agreed


def _span(tensor: Tensor) -> tuple[int, int]:
    """Addresses from the first to behind the last element."""
    if isinstance(tensor, torch._subclasses.FakeTensor) or tensor.numel() == 0:
        return 0, 0
    pairs = zip(tensor.shape, tensor.stride(), strict=True)
    last = sum((size - 1) * stride for size, stride in pairs)
    start = tensor.data_ptr()
    return start, start + (last + 1) * tensor.element_size()


@functools.cache
def _madvise() -> Callable[[int, int, int], int] | None:
    if not sys.platform.startswith("linux"):
        return None
    function = getattr(ctypes.CDLL(None), "madvise", None)
    if function is None:
        return None
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    function.restype = ctypes.c_int
    return function
