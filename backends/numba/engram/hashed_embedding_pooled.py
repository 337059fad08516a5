"""hashed_embedding_pooled: rows are added as they are read, in column order."""

from __future__ import annotations

import numpy as np
import torch
from numba.extending import overload
from torch import Tensor

from transom.kernels.engram.hashed_embedding_pooled import hashed_embedding_pooled
from transom.op import Weight
from transom.requires import device, dtype, last_dim_contiguous

from .._arrays import FLOATS, array, flat, scratch
from .._compile import STRICT, kernel, part
from .._numbers import narrow, wide
from .._pool import for_each, threads
from .._quant import Codes, decode_row, stored_contiguously
from ._hash import hash_arguments
from ._lookup import TOKENS, ask_for, hashed_rows


def _row(table, row, room):
    """Row `row` of a plain table (memory, stride), where it stands; or decoded into `room`."""


@overload(_row, jit_options=STRICT)
def _(table, row, room):
    if len(table) == 2:
        return lambda table, row, room: table[0][row * table[1] : row * table[1] + room.shape[0]]
    return _decoded


def _decoded(table, row, room):
    decode_row(table, 0, row, room)
    return room


def _ask(table, row, d):
    """Begin to load a row of a plain table; codes are a line or two."""


@overload(_ask, jit_options=STRICT)
def _(table, row, d):
    if len(table) == 2:
        return lambda table, row, d: ask_for(table[0], row * table[1], d)
    return lambda table, row, d: None


@part
def _task(task, thread, given, first, count, table, share, y, room, lines):
    rows, total, line = room[thread], lines[thread, 0], lines[thread, 1]
    d = total.shape[0]
    size = hashed_rows(task, given, first, count, rows)
    for i in range(size):
        for c in range(rows.shape[1]):
            if rows[i, c] >= 0:
                _ask(table, rows[i, c], d)
    for i in range(size):
        total[:] = np.float32(0)
        for c in range(rows.shape[1]):
            if rows[i, c] >= 0:
                row = _row(table, rows[i, c], line)
                for k in range(d):
                    total[k] += wide(row[k])
        out = y[task * TOKENS + i]
        for k in range(d):
            out[k] = narrow(total[k] / share, out)


@kernel
def _run(given, first, count, table, share, y, room, lines):
    args = (given, first, count, table, share, y, room, lines)
    for_each(_task, -(-y.shape[0] // TOKENS), room.shape[0], args)


@hashed_embedding_pooled.impl(
    requires=(
        device("cpu"),
        dtype("table", *FLOATS, "int8", "int4", "fp8", "mxfp4"),
        last_dim_contiguous("table"),
        stored_contiguously("table"),
    )
)
def numba(
    tokens: Tensor,
    table: Weight,
    *,
    multipliers: Tensor,
    moduli: Tensor,
    offsets: Tensor,
    pad: int,
    lookback: Tensor | None = None,
    blocked: Tensor | None = None,
    shard: tuple[int, ...] = (),
    mean: bool = False,
) -> Tensor:
    """y[b,s] = sum (or mean) of table[row(b,s,c)] over c."""
    (count, d), columns, plain = table.shape, moduli.numel(), isinstance(table, Tensor)
    y = torch.empty((*tokens.shape, d), dtype=table.dtype if plain else torch.float32)
    if y.numel():
        given = hash_arguments(tokens, multipliers, moduli, offsets, pad, lookback, blocked)
        rows = (flat(table), table.stride(0)) if plain else tuple(Codes.of(table))
        used, share = threads(y.numel() * columns), np.float32(max(1, columns) if mean else 1)
        _run(
            given,
            shard[0] if shard else 0,
            count,
            rows,
            share,
            array(y.view(-1, d)),
            np.empty((used, TOKENS, columns), np.int64),
            scratch(used, 2, d),
        )
    return y
