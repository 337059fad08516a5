"""Tiles chosen by measurement: `transom tune --tiles`."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor

from transom.device import synchronize

from ._choice import Tile, remember, tiles
from ._launch import arch_of, forced, record

Call = Callable[[], Any]


def listed(call: Call, like: Tensor) -> dict[str, tuple[Tile, ...]]:
    """The entries that a call asks for, with the tiles that the tables have on this device."""
    found: dict[str, tuple[Tile, ...]] = {}

    def note(entry: str, some: tuple[Tile, ...]) -> Tile:
        found[entry] = some
        return some[0]

    with record(arch_of(like), note):
        call()
    return found


def measure(calls: Iterable[Call], like: Tensor, repeats: int) -> dict[str, dict[Tile, float]]:
    """Seconds of each entry's tiles, fastest first: medians, added over the calls that ask for it.
    A tile that a device refuses is left out."""
    total: dict[str, dict[Tile, float]] = {}
    for call in calls:
        for entry, some in listed(call, like).items():
            if len(some) < 2:
                continue
            row = total.setdefault(entry, dict.fromkeys(some, 0.0))
            for tile in some:
                if tile in row:
                    try:
                        row[tile] += _seconds(call, {entry: tile}, like, repeats)
                    except RuntimeError:  # it asks for more shared memory than there is
                        del row[tile]
    return {e: dict(sorted(r.items(), key=lambda item: item[1])) for e, r in total.items() if r}


def keep(found: dict[str, dict[Tile, float]], like: Tensor) -> None:
    """Take the fastest of each entry from now on, on this machine."""
    for entry, row in found.items():
        tile = next(iter(row))
        assert tile in tiles(entry, arch_of(like))
        remember(entry, tile, like.device.type)


def _seconds(call: Call, tile: dict[str, Tile], like: Tensor, repeats: int) -> float:
    with forced(tile):
        call()  # compiles
        out = []
        for _ in range(repeats):
            synchronize(like.device)
            start = time.perf_counter()
            call()
            synchronize(like.device)
            out.append(time.perf_counter() - start)
    return statistics.median(out)
