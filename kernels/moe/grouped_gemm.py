"""Grouped matrix product: the rows of each expert times the weight of that expert."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from transom import config
from transom.declare import op
from transom.kernels._same_bits import ROW_TILE, multiply
from transom.op import Weight
from transom.ranges import satisfied_by
from transom.weights import weight_tile

# Rows of a cast or dequantised weight tile are a multiple of this, the largest block of a quantised
# format.
WEIGHT_BLOCK = 128


def segments(ends: Sequence[int], rows: int) -> Iterator[tuple[int, int, int]]:
    """(expert, start, stop) of every expert that has rows, from inclusive ends."""
    start = 0
    for expert, end in enumerate(ends):
        stop = min(int(end), rows)
        if stop > start:
            yield expert, start, stop
            start = stop


def row_steps(start: int, stop: int, bytes_per_row: int) -> Iterator[tuple[int, int]]:
    """Pieces of [start, stop) whose temporaries fit half of the workspace (one row always does)."""
    step = max(1, config.workspace_bytes() // 2 // max(1, bytes_per_row))
    if step > ROW_TILE:
        step -= step % ROW_TILE
    for a in range(start, stop, step):
        yield a, min(stop, a + step)


def weight_steps(weight: Weight, dtype: torch.dtype) -> Iterator[tuple[int, int]]:
    """Row ranges of `weight[e]` whose tiles in `dtype` take at most a quarter of the workspace."""
    N, K = weight.shape[-2:]
    if isinstance(weight, Tensor) and weight.dtype == dtype:
        if N:  # the tile is a view: nothing to bound
            yield 0, N
        return
    fit = config.workspace_bytes() // 4 // max(1, K * dtype.itemsize)
    step = max(WEIGHT_BLOCK, fit - fit % WEIGHT_BLOCK)
    for start in range(0, N, step):
        yield start, min(N, start + step)


def times_weight(rows: Tensor, weight: Weight, expert: int) -> Tensor:
    """rows[R,K] @ weight[expert].T -> [R,N] in the dtype of `rows`; the weight by tiles."""
    out = rows.new_empty(rows.shape[0], weight.shape[1])
    for start, stop in weight_steps(weight, rows.dtype):
        tile = weight_tile(weight, expert, start, stop, rows.dtype)
        out[:, start:stop] = multiply(rows, tile.t())
    return out


def times_weight_transposed(rows: Tensor, weight: Weight, expert: int) -> Tensor:
    """rows[R,N] @ weight[expert] -> [R,K], in the dtype of `rows`; tiles are added in order."""
    out = rows.new_zeros(rows.shape[0], weight.shape[2])
    for start, stop in weight_steps(weight, rows.dtype):
        tile = weight_tile(weight, expert, start, stop, rows.dtype)
        out += multiply(rows[:, start:stop], tile)
    return out


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which rows of `dtype` are multiplied and summed."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@op(
    "x[M,K], weight[E,N,K], offsets[E] -> y[M,N]",
    dtypes="x: float; weight: x | f32 | quant; offsets: index; y: x",
    flops="2*M*N*K",
    accumulate="K",
    autocast="low: x",
    examples=[
        dict(M=24, K=32, N=48, E=4),
        dict(M=512, K=2048, N=1536, E=32),
        dict(M=1024, K=2880, N=5760, E=16),
        dict(M=64, K=4096, N=4096, E=16),
    ],
)
def grouped_gemm(x: Tensor, weight: Weight, offsets: Tensor) -> Tensor:
    """y[r] = weight[e] @ x[r], e the first expert with offsets[e] > r.

    x        rows sorted by expert.
    weight   one [N,K] matrix per expert; any strides (a transposed view is not copied); a
             QuantizedWeight is dequantised by tiles.
    offsets  inclusive ends: the cumulative sum of the rows of each expert, never decreasing, at
             most M.

    Returns a new [M,N] tensor in the dtype of x; sums are float32 (float64 for float64) and rounded
    once.  Rows of 16 bits times int8, int4 or mxfp4: an implementation may round a row first to
    16-bit fixed point within blocks of the weight's group along K (at most 128), with an error of
    2^-15 of the block's largest element; products and sums of a block are then exact.  Rows at or
    beyond offsets[-1] belong to nobody: they are not read (NaN there never matters) and are zero in
    y.  Under torch.use_deterministic_algorithms(True) the bits of a row do not depend on the other
    rows.

    Raises ValueError for offsets that decrease, are negative or exceed M.

    *Source:* op contracts 5.2, layout "offsets" (that of torch's grouped_mm), with the rows beyond
    the end defined.
    """
    M, K = x.shape
    N = weight.shape[1]
    acc = accumulator(x.dtype)
    y = x.new_empty(M, N)
    end = 0
    for expert, start, end in segments(offsets.tolist(), M):
        for a, b in row_steps(start, end, (K + 2 * N) * acc.itemsize):
            y[a:b] = times_weight(x[a:b].to(acc), weight, expert)
    y[end:] = 0
    return y


@grouped_gemm.reference
def _(x: np.ndarray, weight: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    y = np.zeros((x.shape[0], weight.shape[1]))
    start = 0
    for e, end in enumerate(offsets):
        y[start:end] = x[start:end] @ weight[e].T
        start = end
    return y


@grouped_gemm.check_values
@satisfied_by("0 <= rising offsets <= M")
def _offsets_fault(offsets: Tensor, M: int) -> str | None:
    ends = offsets.tolist()
    # Sorting a sorted list is one pass in C: 4 us less than NumPy for the sizes that occur.
    if not ends or (ends[0] >= 0 and ends[-1] <= M and ends == sorted(ends)):
        return None
    if ends[0] < 0:
        return f"offsets starts with {ends[0]}; inclusive ends must be >= 0"
    for e, (end, following) in enumerate(zip(ends, ends[1:]), 1):
        if following < end:
            return (
                f"offsets decreases from {end} to {following} at expert {e}; "
                "inclusive ends never decrease; pass the cumulative sum of the rows of each expert"
            )
    return f"offsets ends with {ends[-1]}; x has M = {M} rows"


def _sample_offsets(rng: np.random.Generator, dims: dict[str, Any]) -> dict[str, Any]:
    """Ends at random places, so that some experts have no row and some rows have no expert."""
    M, E = dims["M"], dims["E"]
    return {"offsets": np.sort(rng.integers(0, M + 1, E))}


grouped_gemm.sample(_sample_offsets)


@grouped_gemm.gradient(save="x weight offsets")
def _(saved: Any, dy: Tensor) -> dict[str, Tensor | None]:
    return {
        "x": grouped_gemm_backward_x(dy, saved.weight, saved.offsets) if saved.needs("x") else None,
        "weight": grouped_gemm_backward_weight(dy, saved.x, saved.offsets, saved.weight)
        if saved.needs("weight")
        else None,
    }


@op(
    "dy[M,N], weight[E,N,K], offsets[E] -> dx[M,K]",
    dtypes="dy: float; weight: dy | f32 | quant; offsets: index; dx: dy",
    flops="2*M*N*K",
    accumulate="N",
    examples=[dict(M=24, K=32, N=48, E=4), dict(M=512, K=2048, N=1536, E=32)],
)
def grouped_gemm_backward_x(dy: Tensor, weight: Weight, offsets: Tensor) -> Tensor:
    """dx[r] = dy[r] @ weight[e], e the first expert with offsets[e] > r: the gradient of
    `grouped_gemm` in x.

    Arguments as in `grouped_gemm`; dy has the shape of its result.  Returns a new [M,K] tensor in
    the dtype of dy, zero in rows at or beyond offsets[-1], where dy is not read.  Works with a
    QuantizedWeight (the gradient of the product with the dequantised weight).

    *Source:* op contracts 5.4, `dA = dY . W`.
    """
    M, N = dy.shape
    K = weight.shape[2]
    acc = accumulator(dy.dtype)
    dx = dy.new_empty(M, K)
    end = 0
    for expert, start, end in segments(offsets.tolist(), M):
        for a, b in row_steps(start, end, (N + 2 * K) * acc.itemsize):
            dx[a:b] = times_weight_transposed(dy[a:b].to(acc), weight, expert)
    dx[end:] = 0
    return dx


@grouped_gemm_backward_x.reference
def _(dy: np.ndarray, weight: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    dx = np.zeros((dy.shape[0], weight.shape[2]))
    start = 0
    for e, end in enumerate(offsets):
        dx[start:end] = dy[start:end] @ weight[e]
        start = end
    return dx


grouped_gemm_backward_x.check_values(_offsets_fault)


grouped_gemm_backward_x.sample(_sample_offsets)


@op(
    "dy[M,N], x[M,K], offsets[E], weight[E,N,K] -> dw[E,N,K]",
    dtypes="dy: float; x: dy; offsets: index; weight: dy | f32; dw: weight",
    flops="2*M*N*K",
    bytes="M*N*size.dy + M*K*size.x + E*N*K*size.weight",
    accumulate="M",
    examples=[dict(M=24, K=32, N=48, E=4), dict(M=512, K=2048, N=1536, E=32)],
)
def grouped_gemm_backward_weight(dy: Tensor, x: Tensor, offsets: Tensor, weight: Tensor) -> Tensor:
    """dw[e] = sum over the rows r of expert e of outer(dy[r], x[r]): the gradient of `grouped_gemm`
    in weight.

    weight   gives the shape and the dtype of the result; its values are not read.

    Returns a new [E,N,K] tensor.  Sums are float32 (float64 for float64) in row order and rounded
    once; an expert without rows gets exactly zero.  Rows at or beyond offsets[-1] are not read.

    *Source:* op contracts 5.2, layout "k-grouped", and 5.4.
    """
    M, N = dy.shape
    K = x.shape[1]
    acc = accumulator(dy.dtype)
    dw = torch.zeros(weight.shape, dtype=weight.dtype, device=dy.device)
    for expert, start, stop in segments(offsets.tolist(), M):
        for n0, n1 in gradient_steps(N, K, dw.dtype, acc):
            into = dw[expert, n0:n1]
            total = into if dw.dtype == acc else into.to(acc)
            for a, b in row_steps(start, stop, (n1 - n0 + K) * acc.itemsize):
                total.addmm_(dy[a:b, n0:n1].to(acc).t(), x[a:b].to(acc))
            if total is not into:
                into.copy_(total)
    return dw


def gradient_steps(
    N: int, K: int, dtype: torch.dtype, acc: torch.dtype
) -> Iterator[tuple[int, int]]:
    """Row ranges of one expert's gradient whose sums fit a quarter of the workspace."""
    step = max(1, N if dtype == acc else config.workspace_bytes() // 4 // max(1, K * acc.itemsize))
    for start in range(0, N, step):
        yield start, min(N, start + step)


@grouped_gemm_backward_weight.reference
def _(dy: np.ndarray, x: np.ndarray, offsets: np.ndarray, weight: np.ndarray) -> np.ndarray:
    dw = np.zeros(weight.shape)
    start = 0
    for e, end in enumerate(offsets):
        dw[e] = dy[start:end].T @ x[start:end]
        start = end
    return dw


grouped_gemm_backward_weight.check_values(_offsets_fault)


grouped_gemm_backward_weight.sample(_sample_offsets)
