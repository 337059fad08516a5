"""Products of an expert's rows with its weight, rows sorted by expert: the kernels' common core.

Rows are cut into tiles that never hold two experts' rows. How many tiles stand before each expert's
end is a table that a kernel of one program makes on the device, since the host never sees how many
rows an expert has. The kernels' grids are as large as the device; each program takes every n-th
tile and finds its expert in the table.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor
from triton import jit

from transom.op import Weight

from .._choice import Tile
from .._language import column, dot, narrow
from .._launch import even, launch, programs, ragged, tile_for
from ._weights import DTYPES, add_product, precision, read

FEW = 16
"""Rows of an expert, on average, up to which tiles are low and weights are what moves."""


@jit
def rows_of(offsets, group, M, E):
    """(start, end) of a group's rows; group E holds those behind the last expert."""
    start = tl.load(offsets + tl.minimum(tl.maximum(group - 1, 0), E - 1))
    end = tl.load(offsets + tl.minimum(group, E - 1))
    start = tl.where(group == 0, 0, tl.minimum(tl.maximum(start, 0), M))
    end = tl.where(group >= E, M, tl.minimum(tl.maximum(end, 0), M))
    return start.to(tl.int32), end.to(tl.int32)


@jit
def _tiles_of(offsets, group, M, E, BM: tl.constexpr):
    start, end = rows_of(offsets, group, M, E)
    return tl.where(group <= E, (tl.maximum(end - start, 0) + BM - 1) // BM, 0)


@jit
def _table(offsets, table, M, E, BM: tl.constexpr, GROUPS: tl.constexpr):
    # One program. A sum of what stands before, without a scan: compilers for other devices lack it.
    group = tl.arange(0, GROUPS)
    before = tl.zeros((GROUPS,), tl.int32)
    for first in range(0, E + 1, 16):
        other = first + tl.arange(0, 16)
        count = _tiles_of(offsets, other, M, E, BM)
        before += tl.sum(tl.where(other[None, :] <= group[:, None], count[None, :], 0), 1)
    tl.store(table + group, before, mask=group <= E)


@jit
def find_tile(offsets, table, at, M, E, BM: tl.constexpr, GROUPS: tl.constexpr):
    """(group, its first row in this tile, the group's end) of row tile `at`."""
    ends = tl.load(table + tl.minimum(tl.arange(0, GROUPS), E))
    group = tl.sum((ends <= at).to(tl.int32), 0)
    before = tl.where(group == 0, 0, tl.load(table + tl.maximum(group - 1, 0)))
    start, end = rows_of(offsets, group, M, E)
    return group, start + (at - before) * BM, end


@jit
def _rows(
    x,
    low,
    y,
    order,
    bias,
    scale,
    offsets,
    table,
    M,
    N,
    K,
    E,
    x_row,
    x_k,
    weight,
    scales,
    zeros,
    w_e,
    w_o,
    w_d,
    s_e,
    s_o,
    s_d,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    GROUPS: tl.constexpr,
    FORMAT: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SCALING: tl.constexpr,
    COMPUTE: tl.constexpr,
    PACKED: tl.constexpr,
    PRECISION: tl.constexpr,
    SPLIT: tl.constexpr,
    EVEN: tl.constexpr,
    SCALED: tl.constexpr,
    RAGGED: tl.constexpr,
):
    # y[order[r]] = scale * (x[r] @ weight[e].T + bias[e]), a tile [BM, BN] a step, summed over K in
    # registers. Bound by the tensor cores, or with few rows an expert by the reading of weights.
    blocks = tl.cdiv(N, BN)
    total = tl.load(table + E) * blocks
    for at in range(tl.program_id(0), total, tl.num_programs(0)):
        group, first, end = find_tile(offsets, table, at // blocks, M, E, BM, GROUPS)
        r, n = first + tl.arange(0, BM), at % blocks * BN + tl.arange(0, BN)
        inside_r, inside_n = r < end, n < N
        e = tl.minimum(group, E - 1).to(tl.int64)
        acc = tl.zeros((BM, BN), tl.float32)
        # Rows behind the last expert are zero and are not read.
        for k0 in range(0, tl.where(group < E, K, 0), BK):
            acc = add_product(
                acc,
                x,
                low,
                r.to(tl.int64) * x_row,
                inside_r,
                x_k,
                weight,
                scales,
                zeros,
                e,
                n,
                inside_n,
                k0,
                K,
                N - 1,
                w_e,
                w_o,
                w_d,
                s_e,
                s_o,
                s_d,
                BK,
                FORMAT,
                BLOCK_O,
                BLOCK_D,
                SCALING,
                COMPUTE,
                PACKED,
                PRECISION,
                SPLIT,
                EVEN,
                RAGGED,
            )
        to = r
        if order is not None:
            to = tl.load(order + tl.minimum(r, M - 1))
            to = tl.minimum(tl.maximum(to, 0), M - 1)
        if scale is not None:
            factor = tl.load(scale + to).to(tl.float32)
            # The bias has the factor, whatever the product has got it already.
            if SCALED:
                if bias is not None:
                    b = tl.load(bias + e * N + n, mask=inside_n, other=0.0).to(tl.float32)
                    acc += b[None, :] * factor[:, None]
            else:
                if bias is not None:
                    b = tl.load(bias + e * N + n, mask=inside_n, other=0.0).to(tl.float32)
                    acc += b[None, :]
                acc *= factor[:, None]
        acc = tl.where(group < E, acc, 0.0)
        into = y + to.to(tl.int64)[:, None] * N + n[None, :]
        out = narrow(acc, y.dtype.element_ty)
        tl.store(into, out, mask=inside_r[:, None] & inside_n[None, :])


@jit
def _operand(
    p,
    low,
    r,
    inside,
    i,
    inside_i,
    order,
    M,
    row,
    column,
    SLOTS: tl.constexpr,
    COMPUTE: tl.constexpr,
    PART: tl.constexpr,
):
    """[rows, i] of one side of an outer product, its rows gathered by order // SLOTS if SLOTS."""
    if SLOTS > 0:
        r = tl.load(order + tl.minimum(r, M - 1))
        r = tl.minimum(tl.maximum(r, 0), M - 1) // SLOTS
    at = p + r.to(tl.int64)[:, None] * row + i[None, :] * column
    if PART == 1:
        at += low
    return tl.load(at, mask=inside[:, None] & inside_i[None, :], other=0.0).to(COMPUTE)


@jit
def _outer(
    a,
    b,
    a_low,
    b_low,
    order,
    out,
    offsets,
    M,
    N,
    K,
    E,
    a_row,
    a_n,
    b_row,
    b_k,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BR: tl.constexpr,
    A_SLOTS: tl.constexpr,
    B_SLOTS: tl.constexpr,
    A_SPLIT: tl.constexpr,
    B_SPLIT: tl.constexpr,
    COMPUTE: tl.constexpr,
    PRECISION: tl.constexpr,
    A_RAGGED: tl.constexpr,
    B_RAGGED: tl.constexpr,
):
    # out[e] = sum over e's rows of outer(a[r], b[r]), a tile [BN, BK] of one expert a step; its
    # rows are added in order.
    n_blocks, k_blocks = tl.cdiv(N, BN), tl.cdiv(K, BK)
    for at in range(tl.program_id(0), E * n_blocks * k_blocks, tl.num_programs(0)):
        e = at // (n_blocks * k_blocks)
        n = at // k_blocks % n_blocks * BN + tl.arange(0, BN)
        k = at % k_blocks * BK + tl.arange(0, BK)
        inside_n, inside_k = n < N, k < K
        n_at, k_at = column(n, N, A_RAGGED), column(k, K, B_RAGGED)
        start, end = rows_of(offsets, e, M, E)
        acc = tl.zeros((BN, BK), tl.float32)
        for r0 in range(start, end, BR):
            r = r0 + tl.arange(0, BR)
            inside = r < end
            left = _operand(
                a, a_low, r, inside, n_at, inside_n, order, M, a_row, a_n, A_SLOTS, COMPUTE, 0
            )
            right = _operand(
                b, b_low, r, inside, k_at, inside_k, order, M, b_row, b_k, B_SLOTS, COMPUTE, 0
            )
            acc = dot(tl.trans(left), right, acc, PRECISION)
            if A_SPLIT:
                left = _operand(
                    a, a_low, r, inside, n_at, inside_n, order, M, a_row, a_n, A_SLOTS, COMPUTE, 1
                )
                acc = dot(tl.trans(left), right, acc, PRECISION)
            if B_SPLIT:
                right = _operand(
                    b, b_low, r, inside, k_at, inside_k, order, M, b_row, b_k, B_SLOTS, COMPUTE, 1
                )
                acc = dot(tl.trans(left), right, acc, PRECISION)
        into = out + (e.to(tl.int64) * N + n[:, None]) * K + k[None, :]
        tl.store(
            into, narrow(acc, out.dtype.element_ty), mask=inside_n[:, None] & inside_k[None, :]
        )


class Rows(NamedTuple):
    """Rows for a product: as they are, or as float32 kept in two bfloat16 that add up to it to
    2^-17, the low ones one matrix behind the high ones."""

    x: Tensor
    split: bool = False
    slots: int = 0
    """If not 0: row r is x[order[r] // slots]."""

    @property
    def size(self) -> tuple[int, int]:
        """(rows, columns) of the matrix."""
        return self.x.shape[-2], self.x.shape[-1]

    @property
    def low(self) -> int:
        """How far behind the high parts the low ones lie."""
        return self.x.stride(0) if self.split else 0

    @property
    def stride(self) -> tuple[int, int]:
        """From row to row and from element to element."""
        return self.x.stride(-2), self.x.stride(-1)


class Groups(NamedTuple):
    """Which rows are whose: offsets [E], inclusive ends, and tables of row tiles by height."""

    offsets: Tensor
    rows: int
    tables: dict[int, Tensor]

    @classmethod
    def of(cls, offsets: Tensor, rows: int) -> Groups:
        """Of any inclusive ends."""
        return cls(offsets.contiguous(), rows, {})

    def table(self, tile: Tile) -> Tensor:
        """Tiles up to each group's end, [E+1]: the experts, and the rows behind them."""
        E, height = self.offsets.shape[0], tile["BM"]
        if height not in self.tables:
            table = torch.empty(E + 1, dtype=torch.int32, device=self.offsets.device)
            launch(
                _table,
                (1,),
                self.offsets,
                table,
                self.rows,
                E,
                BM=height,
                GROUPS=power_of_two(E + 1),
            )
            self.tables[height] = table
        return self.tables[height]

    def grid(self, tile: Tile, blocks: int) -> tuple[int]:
        """For at most so many tiles as there can be, each with so many blocks."""
        tiles = self.rows // tile["BM"] + self.offsets.shape[0] + 1
        return programs(self.offsets, tiles * blocks, tile)


def power_of_two(n: int) -> int:
    """The least power of two >= n, 16 at least."""
    return max(16, 1 << max(0, n - 1).bit_length())


def case(M: int, E: int, x: Tensor, *weights: Weight) -> str:
    """Which tiles a product of M rows takes: low ones for few rows an expert, others for codes and
    for float32. Under deterministic algorithms never low ones: they sum in another order, and a
    row's bits must not depend on the others."""
    few = M <= FEW * E and not torch.are_deterministic_algorithms_enabled()
    return ("few" if few else "many") + kind_of(x, *weights)


def kind_of(x: Tensor, *weights: Weight) -> str:
    """What is multiplied, as the tables' names end."""
    codes = [weight for weight in weights if not isinstance(weight, Tensor)]
    if codes:
        # In float16 a scale of 32 neighbours is multiplied with the sum of as many.
        short = x.dtype == torch.float16 and any(w.format == "mxfp4" for w in codes)
        return "_codes_f32" if short or x.dtype == torch.float32 else "_codes"
    narrow = x.dtype != torch.float32 and all(weight.dtype == x.dtype for weight in weights)
    return "" if narrow else "_f32"


def rows_times(
    x: Rows,
    weight: Weight,
    groups: Groups,
    dtype: torch.dtype,
    *,
    transposed: bool = False,
    order: Tensor | None = None,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    scaled: bool = False,
) -> Tensor:
    """y[order[r]] = scale[order[r]] * (weight[e] @ x[r] + bias[e]), or with `transposed`
    x[r] @ weight[e]; `scaled`: x has the scale already. [M, N] of `dtype`."""
    (M, K), E = x.size, weight.shape[0]
    N = weight.shape[2 if transposed else 1]
    y = torch.empty(M, N, dtype=dtype, device=x.x.device)
    if 0 in (M, N, E):
        return y.zero_()
    entry = f"grouped_gemm.{case(M, E, x.x, weight)}"
    if x.split and entry.endswith(".many_codes"):
        entry += "_split"  # two tiles of rows stay in registers beside the codes
    tile = tile_for(entry, x.x)
    how = read(weight, x.x, tile["BK"], transposed=transposed)
    launch(
        _rows,
        groups.grid(tile, -(-N // tile["BN"])),
        x.x,
        x.low,
        y,
        order,
        bias,
        scale,
        groups.offsets,
        groups.table(tile),
        M,
        N,
        K,
        E,
        *x.stride,
        *how.arguments,
        tile=tile,
        entry=entry,
        GROUPS=power_of_two(E + 1),
        EVEN=K % tile["BK"] == 0,
        SPLIT=x.split,
        SCALED=scaled,
        RAGGED=how.ragged(x.x, K, tile["BK"], False),
        **how.constants(),
    )
    return y


def outer_sums(
    a: Rows, b: Rows, groups: Groups, dtype: torch.dtype, order: Tensor | None = None
) -> Tensor:
    """[E, N, K]: sums over the rows r of each expert of outer(a[r], b[r]), in `dtype`."""
    M, E, N, K = groups.rows, groups.offsets.shape[0], a.size[1], b.size[1]
    out = torch.empty(E, N, K, dtype=dtype, device=a.x.device)
    if 0 in (M, N, K, E):
        return out.zero_()
    tile = tile_for(entry := f"grouped_gemm.dw{kind_of(a.x, b.x)}", a.x)
    tile = even(tile, "BN", N, a.x) if a.slots else tile
    tile = even(tile, "BK", K, b.x) if b.slots else tile
    same = a.x.dtype == b.x.dtype
    launch(
        _outer,
        programs(a.x, E * -(-N // tile["BN"]) * -(-K // tile["BK"]), tile),
        a.x,
        b.x,
        a.low,
        b.low,
        order,
        out,
        groups.offsets,
        M,
        N,
        K,
        E,
        *a.stride,
        *b.stride,
        tile=tile,
        entry=entry,
        A_SLOTS=a.slots,
        B_SLOTS=b.slots,
        A_SPLIT=a.split,
        B_SPLIT=b.split,
        COMPUTE=DTYPES[a.x.dtype] if same else tl.float32,
        PRECISION=precision(a.x.dtype, b.x.dtype, a.x),
        A_RAGGED=a.slots > 0 and ragged(a.x, N, tile["BN"]),
        B_RAGGED=b.slots > 0 and ragged(b.x, K, tile["BK"]),
    )
    return out
