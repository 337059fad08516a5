"""sinkhorn by npu_mhc_sinkhorn."""

from __future__ import annotations

import torch
from torch import Tensor

from transom.kernels.mhc.sinkhorn import sinkhorn
from transom.requires import at_most, dtype

from .._vendor import call, offer
from ._limits import ITERATIONS, LIMITS


@offer(
    sinkhorn,
    dtype("logits", torch.float32, torch.bfloat16, torch.float16),
    at_most("iterations", ITERATIONS),
    *LIMITS,
)
def forward(logits: Tensor, *, iterations: int, eps: float) -> Tensor:
    return balanced(logits, iterations, eps)


def balanced(logits: Tensor, iterations: int, eps: float) -> Tensor:
    """The vendor's first row step is a softmax plus eps, as ours is; in float32."""
    R = logits.shape[-1]
    flat = logits.float().reshape(-1, R, R)
    comb, _, _ = call("npu_mhc_sinkhorn", flat, eps=eps, num_iters=iterations, out_flag=0)
    return comb.view(logits.shape)
