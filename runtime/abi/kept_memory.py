"""Memory of large outputs on the host, kept for the outputs of later calls.

The C library gives blocks of 32 MiB and more back to the system when a tensor ends, and the system
clears every page again for the next one: with small pages that takes longer than a kernel which is
bound by memory. What is kept here is the system's all the same: it is told that it may take the
pages (MADV_FREE) whenever it is short of them, and a page that it has not taken needs no clearing.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import mmap
import sys
import weakref
from math import prod

import torch
from torch import Tensor

from .. import config

LEAST = 1 << 22
"""Bytes from which on an output is made here."""
PAGE = 1 << 21
"""Of a huge page; blocks are whole numbers of them."""


class _Block:
    """Memory of its own mapping, in huge pages where the system has them."""

    __slots__ = ("bytes", "first", "mapping")

    def __init__(self, size: int) -> None:
        self.bytes = size
        self.mapping = mmap.mmap(-1, size + PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.first = -ctypes.addressof(ctypes.c_char.from_buffer(self.mapping)) % PAGE
        with contextlib.suppress(OSError):  # a system without huge pages
            self.mapping.madvise(mmap.MADV_HUGEPAGE)

    def offer(self) -> None:
        """The system may take the pages until they are written again."""
        with contextlib.suppress(OSError):
            self.mapping.madvise(mmap.MADV_FREE)


_kept: list[_Block] = []
"""Oldest first. Lists are changed in single steps: a tensor can end on any thread, at any time."""


def worth(size: int) -> bool:
    """Whether empty() should make an output of this many bytes."""
    return size >= LEAST and _limit() > 0


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor on the host like torch.empty(shape, dtype=dtype), whose storage can't be resized."""
    size = prod(shape) * dtype.itemsize
    block = _taken(size) or _Block(-(-size // PAGE) * PAGE)
    view = memoryview(block.mapping)[block.first : block.first + size]
    tensor = torch.frombuffer(view, dtype=dtype).view(shape)
    weakref.finalize(view, _give, block).atexit = False  # torch holds it as long as the storage
    return tensor


def _taken(size: int) -> _Block | None:
    """The smallest kept block that is at most a quarter, or a page, larger than `size`."""
    fitting = [b for b in _kept if size <= b.bytes <= size + max(size // 4, PAGE)]
    for block in sorted(fitting, key=lambda b: b.bytes):
        with contextlib.suppress(ValueError):  # another thread was faster
            _kept.remove(block)
            return block
    return None


def _give(block: _Block) -> None:
    block.offer()
    _kept.append(block)
    while sum(b.bytes for b in _kept) > _limit():
        with contextlib.suppress(IndexError):
            _kept.pop(0)


@functools.cache
def _limit() -> int:
    """Bytes to keep; 0 where the system can't be told to take them."""
    if not (sys.platform.startswith("linux") and hasattr(mmap, "MADV_FREE")):
        return 0
    return config.at_most(config.KEPT)
