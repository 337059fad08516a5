"""transom doctor: what this machine has, which backends can be used here, and why not."""

from __future__ import annotations

import dataclasses
import os
from itertools import groupby
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from .. import config, guard, selection
from .. import device as _device
from ..abi.extension import why_cffi
from ..explain import backends, ops
from ..plugins import Plugin, load, plugins
from ..plugins import backends as tree_backends
from . import machine, units
from .console import out, table, write_json

EPILOG = """
Examples:

    transom doctor

    transom doctor --fresh -v

    transom doctor --json --no-peaks

    transom doctor --clear

Peaks are measured once, in a few seconds, and kept in the cache folder.
"""

_FALLBACK = {
    "warn": "warns once (transom.SlowPath) with the reasons",
    "error": "raises transom.NotSupported",
    "quiet": "says nothing",
}


def doctor(
    verbose: Annotated[
        bool,
        typer.Option(
            "-v",
            "--verbose",
            help="Tracebacks of plugins that failed to load, and every implementation.",
        ),
    ] = False,
    json_: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Measure the peaks again.")] = False,
    no_peaks: Annotated[
        bool, typer.Option("--no-peaks", help="Measure nothing; show peaks that are known.")
    ] = False,
    clear: Annotated[
        bool, typer.Option("--clear", help="Set free what TRANSOM_GUARD has quarantined.")
    ] = False,
) -> int:
    """Versions, devices, backends with the sentence why each is or isn't available, measured peaks,
    settings."""
    if clear:
        count = guard.clear()
        out().print(Text(f"set free: {count} quarantined implementation{'s' * (count != 1)}"))
        return 0
    measured = {
        d: _device.known_peaks(d) if no_peaks else _device.peaks(d, fresh=fresh)
        for d in _device.available()
    }
    found = _figures(measured, verbose)
    if json_:
        write_json(None, found)
    else:
        _print(out(), found, verbose)
    return 0


def _figures(measured: dict[str, _device.Peaks | None], verbose: bool) -> dict[str, Any]:
    available = backends()
    for op in ops().values():  # every implementation is registered now, so that they can be counted
        for device in measured:
            load(op, device)
    extra = {p.name: p for p in plugins().values()}
    return {
        "versions": machine.versions(),
        "commit": machine.commit(),
        "system": machine.system(),
        "devices": [
            {**d, "peaks": dataclasses.asdict(p) if (p := measured[d["device"]]) else None}
            for d in machine.devices()
        ],
        "backends": [
            {
                "name": name,
                "unavailable": reason,
                "origin": _origin(name, extra),
                "devices": list(_devices(name, extra)),
                "operators": _implements(name),
                **(
                    {"traceback": extra[name].trace}
                    if verbose and name in extra and extra[name].trace
                    else {}
                ),
            }
            for name, reason in available.items()
        ],
        "ties": _ties(),
        "c_calls": {"road": "cffi" if why_cffi() else "transom._C", "reason": why_cffi()},
        "cache": {"folder": str(config.cache_folder()), **_cached()},
        "variables": [
            {"name": v.name, "value": v.get(), "set": v.name in os.environ, "meaning": v.meaning}
            for v in config.VARIABLES
        ],
        "slow_path": _slow_path(),
        "quarantined": [dataclasses.asdict(e) for e in guard.entries()],
    }


def _origin(name: str, extra: dict[str, Plugin]) -> str:
    if name in extra:
        return f"plugin, {extra[name].distribution}"
    return {"composite": "the meaning, in torch", "reference": "the meaning, in NumPy float64"}.get(
        name, "this tree"
    )


def _devices(name: str, extra: dict[str, Plugin]) -> tuple[str, ...]:
    if name in extra:
        return extra[name].devices
    if name in tree_backends():
        return tree_backends()[name].devices
    return ("any",) if name == "composite" else ("cpu",)


def _implements(backend: str) -> int:
    """How many operators this backend has an implementation of that can be tried here."""
    return sum(
        any(i.backend == backend and not i.unavailable for i in op.impls.values())
        for op in ops().values()
    )


def _ties() -> list[dict[str, Any]]:
    """Implementations of one operator and tier: the first comes first unless measured or asked for
    otherwise."""
    found = []
    for op in ops().values():
        order = sorted(
            (i for i in op.impls.values() if i.tier in ("portable", "tuned") and not i.unavailable),
            key=lambda i: (i.tier, i.backend in tree_backends(), i.name),
        )
        for tier, members in groupby(order, key=lambda i: i.tier):
            names = [i.name for i in members]
            if len(names) > 1:
                found.append({"op": op.name, "tier": tier, "order": names})
    return found


def _cached() -> dict[str, int]:
    folder = config.cache_folder()
    count = {"choices": "tune-*.json", "peaks": "peaks-*.json"}
    return {
        what: len(list(folder.glob(pattern))) if folder.is_dir() else 0
        for what, pattern in count.items()
    }


def _slow_path() -> dict[str, str]:
    try:
        mode = config.fallback()
    except ValueError as error:
        return {"mode": "invalid", "meaning": str(error)}
    return {
        "mode": mode,
        "meaning": f"a drop to the composite where the device has a kernel {_FALLBACK[mode]}",
    }


def _print(console: Console, found: dict[str, Any], verbose: bool) -> None:
    rows = table("versions", "")
    for name, version in found["versions"].items():
        rows.add_row(name, version or Text("not installed", style="dim"))
    rows.add_row(
        "commit",
        found["commit"] or Text("unknown: not run from a source tree under git", style="dim"),
    )
    rows.add_row("system", f"{found['system']['system']}, {found['system']['threads']} threads")
    console.print(rows)
    console.print()

    rows = table("device", "name", "architecture", ">GFLOP/s (f32)", ">GB/s")
    for d in found["devices"]:
        peaks = d["peaks"]
        figures = (
            (units.digits(peaks["gflops"]), units.digits(peaks["gbytes"]))
            if peaks
            else ("not measured",) * 2
        )
        rows.add_row(d["device"], d["name"], d["arch"], *figures)
    console.print(rows)
    console.print(
        Text(
            "peaks are measured: torch's best matrix product, and a read far above the caches",
            style="dim",
        )
    )
    console.print()

    rows = table("backend", "here", "serves", ">operators", "from")
    for b in found["backends"]:
        here = (
            Text("available", style="green")
            if b["unavailable"] is None
            else Text(b["unavailable"], style="yellow")
        )
        rows.add_row(
            b["name"], here, ", ".join(b["devices"]) or "any", str(b["operators"]), b["origin"]
        )
    console.print(rows)
    for b in found["backends"]:
        if verbose and b.get("traceback"):
            console.print(Text(f"\n{b['name']}:\n{b['traceback']}", style="dim"))
    if verbose:
        _print_implementations(console)
    ties = "; ".join(
        f"{t['op']} ({t['tier']}): {' before '.join(t['order'])}" for t in found["ties"]
    )
    console.print(Text(f"ties within a tier, decided by name: {ties or 'none'}"))
    calls = found["c_calls"]
    reason = f": {calls['reason']}" if calls["reason"] else ""
    console.print(Text(f"C implementations are called through {calls['road']}{reason}"))
    console.print()

    for e in found["quarantined"]:
        text = f"quarantined: {e['op']} {e['impl']}: {e['problem']}, for {e['call']}"
        console.print(Text(text, style="yellow"))
    rows = table("variable", "value", "meaning")
    for v in found["variables"]:
        rows.add_row(
            v["name"],
            Text(v["value"] or "(empty)", style="bold" if v["set"] else "dim"),
            v["meaning"],
        )
    console.print(rows)
    console.print(Text("in bold: set in this environment", style="dim"))
    console.print()
    console.print(Text(f"SlowPath: {found['slow_path']['mode']}: {found['slow_path']['meaning']}"))
    cache = found["cache"]
    console.print(
        Text(
            f"cache: {cache['folder']} (files: {cache['choices']} of measured choices, "
            f"{cache['peaks']} of peaks)"
        )
    )


def _print_implementations(console: Console) -> None:
    rows = table("operator", "implementations, best tier first", title="")
    for op in ops().values():
        order = sorted(op.impls.values(), key=lambda i: (-selection.TIERS.index(i.tier), i.name))
        rows.add_row(op.name, ", ".join(f"{i.name} ({i.tier})" for i in order))
    console.print(rows)
    console.print()
