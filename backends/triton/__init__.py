"""Triton kernels: one set for NVIDIA (sm_80 to sm_120), AMD (gfx942, gfx950) and, through
triton-ascend, Ascend (910B, 910C, 950PR), in Triton 3.2.

Every launch goes through `_launch.launch`, so that the same host code runs kernels on a device, in
Triton's interpreter, or records what it would launch: ahead-of-time compilation and other vendors'
compilers start from there (`_launch.road`). Tile sizes are data, an entry an architecture, in
_tiles/*.json; `set_tiles` replaces them.

With TRITON_INTERPRET=1, set before Triton is imported, the kernels run on tensors of the CPU, one
program after the other: for tests.
"""

from __future__ import annotations

import importlib.util
import os
from importlib.metadata import PackageNotFoundError, version

from ._choice import Tile, set_tiles

__all__ = ["DEVICES", "INTERPRETED", "OLDEST", "Tile", "probe", "set_tiles"]

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"

DEVICES = ("cpu",) if INTERPRETED else ("cuda", "npu")
"""torch calls an AMD device cuda too; torch_npu an Ascend npu."""

PACKAGES = ("triton", "triton-ascend")
"""Distributions that bring the module."""

OLDEST = (3, 2)
"""Of Triton; as the extra transom[triton] asks. Every vendor's fork has what 3.2 has."""


def probe() -> str | None:
    """None if Triton is installed, new enough and has a device; Triton itself is not imported."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; expected triton >= 3.2; pip install transom[triton]"
    seen = next(filter(None, map(_version, PACKAGES)), None)
    if seen is None:
        return "triton has no version; expected triton >= 3.2; pip install transom[triton]"
    if tuple(int(part) for part in seen.split(".")[:2] if part.isdigit()) < OLDEST:
        return f"triton is {seen}; expected >= 3.2; pip install -U transom[triton]"
    if INTERPRETED:
        return _interpreter()
    import torch

    if not torch.cuda.is_available() and not (hasattr(torch, "npu") and torch.npu.is_available()):
        return "torch sees no CUDA, ROCm or Ascend device; expected one that Triton compiles for"
    return None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _interpreter() -> str | None:
    import triton.language as tl
    from triton import JITFunction

    if isinstance(tl.sum, JITFunction):
        return "TRITON_INTERPRET was set after triton was imported; set it before"
    return None
