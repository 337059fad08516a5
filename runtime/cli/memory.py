"""Peak memory of a stretch of work: growth above what the process, or the device's allocator, held
when it began."""

from __future__ import annotations

import ctypes
import gc
import os
import sys
import threading
from pathlib import Path
from types import TracebackType

import torch

SAMPLE_SECONDS = 0.002
"""Where the kernel's high-water mark cannot be reset, resident memory is read this often."""

_SELF = Path("/proc/self")
_SLACK = 4 << 20
"""The kernel counts pages in batches per thread: its mark may lag by about this much."""


def available_bytes(meminfo: Path = Path("/proc/meminfo")) -> float:
    """Bytes of memory that can be taken without swapping: what is free, and what the system holds
    only as long as nobody wants it, files that were read above all."""
    try:
        for line in meminfo.read_text().splitlines():
            name, _, value = line.partition(":")
            if name == "MemAvailable":
                return float(value.split()[0]) * 1024
        return float(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (OSError, AttributeError, ValueError):
        return 8e9


class PeakMemory:
    """Within the block, the largest growth of memory: `.bytes` after it, or None where it can't be
    measured.

    On the CPU it is resident memory: the kernel's own high-water mark, reset at the beginning
    (`.method` is 'kernel'), else a thread that reads resident memory every 2 ms ('sampled'). On
    accelerators it is what torch's allocator handed out ('allocator'). Free heap is returned to the
    system first, so that a second run doesn't profit from pages that the first one left behind.
    """

    def __init__(self, device: torch.device, *, collect: bool = True) -> None:
        """collect    False: Python's garbage stays; for calls that leave none, many times over."""
        self.device = device
        self._collect = collect
        self.bytes: int | None = None
        self.method = "none"
        self._base = 0
        self._highest = 0
        self._stop: threading.Event | None = None
        self._thread: threading.Thread | None = None

    def __enter__(self) -> PeakMemory:
        if self._collect:
            gc.collect()
        if self.device.type != "cpu":
            if hasattr(torch.accelerator, "max_memory_allocated"):
                torch.accelerator.synchronize()
                torch.accelerator.reset_peak_memory_stats(self.device)
                self._base = int(torch.accelerator.memory_allocated(self.device))
                self.method = "allocator"
            return self
        _return_free_heap()
        base = _status("VmRSS")
        if base is None:
            return self
        self._base = base
        if _reset_mark(base):
            self.method = "kernel"
            return self
        self.method, self._highest, self._stop = "sampled", base, threading.Event()
        self._thread = threading.Thread(target=self._sample, args=(self._stop,), daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.method == "allocator":
            self.bytes = int(torch.accelerator.max_memory_allocated(self.device)) - self._base
        elif self.method == "kernel":
            self.bytes = max(0, (_status("VmHWM") or self._base) - self._base)
        elif self._thread is not None and self._stop is not None:
            self._stop.set()
            self._thread.join()
            self.bytes = self._highest - self._base

    def _sample(self, stop: threading.Event) -> None:
        while not stop.wait(SAMPLE_SECONDS):
            self._highest = max(self._highest, _status("VmRSS") or 0)


def _status(field: str) -> int | None:
    """A memory field of this process in bytes, or None where there is no /proc."""
    try:
        for line in (_SELF / "status").read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError, IndexError):
        pass
    return None


def _reset_mark(resident: int) -> bool:
    """Reset the kernel's high-water mark of this process; True if it really went down to what is
    resident."""
    try:
        (_SELF / "clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    mark = _status("VmHWM")
    return mark is not None and mark <= resident + _SLACK


def _return_free_heap() -> None:
    if sys.platform == "linux":
        try:
            ctypes.CDLL(None).malloc_trim(0)
        except (AttributeError, OSError):
            pass  # not glibc: its allocator returns pages by itself, or can't be asked to
