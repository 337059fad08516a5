"""Memory of large outputs on the host, used again for the outputs of later calls.

The C library gives blocks of 32 MiB and more back to the system when a tensor ends, and the system
clears every page again for the next one: with small pages that takes longer than a kernel which is
bound by memory. Storages that torch has made for outputs are therefore remembered, and one that
nobody else refers to any more becomes the next output of the same size. The system gets its pages
all the same: it is told that it may take them (MADV_FREE) as soon as an output has ended, and a
page that it has not taken needs no clearing.

An output is an ordinary tensor: its storage is torch's own, of exactly its size, and may be
resized, shared or freed by whoever holds it.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import mmap
import sys
import weakref
from collections.abc import Callable
from math import prod

import torch
from torch import Tensor

from .. import config
from ..weights.layout import contiguous_strides

LEAST = 1 << 22
"""Bytes from which on an output is made here."""


_uses: Callable[[int], int] | None = getattr(torch._C, "_storage_Use_Count", None)


class _Block:
    """A storage of torch's that has been an output."""

    __slots__ = ("storage",)

    def __init__(self, size: int) -> None:
        self.storage = torch.UntypedStorage(size, device="cpu")
        self.advise(mmap.MADV_HUGEPAGE)

    @property
    def bytes(self) -> int:
        """Of the storage, which may have been resized."""
        return int(self.storage.nbytes())

    def users(self) -> int:
        """How many tensors refer to the storage, and those who asked a tensor for it: Python's
        object of a storage is one and the same."""
        assert _uses is not None
        return _uses(self.storage._cdata) - 1 + sys.getrefcount(self.storage) - 2

    def advise(self, advice: int) -> None:
        """Tell the system about the whole pages of the storage."""
        data = self.storage.data_ptr()
        first = -(-data // mmap.PAGESIZE) * mmap.PAGESIZE
        last = (data + self.bytes) // mmap.PAGESIZE * mmap.PAGESIZE
        if last > first:  # that it takes no such advice, or has no huge pages, is no fault
            _system().madvise(ctypes.c_void_p(first), ctypes.c_size_t(last - first), advice)


_free: list[_Block] = []
"""Nobody else refers to them; oldest first. Lists are changed in single steps: a tensor can end on
any thread, at any time."""
_shared: list[_Block] = []
"""The output has ended, but a view of it, or what was saved for a gradient, has not; oldest
first."""


def worth(shape: tuple[int, ...], dtype: torch.dtype) -> bool:
    """Whether empty() should make this output."""
    return prod(shape) * dtype.itemsize >= LEAST and _limit() > 0


def empty(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A tensor on the host like torch.empty(shape, dtype=dtype)."""
    size = prod(shape) * dtype.itemsize
    block = _taken(size) or _Block(size)
    tensor = torch.empty(0, dtype=dtype, device="cpu").set_(
        block.storage, 0, shape, contiguous_strides(shape)
    )
    weakref.finalize(tensor, _ended, block).atexit = False
    return tensor


def _taken(size: int) -> _Block | None:
    """A block of that size that has ended, if there is one."""
    for found in (_free, _shared):
        for block in list(found):
            if block.bytes == size and not block.users():
                with contextlib.suppress(ValueError):  # another thread was faster
                    found.remove(block)
                    return block
    return None


def _ended(block: _Block) -> None:
    """The tensor that empty() made of it has ended."""
    if block.bytes < LEAST:  # whoever held it has given the memory back
        return
    if block.users() <= _of_one_tensor():  # the tensor itself, which lets go of it after this
        block.advise(mmap.MADV_FREE)
        _free.append(block)
    else:
        _shared.append(block)
    for held in (_free, _shared):
        while sum(b.bytes for b in list(held)) > _limit():
            with contextlib.suppress(IndexError):
                held.pop(0)


@functools.cache
def _of_one_tensor() -> int:
    """What users() answers while one tensor refers to a storage: some torches count Python's object
    of the storage as well."""
    block = _Block(1)
    tensor = torch.empty(0, dtype=torch.uint8, device="cpu").set_(block.storage, 0, (1,), (1,))
    count = block.users()
    del tensor
    return count


@functools.cache
def _system() -> ctypes.CDLL:
    return ctypes.CDLL(None)


@functools.cache
def _limit() -> int:
    """Bytes to keep; 0 where the system can't be told to take them, or torch doesn't count uses."""
    able = sys.platform.startswith("linux") and hasattr(mmap, "MADV_FREE") and _uses is not None
    return config.at_most(config.KEPT) if able else 0
