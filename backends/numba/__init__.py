"""CPU kernels compiled by numba when they are first called: for machines without a C++ compiler.

They run on the OpenMP pool that torch has loaded, so torch.set_num_threads holds and no second pool
is made (numba's own, of which one kind aborts the process when two threads call it, is never
started). Where torch has no OpenMP, and in a child that was forked, they run on the calling thread.

The first call with given dtypes compiles, in seconds; the machine code is kept on disk, in
TRANSOM_CACHE/numba (or NUMBA_CACHE_DIR, if that is set), and loaded by later processes in
milliseconds. What the code was made from is part of the folder's name: an upgrade never meets old
code. Where no folder can be written every process compiles for itself.

Matrix products of many rows are torch's, of float32 tiles; everything around them is compiled here.
"""

from __future__ import annotations

import importlib.util
from importlib.metadata import PackageNotFoundError, version

DEVICES = ("cpu",)

OLDEST = (0, 60)
"""Of numba; as the extra transom[numba] asks."""


def probe() -> str | None:
    """None if numba is installed, new enough, else the sentence why not; numba is not imported."""
    if importlib.util.find_spec("numba") is None:
        return "numba is not installed; expected numba >= 0.60; pip install transom[numba]"
    try:
        seen = version("numba")
    except PackageNotFoundError:
        return "numba has no version; expected numba >= 0.60; pip install transom[numba]"
    if tuple(int(part) for part in seen.split(".")[:2] if part.isdigit()) < OLDEST:
        return f"numba is {seen}; expected >= 0.60; pip install -U transom[numba]"
    return None
