"""Which tile a kernel runs with: tables by architecture, replaceable, and a measured choice.

An entry is named `<operator>.<case>`, for example `grouped_gemm.few`, and stands in the file
_tiles/<operator>.json: for each architecture a list of tiles, the first of which is taken unless
`transom tune --tiles` has measured another one faster on this machine. An architecture is looked up
by the longest prefix that the table has: `sm_90` before `sm_` before "" (any).
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transom import config
from transom.device import fingerprint

FOLDER = Path(__file__).parent / "_tiles"

INTERPRETER = "interpreter"
"""The architecture of Triton's interpreter: small tiles, so that small tensors have several."""

ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942", "gfx950")
"""What kernels are compiled for, with and without such a device."""

CORES = {
    "sm_80": 108,
    "sm_86": 84,
    "sm_89": 128,
    "sm_90": 132,
    "sm_100": 148,
    "sm_120": 170,
    "gfx942": 304,
    "gfx950": 256,
    INTERPRETER: 3,
}
"""Multiprocessors of the largest common device, where no device is there to be asked."""


@dataclass(frozen=True)
class Tile:
    """Sizes that a kernel takes as constants, and how it is compiled."""

    sizes: tuple[tuple[str, int], ...]
    warps: int = 4
    stages: int = 2
    each: int = 1
    """Programs on each multiprocessor, of a kernel whose grid does not follow the sizes."""

    @classmethod
    def of(cls, fields: Mapping[str, int]) -> Tile:
        """{"BM": 64, ..., "warps": 4}: what is in capitals is a size."""
        sizes = tuple((name, size) for name, size in fields.items() if name.isupper())
        return cls(sizes, **{name: n for name, n in fields.items() if not name.isupper()})

    def __getitem__(self, name: str) -> int:
        return dict(self.sizes)[name]

    def plain(self) -> dict[str, int]:
        """As it stands in a table."""
        more = {"warps": self.warps, "stages": self.stages, "each": self.each}
        return {**dict(self.sizes), **more}

    def __str__(self) -> str:
        sizes = " ".join(f"{name}={size}" for name, size in self.sizes)
        return f"{sizes} warps={self.warps} stages={self.stages}".strip()


_replaced: dict[tuple[str, str], tuple[Tile, ...]] = {}


def set_tiles(entry: str, arch: str, tiles: Iterable[Mapping[str, int] | Tile]) -> None:
    """Put these tiles in place of an entry's for an architecture, or for all that begin so.

    A vendor calls this from its plugin's register(); the first tile is the one taken.
    """
    found = tuple(t if isinstance(t, Tile) else Tile.of(t) for t in tiles)
    if not found:
        raise ValueError(f"set_tiles: {entry} for {arch!r} got no tile; expected one or more")
    table(entry)  # raises for an entry that there is not
    _replaced[entry, arch] = found


def entries() -> list[str]:
    """Every entry of every file."""
    return sorted(entry for path in FOLDER.glob("*.json") for entry in _file(path.stem))


def table(entry: str) -> dict[str, tuple[Tile, ...]]:
    """The tiles of an entry by architecture."""
    found = _file(entry.partition(".")[0]).get(entry)
    if found is None:
        raise ValueError(f"tiles: there is no entry {entry!r}; expected one of {entries()}")
    return {**found, **{a: tiles for (e, a), tiles in _replaced.items() if e == entry}}


def tiles(entry: str, arch: str) -> tuple[Tile, ...]:
    """An entry's tiles for an architecture, the default first."""
    found = table(entry)
    return found[max((a for a in found if arch.startswith(a)), key=len)]


def chosen(entry: str, arch: str, device: str) -> Tile:
    """The tile that was measured fastest on this machine, if it is still listed, else the first."""
    listed = tiles(entry, arch)
    measured = None if config.TUNE.get() == "off" else _measured(device).get(entry)
    return next((tile for tile in listed if tile.plain() == measured), listed[0])


def remember(entry: str, tile: Tile, device: str) -> None:
    """Take this tile for the entry from now on, on this machine."""
    (path := _path(device)).parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({**_measured(device), entry: tile.plain()}, indent=1, sort_keys=True)
    path.write_text(text, encoding="utf-8")
    _measured.cache_clear()


@functools.cache
def _file(operator: str) -> dict[str, dict[str, tuple[Tile, ...]]]:
    try:
        found = json.loads((FOLDER / f"{operator}.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    return {
        f"{operator}.{case}": {a: tuple(map(Tile.of, t)) for a, t in archs.items()}
        for case, archs in found.items()
    }


@functools.cache
def _measured(device: str) -> dict[str, Any]:
    try:
        found = json.loads(_path(device).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _path(device: str) -> Path:
    return config.cache_folder() / f"triton-tiles-{fingerprint(device)}.json"
