"""Hyper-connections, after a sublayer: its output spread over the mixed residual streams."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from transom.declare import op
from transom.dtypes import accumulator

from .sinkhorn import blocks

_EXAMPLES = [
    dict(T=(3,), R=4, D=8),
    dict(T=(4096,), R=4, D=4096),
    dict(T=(4096,), R=4, D=7168),
    dict(T=(1,), R=4, D=7168),
]


@op(
    "f[*T,D], x[*T,R,D], post[*T,R], comb[*T,R,R] -> y[*T,R,D]",
    dtypes="f: x; x: float; post: x | f32; comb: x | f32; y: x",
    flops="T*R*D*(2*R + 2)",
    accumulate="R + 1",
    autocast="f32: f x",
    batch="*T",
    examples=_EXAMPLES,
)
def mhc_post(f: Tensor, x: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    """y[k] = post[k] * f + sum_j comb[j,k] * x[j].

    f      output of the sublayer, [*T,D]
    x      residual streams that `mhc_pre` read, [*T,R,D]; leading dimensions are free
    post   weight of f in each stream; comb contracts its first axis: comb[j,k] is how much of
           stream j goes to k

    Returns new memory in the dtype of x; sums are float32 (float64 for float64), rounded once.

    *Source:* mHC, arXiv 2512.24880, eq. 3; axis as in DeepSeek-V4's released code.
    """
    (R, D), T = x.shape[-2:], x.shape[:-2].numel()
    wide = accumulator(x.dtype)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    fs, xs, out = f.reshape(T, D), x.reshape(T, R, D), y.view(T, R, D)
    posts, combs = post.reshape(T, R), comb.reshape(T, R, R)
    for rows in blocks(T, (3 * R + 1) * max(1, D) * wide.itemsize):
        mixed = torch.bmm(combs[rows].to(wide).mT, xs[rows].to(wide))
        mixed.addcmul_(posts[rows, :, None].to(wide), fs[rows, None].to(wide))
        out[rows] = mixed.to(x.dtype)
    return y


@op(
    "dy[*T,R,D], f[*T,D], x[*T,R,D], post[*T,R], comb[*T,R,R]"
    " -> df[*T,D], dx[*T,R,D], dpost[*T,R], dcomb[*T,R,R]",
    dtypes="dy: x; f: x; x: float; post: x | f32; comb: x | f32;"
    " df: x; dx: x; dpost: acc(x); dcomb: acc(x)",
    flops="T*R*D*(4*R + 4)",
    accumulate="max(D, R)",
    examples=_EXAMPLES,
)
def mhc_post_backward(
    dy: Tensor, f: Tensor, x: Tensor, post: Tensor, comb: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients (df, dx, dpost, dcomb) of `mhc_post`.

        df        = sum_k post[k] * dy[k]
        dx[j]     = sum_k comb[j,k] * dy[k]
        dpost[k]  = sum_d dy[k] * f
        dcomb[j,k] = sum_d x[j] * dy[k]

    dpost and dcomb are float32 (float64 for float64).

    *Source:* derived from the formula of `mhc_post`.
    """
    (R, D), T = x.shape[-2:], x.shape[:-2].numel()
    wide = accumulator(x.dtype)
    df, dx = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (f, x))
    dpost, dcomb = (torch.empty(t.shape, dtype=wide, device=t.device) for t in (post, comb))
    dys, fs, xs = dy.reshape(T, R, D), f.reshape(T, D), x.reshape(T, R, D)
    posts, combs = post.reshape(T, R), comb.reshape(T, R, R)
    for rows in blocks(T, (3 * R + 2) * max(1, D) * wide.itemsize):
        g, w = dys[rows].to(wide), combs[rows].to(wide)
        df.view(T, D)[rows] = torch.bmm(posts[rows, None].to(wide), g)[:, 0].to(x.dtype)
        dx.view(T, R, D)[rows] = torch.bmm(w, g).to(x.dtype)
        dpost.view(T, R)[rows] = torch.bmm(g, fs[rows, :, None].to(wide))[:, :, 0]
        dcomb.view(T, R, R)[rows] = torch.bmm(xs[rows].to(wide), g.mT)
    return df, dx, dpost, dcomb


@mhc_post.gradient(save="f x post comb")
def _(saved, dy):
    df, dx, dpost, dcomb = mhc_post_backward(dy, saved.f, saved.x, saved.post, saved.comb)
    return {
        "f": df,
        "x": dx,
        "post": dpost.to(saved.post.dtype),
        "comb": dcomb.to(saved.comb.dtype),
    }


@mhc_post.reference
def _(f, x, post, comb):
    y = post[..., None] * f[..., None, :]
    for j in range(x.shape[-2]):
        y = y + comb[..., j, :, None] * x[..., j, None, :]
    return y


@mhc_post_backward.reference
def _(dy, f, x, post, comb):
    df = (post[..., None] * dy).sum(-2)
    dx = np.einsum("...jk,...kd->...jd", comb, dy)
    dpost = (dy * f[..., None, :]).sum(-1)
    dcomb = np.einsum("...jd,...kd->...jk", x, dy)
    return df, dx, dpost, dcomb
