"""Libraries that answer csrc/include/transom_plugin.h, opened through cffi.

A library is opened from an explicit path, never from a search path. Everything that its table says
is checked before anything is registered: sizes, NULLs, counts, texts, versions. A library that
fails is a PluginError with one sentence. plugin.py registers what a library offers.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import PluginError
from ..op import Op

FIRST_SIZE = {"transom_plugin": 48, "transom_impl": 64, "transom_services": 64}
"""Bytes of each struct in the minor version that brought it: the least that a library can have."""
MOST_IMPLS = 4096
"""More entries than this are taken for a damaged table."""
LONGEST = 256
"""Bytes of the longest name that a table may hold."""
_TIERS = {1: "portable", 2: "tuned"}
_DETERMINISTIC, _CAPTURABLE = 1, 2


@functools.cache
def interface() -> Any:
    """cffi's view of the header, which is read as it is."""
    import cffi  # 20 ms: not at `import transom`

    ffi = cffi.FFI()
    folder = Path(importlib.import_module("transom.include").__path__[0])
    ffi.cdef((folder / "transom_plugin.h").read_text(encoding="utf-8"))
    ffi.cdef("transom_plugin_function transom_plugin_v1;")
    return ffi


def arguments(op: Op[..., Any]) -> list[tuple[str, str]]:
    """(name, type) of each place of a call's arguments; a weight takes four."""
    out: list[tuple[str, str]] = []
    for p in op.parameters:
        if p.role == "weight":
            optional = p.type.removeprefix("Tensor")
            out.append((p.name, f"Weight{optional}"))
            out += [(f"{p.name}_{part}", "Tensor?") for part in ("scales", "zeros")]
            out.append((f"{p.name}_spec", "str?"))
        else:
            out.append((p.name, p.type))
    return out


def schema(op: Op[..., Any], name: str = "") -> str:
    """What a compiled implementation relies on: arguments in order with types, shapes, dtypes;
    under a former name of the operator, if one is given."""
    listed = ", ".join(f"{kind} {name}" for name, kind in arguments(op))
    text = f"{name or op.name}({listed}); {op.shapes_text}; {op.dtypes_text}"
    return " ".join([*text.split(), *(f"; writes {name}" for name in op.mutates)])


def schema_hash(op: Op[..., Any], name: str = "") -> int:
    """64 bits of the SHA-256 of `schema`."""
    return int.from_bytes(hashlib.sha256(schema(op, name).encode()).digest()[:8], "big")


@dataclass(frozen=True)
class Entry:
    """One implementation of a library's table, checked."""

    op: str
    name: str
    tier: str
    schema_hash: int
    deterministic: bool
    capturable: bool
    pointer: Any = field(repr=False)


@dataclass(frozen=True)
class Library:
    """An opened library: who made it, for which device type, and what it offers."""

    path: Path
    vendor: str
    version: str
    device_type: str
    abi: tuple[int, int]
    entries: tuple[Entry, ...]
    handle: Any = field(repr=False)
    services: Any = field(default=None, repr=False)
    """The transom_services in C, or None."""


_open: dict[Path, Library] = {}


def open_library(path: str | Path) -> Library:
    """The library at `path`, its table checked; opened once a process. Nothing is registered."""
    where = Path(path).expanduser().resolve()
    if where in _open:
        return _open[where]
    if not where.is_file():
        raise PluginError(f"{path}: no such file; expected the path of a shared library")
    ffi = interface()
    try:
        handle = ffi.dlopen(str(where), ffi.RTLD_NOW | ffi.RTLD_LOCAL)
    except OSError as error:
        raise PluginError(f"{where.name}: cannot be opened: {_line(str(error))}") from None
    try:
        enter = handle.transom_plugin_v1
    except AttributeError:
        raise PluginError(
            f"{where.name}: exports no transom_plugin_v1; expected a library compiled for ABI 1"
        ) from None
    version = ffi.new("char[]", importlib.import_module("transom").__version__.encode())
    host = ffi.new("transom_host *")
    host.struct_size = ffi.sizeof("transom_host")
    host.abi_major, host.abi_minor = header_version()
    host.version = version
    status = ffi.new("transom_status *")
    table = enter(host, status)
    if table == ffi.NULL:
        raise PluginError(f"{where.name}: {message(status) or 'refuses this transom, unexplained'}")
    _open[where] = library = _checked(where, handle, table)
    return library


def header_version() -> tuple[int, int]:
    """(major, minor) of the ABI that this transom speaks."""
    return (1, 2)


def message(status: Any) -> str:
    """The text of a status as one line; bytes that are no UTF-8 are replaced."""
    return one_line(interface().buffer(status.message)[:])


def one_line(raw: bytes) -> str:
    """The text up to the first zero as one line; bytes that are no UTF-8 are replaced."""
    return _line(raw.partition(b"\0")[0].decode("utf-8", "replace"))


def _line(text: str) -> str:
    return " ".join(text.split())


def _checked(where: Path, handle: Any, table: Any) -> Library:
    """The table as a Library; PluginError if any part of it cannot be right."""
    at = where.name
    _size(at, "transom_plugin", table.struct_size)
    major, minor = table.abi_major, table.abi_minor
    if major != header_version()[0]:
        raise PluginError(
            f"{at}: built for ABI {major}.{minor}; this transom speaks "
            f"{'.'.join(map(str, header_version()))}; install a build for this ABI"
        )
    vendor = _name(at, "vendor", table.vendor, r"[\w.+ -]+")
    version = _name(at, "version", table.version, r"[\w.+ -]+")
    device_type = _name(at, "device_type", table.device_type, r"\w+")
    ffi = interface()
    if table.n_impls > MOST_IMPLS:
        raise PluginError(
            f"{at}: says it has {table.n_impls} implementations; expected at most {MOST_IMPLS}"
        )
    if table.n_impls and table.impls == ffi.NULL:
        raise PluginError(f"{at}: impls is NULL; expected {table.n_impls} implementations")
    entries = tuple(_entry(at, i, table.impls[i]) for i in range(table.n_impls))
    services = _services(at, table)
    return Library(where, vendor, version, device_type, (major, minor), entries, handle, services)


def _services(at: str, table: Any) -> Any:
    """The library's services, or None: of an older header, or it has none."""
    ffi = interface()
    end = ffi.offsetof("transom_plugin", "services") + ffi.sizeof("void *")
    if table.struct_size < end or table.services == ffi.NULL:
        return None
    _size(at, "transom_services", table.services.struct_size)
    return table.services


def _entry(at: str, i: int, impl: Any) -> Entry:
    ffi = interface()
    where = f"{at}: implementation {i}"
    if impl == ffi.NULL:
        raise PluginError(f"{where} is NULL")
    _size(where, "transom_impl", impl.struct_size)
    op = _name(where, "op", impl.op, r"[A-Za-z_]\w*")
    name = _name(where, "name", impl.name, r"[A-Za-z_]\w*")
    if impl.tier not in _TIERS:
        raise PluginError(f"{where} ({op}): tier is {impl.tier}; expected 1 or 2")
    if impl.run == ffi.NULL:
        raise PluginError(f"{where} ({op}): run is NULL; expected a function")
    flags = impl.flags
    return Entry(
        op,
        name,
        _TIERS[impl.tier],
        impl.schema_hash,
        bool(flags & _DETERMINISTIC),
        bool(flags & _CAPTURABLE),
        impl,
    )


def _size(where: str, struct: str, seen: int) -> None:
    least = FIRST_SIZE[struct]
    if not least <= seen <= 1 << 16 or seen % 8:
        raise PluginError(f"{where}: {struct} has struct_size {seen}; expected {least} or more")


def _name(where: str, what: str, pointer: Any, pattern: str) -> str:
    """A short text of a table; `pattern` says what it may consist of."""
    ffi = interface()
    if pointer == ffi.NULL:
        raise PluginError(f"{where}: {what} is NULL; expected a text")
    raw = ffi.string(pointer, LONGEST + 1)
    if len(raw) > LONGEST:
        raise PluginError(f"{where}: {what} is longer than {LONGEST} bytes")
    try:
        text: str = raw.decode("utf-8")
    except UnicodeDecodeError:
        raise PluginError(f"{where}: {what} is {raw!r}; expected UTF-8") from None
    if re.fullmatch(pattern, text) is None:
        raise PluginError(f"{where}: {what} is {text!r}; expected letters, digits and _")
    return text
