"""The machine's ceilings, measured with the loops of csrc/cpu/base/probes.cpp.

They are taken in the same rounds as the candidates, so that a machine that others share slows down
both. Without the compiled library torch's own kernels stand in: its matrix product and its sum are
slower than the machine, so shares of them are too high, and the report says so.
"""

from __future__ import annotations

import functools
import mmap
import os
import re
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from transom.errors import PluginError

LEVELS = ("baseline", "avx2", "avx512")
"""Of the probes, by their number; NEON's is 'baseline'."""

_FUNCTIONS = """
double transom_probe_fma(int32_t threads, int32_t level, int64_t steps);
double transom_probe_dot(int32_t threads, int32_t level, int64_t steps);
double transom_probe_read(int32_t threads, int32_t level, const void *data, int64_t bytes,
                          int32_t streams, int64_t ahead);
double transom_probe_rows(int32_t threads, const void *table, int64_t row_bytes,
                          const int64_t *numbers, int64_t count, int64_t ahead, void *out,
                          int32_t streaming);
"""

_STEPS = 30_000
"""Of a task of the arithmetic probes: some 2 ms for all of them on two cores of 2020."""
_READ_BYTES = 96 << 20
_WAYS = ((1, 0), (2, 0), (4, 0), (1, 1024), (2, 1024))
"""Streams a thread reads side by side, bytes from a load to its prefetch: the fastest is kept."""
_ROWS = 1 << 16
_ROWS_AHEAD = (4, 8, 16, 32)


@functools.cache
def library() -> tuple[Any, Any] | None:
    """cffi's view of the compiled probes, and what they must be called with; None without them."""
    import cffi

    from transom.backends import native

    try:
        path = native.library().path
    except PluginError:
        return None
    ffi = cffi.FFI()
    ffi.cdef(_FUNCTIONS)
    handle = ffi.dlopen(str(path), ffi.RTLD_NOW | ffi.RTLD_LOCAL)
    return (ffi, handle) if hasattr(handle, "transom_probe_fma") else None


def level() -> str:
    """The instruction set that transom's kernels use here: 'avx2'; 'torch' without kernels."""
    from transom.backends import native

    try:
        return native.library().version.rpartition(".")[2]
    except PluginError:
        return "torch"


def best_level() -> str:
    """The highest instruction set of the probes that this processor has."""
    capability = torch.backends.cpu.get_cpu_capability().lower()
    return capability if capability in LEVELS else "baseline"


def cache_bytes() -> int:
    """Bytes of the largest cache that the system tells of, else 32 MiB."""
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        match = re.fullmatch(r"(\d+)([KMG]?)\s*", path.read_text(encoding="ascii"))
        if match:
            sizes.append(int(match[1]) << {"": 0, "K": 10, "M": 20, "G": 30}[match[2]])
    return max(sizes, default=32 << 20)


def huge(size: int) -> torch.Tensor:
    """`size` bytes in huge pages where the system allows, every page touched."""
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        pages.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(pages, dtype=torch.uint8).fill_(1)


@dataclass(frozen=True)
class Sample:
    """One run of a probe."""

    work: float
    """Operations or bytes."""
    seconds: float

    @property
    def rate(self) -> float:
        """Operations or bytes a second."""
        return self.work / self.seconds


class Ceilings:
    """The probes of one run, with the memory that they read."""

    def __init__(self, threads: int, memory: int) -> None:
        self.threads = threads
        self.compiled = library() is not None
        self.level = level()
        # Beyond the caches even if the whole of a shared one should be ours, where memory allows.
        size = min(max(512 << 20, 2 * cache_bytes()), max(_READ_BYTES, memory))
        self._buffer = huge(size // _READ_BYTES * _READ_BYTES)
        self._at = 0
        self._way: tuple[int, int] | None = None
        self._rows: dict[tuple[int, int], tuple[int, int]] = {}
        self._square = torch.randn(2, 768, 768)
        self._product = torch.empty(768, 768)
        for probe in (self.fma, self.dot, self.read):
            probe()

    @property
    def buffer_bytes(self) -> int:
        """Bytes that the reading probe goes through before it comes to the same again."""
        return self._buffer.numel()

    def fma(self, level: str | None = None) -> Sample:
        """float32 multiply-adds, two operations each."""
        found = library()
        if found is None:
            n = self._square.shape[-1]
            a, b = self._square
            return _best(lambda: (torch.mm(a, b, out=self._product), 2.0 * n**3)[1])
        call, at = found[1].transom_probe_fma, _number(level or self.level)
        return _best(lambda: call(self.threads, at, _STEPS))

    def dot(self, level: str | None = None) -> Sample | None:
        """int8 products added up, two operations each; None where there is no instruction."""
        found = library()
        if found is None:
            return None
        call, at = found[1].transom_probe_dot, _number(level or self.level)
        sample = _best(lambda: call(self.threads, at, _STEPS))
        return sample if sample.work else None

    def read(self) -> Sample:
        """Bytes read in order, not in any cache (if the buffer is larger than the caches)."""
        found = library()
        if found is None:
            self._at = (self._at + _READ_BYTES) % self._buffer.numel()
            words = self._buffer[self._at : self._at + _READ_BYTES].view(torch.float32)
            return _timed(lambda: (words.sum(), float(_READ_BYTES))[1])
        ffi, handle = found
        at = _number(self.level)

        def once(streams: int, ahead: int) -> Sample:
            self._at = (self._at + _READ_BYTES) % self._buffer.numel()
            pointer = ffi.cast("void *", self._buffer.data_ptr() + self._at)
            return _timed(
                lambda: handle.transom_probe_read(
                    self.threads, at, pointer, _READ_BYTES, streams, ahead
                )
            )

        if self._way is None:
            tried = {way: statistics.median(once(*way).rate for _ in range(5)) for way in _WAYS}
            self._way = max(tried, key=lambda way: tried[way])
        # A burst of the machine's others is shorter than this: the best of some is the ceiling.
        return max((once(*self._way) for _ in range(3)), key=lambda s: s.rate)

    def found(self) -> dict[str, Any]:
        """The ceilings as figures for a report: medians of some samples, in 10^9 a second."""

        def middle(probe: Callable[[], Sample | None]) -> float | None:
            taken = [s.rate / 1e9 for s in (probe() for _ in range(5)) if s is not None]
            return statistics.median(taken) if taken else None

        best = best_level() if self.compiled else self.level
        return {
            "compiled": self.compiled,
            "threads": self.threads,
            "level": self.level,
            "best_level": best,
            "fma": middle(self.fma),
            "dot": middle(self.dot),
            "read": middle(self.read),
            "fma_best": middle(lambda: self.fma(best)),
            "dot_best": middle(lambda: self.dot(best)),
            "buffer_bytes": self.buffer_bytes,
            "cache_bytes": cache_bytes(),
        }

    def rows(self, table: torch.Tensor) -> Sample:
        """Rows of `table` at random, copied one after the other: new rows every time."""
        count, size = table.shape[0], table.stride(0) * table.element_size()
        numbers = torch.randint(count, (_ROWS,))
        out = self._buffer[: _ROWS * size] if _ROWS * size <= self._buffer.numel() else None
        found = library()
        if found is None or out is None:
            target = torch.empty(_ROWS, table.shape[1], dtype=table.dtype)
            return _timed(
                lambda: (torch.index_select(table, 0, numbers, out=target), float(_ROWS * size))[1]
            )
        ffi, handle = found

        def once(ahead: int, streaming: int) -> Sample:
            where = [ffi.cast("void *", t.data_ptr()) for t in (table, out)]
            listed = ffi.cast("int64_t *", numbers.data_ptr())
            return _timed(
                lambda: handle.transom_probe_rows(
                    self.threads, where[0], size, listed, _ROWS, ahead, where[1], streaming
                )
            )

        key = (table.data_ptr(), size)
        if key not in self._rows:
            tried = {}
            for way in [(a, s) for a in _ROWS_AHEAD for s in (0, 1)]:
                numbers = torch.randint(count, (_ROWS,))
                tried[way] = once(*way).rate
            self._rows[key] = max(tried, key=lambda w: tried[w])
            numbers = torch.randint(count, (_ROWS,))
        return once(*self._rows[key])


def _number(level: str) -> int:
    return LEVELS.index(level) if level in LEVELS else 0


def _timed(work: Any) -> Sample:
    start = time.perf_counter()
    done = float(work())
    return Sample(done, max(time.perf_counter() - start, 1e-9))


def _best(work: Any) -> Sample:
    return max((_timed(work) for _ in range(2)), key=lambda s: s.rate)


def processors() -> int:
    """How many processors this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
