"""Level 0: a backend, plugin or library is what it says it is."""

from __future__ import annotations

from typing import Any

import transom
from transom.abi import library as opened
from transom.abi.plugin import CFunction
from transom.op import Impl
from transom.plugins import load, plugins

from .levels import Finding


def implementations(backend: str, device: str) -> list[tuple[Any, Impl]]:
    """(operator, implementation) of a backend, plugin or name, those that cannot be used too."""
    found = []
    for op in transom.ops().values():
        load(op, device)
        found += [
            (op, i)
            for i in op.impls.values()
            if backend in (i.name, i.backend) and i.tier != "reference"
        ]
    return found


def findings(backend: str, device: str) -> list[Finding]:
    """What loading it shows."""

    def say(check: str, problem: str | None) -> Finding:
        return Finding("", backend, 0, check, "fail" if problem else "pass", problem or "")

    out = []
    plugin = plugins().get(backend)
    reason = transom.backends().get(backend)
    out.append(say("loads", plugin.error if plugin is not None else reason))
    mine = implementations(backend, device)
    out.append(say("offers", None if mine else f"no implementation of any operator for {device!r}"))
    lost = [f"{op.name}: {i.unavailable}" for op, i in mine if i.unavailable]
    out.append(say("declarations", "; ".join(lost) or None))
    libraries = {
        str(i.function.library.path): i.function.library
        for _, i in mine
        if isinstance(i.function, CFunction)
    }
    for library in libraries.values():
        out.append(say("a later host", later_host(library)))
        out.append(say("asked twice", asked_twice(library)))
    return out


def later_host(library: opened.Library) -> str | None:
    """A host of the next major version is refused, in words."""
    answer, text = _enter(library, opened.header_version()[0] + 1)
    if answer is not None:
        return "it accepts a host of the next major version; must answer NULL"
    return None if text else "it refuses a host of the next major version without a reason"


def asked_twice(library: opened.Library) -> str | None:
    """A second call of its function answers the same opened."""
    first, second = (_enter(library, opened.header_version()[0])[0] for _ in range(2))
    return None if first is not None and first == second else "a second call answers another table"


def _enter(library: opened.Library, major: int) -> tuple[Any, str]:
    """The table that the library answers to a host of this version, or None and its reason."""
    ffi = opened.interface()
    version = ffi.new("char[]", transom.__version__.encode())
    host, status = ffi.new("transom_host *"), ffi.new("transom_status *")
    host.struct_size, host.version = ffi.sizeof("transom_host"), version
    host.abi_major, host.abi_minor = major, opened.header_version()[1]
    answer = library.handle.transom_plugin_v1(host, status)
    return (None if answer == ffi.NULL else answer), opened.message(status)
