"""grouped_gemm and its gradient in x, by npu_grouped_matmul."""

from __future__ import annotations

from torch import Tensor

from transom.kernels.moe.grouped_gemm import grouped_gemm, grouped_gemm_backward_x
from transom.op import Weight

from .._vendor import offer
from ._products import grouped, limits


@offer(grouped_gemm, *limits("x"))
def forward(x: Tensor, weight: Weight, offsets: Tensor) -> Tensor:
    """The vendor takes weights [E, K, N], and a transposed view as it is."""
    return grouped(x, weight.transpose(1, 2), offsets)


@offer(grouped_gemm_backward_x, *limits("dy"))
def dx(dy: Tensor, weight: Weight, offsets: Tensor) -> Tensor:
    """dx[r] = dy[r] @ weight[e]: the weight as it lies."""
    return grouped(dy, weight, offsets)
