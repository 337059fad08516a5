"""Every environment variable of transom, in one table.

Values are read when they are needed, never on the hot path of a call.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Variable:
    """One environment variable: its name, its value when unset, and what it does."""

    name: str
    default: str
    meaning: str

    def get(self) -> str:
        """The value in force: the environment's, else the default."""
        return os.environ.get(self.name, self.default)


USE = Variable("TRANSOM_USE", "", "implementations to force: `backend` or `op=impl,op=impl`")
FALLBACK = Variable("TRANSOM_FALLBACK", "warn", "on a drop to the composite: warn | error | quiet")
PLUGINS = Variable("TRANSOM_PLUGINS", "all", "plugins to load: all | none | name,name")
DEBUG = Variable("TRANSOM_DEBUG", "0", "1: check values of tensors on every device (synchronises)")
WORKSPACE = Variable("TRANSOM_WORKSPACE_MB", "64", "temporaries of a composite, in MiB")
KEPT = Variable("TRANSOM_KEPT_MB", "1024", "memory of large outputs kept for later ones, in MiB")
PACKED = Variable("TRANSOM_PACKED_MB", "0", "packed weights that native kernels keep, in MiB")
TUNE = Variable("TRANSOM_TUNE", "on", "off: ignore measured choices (transom tune)")
CACHE = Variable("TRANSOM_CACHE", "~/.cache/transom", "folder of measured choices and peaks")
GUARD = Variable("TRANSOM_GUARD", "0", "N: compare every Nth call with the composite")
LEVEL = Variable("TRANSOM_NATIVE_LEVEL", "", "CPU kernels: baseline | avx2 | avx512 | neon")

VARIABLES = (USE, FALLBACK, PLUGINS, DEBUG, WORKSPACE, KEPT, PACKED, TUNE, CACHE, GUARD, LEVEL)


def workspace_bytes() -> int:
    """Bytes of a composite's temporaries beside inputs and outputs (soft: one tile always fits)."""
    return at_most(WORKSPACE, zero=False)


def at_most(variable: Variable, zero: bool = True) -> int:
    """Bytes of a variable in MiB, which may be 0 if `zero`."""
    text = variable.get()
    try:
        mib = float(text)
    except ValueError:
        mib = -1.0
    if not 0 <= mib < float("inf") or (mib == 0 and not zero):
        least = ">= 0" if zero else "> 0"
        raise ValueError(f"{variable.name}: value is {text!r}; expected MiB {least}")
    return int(mib * 2**20)


def debug() -> bool:
    """True: check tensor values on every device, which synchronises with it at each call."""
    return DEBUG.get() not in ("", "0")


def fallback() -> str:
    """What a drop to the composite does: 'warn', 'error' or 'quiet'."""
    value = FALLBACK.get()
    if value not in ("warn", "error", "quiet"):
        raise ValueError(f"{FALLBACK.name}: value is {value!r}; expected warn, error or quiet")
    return value


def cache_folder() -> Path:
    """The folder for measured choices and peaks (not created here)."""
    return Path(CACHE.get()).expanduser()
