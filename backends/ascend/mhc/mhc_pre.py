"""mhc_pre by npu_mhc_pre and npu_mhc_sinkhorn."""

from __future__ import annotations

import torch
from torch import Tensor

from transom.kernels.mhc.mhc_pre import mhc_pre
from transom.requires import at_most, dtype, one_of

from .._vendor import call, offer
from ._limits import ITERATIONS, LIMITS
from .sinkhorn import balanced


@offer(
    mhc_pre,
    dtype("x", torch.bfloat16, torch.float16),
    one_of("post_scale", 2.0),
    at_most("iterations", ITERATIONS),
    *LIMITS,
)
def forward(
    x: Tensor,
    fn: Tensor,
    scale: Tensor,
    base: Tensor,
    *,
    iterations: int,
    eps: float,
    rms_eps: float,
    post_scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Parameters are taken to float32, in which the vendor wants them."""
    *lead, R, D = x.shape
    h, post, mixed, *_ = call(
        "npu_mhc_pre",
        x.reshape(-1, R, D).contiguous(),
        fn.float(),
        scale.float(),
        base.float(),
        norm_eps=rms_eps,
        hc_eps=eps,
    )
    comb = balanced(mixed.view(*lead, R, R), iterations, eps)
    return h.view(*lead, D), post.view(*lead, R), comb
