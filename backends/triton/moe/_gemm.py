"""Products of an expert's rows with its weight, rows sorted by expert: the kernels' common core.

Rows are cut into tiles that never hold two experts' rows. How many tiles stand before each expert's
end is a table that a kernel of one program makes on the device, since the host never sees how many
rows an expert has. The kernels' grids are as large as the device; each program takes every n-th
tile and finds its expert in the table.
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor
from triton import jit

from .._choice import Tile
from .._language import dot, narrow
from .._launch import launch, programs, tile_for

FEW = 16
"""Rows of an expert, on average, up to which tiles are low and weights are what moves."""


@jit
def _rows_of(offsets, group, M, E):
    """(start, end) of a group's rows; group E holds those behind the last expert."""
    start = tl.load(offsets + tl.minimum(tl.maximum(group - 1, 0), E - 1))
    end = tl.load(offsets + tl.minimum(group, E - 1))
    start = tl.where(group == 0, 0, tl.minimum(tl.maximum(start, 0), M))
    end = tl.where(group >= E, M, tl.minimum(tl.maximum(end, 0), M))
    return start.to(tl.int32), end.to(tl.int32)


@jit
def _tiles_of(offsets, group, M, E, BM: tl.constexpr):
    start, end = _rows_of(offsets, group, M, E)
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
    start, end = _rows_of(offsets, group, M, E)
    return group, start + (at - before) * BM, end


@jit
def _rows(
    x, weight, y, offsets, table, M, N, K, E, x_row, x_k, w_e, w_n, w_k,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUPS: tl.constexpr,
    EVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # y[r] = x[r] @ weight[e].T, a tile [BM, BN] a step, summed over K in registers. Bound by the
    # tensor cores, or with few rows an expert by the reading of weights.
    blocks = tl.cdiv(N, BN)
    total = tl.load(table + E) * blocks
    for at in range(tl.program_id(0), total, tl.num_programs(0)):
        group, first, end = find_tile(offsets, table, at // blocks, M, E, BM, GROUPS)
        r, n = first + tl.arange(0, BM), at % blocks * BN + tl.arange(0, BN)
        inside_r, inside_n = r < end, n < N
        e = tl.minimum(group, E - 1).to(tl.int64)
        from_x = x + r.to(tl.int64)[:, None] * x_row
        from_w = weight + e * w_e + n.to(tl.int64)[None, :] * w_n
        acc = tl.zeros((BM, BN), tl.float32)
        # Rows behind the last expert are zero and are not read.
        for k0 in range(0, tl.where(group < E, K, 0), BK):
            k = k0 + tl.arange(0, BK)
            if EVEN:
                a = tl.load(from_x + k[None, :] * x_k, mask=inside_r[:, None], other=0.0)
                b = tl.load(from_w + k[:, None] * w_k, mask=inside_n[None, :], other=0.0)
            else:
                inside_k = k < K
                a_mask = inside_r[:, None] & inside_k[None, :]
                b_mask = inside_n[None, :] & inside_k[:, None]
                a = tl.load(from_x + k[None, :] * x_k, mask=a_mask, other=0.0)
                b = tl.load(from_w + k[:, None] * w_k, mask=b_mask, other=0.0)
            if a.dtype != b.dtype:
                acc = dot(a.to(tl.float32), b.to(tl.float32), acc, PRECISION)
            else:
                acc = dot(a, b, acc, PRECISION)
        into = y + r.to(tl.int64)[:, None] * N + n[None, :]
        tl.store(into, narrow(acc, y.dtype.element_ty), mask=inside_r[:, None] & inside_n[None, :])


@jit
def _outer(
    dy, x, dw, offsets, M, N, K, E, dy_row, dy_n, x_row, x_k,
    BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # dw[e] = sum over e's rows of outer(dy[r], x[r]), a tile [BN, BK] of one expert a step; its
    # rows are added in order.
    n_blocks, k_blocks = tl.cdiv(N, BN), tl.cdiv(K, BK)
    for at in range(tl.program_id(0), E * n_blocks * k_blocks, tl.num_programs(0)):
        e = at // (n_blocks * k_blocks)
        n = at // k_blocks % n_blocks * BN + tl.arange(0, BN)
        k = at % k_blocks * BK + tl.arange(0, BK)
        inside_n, inside_k = n < N, k < K
        start, end = _rows_of(offsets, e, M, E)
        acc = tl.zeros((BN, BK), tl.float32)
        for r0 in range(start, end, BR):
            r = r0 + tl.arange(0, BR)
            inside_r, row = r < end, r.to(tl.int64)
            a = tl.load(
                dy + row[None, :] * dy_row + n[:, None] * dy_n,
                mask=inside_r[None, :] & inside_n[:, None], other=0.0,
            )  # fmt: skip
            b = tl.load(
                x + row[:, None] * x_row + k[None, :] * x_k,
                mask=inside_r[:, None] & inside_k[None, :], other=0.0,
            )  # fmt: skip
            acc = dot(a, b, acc, PRECISION)
        into = dw + (e.to(tl.int64) * N + n[:, None]) * K + k[None, :]
        tl.store(into, narrow(acc, dw.dtype.element_ty), mask=inside_n[:, None] & inside_k[None, :])


def power_of_two(n: int) -> int:
    """The least power of two >= n, 16 at least."""
    return max(16, 1 << max(0, n - 1).bit_length())


def precision() -> str:
    """How float32 is multiplied: as torch.set_float32_matmul_precision asks, "highest" is ieee."""
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def few_rows(M: int, E: int) -> bool:
    """True if low tiles are the better ones. Under deterministic algorithms never: they sum in
    another order, and a row's bits must not depend on the other rows."""
    return M <= FEW * E and not torch.are_deterministic_algorithms_enabled()


def tile_table(offsets: Tensor, M: int, tile: Tile) -> Tensor:
    """Tiles up to each group's end, [E+1]: the experts, and the rows behind them."""
    E = offsets.shape[0]
    table = torch.empty(E + 1, dtype=torch.int32, device=offsets.device)
    launch(_table, (1,), offsets, table, M, E, BM=tile["BM"], GROUPS=power_of_two(E + 1))
    return table


def most_tiles(M: int, E: int, tile: Tile) -> int:
    """Tiles that there are at most, whatever the offsets."""
    return M // tile["BM"] + E + 1


def rows_times(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """y[r] = weight[e] @ x[r]; weight [E, N, K] of any strides."""
    (M, K), (E, N) = x.shape, weight.shape[:2]
    if 0 in (M, K, N, E):
        return x.new_zeros(M, N)
    y = x.new_empty(M, N)
    entry = "grouped_gemm.few" if few_rows(M, E) else "grouped_gemm.many"
    tile = tile_for(entry, x)
    offsets = offsets.contiguous()
    table = tile_table(offsets, M, tile)
    grid = programs(x, most_tiles(M, E, tile) * -(-N // tile["BN"]), tile)
    launch(
        _rows, grid, x, weight, y, offsets, table, M, N, K, E, *x.stride(), *weight.stride(),
        tile=tile, entry=entry, GROUPS=power_of_two(E + 1), EVEN=K % tile["BK"] == 0,
        PRECISION=precision(),
    )  # fmt: skip
    return y


def outer_sums(dy: Tensor, x: Tensor, offsets: Tensor, dtype: torch.dtype) -> Tensor:
    """dw[e] = sum over the rows r of expert e of outer(dy[r], x[r]), in `dtype`."""
    (M, N), K, E = dy.shape, x.shape[1], offsets.shape[0]
    if 0 in (M, N, K, E):
        return dy.new_zeros(E, N, K, dtype=dtype)
    dw = dy.new_empty(E, N, K, dtype=dtype)
    tile = tile_for(entry := "grouped_gemm.dw", dy)
    grid = programs(dy, E * -(-N // tile["BN"]) * -(-K // tile["BK"]), tile)
    launch(
        _outer, grid, dy, x, dw, offsets.contiguous(), M, N, K, E, *dy.stride(), *x.stride(),
        tile=tile, entry=entry, PRECISION=precision(),
    )  # fmt: skip
    return dw
