"""mhc_post by npu_mhc_post."""

from __future__ import annotations

import torch
from torch import Tensor

from transom.kernels.mhc.mhc_post import mhc_post
from transom.requires import dtype

from .._vendor import call, offer, same_dtype
from ._limits import LIMITS


@offer(mhc_post, dtype("x", torch.bfloat16, torch.float16), same_dtype("x", "f"), *LIMITS)
def forward(f: Tensor, x: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    """comb contracts its first axis, here as there."""
    R, D = x.shape[-2:]
    y = call(
        "npu_mhc_post",
        x.reshape(-1, R, D).contiguous(),
        comb.float().reshape(-1, R, R),
        f.reshape(-1, D).contiguous(),
        post.float().reshape(-1, R),
    )
    return y.view(x.shape)
