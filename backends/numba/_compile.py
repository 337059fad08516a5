"""Compilation by numba, with the machine code kept on disk."""

from __future__ import annotations

import functools
import hashlib
import tempfile
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
from numba.core import config as numba_config

from transom import config

# Sums may be regrouped, products and sums fused: what vector code needs. NaN and Inf keep their
# meaning. The grouping depends on the length of a loop only, so equal rows give equal bits.
_LOOSE = {"nogil": True, "error_model": "numpy", "fastmath": {"reassoc", "contract", "nsz"}}
STRICT = {"nogil": True, "error_model": "numpy", "fastmath": {"contract"}}
"""Where the order of operations is the point: splitting a number in two, rounding by addition."""

_lock = threading.Lock()


def part(function: Callable[..., Any]) -> Any:
    """A function that kernels call, or a task; compiled as part of them."""
    return numba.njit(**_LOOSE)(function)


def strict(function: Callable[..., Any]) -> Any:
    """As `part`, with sums and products in the order in which they are written."""
    return numba.njit(**STRICT)(function)


def kernel(function: Callable[..., Any]) -> Any:
    """An entry from Python, without the GIL, kept on disk for each combination of types."""
    compiled = numba.njit(**_LOOSE)(function)
    folder = _folder()
    if folder is None:
        return compiled
    # numba takes the folder from its configuration when caching is switched on. It is set for this
    # moment only: functions of others keep their folders.
    with _lock:
        before = numba_config.CACHE_DIR
        numba_config.CACHE_DIR = before or str(folder)
        try:
            compiled.enable_caching()
        finally:
            numba_config.CACHE_DIR = before
    return compiled


@functools.cache
def _folder() -> Path | None:
    """Where this version's machine code is kept; None, with a warning, if nothing can be written.

    numba compares the source file of a kernel only, not those of the functions that it calls. So
    the sources of all kernels are part of the folder's name.
    """
    folder = config.cache_folder() / "numba" / _sources()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        warnings.warn(
            f"kernels are compiled anew in each process: {folder} cannot be written "
            f"({error.strerror}); set {config.CACHE.name} to a folder of yours",
            stacklevel=2,
        )
        return None
    return folder


def _sources() -> str:
    digest = hashlib.sha256(numba.__version__.encode())
    root = Path(__file__).parent
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:16]
