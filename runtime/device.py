"""Devices: their type, architecture string, fingerprint and measured peaks.

Nothing here runs at import, and nothing initialises a device that no tensor lives on.
"""

from __future__ import annotations

import functools
import hashlib
import json
import platform
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from .config import cache_folder


@functools.cache
def arch(device_type: str, index: int = 0) -> str:
    """The architecture: 'x86_64+avx2', 'sm_90', 'gfx942', or the device's own name in lower
    case."""
    if device_type == "cpu":
        capability = torch.backends.cpu.get_cpu_capability().lower()
        return f"{platform.machine()}+{capability}"
    module = getattr(torch, device_type, None)
    if device_type == "cuda" and torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(index)
        if torch.version.hip:
            return str(properties.gcnArchName).split(":")[0]
        return f"sm_{properties.major}{properties.minor}"
    try:
        return str(module.get_device_name(index)).lower() if module else device_type
    except (AttributeError, AssertionError, RuntimeError):  # no name: known by its type
        return device_type


@functools.cache
def describe(device_type: str) -> str:
    """The device as a person names it: the processor's or the accelerator's model."""
    if device_type == "cpu":
        return _processor_name()
    module = getattr(torch, device_type, None)
    try:
        return str(module.get_device_name(0)) if module else device_type
    except (AttributeError, AssertionError, RuntimeError):  # torch.cuda of a build for CPUs asserts
        return device_type


def _processor_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def fingerprint(device_type: str) -> str:
    """What measured choices are valid for: device, architecture, toolchain and thread count, as 12
    hex digits."""
    parts = [describe(device_type), arch(device_type), torch.__version__, str(torch.version.cuda)]
    if device_type == "cpu":
        parts.append(str(torch.get_num_threads()))
    return hashlib.sha256("|".join(parts).encode()).hexdigest()[:12]


def available() -> list[str]:
    """The device types that this process can use, 'cpu' first."""
    out = ["cpu"]
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is not None:
        out.append(accelerator.type)
    return out


def synchronize(device: torch.device) -> None:
    """Wait until work on `device` is done; nothing to do for the CPU."""
    if device.type != "cpu":
        module = getattr(torch, device.type, None)
        if module is not None and hasattr(module, "synchronize"):
            module.synchronize()


@dataclass(frozen=True)
class Peaks:
    """The ceilings of a device: float32 multiply-add rate and streaming read rate, measured by
    torch's own kernels or stated by the vendor."""

    device: str
    gflops: float
    """10^9 float32 operations a second: the best of several square matrix products."""
    gbytes: float
    """10^9 bytes a second: the best of several sums over a buffer far larger than the caches."""
    threads: int


def peaks(device_type: str = "cpu", *, fresh: bool = False) -> Peaks:
    """This machine's ceilings, stated, or measured once and cached; `fresh`: measured again."""
    known = (stated_peaks if fresh else known_peaks)(device_type)
    if known is not None:
        return known
    found = _measure(torch.device(device_type))
    path = _peaks_path(device_type)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(asdict(found)), encoding="utf-8")
    except OSError:
        pass  # a read-only home is no reason to fail: the figures are returned all the same
    return found


def known_peaks(device_type: str = "cpu") -> Peaks | None:
    """This machine's ceilings if they are stated or were measured before; measures nothing."""
    stated = stated_peaks(device_type)
    try:
        return stated or Peaks(**json.loads(_peaks_path(device_type).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None  # no file, or one of another version


def stated_peaks(device_type: str) -> Peaks | None:
    """What the vendor states as `torch.<device>.peaks()`, (operations, bytes) a second."""
    ask = getattr(getattr(torch, device_type, None), "peaks", None)
    flops, bytes_ = ask() if ask else (0.0, 0.0)
    return Peaks(device_type, flops / 1e9, bytes_ / 1e9, torch.get_num_threads()) if ask else None


def _peaks_path(device_type: str) -> Path:
    return cache_folder() / f"peaks-{fingerprint(device_type)}.json"


@torch.no_grad()
def _measure(device: torch.device) -> Peaks:
    cpu = device.type == "cpu"
    n = 1024 if cpu else 8192
    a, b = torch.randn(n, n, device=device), torch.randn(n, n, device=device)
    out = torch.empty(n, n, device=device)
    buffer = torch.ones((1 if cpu else 4) << 28, device=device)
    flops = bytes_ = 0.0
    for _ in range(8):
        flops = max(flops, 2 * n**3 / _seconds(lambda: torch.mm(a, b, out=out), device))
        bytes_ = max(bytes_, buffer.nbytes / _seconds(lambda: buffer.sum(), device))
    return Peaks(device.type, flops / 1e9, bytes_ / 1e9, torch.get_num_threads())


def _seconds(work: object, device: torch.device) -> float:
    assert callable(work)
    synchronize(device)
    start = time.perf_counter()
    work()
    synchronize(device)
    return max(time.perf_counter() - start, 1e-9)
