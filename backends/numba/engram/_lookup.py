"""Rows of a table by hashes: hashed a few tokens ahead of the copy, so that loads overlap."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from transom.facts import Facts
from transom.op import Weight
from transom.requires import Requirement, condition

from .._arrays import array, flat, scratch
from .._compile import kernel, part
from .._numbers import narrow, prefetch, wide
from .._pool import for_each, threads
from .._quant import Codes, decode_row
from ._hash import hash_arguments, hash_token

TOKENS = 8
"""Of a task: their rows are asked for before the first is copied."""
LINE = 64
"""Bytes of a cache line."""


def same_or_narrow(table: str, out: str) -> Requirement:
    """Rows are copied, or converted through float32: not from or to float64."""

    def test(f: Facts) -> str | None:
        source, target = f.dtypes[table], f.dtypes[out]
        if torch.float64 not in (source, target) or source == target:
            return None
        name = out if target == torch.float64 else table
        return f"{name} is float64; supported: float32, bfloat16, float16, or both float64"

    return condition(f"{table} and {out} alike or neither float64", (f"dtype:{table}",), test)


@part
def hashed_rows(task, given, first, count, rows):
    """rows[i] of a task's tokens, as rows of the table; -1 outside of it. Returns the tokens."""
    B, S = given[0].shape
    size = min(TOKENS, B * S - task * TOKENS)
    for i in range(size):
        at = task * TOKENS + i
        hash_token(at // S, at % S, given, rows[i])
        for c in range(rows.shape[1]):
            row = rows[i, c] - first
            rows[i, c] = row if 0 <= row < count else -1
    return size


@part
def ask_for(memory, start, count):
    """Begin to load so many elements of a flat array."""
    for k in range(start, start + count, LINE // memory.itemsize):
        prefetch(memory, k)


@part
def _copy_task(task, thread, given, first, count, table, stride, y, room):
    rows, d = room[thread], y.shape[2]
    size = hashed_rows(task, given, first, count, rows)
    for i in range(size):
        for c in range(rows.shape[1]):
            if rows[i, c] >= 0:
                ask_for(table, rows[i, c] * stride, d)
    for i in range(size):
        for c in range(rows.shape[1]):
            out, place = y[task * TOKENS + i, c], rows[i, c] * stride
            if place < 0:
                for k in range(d):
                    out[k] = narrow(np.float32(0), out)
                continue
            row = table[place : place + d]
            for k in range(d):
                out[k] = narrow(wide(row[k]), out)


@part
def _byte_task(task, thread, given, first, count, table, stride, y, room):
    rows, d = room[thread], y.shape[2]
    size = hashed_rows(task, given, first, count, rows)
    for i in range(size):
        for c in range(rows.shape[1]):
            if rows[i, c] >= 0:
                ask_for(table, rows[i, c] * stride, d)
    for i in range(size):
        for c in range(rows.shape[1]):
            out, place = y[task * TOKENS + i, c], rows[i, c] * stride
            if place < 0:
                out[:] = np.uint8(0)
            else:
                out[:] = table[place : place + d]


@part
def _decode_task(task, thread, given, first, count, codes, y, room, line):
    rows, row = room[thread], line[thread]
    size = hashed_rows(task, given, first, count, rows)
    for i in range(size):
        for c in range(rows.shape[1]):
            out = y[task * TOKENS + i, c]
            if rows[i, c] < 0:
                row[:] = np.float32(0)
            else:
                decode_row(codes, 0, rows[i, c], row)
            for k in range(row.shape[0]):
                out[k] = narrow(row[k], out)


@kernel
def _bytes(given, first, count, table, stride, y, room):
    args = (given, first, count, table, stride, y, room)
    for_each(_byte_task, -(-y.shape[0] // TOKENS), room.shape[0], args)


@kernel
def _convert(given, first, count, table, stride, y, room):
    args = (given, first, count, table, stride, y, room)
    for_each(_copy_task, -(-y.shape[0] // TOKENS), room.shape[0], args)


@kernel
def _decode(given, first, count, codes, y, room, line):
    args = (given, first, count, codes, y, room, line)
    for_each(_decode_task, -(-y.shape[0] // TOKENS), room.shape[0], args)


def lookup_into(
    y: Tensor,
    tokens: Tensor,
    table: Weight,
    multipliers: Tensor,
    moduli: Tensor,
    offsets: Tensor,
    pad: int,
    lookback: Tensor | None,
    blocked: Tensor | None,
    shard: tuple[int, ...],
) -> None:
    """Write the rows of all tokens into y[B,S,columns*d], contiguous."""
    (count, d), columns = table.shape, moduli.numel()
    if y.numel() == 0:
        return
    given = hash_arguments(tokens, multipliers, moduli, offsets, pad, lookback, blocked)
    out = y.view(-1, columns, d)
    used, first = threads(y.numel()), shard[0] if shard else 0
    room = np.empty((used, TOKENS, columns), np.int64)
    if not isinstance(table, Tensor):
        codes = tuple(Codes.of(table))
        _decode(given, first, count, codes, array(out), room, scratch(used, d))
    elif table.dtype == y.dtype:
        # Which dtype it is does not matter to a copy: one kernel for all.
        size, stride = table.itemsize, table.stride(0)
        raw = flat(table).view(np.uint8)
        _bytes(given, first, count, raw, stride * size, array(out.view(torch.uint8)), room)
    else:
        _convert(given, first, count, flat(table), table.stride(0), array(out), room)
