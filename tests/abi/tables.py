"""Reads tables of random content; one JSON line each: its seed and what was said against it.

    python tables.py FIRST LAST

Each struct lies at the end of readable memory, in as many bytes as its struct_size says: reading
further is the end of the process.
"""

from __future__ import annotations

import ctypes
import json
import mmap
import sys
from pathlib import Path
from random import Random
from typing import Any

from transom.abi import library
from transom.errors import PluginError

FFI = library.interface()
PROTECT = ctypes.CDLL(None).mprotect
PROTECT.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
SIZES = (0, 1, 7, 8, 40, 47, 52, 56, 63, 64, 72, 96, 65536, 65544, 2**31 - 1, 2**32 - 8, 2**32 - 1)
RUN = FFI.callback("int32_t(transom_call *, transom_status *)", lambda call, status: 0)
memory: list[Any] = []


def guarded(data: bytes) -> int:
    """The address of `data`, with nothing readable after it."""
    pages = -(-len(data) // mmap.PAGESIZE) * mmap.PAGESIZE
    mapped = mmap.mmap(-1, pages + mmap.PAGESIZE)
    mapped[pages - len(data) : pages] = data
    start = ctypes.addressof(ctypes.c_char.from_buffer(mapped))
    assert PROTECT(start + pages, mmap.PAGESIZE, 0) == 0
    memory.append(mapped)
    return start + pages - len(data)


def struct(r: Random, kind: str, /, **fields: Any) -> int:
    one = FFI.new(f"transom_{kind} *")
    for field, value in fields.items():
        setattr(one, field, value)
    whole = bytes(FFI.buffer(one))
    # A size that cannot be must not be believed: then only struct_size itself can be read.
    size = one.struct_size if 8 <= one.struct_size <= 1 << 16 else 8
    return guarded((whole + r.randbytes(max(0, size - len(whole))))[:size])


def pointer(kind: str, address: int) -> Any:
    return FFI.cast(f"{kind} *", address)


def text(r: Random, good: str) -> Any:
    if r.random() < 0.9:
        return pointer("char", guarded(good.encode() + b"\0"))
    bad = [b"\0", b"\xff\xfe\x80\0", b"a b;c\0", b"x" * 300, "pl\u00fcg\n".encode() + b"\0"]
    bad += [r.randbytes(257), r.randbytes(9) + b"\0"]
    return pointer("char", r.choice([0, *(guarded(b) for b in bad)]))


def maybe(r: Random, good: Any, *bad: Any) -> Any:
    return good if r.random() < 0.9 else r.choice(bad)


def entry(r: Random) -> int:
    return struct(
        r,
        "impl",
        struct_size=maybe(r, 64, *SIZES),
        tier=maybe(r, 1, 0, -1, 9, 2**31 - 1),
        op=text(r, "grouped_gemm"),
        name=text(r, "fuzz"),
        schema_hash=r.getrandbits(64),
        flags=r.getrandbits(32),
        reserved=r.getrandbits(32),
        run=maybe(r, RUN, FFI.NULL),
    )


def plugin(r: Random) -> Any:
    entries = [maybe(r, entry(r), 0) for _ in range(r.choice([0, 1, 1, 2, 5]))]
    array = guarded(b"".join(e.to_bytes(8, "little") for e in entries) or bytes(8))
    services = struct(r, "services", struct_size=maybe(r, 64, *SIZES))
    address = struct(
        r,
        "plugin",
        struct_size=maybe(r, r.choice([48, 56, 64, 120]), *SIZES),
        abi_major=maybe(r, 1, 0, 2, 65535),
        abi_minor=r.getrandbits(16),
        vendor=text(r, "fuzz"),
        version=text(r, "1.0"),
        device_type=text(r, "cpu"),
        n_impls=maybe(r, len(entries), 4097, 2**32 - 1),
        reserved=r.getrandbits(32),
        impls=pointer("transom_impl *", maybe(r, array, 0)),
        services=pointer("transom_services", r.choice([0, services])),
    )
    return pointer("transom_plugin", address)


def main() -> None:
    for seed in range(int(sys.argv[1]), int(sys.argv[2])):
        said = None
        try:
            library._checked(Path("libfuzz.so"), None, plugin(Random(seed)))
        except PluginError as error:
            said = str(error)
        print(json.dumps([seed, said]), flush=True)
        memory.clear()


if __name__ == "__main__":
    main()
