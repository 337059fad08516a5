"""Our own CPU kernels: csrc/cpu, compiled into transom/_native.so, called through the plugin table.

TRANSOM_NATIVE_LEVEL (baseline, avx2, avx512, neon) asks for another level than the best one here.
Weights are packed only where TRANSOM_PACKED_MB gives memory for it: the form is a second copy.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import transom
from transom import config
from transom.abi import Library, open_library, plugin
from transom.abi.library import Entry
from transom.abi.weight_forms import Budget
from transom.errors import PluginError
from transom.op import Op

DEVICES = ("cpu",)

FAMILIES = ("attention", "engram", "linear_attention", "mhc", "moe")
"""Folders of kernels in csrc/cpu."""

WITHOUT = ("attention/cache_rows",)
"""What they have no kernels for."""


@functools.cache
def library() -> Library:
    """The library with the kernels; PluginError with the reason if there is none."""
    path = Path(transom.__file__).parent / "_native.so"
    if not path.exists():
        raise PluginError(
            "this installation has no compiled kernels; expected transom/_native.so; "
            "install a platform wheel, or build from source with a C++ compiler"
        )
    return open_library(path)


@functools.cache
def _budget() -> Budget:
    """Of the packed forms of all operators' weights together."""
    return Budget(config.at_most(config.PACKED))


def offered(op: Op[..., Any]) -> Callable[[], None] | None:
    """What registers the library's implementations of an operator; None if it has none.

    Without the library, whose table would say, these are the operators of FAMILIES but for those
    WITHOUT a kernel: what they miss is then said.
    """
    if probe() is not None:
        return _register if op.family in FAMILIES and op.path not in WITHOUT else None
    entries = [entry for entry in library().entries if entry.op == op.name]
    return functools.partial(_register, *entries) if entries else None


def _register(*entries: Entry) -> None:
    for entry in entries:
        plugin.register(library(), entry, __name__.rpartition(".")[2], _budget())


def probe() -> str | None:
    """None if the library loads here, else the sentence why not."""
    try:
        library()
    except PluginError as error:
        return str(error)
    return None
