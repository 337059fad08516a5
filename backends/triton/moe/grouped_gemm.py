"""grouped_gemm and its gradients: two launches, a table of row tiles and the products."""

from __future__ import annotations

from torch import Tensor

from transom.dtypes import QUANTIZED
from transom.kernels.moe.grouped_gemm import (
    grouped_gemm,
    grouped_gemm_backward_weight,
    grouped_gemm_backward_x,
)
from transom.op import Weight
from transom.requires import dtype

from .._offer import floats, offer, usable
from ._gemm import Groups, Rows, outer_sums, rows_times


@offer(grouped_gemm, *floats("x"), dtype("weight", *usable(), *QUANTIZED))
def forward(x: Tensor, weight: Weight, offsets: Tensor) -> Tensor:
    """y[r] = weight[e] @ x[r], e the first expert with offsets[e] > r."""
    return rows_times(Rows(x), weight, Groups.of(offsets, x.shape[0]), x.dtype)


@offer(grouped_gemm_backward_x, *floats("dy"), dtype("weight", *usable(), *QUANTIZED))
def dx(dy: Tensor, weight: Weight, offsets: Tensor) -> Tensor:
    """dx[r] = dy[r] @ weight[e]."""
    groups = Groups.of(offsets, dy.shape[0])
    return rows_times(Rows(dy), weight, groups, dy.dtype, transposed=True)


@offer(grouped_gemm_backward_weight, *floats("dy"))
def dw(dy: Tensor, x: Tensor, offsets: Tensor, weight: Tensor) -> Tensor:
    """dw[e] = sum over the rows r of expert e of outer(dy[r], x[r])."""
    return outer_sums(Rows(dy), Rows(x), Groups.of(offsets, dy.shape[0]), weight.dtype)
