"""One launch of a lowered kernel on this machine, in the environment that holds llvmlite.

A script and no module: the program may fault, and then only this process ends. Every storage lies
between two unreadable pages, the gap to one of them filled with a pattern that is NaN and -1 and
must still be there afterwards. What a program allocates is filled with the same pattern, and taken
back when it ends. The programs run one after another, their ids shuffled: a race doesn't show.

All of it happens twice, with storages flush with the page before them, then with the one behind, in
two orders of the programs; both must leave the same bits.
"""

from __future__ import annotations

import ctypes
import itertools
import json
import os
import random
import re
import sys
from pathlib import Path
from typing import Any

PAGE = 4096
POISON = 0xFF
_LIBC = ctypes.CDLL(None, use_errno=True)
_LIBC.mmap.restype = ctypes.c_void_p
_LIBC.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_LIBC.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
READ_WRITE, NOTHING, ANONYMOUS = 3, 0, 0x22


class Guarded:
    """A copy of some bytes between two unreadable pages."""

    def __init__(self, content: bytes, flush: str) -> None:
        self.size = len(content)
        self.room = max(PAGE, -(-self.size // PAGE) * PAGE)
        start = _LIBC.mmap(None, self.room + 2 * PAGE, READ_WRITE, ANONYMOUS, -1, 0)
        self.inside = start + PAGE
        ctypes.memset(self.inside, POISON, self.room)
        # kernels are told that tensors begin at a multiple of 16 bytes
        self.gap = (self.room - self.size) // 16 * 16 if flush == "end" else 0
        self.address = self.inside + self.gap
        ctypes.memmove(self.address, content, self.size)
        for guard in (start, self.inside + self.room):
            if _LIBC.mprotect(guard, PAGE, NOTHING):
                raise OSError(ctypes.get_errno(), "mprotect failed")

    def content(self) -> bytes:
        return ctypes.string_at(self.address, self.size)

    def overrun(self) -> str | None:
        """Where bytes outside the storage were written, or None."""
        before = ctypes.string_at(self.inside, self.gap)
        after = ctypes.string_at(self.address + self.size, self.room - self.gap - self.size)
        for where, seen in (("before", before), ("behind", after)):
            if seen.strip(bytes([POISON])):
                return where
        return None


def compiled(text: str, symbols: str) -> tuple[Any, int]:
    """The compiled module (to be kept) and the address of its one function."""
    import llvmlite.binding as llvm

    llvm.load_library_permanently(symbols)
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    # its heap is ours, so that each program's memory can be poisoned and taken back
    text = re.sub(r"@malloc\b", "@transom_allocate", text)
    text = re.sub(r"@free\b", "@transom_release", text)
    machine = llvm.Target.from_default_triple().create_target_machine(
        cpu=llvm.get_host_cpu_name(), features=llvm.get_host_cpu_features().flatten(), opt=2
    )
    module = llvm.parse_assembly(text)
    module.verify()
    engine = llvm.create_mcjit_compiler(module, machine)
    missing = [
        f.name
        for f in module.functions
        if f.is_declaration
        and not f.name.startswith("llvm.")
        and not llvm.address_of_symbol(f.name)
    ]
    if missing:  # the code generator would call address 0
        raise LookupError(f"calls {', '.join(missing)}, which nothing defines")
    engine.finalize_object()
    name = re.search(r"define void @(\w+)\(", text).group(1)
    return engine, engine.get_function_address(name)


def main(folder: Path) -> None:
    task = json.loads((folder / "launch.json").read_text())
    try:
        engine, address = compiled(Path(task["program"]).read_text(), task["symbols"])
    except LookupError as error:
        (folder / "error").write_text(str(error))
        return
    call = compiled_call(address, task)
    results = [
        run(folder, task, call, flush, seed)
        for flush, seed in (("start", task["seed"]), ("end", task["seed"] + 1))
    ]
    if "error" in os.listdir(folder):
        return
    for name, first, second in zip(task["storages"], *results, strict=True):
        if first != second:
            (folder / "error").write_text(
                f"{task['names'][name]} depends on the order of the programs, or on memory that "
                "nothing has written"
            )
            return
        (folder / name).write_bytes(first)
    (folder / "done").touch()
    del engine


def compiled_call(address: int, task: dict[str, Any]) -> Any:
    """The function at `address` with the arguments that the task describes."""
    types = [*_memref(0, 0), *_memref(0, 0)]  # the vendor's lock and workspace
    for kind, *_ in task["arguments"]:
        types += _memref(0, 0) if kind == "tensor" else [KINDS[kind](0)]
    return ctypes.CFUNCTYPE(None, *(type(t) for t in types), *[ctypes.c_int32] * 6)(address)


def run(folder: Path, task: dict[str, Any], call: Any, flush: str, seed: int) -> list[bytes]:
    """All programs in an order of the seed's; the content of every storage afterwards."""
    held = [Guarded((folder / name).read_bytes(), flush) for name in task["storages"]]
    arguments = [*_memref(0, 0), *_memref(0, 0)]
    for kind, *value in task["arguments"]:
        if kind == "tensor":
            storage, offset = value
            store = held[storage]
            arguments += _memref(store.address + offset, store.size - offset)
        else:
            arguments.append(KINDS[kind](value[0]))
    forget = ctypes.CDLL(task["symbols"]).transom_forget
    programs = list(itertools.product(*(range(n) for n in task["grid"])))
    random.Random(seed).shuffle(programs)
    for program in programs:
        call(*arguments, *task["grid"], *program)
        forget()
    for name, store in zip(task["storages"], held, strict=True):
        if where := store.overrun():
            (folder / "error").write_text(f"wrote {where} {task['names'][name]}")
    return [store.content() for store in held]


def _memref(address: int, size: int) -> list[Any]:
    """A one-dimensional memref: base, aligned, offset, size, stride. The sizes are never read."""
    pointer, word = ctypes.c_void_p, ctypes.c_int64
    return [pointer(address), pointer(address), word(0), word(size), word(1)]


KINDS = {"i1": ctypes.c_bool, "i32": ctypes.c_int32, "i64": ctypes.c_int64, "fp32": ctypes.c_float}

if __name__ == "__main__":
    main(Path(sys.argv[1]))
