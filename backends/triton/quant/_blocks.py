"""Blocks of a matrix that share one scale: scales first, then codes; and codes decoded.

Quotients are rounded as IEEE division rounds (`tl.div_rn`: a plain `/` may be off by two units on
NVIDIA), so that every bit is the composite's.
"""

from __future__ import annotations

from math import prod

import numpy as np
import torch
import triton.language as tl
from torch import Tensor
from triton import cdiv, jit

from transom.facts import Facts
from transom.kernels.quant.mxfp4 import BLOCK as GROUP
from transom.requires import Requirement, condition, dtype

from .._language import e2m1_code, e4m3_code, e8m0_byte, rounded, scale_of
from .._launch import launch, programs, tile_for
from .._offer import usable
from ..engram._lookup import stored_values

INFINITE = tl.constexpr(0x7F800000)
"""The bits of infinity: those of every finite magnitude are less, those of NaN are more."""

TOP = tl.constexpr(253)
"""The E8M0 byte from which on an mxfp4 code of 4 or 6 would read back as Inf."""


BLOCKS = 2**31 - 1
"""Of a weight, at most: the kernels number them in int32."""


def weights(*block: str) -> tuple[Requirement, ...]:
    """The weights that the kernels quantise, in blocks of these arguments' sizes, the last along
    K."""

    def few(f: Facts) -> str | None:
        rows, columns = [1, *(f.arguments[name] for name in block)][-2:] if block else (1, GROUP)
        *lead, n = (*f.dims["B"], f.dims["N"])
        blocks = prod(lead) * cdiv(n, rows) * cdiv(f.dims["K"], columns)
        return None if blocks <= BLOCKS else f"weight has {blocks} blocks; supported: {BLOCKS}"

    return (
        dtype("weight", *usable()),
        condition(f"weight of at most {BLOCKS} blocks", ("B", "N", "K", *block), few),
    )


@jit
def _scales(
    x,
    scales,
    zeros,
    total,
    n,
    k,
    down,
    across,
    by_matrix,
    by_row,
    by_column,
    FORMAT: tl.constexpr,
    FLOOR: tl.constexpr,
    LARGEST: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    WHOLE: tl.constexpr,
    BB: tl.constexpr,
    BE: tl.constexpr,
):
    # The scale (int4: and the zero point) of BB blocks of ROWS x COLUMNS, BE elements of each at a
    # time. Magnitudes are compared by their bits, among which NaN is the largest. Bound by memory.
    # WHOLE: no block reaches beyond a row's end, no BE elements beyond a block's. FLOOR is the
    # least magnitude, int4: the least scale.
    for number in range(tl.program_id(0), tl.cdiv(total, BB), tl.num_programs(0)):
        block = number * BB + tl.arange(0, BB)
        there = block < total
        block = tl.minimum(block, total - 1)
        # In int32, as far as they are no addresses: registers are what this kernel runs out of.
        j, rest = block % across, block // across
        i = rest % down
        start = x + (rest // down) * tl.cast(by_matrix, tl.int64)
        if ROWS == 1:
            start += i * tl.cast(by_row, tl.int64)
        high, low = tl.zeros((BB,), tl.int32), tl.zeros((BB,), tl.int32)
        for first in range(0, ROWS * COLUMNS, BE):
            e = first + tl.arange(0, BE)
            column = (j * COLUMNS)[:, None] + (e % COLUMNS)[None, :]
            inside = (e < ROWS * COLUMNS)[None, :] & (column < k)
            if not WHOLE:
                column = tl.minimum(column, k - 1)
            at = start[:, None] + column * tl.cast(by_column, tl.int64)
            if ROWS > 1:
                row = (i * ROWS)[:, None] + (e // COLUMNS)[None, :]
                inside = inside & (row < n)
                at += tl.minimum(row, n - 1) * tl.cast(by_row, tl.int64)
            bits = tl.load(at, mask=inside, other=0.0).to(tl.float32).to(tl.int32, bitcast=True)
            size = bits & 0x7FFFFFFF
            if FORMAT == "int4":
                low = tl.maximum(low, tl.max(tl.where(bits < 0, size, 0), 1))
                size = tl.where(bits < 0, 0, size)
            high = tl.maximum(high, tl.max(size, 1))
        finite = (high < INFINITE) & (low < INFINITE)
        most = tl.where(finite, high, 0).to(tl.float32, bitcast=True)
        if FORMAT == "int4":
            # Each side is divided first, because their sum may overflow.
            least = tl.where(finite, low, 0).to(tl.float32, bitcast=True)
            scale = tl.div_rn(most, LARGEST) + tl.div_rn(least, LARGEST)
            scale = tl.maximum(scale, FLOOR)
            zero = tl.where(finite, rounded(tl.div_rn(least, scale)), 0.0)
            tl.store(zeros + block, zero.to(tl.int32).to(tl.uint8), mask=there)
        else:
            scale = tl.div_rn(tl.maximum(most, FLOOR), LARGEST)
        scale = tl.where(finite, scale, float("nan"))
        if scales.dtype.element_ty == tl.uint8:
            tl.store(scales + block, e8m0_byte(scale).to(tl.uint8), mask=there)
        else:
            tl.store(scales + block, scale, mask=there)


@jit
def _code(
    x,
    scales,
    zeros,
    row,
    column,
    n,
    k,
    across,
    by_row,
    by_column,
    FORMAT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The codes of some rows and columns of a matrix as int32."""
    inside = (row < n)[:, None] & (column < k)[None, :]
    row, column = tl.minimum(row, n - 1), tl.minimum(column, k - 1)
    at = x + (row * by_row)[:, None] + (column * by_column)[None, :]
    value = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    place = (row // ROWS * across)[:, None] + (column // COLUMNS)[None, :]
    stored = tl.load(scales + place)
    scale = scale_of(stored)
    quotient = tl.div_rn(value, scale)
    if FORMAT == "int8":
        quotient = tl.where(quotient == quotient, quotient, 0.0)
        code = rounded(tl.minimum(tl.maximum(quotient, -127.0), 127.0)).to(tl.int32)
    elif FORMAT == "int4":
        quotient = tl.where(quotient == quotient, quotient, 0.0)
        zero = tl.load(zeros + place).to(tl.int32)
        code = tl.minimum(tl.maximum(rounded(quotient).to(tl.int32) + zero, 0), 15)
    elif FORMAT == "mxfp4":
        most = tl.where(stored.to(tl.int32) >= TOP, 3.0, 6.0)
        code = e2m1_code(tl.minimum(tl.maximum(quotient, -most), most), scale == scale)
    else:
        code = e4m3_code(quotient, scale == scale)
    return code


@jit
def _codes(
    x,
    scales,
    zeros,
    values,
    matrices,
    n,
    k,
    width,
    down,
    across,
    by_matrix,
    by_row,
    by_column,
    FORMAT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
):
    # values = codes of x / scale: BR rows and BC bytes of a matrix at a time. Bound by memory.
    rows, columns = tl.cdiv(n, BR), tl.cdiv(width, BC)
    for number in range(tl.program_id(0), matrices * rows * columns, tl.num_programs(0)):
        matrix = tl.cast(number // columns // rows, tl.int64)
        row = tl.cast(number // columns % rows, tl.int64) * BR + tl.arange(0, BR)
        column = number % columns * BC + tl.arange(0, BC)
        start, place = x + matrix * by_matrix, matrix * (down * across)
        more = zeros
        if FORMAT == "int4":
            more = zeros + place
        if width != k:  # two codes a byte
            low = _code(
                start,
                scales + place,
                more,
                row,
                2 * column,
                n,
                k,
                across,
                by_row,
                by_column,
                FORMAT,
                ROWS,
                COLUMNS,
            )
            high = _code(
                start,
                scales + place,
                more,
                row,
                2 * column + 1,
                n,
                k,
                across,
                by_row,
                by_column,
                FORMAT,
                ROWS,
                COLUMNS,
            )
            code = low | (high << 4)
        else:
            code = _code(
                start,
                scales + place,
                more,
                row,
                column,
                n,
                k,
                across,
                by_row,
                by_column,
                FORMAT,
                ROWS,
                COLUMNS,
            )
        at = values + ((matrix * n + row) * width)[:, None] + column[None, :]
        inside = (row < n)[:, None] & (column < width)[None, :]
        tl.store(at, code.to(values.dtype.element_ty), mask=inside)


@jit
def _decoded(
    values,
    scales,
    zeros,
    y,
    matrices,
    n,
    k,
    width,
    down,
    across,
    FORMAT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BR: tl.constexpr,
    BC: tl.constexpr,
):
    # y = value(code) * scale: BR rows and BC elements of a matrix at a time. Bound by memory.
    rows, columns = tl.cdiv(n, BR), tl.cdiv(k, BC)
    for number in range(tl.program_id(0), matrices * rows * columns, tl.num_programs(0)):
        matrix = tl.cast(number // columns // rows, tl.int64)
        row = tl.cast(number // columns % rows, tl.int64) * BR + tl.arange(0, BR)
        column = number % columns * BC + tl.arange(0, BC)
        place = matrix * (down * across)
        more = zeros
        if FORMAT == "int4":
            more = zeros + place
        number_of = stored_values(
            values + matrix * n * width,
            scales + place,
            more,
            tl.minimum(row, n - 1),
            row < n,
            column,
            across,
            width,
            k,
            FORMAT,
            ROWS,
            COLUMNS,
        )
        at = y + ((matrix * n + row) * k)[:, None] + column[None, :]
        tl.store(at, number_of, mask=(row < n)[:, None] & (column < k)[None, :])


def quantized(
    weight: Tensor,
    name: str,
    rows: int,
    columns: int,
    scale: torch.dtype,
    *,
    floor: float,
    largest: float,
) -> tuple[Tensor, ...]:
    """(values, scales), for int4 also zeros: `weight` [*B,N,K] in a format, one scale for each
    block of rows x columns, which is max(max|weight|, floor) / largest or, of dtype uint8, the
    power of two above."""
    *lead, n, k = weight.shape
    width, grid = _packed(name, k), (*lead, cdiv(n, rows), cdiv(k, columns))

    def new(shape: tuple[int, ...], kind: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=kind, device=weight.device)

    values = new((*lead, n, width), torch.int8 if name == "int8" else torch.uint8)
    scales = new(grid, scale)
    zeros = new(grid, torch.uint8) if name == "int4" else None
    outputs = (values, scales) if zeros is None else (values, scales, zeros)
    if not values.numel():
        return outputs
    x = weight.reshape(-1, n, k)
    block = dict(FORMAT=name, ROWS=min(rows, n), COLUMNS=min(columns, k))
    if name == "int4":  # in float32, as the composite divides
        floor = float(np.float32(floor) / np.float32(largest))
    tile = tile_for("quantize.scales", x)
    # Two at least: Ascend's compiler takes no tile of one column.
    each = max(2, min(tile["BE"], 1 << (block["ROWS"] * block["COLUMNS"] - 1).bit_length()))
    sizes = dict(BE=each, BB=tile["ELEMENTS"] // each)
    launch(
        _scales,
        programs(x, cdiv(scales.numel(), sizes["BB"]), tile),
        x,
        scales,
        zeros,
        scales.numel(),
        n,
        k,
        *grid[-2:],
        *x.stride(),
        tile=tile,
        entry="quantize.scales",
        FLOOR=floor,
        LARGEST=largest,
        WHOLE=k % columns == 0 and rows * columns % each == 0,
        **block,
        **sizes,
    )
    tile = tile_for("quantize.codes", x)
    launch(
        _codes,
        programs(x, _work(tile, x.shape[0], n, width), tile),
        x,
        scales,
        zeros,
        values,
        x.shape[0],
        n,
        k,
        width,
        *grid[-2:],
        *x.stride(),
        tile=tile,
        entry="quantize.codes",
        **block,
    )
    return outputs


def dequantized(
    values: Tensor, scales: Tensor, zeros: Tensor | None, name: str, rows: int, columns: int
) -> Tensor:
    """weight = value(code) * scale of its block, float32, [*B,N,K]."""
    *lead, n, width = values.shape
    k = width * 2 if name in ("int4", "mxfp4") else width
    y = torch.empty((*lead, n, k), dtype=torch.float32, device=values.device)
    if not y.numel():
        return y
    tile, matrices = tile_for("quantize.values", y), y.numel() // (n * k)
    launch(
        _decoded,
        programs(y, _work(tile, matrices, n, k), tile),
        values.contiguous(),
        scales.contiguous(),
        None if zeros is None else zeros.contiguous(),
        y,
        matrices,
        n,
        k,
        width,
        *scales.shape[-2:],
        tile=tile,
        entry="quantize.values",
        FORMAT=name,
        ROWS=min(rows, n),
        COLUMNS=min(columns, k),
    )
    return y


def _packed(name: str, k: int) -> int:
    """Bytes of a row of k codes."""
    return k // 2 if name in ("int4", "mxfp4") else k


def _work(tile, matrices: int, n: int, width: int) -> int:
    return matrices * cdiv(n, tile["BR"]) * cdiv(width, tile["BC"])
