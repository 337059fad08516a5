"""The largest tile that fits a chip, found by compiling, and kept in the kernels' tables.

Larger is taken to be better: a tile's operands are read once for more products, and nothing here
can time a kernel. `transom tune --tiles` may measure another one faster on a device.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import transom
from transom.backends.triton import _choice
from transom.backends.triton._choice import Tile
from transom.backends.triton._launch import record
from transom.op import Op

from ..compiled import compile as triton
from . import calls
from .chips import TARGETS
from .environment import Environment
from .verify import plan

LEAST, MOST, STEP = 16, 256, 128
"""Of each size: below, the cube unit idles; above, no kernel gains. STEP bounds BK, which is halved
where it does not divide rows that are gathered (_launch.even)."""

FAMILIES = {
    "Ascend910B3": "ascend910b",
    "Ascend910_9391": "ascend910_93",
    "Ascend950PR_9589": "ascend950",
}
"""What the tables call the generation of each chip that is compiled for."""


Call = tuple[Op[..., Any], tuple[Any, ...]]
"""An operator and its arguments, without memory."""


def launchers(names: Iterable[str], every: bool = True) -> dict[str, list[Call]]:
    """By entry: the calls, of these operators in models' sizes, that launch a kernel with it."""
    found: dict[str, list[Call]] = {}
    for op in map(transom.ops().__getitem__, names):
        for _, values in triton.calls(op, every):
            entries = {n.entry for n in calls.recorded(op, op.impls["triton"], values, TARGETS[0])}
            for entry in entries - {""}:
                found.setdefault(entry, []).append((op, values))
    return found


def largest(environment: Environment, entry: str, shown: list[Call], chip: str) -> Tile | None:
    """The largest tile of an entry with which every kernel of these calls that takes it fits the
    chip; None if none does.

    From the listed tile: the largest size halved until it fits, then each size doubled, the
    smallest first, while it does.
    """

    def fits(sizes: dict[str, int]) -> bool:
        tile = Tile(tuple(sizes.items()))
        seen = set()
        for op, values in shown:
            with record(
                chip.lower(), lambda name, listed: tile if name == entry else listed[0]
            ) as launches:
                op.invoke(op.impls["triton"].function, *values)
            for launch in launches:
                if launch.entry == entry and (key := triton.identity(launch)) not in seen:
                    seen.add(key)
                    if not plan(environment, launch, chip).fits:
                        return False
        return True

    sizes = dict(_choice.tiles(entry, chip.lower())[0].sizes)
    return climb(sizes, fits, {name: bound(name, shown) for name in sizes})


def bound(name: str, shown: list[Call]) -> int:
    """What a size need not exceed: BH tiles H, and there is nothing to gain beyond it."""
    most = STEP if name == "BK" else MOST
    seen = []
    for op, values in shown:
        shapes = {n: t.shape for n, t in op.tensors(values).items()}
        seen.append(op.signature.bind(op.name, shapes, op.arguments(values)).get(name[1:]))
    dims = [d for d in seen if type(d) is int and name != "BK"]
    return min(most, max(LEAST, 1 << (max(dims) - 1).bit_length())) if dims else most


def climb(
    sizes: dict[str, int], fits: Callable[[dict[str, int]], bool], most: Mapping[str, int]
) -> Tile | None:
    """The search itself, for whatever `fits`, each size up to its bound."""
    known: dict[tuple[int, ...], bool] = {}

    def known_to_fit(sizes: dict[str, int]) -> bool:
        key = tuple(sizes.values())
        if key not in known:
            known[key] = fits(sizes)
        return known[key]

    while not known_to_fit(sizes):
        widest = max(sizes, key=sizes.__getitem__)
        if sizes[widest] <= LEAST:
            # The least of all may be what a compiler fails at: the 950's does at 16 columns.
            near = ({**sizes, name: sizes[name] * 2} for name in sizes)
            found = next((n for n in near if known_to_fit(n)), None)
            if found is None:
                return None
            sizes = found
        else:
            sizes = {**sizes, widest: sizes[widest] // 2}
    grown = True
    while grown:
        grown = False
        for name in sorted(sizes, key=sizes.__getitem__):
            larger = {**sizes, name: sizes[name] * 2}
            if larger[name] <= most[name] and known_to_fit(larger):
                sizes, grown = larger, True
    return Tile(tuple(sizes.items()), warps=1, stages=1)


def refit(
    environment: Environment,
    names: list[str] | None = None,
    *,
    every: bool = True,
    targets: Iterable[str] = TARGETS,
    workers: int = 1,
    tell: Callable[[str, str, Tile | None], None],
) -> None:
    """Find and store the tile of every entry that these operators (None: all) take; `tell` hears
    each. An entry that several operators take is fitted to all of them."""
    with calls.implementations() as impls:
        known = launchers(impls, every)
        mine = {e for e, c in known.items() if names is None or any(o.name in names for o, _ in c)}
        jobs = [(entry, chip) for entry in sorted(mine) for chip in targets]

        def find(job: tuple[str, str]) -> Tile | None:
            tile = largest(environment, job[0], known[job[0]], job[1])
            tell(*job, tile)
            return tile

        with ThreadPoolExecutor(workers) as pool:
            for (entry, chip), tile in zip(jobs, pool.map(find, jobs), strict=True):
                if tile is not None:
                    store(entry, FAMILIES[chip], tile)


def store(entry: str, family: str, tile: Tile) -> None:
    """Put a tile into the table's file as the entry's for a generation."""
    operator, _, case = entry.partition(".")
    path = _choice.FOLDER / f"{operator}.json"
    table = json.loads(path.read_text(encoding="utf-8"))
    table[case][family] = [dict(tile.sizes)]
    new = path.with_suffix(".new")  # others read the table meanwhile
    new.write_text(rendered(table), encoding="utf-8")
    new.replace(path)
    _choice._file.cache_clear()


def rendered(table: dict[str, Any]) -> str:
    """A table as its file is written by hand: a line a tile."""
    cases = []
    for case, archs in table.items():
        lines = []
        for arch, tiles in archs.items():
            indent = ",\n" + " " * (len(json.dumps(arch)) + 6)
            lines.append(f"    {json.dumps(arch)}: [{indent.join(map(json.dumps, tiles))}]")
        cases.append(f"  {json.dumps(case)}: {{\n" + ",\n".join(lines) + "\n  }")
    return "{\n" + ",\n".join(cases) + "\n}\n"
