"""The largest tile that fits a chip, found by compiling, and kept in the kernels' tables.

Larger is taken to be better: a tile's operands are read once for more products, and nothing here
can time a kernel. `transom tune --tiles` may measure another one faster on a device.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from typing import Any

import transom
from transom.backends.triton import _choice
from transom.backends.triton import compile as triton
from transom.backends.triton._choice import Tile
from transom.backends.triton._launch import record
from transom.op import Op

from . import calls
from .chips import TARGETS
from .environment import Environment
from .verify import plan

LEAST, MOST = 16, 256
"""Of each size: below, the cube unit idles; above, no kernel gains."""

FAMILIES = {
    "Ascend910B3": "ascend910b",
    "Ascend910_9391": "ascend910_93",
    "Ascend950PR_9589": "ascend950",
}
"""What the tables call the generation of each chip that is compiled for."""


def largest(
    environment: Environment, op: Op[..., Any], entry: str, chip: str, every: bool = True
) -> Tile | None:
    """The largest tile of an entry with which all of the operator's kernels fit the chip, in
    models' sizes; None if none does.

    From the listed tile: the largest size halved until it fits, then each size doubled, the
    smallest first, while it does.
    """
    shown = [values for _, values in triton.calls(op, every)]
    impl = op.impls["triton"]

    def fits(sizes: dict[str, int]) -> bool:
        tile = Tile(tuple(sizes.items()))
        seen = set()
        for values in shown:
            with record(
                chip.lower(), lambda name, listed: tile if name == entry else listed[0]
            ) as launches:
                op._invoke(impl.function, *values)
            for launch in launches:
                if launch.entry == entry and (key := triton.identity(launch)) not in seen:
                    seen.add(key)
                    if not plan(environment, launch, chip).fits:
                        return False
        return True

    return climb(dict(_choice.tiles(entry, chip.lower())[0].sizes), fits)


def climb(sizes: dict[str, int], fits: Callable[[dict[str, int]], bool]) -> Tile | None:
    """The search itself, for whatever `fits`."""
    known: dict[tuple[int, ...], bool] = {}

    def known_to_fit(sizes: dict[str, int]) -> bool:
        key = tuple(sizes.values())
        if key not in known:
            known[key] = fits(sizes)
        return known[key]

    while not known_to_fit(sizes):
        widest = max(sizes, key=sizes.__getitem__)
        if sizes[widest] <= LEAST:
            return None
        sizes = {**sizes, widest: sizes[widest] // 2}
    grown = True
    while grown:
        grown = False
        for name in sorted(sizes, key=sizes.__getitem__):
            larger = {**sizes, name: sizes[name] * 2}
            if larger[name] <= MOST and known_to_fit(larger):
                sizes, grown = larger, True
    return Tile(tuple(sizes.items()), warps=1, stages=1)


def refit(
    environment: Environment, names: list[str] | None = None, *, every: bool = True,
    targets: Iterable[str] = TARGETS, tell: Callable[[str, str, Tile | None], None],
) -> None:  # fmt: skip
    """Find and store the tile of every entry of these operators; `tell` hears each."""
    with calls.implementations(names) as impls:
        for name in impls:
            op = transom.ops()[name]
            for entry in entries_of(op):
                for chip in targets:
                    tile = largest(environment, op, entry, chip, every)
                    tell(entry, chip, tile)
                    if tile is not None:
                        store(entry, FAMILIES[chip], tile)


def entries_of(op: Op[..., Any]) -> list[str]:
    """The entries whose tiles the operator's own table holds."""
    return [e for e in _choice.entries() if e.partition(".")[0] == op.name]


def store(entry: str, family: str, tile: Tile) -> None:
    """Put a tile into the table's file as the entry's for a generation."""
    operator, _, case = entry.partition(".")
    path = _choice.FOLDER / f"{operator}.json"
    table = json.loads(path.read_text(encoding="utf-8"))
    table[case][family] = [dict(tile.sizes)]
    path.write_text(rendered(table), encoding="utf-8")
    _choice._file.cache_clear()


def rendered(table: dict[str, Any]) -> str:
    """A table as its file is written by hand: a line a tile."""
    cases = []
    for case, archs in table.items():
        lines = []
        for arch, tiles in archs.items():
            indent = ",\n" + " " * (len(json.dumps(arch)) + 7)
            lines.append(f"    {json.dumps(arch)}: [{indent.join(map(json.dumps, tiles))}]")
        cases.append(f"  {json.dumps(case)}: {{\n" + ",\n".join(lines) + "\n  }")
    return "{\n" + ",\n".join(cases) + "\n}\n"
