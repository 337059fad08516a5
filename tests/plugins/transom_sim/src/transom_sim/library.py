"""The C library: the table's services through transom, what else it exports through ctypes."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import Any

PATH = Path(__file__).parent / "libtransom_sim.so"

_POINTER, _INT, _COUNT = ctypes.c_void_p, ctypes.c_int32, ctypes.c_uint64
_SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "sim_copy": (_INT, [_POINTER] * 4 + [_INT, _INT] + [_POINTER] * 3),
    "sim_fill": (_INT, [_POINTER] * 3 + [_INT, _INT] + [_POINTER] * 3),
    "sim_stream": (_POINTER, [_INT]),
    "sim_current": (_INT, []),
    "sim_set_current": (None, [_INT]),
    "sim_record": (_COUNT, [_INT]),
    "sim_reached": (_INT, [_INT, _COUNT]),
    "sim_wait": (None, [_INT, _COUNT]),
    "sim_stream_waits": (_INT, [_INT, _INT, _COUNT]),
    "sim_hold": (_INT, [_POINTER, _INT]),
    "sim_memory": (None, [_POINTER, _POINTER]),
    "sim_counters": (None, [_POINTER]),
    "sim_peaks": (None, [_POINTER, _POINTER]),
}


class Counters(ctypes.Structure):
    """What the chip has done; see README.md for the cost model."""

    _fields_ = [
        (name, _COUNT) for name in ("commands", "bytes", "tiles", "vector", "link_bytes", "cycles")
    ]


class _Status(ctypes.Structure):
    _fields_ = [("code", _INT), ("message", ctypes.c_char * 508)]


@functools.cache
def plugin() -> Any:
    """The library as a plugin: opened, and its implementations registered, when first needed."""
    import transom

    return transom.CPlugin(PATH)


@functools.cache
def services() -> Any:
    """Memory, copies and synchronisation."""
    return plugin().services


@functools.cache
def exports() -> Any:
    """The functions of csrc/driver.c."""
    library = ctypes.CDLL(str(PATH))
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


def checked(function: Any, *args: Any) -> None:
    """Call a function that ends in a transom_status; RuntimeError with its sentence."""
    status = _Status()
    if function(*args, ctypes.byref(status)):
        raise RuntimeError(f"sim: {status.message.decode()}")


def stream_handle() -> int:
    """The current stream of this thread, as the table takes it."""
    library = exports()
    return int(library.sim_stream(library.sim_current()))
