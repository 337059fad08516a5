"""The one way to a kernel: `launch`, on the device, in the interpreter, or down another road.

A road is a function that takes a Launch instead of the device. With one in force, host code runs on
tensors of the CPU and no kernel runs, unless the road runs it:

    with road(notes.append, arch="sm_90") as notes: ...

So host code must not read what a kernel has written, must not ask the device anything, and must
take sizes of grids from shapes.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from transom import device as _device

from . import INTERPRETED
from ._choice import CORES, INTERPRETER, Tile, chosen, tiles

MOST_PROGRAMS = 65535
"""Of a launch, on the device that allows the fewest (Ascend)."""

STREAMING = Tile((), each=8)
"""For kernels that move memory and do little else: programs enough to keep it busy."""

POINTERS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.uint8: "*u8",
    torch.int8: "*i8",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.bool: "*i1",
    torch.float64: "*fp64",
    torch.int16: "*i16",
}


@dataclass(frozen=True)
class Launch:
    """One launch as host code asked for it."""

    kernel: Any
    """The function that triton.jit gave."""
    grid: tuple[int, ...]
    arguments: Mapping[str, Any] = field(repr=False)
    """Tensors, numbers and None, by the kernel's names."""
    constants: Mapping[str, Any]
    """The kernel's tl.constexpr arguments, the tile's sizes among them."""
    tile: Tile
    entry: str
    """The tile's name in the tables; empty for a kernel without one."""

    @property
    def name(self) -> str:
        """The kernel's module and function, for people: `moe.grouped_gemm: _rows`."""
        function = self.kernel.fn
        module = function.__module__.partition(".triton.")[2] or function.__module__
        return f"{module}: {function.__name__}"

    def signature(self) -> dict[str, str]:
        """The type of every argument in Triton's words, in the kernel's order; numbers equal to 1
        and arguments left out are constants, as in a launch on a device."""
        out = {}
        for name in self.kernel.arg_names:
            value = self.constants.get(name, self.arguments.get(name))
            constant = name in self.constants or value is None or (_int(value) and value == 1)
            out[name] = "constexpr" if constant else type_of(value)
        return out

    def constexprs(self) -> dict[str, Any]:
        """The values of the signature's constants."""
        known = {**self.arguments, **self.constants}
        return {n: known[n] for n, kind in self.signature().items() if kind == "constexpr"}

    def divisible(self) -> list[str]:
        """The arguments whose value, or address, is a multiple of 16."""
        return [
            name
            for name, kind in self.signature().items()
            if kind != "constexpr" and _divisible(self.arguments[name])
        ]


def type_of(value: Any) -> str:
    """`*bf16`, `i32`, `fp32`: an argument's type in Triton's words."""
    if isinstance(value, Tensor):
        return POINTERS[value.dtype]
    if isinstance(value, bool):
        return "i1"
    if isinstance(value, int):
        return "i32" if -(2**31) <= value < 2**31 else "i64"
    return "fp32"


def as_bytes(flags: Tensor | None) -> Tensor | None:
    """Booleans as bytes, contiguous: not every compiler knows a pointer to booleans."""
    return None if flags is None else flags.contiguous().view(torch.uint8)


def _int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _divisible(value: Any) -> bool:
    if isinstance(value, Tensor):
        return value.data_ptr() % 16 == 0
    return _int(value) and value % 16 == 0


@dataclass(frozen=True)
class _Road:
    to: Callable[[Launch], Any]
    arch: str
    cores: int
    choose: Callable[[str, tuple[Tile, ...]], Tile]


_roads = threading.local()
_one = threading.Lock()  # the interpreter patches Triton's language while a kernel runs


def _now() -> _Road | None:
    return getattr(_roads, "now", None)


@contextlib.contextmanager
def road(
    to: Callable[[Launch], Any],
    *,
    arch: str,
    cores: int | None = None,
    choose: Callable[[str, tuple[Tile, ...]], Tile] = lambda entry, listed: listed[0],
) -> Iterator[None]:
    """Within the block, on this thread: launches are handed to `to`.

    arch     whose tiles are taken; cores: its multiprocessors (None: the table's)
    choose   (entry, tiles) -> the tile to take; None: the first
    """
    before = _now()
    _roads.now = _Road(to, arch, cores or CORES.get(arch, 32), choose)
    try:
        yield
    finally:
        _roads.now = before


@contextlib.contextmanager
def record(
    arch: str, choose: Callable[[str, tuple[Tile, ...]], Tile] = lambda entry, listed: listed[0]
) -> Iterator[list[Launch]]:
    """A list of what host code launches within the block; nothing runs."""
    launches: list[Launch] = []
    with road(launches.append, arch=arch, choose=choose):
        yield launches


@contextlib.contextmanager
def forced(tiles: Mapping[str, Tile]) -> Iterator[None]:
    """Within the block, on this thread: these entries have these tiles, on the device too."""
    before = getattr(_roads, "forced", {})
    _roads.forced = {**before, **tiles}
    try:
        yield
    finally:
        _roads.forced = before


def arch_of(tensor: Tensor) -> str:
    """The architecture whose tiles a call on this tensor takes."""
    if (now := _now()) is not None:
        return now.arch
    if INTERPRETED:
        return INTERPRETER
    return _device.arch(tensor.device.type, tensor.device.index or 0)


def tile_for(entry: str, tensor: Tensor) -> Tile:
    """The tile of an entry for the device that the tensor is on."""
    if (now := _now()) is not None:
        return now.choose(entry, tiles(entry, now.arch))
    if (tile := getattr(_roads, "forced", {}).get(entry)) is not None:
        return tile
    return chosen(entry, arch_of(tensor), tensor.device.type)


def gathers_whole_rows(tensor: Tensor) -> bool:
    """True on Ascend: of rows that are gathered its lowering copies the tile's width, whatever the
    mask says."""
    return arch_of(tensor).startswith("ascend")


def ragged(tensor: Tensor, size: int, step: int) -> bool:
    """True if a kernel must clamp the columns of rows that it gathers, `step` of `size` at a time.
    It then reads element by element."""
    return gathers_whole_rows(tensor) and size % step != 0


def even(tile: Tile, name: str, size: int, tensor: Tensor) -> Tile:
    """The tile; where ragged columns are to be avoided, with its size `name` halved until it
    divides `size`, or is 16."""
    sizes = dict(tile.sizes)
    while ragged(tensor, size, sizes[name]) and sizes[name] > 16:
        sizes[name] //= 2
    return replace(tile, sizes=tuple(sizes.items()))


def programs(tensor: Tensor, most: int, tile: Tile | None = None) -> tuple[int]:
    """The grid of a kernel whose programs share `most` pieces of work between them."""
    cores = now.cores if (now := _now()) is not None else _cores(tensor.device)
    return (max(1, min(most, cores * (tile.each if tile else 1), MOST_PROGRAMS)),)


@functools.cache
def _cores(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).multi_processor_count)
    if device.type == "npu":  # its cores with a cube unit; each has two vector cores
        from triton.runtime.driver import driver

        return int(driver.active.utils.get_device_properties(device.index or 0)["num_aicore"])
    return CORES[INTERPRETER]


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    *args: Any,
    tile: Tile | None = None,
    entry: str = "",
    **constants: Any,
) -> None:
    """Run `kernel` on `grid` with these arguments in its order, then constants and tile sizes by
    name.

    One tensor at least; all on one device, whose current stream it runs on. Arguments may be None.
    """
    tile = tile or Tile(())
    constants.update(tile.sizes)
    if (now := _now()) is not None:
        named = dict(zip(kernel.arg_names, args, strict=False))
        now.to(Launch(kernel, grid, named, constants, tile, entry))
        return
    if INTERPRETED:
        with _one:
            kernel[grid](*args, **constants)
        return
    device = next(a for a in args if isinstance(a, Tensor)).device
    # Ascend's compiler has neither warps nor stages, and warns of them.
    how = {"num_warps": tile.warps, "num_stages": tile.stages} if device.type == "cuda" else {}
    with getattr(torch, device.type).device(device.index):  # nothing where it is the current one
        kernel[grid](*args, **how, **constants)
