"""The module torch.sim: what torch, transom and users ask of a device."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from . import aten, library
from .streams import Event, Stream, current_stream, default_stream, set_stream, stream

__all__ = [
    "Event",
    "Stream",
    "clock",
    "counters",
    "current_device",
    "current_stream",
    "default_stream",
    "device",
    "device_count",
    "fallbacks",
    "get_device_name",
    "is_available",
    "is_initialized",
    "max_memory_allocated",
    "memory_allocated",
    "peaks",
    "set_device",
    "set_stream",
    "stream",
    "synchronize",
]

HERTZ = 1e9


def is_available() -> bool:
    return True


def is_initialized() -> bool:
    return True


def _is_in_bad_fork() -> bool:
    return False


def device_count() -> int:
    return 1


def current_device() -> int:
    return 0


def set_device(device: Any) -> None:
    """There is one."""


class device:
    """Within the block this device is current, as it always is."""

    def __init__(self, device: Any) -> None:
        self.idx = 0

    def __enter__(self) -> device:
        return self

    def __exit__(self, *raised: object) -> None:
        return None


def get_device_name(device: Any = None) -> str:
    return "transom simulated accelerator"


def synchronize(device: Any = None) -> None:
    """Wait for every stream."""
    library.services().synchronize()


# Random numbers are the CPU's: their generator is.


def manual_seed(seed: int) -> None:
    pass


def manual_seed_all(seed: int) -> None:
    pass


def get_rng_state(device: Any = "sim") -> Tensor:
    return torch.zeros(16, dtype=torch.uint8)


def set_rng_state(state: Tensor, device: Any = "sim") -> None:
    pass


def get_amp_supported_dtype() -> list[torch.dtype]:
    return [torch.bfloat16, torch.float16]


# Memory and time -------------------------------------------------------------------------------


def _memory() -> tuple[int, int]:
    now, peak = ctypes.c_uint64(), ctypes.c_uint64()
    library.exports().sim_memory(ctypes.byref(now), ctypes.byref(peak))
    return now.value, peak.value


def memory_allocated(device: Any = None) -> int:
    """Bytes that are allocated and not given back."""
    return _memory()[0]


def max_memory_allocated(device: Any = None) -> int:
    """The most that there were at a time."""
    return _memory()[1]


def counters() -> dict[str, int]:
    """Commands, bytes moved in memory, tiles multiplied, vector operations, bytes over the link
    and cycles since the start; waits for everything."""
    found = library.Counters()
    library.exports().sim_counters(ctypes.byref(found))
    return {name: getattr(found, name) for name, _ in found._fields_}


def clock() -> float:
    """Seconds that the device has worked, by its cost model; waits for everything."""
    return counters()["cycles"] / HERTZ


def peaks() -> tuple[float, float]:
    """Floating-point operations and bytes of memory a second, at most."""
    flops, bytes_ = ctypes.c_double(), ctypes.c_double()
    library.exports().sim_peaks(ctypes.byref(flops), ctypes.byref(bytes_))
    return flops.value, bytes_.value


def fallbacks() -> dict[str, int]:
    """How often each of torch's operators went round by the CPU, most often first."""
    return dict(aten.fallbacks.most_common())
