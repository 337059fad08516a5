"""Manifold-constrained hyper-connections of transformers' families: `mhc_pre` and `mhc_post`.

Hugging Face rounds the coefficients of the mix to the streams' dtype; so does this.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import transom


def pre(module: Any, streams: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """post[B, S, R], comb[B, S, R, R] and the sublayer's input [B, S, D] of streams[B, S, R, D]."""
    h, out, comb = transom.mhc_pre(
        streams,
        *(as_or_wide(p, streams) for p in (module.fn, module.scale, module.base)),
        iterations=module.hc_sinkhorn_iters,
        eps=module.hc_eps,
        rms_eps=module.input_norm.eps,
        post_scale=2.0,
    )
    return out, comb, h


def post(f: Tensor, x: Tensor, out: Tensor, comb: Tensor) -> Tensor:
    """The streams after a sublayer that gave f[B, S, D] for the streams x."""
    return transom.mhc_post(f.to(x.dtype), x, out.to(x.dtype), comb.to(x.dtype))


def as_or_wide(parameter: Tensor, x: Tensor) -> Tensor:
    """`parameter` if the operators take it beside x as it is, else in float32."""
    return parameter if parameter.dtype in (x.dtype, torch.float32) else parameter.float()
