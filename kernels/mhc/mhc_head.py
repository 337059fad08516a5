"""Hyper-connections, after the last layer: the residual streams become one."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from transom.declare import op
from transom.dtypes import accumulator
from transom.kernels._same_bits import sigmoid

from .mhc_pre import mixes, mixes_backward
from .sinkhorn import blocks

_EXAMPLES = [
    dict(T=(3,), R=4, D=8, eps=1e-6, rms_eps=1e-6),
    dict(T=(4096,), R=4, D=4096, eps=1e-6, rms_eps=1e-6),
    dict(T=(1,), R=4, D=7168, eps=1e-6, rms_eps=1e-6),
]


@op(
    "x[*T,R,D], fn[R,R*D], scale[1], base[R] -> h[*T,D]",
    dtypes="x: float; fn: x | f32; scale: x | f32; base: x | f32; h: x",
    flops="T*(2*R*R*D + 4*R*D)",
    accumulate="R*D",
    batch="*T",
    examples=_EXAMPLES,
)
def mhc_head(
    x: Tensor, fn: Tensor, scale: Tensor, base: Tensor, *, eps: float, rms_eps: float
) -> Tensor:
    """h = sum_j pre[j] * x[j], pre = sigmoid(mix*scale + base) + eps, mix as in `mhc_pre`.

    x        residual streams; leading dimensions are free
    eps      added to pre; rms_eps to the mean square of all streams, in units of x**2

    Returns [*T,D] in the dtype of x; mixes and sums are float32 or wider.  Raises ValueError for
    R < 1 or negative eps or rms_eps.

    *Source:* DeepSeek-V4, arXiv 2606.19348 (its released code).
    """
    (R, D), T = x.shape[-2:], x.shape[:-2].numel()
    wide = accumulator(x.dtype)
    h = torch.empty((*x.shape[:-2], D), dtype=x.dtype, device=x.device)
    flat, hs = x.reshape(T, R, D), h.view(T, D)
    fn, scale, base = fn.to(wide), scale.to(wide), base.to(wide)
    for rows in blocks(T, (2 * R + 1) * max(1, D) * wide.itemsize):
        xw = flat[rows].to(wide)
        a, _, _, _ = mixes(xw, fn, scale, base, rms_eps)
        hs[rows] = torch.bmm(sigmoid(a)[:, None] + eps, xw)[:, 0].to(x.dtype)
    return h


@op(
    "dh[*T,D], x[*T,R,D], fn[R,R*D], scale[1], base[R]"
    " -> dx[*T,R,D], dfn[R,R*D], dscale[1], dbase[R]",
    dtypes="dh: x; x: float; fn: x | f32; scale: x | f32; base: x | f32;"
    " dx: x; dfn: acc(x); dscale: acc(x); dbase: acc(x)",
    flops="T*(6*R*R*D + 8*R*D)",
    accumulate="max(R*D, T*R)",
    examples=_EXAMPLES,
)
def mhc_head_backward(
    dh: Tensor, x: Tensor, fn: Tensor, scale: Tensor, base: Tensor, *, eps: float, rms_eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients (dx, dfn, dscale, dbase) of `mhc_head`; formulas as in `mhc_pre_backward`.

    Parameter gradients are float32 (float64 for float64), summed in a fixed order.

    *Source:* derived from the formula of `mhc_head`.
    """
    (R, D), T = x.shape[-2:], x.shape[:-2].numel()
    wide = accumulator(x.dtype)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    flat, dflat, dhs = x.reshape(T, R, D), dx.view(T, R, D), dh.reshape(T, D)
    fn, scale, base = fn.to(wide), scale.to(wide), base.to(wide)
    dfn, dscale, dbase = (
        torch.zeros(t.shape, dtype=wide, device=x.device) for t in (fn, base, base)
    )
    for rows in blocks(T, (6 * R + 1) * max(1, D) * wide.itemsize):
        xw, dhw = flat[rows].to(wide), dhs[rows].to(wide)
        a, u, r, _ = mixes(xw, fn, scale, base, rms_eps)
        gate = sigmoid(a)
        da = torch.bmm(xw, dhw[:, :, None])[:, :, 0] * gate * (1 - gate)
        dxw = mixes_backward(da, xw, fn, scale, u, r, (dfn, dscale, dbase))
        dxw += (gate + eps)[:, :, None] * dhw[:, None]
        dflat[rows] = dxw.to(x.dtype)
    return dx, dfn, dscale.sum(0, keepdim=True), dbase


@mhc_head.gradient(save="x fn scale base")
def _(saved, dh):
    dx, dfn, dscale, dbase = mhc_head_backward(
        dh, saved.x, saved.fn, saved.scale, saved.base, eps=saved.eps, rms_eps=saved.rms_eps
    )
    return {
        "x": dx,
        "fn": dfn.to(saved.fn.dtype),
        "scale": dscale.to(saved.scale.dtype),
        "base": dbase.to(saved.base.dtype),
    }


@mhc_head.reference
def _(x, fn, scale, base, eps, rms_eps):
    R, D = x.shape[-2:]
    xf = x.reshape(*x.shape[:-2], R * D)
    normed = xf / np.sqrt((xf**2).sum(-1, keepdims=True) / max(1, R * D) + rms_eps)
    pre = 1 / (1 + np.exp(-(normed @ fn.T * scale + base))) + eps
    return (pre[..., None] * x).sum(-2)


@mhc_head_backward.reference
def _(dh, x, fn, scale, base, eps, rms_eps):
    R, D = x.shape[-2:]
    lead = x.shape[:-2]
    count = np.prod(lead, dtype=int)
    xf = x.reshape(*lead, R * D)
    rms = np.sqrt((xf**2).sum(-1, keepdims=True) / max(1, R * D) + rms_eps)
    normed = xf / rms
    mix = normed @ fn.T
    gate = 1 / (1 + np.exp(-(mix * scale + base)))
    da = (x * dh[..., None, :]).sum(-1) * gate * (1 - gate)
    dnormed = (da * scale) @ fn
    along = (dnormed * normed).sum(-1, keepdims=True) / max(1, R * D)
    dx = ((dnormed - normed * along) / rms).reshape(x.shape)
    dx = dx + (gate + eps)[..., None] * dh[..., None, :]
    dfn = (da * scale).reshape(count, R).T @ normed.reshape(count, R * D)
    dscale = np.array([(da * mix).sum()])
    return dx, dfn, dscale, da.reshape(count, R).sum(0)


def _rules(R: int, eps: float, rms_eps: float) -> str | None:
    if R < 1:
        return f"x has R = {R} streams; must be >= 1"
    for name, value in (("eps", eps), ("rms_eps", rms_eps)):
        if not value >= 0:
            return f"{name} is {value}; must be >= 0"
    return None


for _op in (mhc_head, mhc_head_backward):
    _op.check(_rules)
