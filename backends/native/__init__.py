"""Our own CPU kernels: csrc/cpu, compiled into transom/_native.so, called through the plugin table.

TRANSOM_NATIVE_LEVEL (baseline, avx2, avx512, neon) asks for another level than the best one here.
Weights are packed only where TRANSOM_PACKED_MB gives memory for it: the form is a second copy.
"""

from __future__ import annotations

import functools
from pathlib import Path

import transom
from transom import config
from transom.abi import Library, open_library, plugin
from transom.abi.weight_forms import Budget
from transom.errors import PluginError

DEVICES = ("cpu",)


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


def register(op: str) -> None:
    """Offer the library's implementation of `op` to the registry."""
    for entry in library().entries:
        if entry.op == op:
            backend = __name__.rpartition(".")[2]
            plugin.register(library(), entry, backend, _budget())


def probe() -> str | None:
    """None if the library loads here, else the sentence why not."""
    try:
        library()
    except PluginError as error:
        return str(error)
    return None
