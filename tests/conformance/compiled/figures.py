"""Which launches `transom verify --compile` compiles, what it keeps of them, and how it sums up."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transom import config

if TYPE_CHECKING:
    from transom.backends.triton._launch import Launch

    from .compile import Compiled

LEADING = {"sm_": "sm_90", "gfx": "gfx942"}
"""Of each vendor the target that is compiled in full; where it is not asked for, the first that
is."""

READ = 1
"""Counts up when figures are read from a compiler's output in another way."""


def leading(targets: Iterable[str]) -> set[str]:
    """The targets that are compiled in full."""
    found = set()
    for vendor, first in LEADING.items():
        asked = [t for t in targets if t.startswith(vendor)]
        found |= set(asked[:1] if first not in asked else [first])
    return found


def picked(
    found: list[tuple[str, Launch, str, bool]], full: bool, edge: str
) -> Iterator[tuple[str, Launch, str, bool]]:
    """Of all launches on one target those to compile, largest example first.

    Every target: each kernel with each tile, element types, format of weights, arguments left out
    and switch, at the last example that has it, in bfloat16 and float32. In `full` also float16,
    the first tile with all sizes of all examples, and calls with dims of 1 in bfloat16. What
    differs only in which numbers are multiples of 16 is compiled once.
    """
    seen = set()
    last_first = sorted(reversed(found), key=lambda f: (f[2].startswith(edge), not f[3]))
    for one in last_first:
        _, launch, call, chosen = one
        at_edge, element = call.startswith(edge), call.removeprefix(edge).split()[0]
        if at_edge and not (full and element == "bfloat16"):
            continue
        if element == "float16" and not full:
            continue
        key, sizes = _keys(launch)
        if full and (chosen or at_edge):
            seen_before = sizes in seen
        else:
            seen_before = key in seen
        seen |= {key, sizes}
        if not seen_before:
            yield one


def _keys(launch: Launch) -> tuple[Any, Any]:
    """(what decides the kind of code, that and the sizes that are constants)."""
    signature, tile = launch.signature(), dict(launch.tile.sizes)
    pointers = tuple((n, kind) for n, kind in signature.items() if kind.startswith("*"))
    constants = {n: c for n, c in launch.constexprs().items() if n not in tile}
    switches = tuple(
        (n, c)
        for n, c in constants.items()
        if c is None or (isinstance(c, bool | str) and n != "EVEN")
    )
    kind = (launch.name, pointers, switches, str(launch.tile))
    return kind, (*kind, tuple(constants.items()))


class Kept:
    """Figures of kernels that were compiled before, by everything that decides the machine code:
    source, types, constants, target and the compiler's version. A file of JSON lines."""

    def __init__(self) -> None:
        self.path: Path = config.cache_folder() / "triton-compiled.jsonl"
        self._known: dict[str, dict[str, Any]] = {}
        if self.path.exists():
            for line in self.path.read_text(encoding="utf-8").splitlines():
                try:
                    found = json.loads(line)
                    self._known[found["key"]] = found["figures"]
                except (ValueError, KeyError, TypeError):
                    continue  # a line that a process was ended in

    @staticmethod
    def key(launch: Launch, target: str, identity: str) -> str:
        """The name that a launch's figures are kept under."""
        import triton

        text = repr((READ, triton.__version__, target, launch.kernel.cache_key, identity))
        return hashlib.sha256(text.encode()).hexdigest()

    def get(self, key: str) -> dict[str, Any] | None:
        """Figures kept under a key."""
        return self._known.get(key)

    def put(self, key: str, figures: dict[str, Any]) -> None:
        """Keep figures; one write, so that processes side by side don't mix their lines."""
        self._known[key] = figures
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"key": key, "figures": figures}) + "\n")


def summary(kernels: Iterable[Compiled]) -> list[dict[str, Any]]:
    """One row for each kernel and target: how often it was compiled, and the most that a chosen
    tile takes of registers, stack and shared memory."""
    rows: dict[tuple[str, str], list[Compiled]] = {}
    for kernel in kernels:
        rows.setdefault((kernel.kernel, kernel.target), []).append(kernel)
    return [_row(name, target, found) for (name, target), found in sorted(rows.items())]


def _row(name: str, target: str, found: list[Compiled]) -> dict[str, Any]:
    judged = [k for k in found if k.chosen] or found
    tiles: dict[str, list[int]] = {}
    for k in judged:
        most = tiles.setdefault(k.tile, [0, 0, 0])
        tiles[k.tile] = [max(p) for p in zip(most, (k.registers, k.spills, k.shared), strict=True)]
    return {
        "kernel": name,
        "target": target,
        "ops": sorted({k.op for k in found}),
        "compiled": len(found),
        "faults": sum(bool(k.faults) for k in found),
        "registers": max(k.registers for k in judged),
        "spills": max(k.spills for k in judged),
        "shared": max(k.shared for k in judged),
        "product": sorted({k.product for k in judged} - {""}),
        "tiles": tiles,
        "spills_of_others": max((k.spills for k in found if not k.chosen), default=0),
    }
