"""Rows of a table by hashes, put side by side or added up: hashed and copied in one launch."""

from __future__ import annotations

from typing import Any

import triton.language as tl
from torch import Tensor
from triton import cdiv, jit

from transom.op import Weight
from transom.requires import Requirement, dtype, last_dim_contiguous
from transom.weights.layout import parse_spec, parts

from .._language import e2m1, e4m3, narrow, scale_of
from .._launch import launch, programs, tile_for
from .._offer import usable
from ._hash import floor_modulo, hash_arguments, mixed

MASKED = 16
"""Columns that a row's tile has at least."""


def tables() -> tuple[Requirement, ...]:
    """The tables that the kernels read."""
    return (dtype("table", *usable(), "int8", "int4", "fp8", "mxfp4"), last_dim_contiguous("table"))


@jit
def stored_values(
    table,
    scales,
    zeros,
    row,
    there,
    column,
    grid,
    stride,
    d,
    FORMAT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Some columns of some rows of a table as float32; 0 in rows that are not there.

    FORMAT "" is a plain table; else a block of ROWS x COLUMNS shares a scale (0: the whole extent),
    `grid` of them a row.
    """
    inside = there[:, None] & (column < d)[None, :]
    column = tl.minimum(column, d - 1)
    packed: tl.constexpr = FORMAT == "int4" or FORMAT == "mxfp4"
    at = table + (row * stride)[:, None]
    at += (column // 2 if packed else column)[None, :]
    value = tl.load(at, mask=inside, other=0)
    if FORMAT == "":
        number = value.to(tl.float32)
    else:
        if packed:
            code = (value.to(tl.int32) >> (column % 2 * 4)[None, :]) & 15
        else:
            code = value
        if FORMAT == "fp8":
            number = e4m3(code)
        elif FORMAT == "mxfp4":
            number = e2m1(code)
        else:
            number = code.to(tl.float32)
        place = tl.zeros((row.shape[0], column.shape[0]), tl.int64)
        if ROWS > 0:
            place += (row // ROWS * grid)[:, None]
        if COLUMNS > 0:
            place += (column // COLUMNS)[None, :]
        if FORMAT == "int4":
            number -= tl.load(zeros + place).to(tl.float32)
        number = tl.where(inside, number * scale_of(tl.load(scales + place)), 0.0)
    return number


@jit
def _row(tokens, lookback, blocked, multipliers, pad, moduli, offsets, t, S, n, h, first, count, c):
    """(row, whether it is in the table) of column c for the tokens t; a row that is not is 0."""
    mix = mixed(tokens, lookback, blocked, multipliers, pad, t, S, n, c // h + 1)
    row = floor_modulo(mix, tl.load(moduli + c).to(tl.int64))
    row += tl.load(offsets + c).to(tl.int64) - first
    there = (row >= 0) & (row < count)
    return tl.where(there, row, 0), there


@jit
def _copy(
    tokens,
    lookback,
    blocked,
    multipliers,
    pad,
    moduli,
    offsets,
    table,
    scales,
    zeros,
    y,
    T,
    S,
    n,
    h,
    first,
    count,
    grid,
    stride,
    d,
    FORMAT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BD: tl.constexpr,
    BT: tl.constexpr,
):
    # y[t,c] = table[row(t,c)]: BT tokens and one column at a time, so that few tokens too ask for
    # many rows at once. Bound by the latency of the rows' memory, then by its bandwidth.
    wide = (n - 1) * h
    for number in range(tl.program_id(0), tl.cdiv(T, BT) * wide, tl.num_programs(0)):
        c = number % wide
        t = number // wide * BT + tl.arange(0, BT)
        row, there = _row(
            tokens,
            lookback,
            blocked,
            multipliers,
            pad,
            moduli,
            offsets,
            tl.minimum(t, T - 1),
            S,
            n,
            h,
            first,
            count,
            c,
        )
        into = y + (t.to(tl.int64) * wide + c) * d
        for start in range(0, d, BD):
            column = start + tl.arange(0, BD)
            value = stored_values(
                table,
                scales,
                zeros,
                row,
                there & (t < T),
                column,
                grid,
                stride,
                d,
                FORMAT,
                ROWS,
                COLUMNS,
            )
            inside = (t < T)[:, None] & (column < d)[None, :]
            tl.store(
                into[:, None] + column[None, :], narrow(value, y.dtype.element_ty), mask=inside
            )


@jit
def _pool(
    tokens,
    lookback,
    blocked,
    multipliers,
    pad,
    moduli,
    offsets,
    table,
    scales,
    zeros,
    y,
    T,
    S,
    n,
    h,
    first,
    count,
    grid,
    stride,
    d,
    divisor,
    FORMAT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BD: tl.constexpr,
    BT: tl.constexpr,
):
    # y[t] = sum of table[row(t,c)] over c in order, / divisor: BT tokens and BD elements at a time.
    blocks = tl.cdiv(d, BD)
    for number in range(tl.program_id(0), tl.cdiv(T, BT) * blocks, tl.num_programs(0)):
        t = number // blocks * BT + tl.arange(0, BT)
        column = number % blocks * BD + tl.arange(0, BD)
        total = tl.zeros((BT, BD), tl.float32)
        for c in range(0, (n - 1) * h):
            row, there = _row(
                tokens,
                lookback,
                blocked,
                multipliers,
                pad,
                moduli,
                offsets,
                tl.minimum(t, T - 1),
                S,
                n,
                h,
                first,
                count,
                c,
            )
            total += stored_values(
                table,
                scales,
                zeros,
                row,
                there & (t < T),
                column,
                grid,
                stride,
                d,
                FORMAT,
                ROWS,
                COLUMNS,
            )
        inside = (t < T)[:, None] & (column < d)[None, :]
        into = y + t.to(tl.int64)[:, None] * d + column[None, :]
        tl.store(into, narrow(total / divisor, y.dtype.element_ty), mask=inside)


def look_up(
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
    divisor: int = 0,
) -> None:
    """y = the rows side by side; with a divisor, their sum divided by it. y is contiguous."""
    (T, S), (count, d), columns = (tokens.numel(), tokens.shape[1]), table.shape, moduli.numel()
    if not y.numel():
        return
    if not count or not columns:
        y.zero_()
        return
    entry = "hashed_embedding." + ("pool" if divisor else "copy")
    tile = tile_for(entry, y)
    width = max(MASKED, min(tile["BD"], 1 << (d - 1).bit_length()))
    stored, *more, constants = _stored(table)
    work = cdiv(T, tile["BT"]) * (cdiv(d, width) if divisor else columns)
    launch(
        _pool if divisor else _copy,
        programs(y, work, tile),
        *hash_arguments(tokens, lookback, blocked, multipliers, pad),
        moduli.contiguous(),
        offsets.contiguous(),
        stored,
        *more,
        y,
        T,
        S,
        moduli.shape[0] + 1,
        moduli.shape[1],
        shard[0] if shard else 0,
        count,
        more[0].shape[1] if more[0] is not None else 0,
        stored.stride(0),
        d,
        *((divisor,) if divisor else ()),
        tile=tile,
        entry=entry,
        **constants,
        BD=width,
    )


def _stored(table: Weight) -> tuple[Any, ...]:
    """(values, scales, zeros, constants) of a table as kernels take it."""
    if isinstance(table, Tensor):
        return table, None, None, dict(FORMAT="", ROWS=0, COLUMNS=0)
    values, scales, zeros, spec = parts(table)
    name, rows, columns = parse_spec(spec)
    zeros = None if zeros is None else zeros.contiguous()
    return (
        values.contiguous(),
        scales.contiguous(),
        zeros,
        dict(FORMAT=name, ROWS=rows, COLUMNS=columns),
    )
