"""Hyper-connections, before a sublayer: its input, and how its output will enter the streams."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from transom.declare import op
from transom.dtypes import accumulator
from transom.kernels import _bounds as bounds
from transom.kernels._same_bits import multiply, sigmoid

from .sinkhorn import (
    blocks,
    normalised,
    normalised_backward,
    sinkhorn_backward_reference,
    sinkhorn_reference,
)

_NUMBERS = dict(eps=1e-6, rms_eps=1e-6, post_scale=2.0)
_EXAMPLES = [
    dict(T=(3,), R=4, D=8, iterations=3, **_NUMBERS),
    dict(T=(4096,), R=4, D=4096, iterations=20, **_NUMBERS),
    dict(T=(4096,), R=4, D=7168, iterations=20, **_NUMBERS),
    dict(T=(1,), R=4, D=7168, iterations=20, **_NUMBERS),
]


@op(
    "x[*T,R,D], fn[(2+R)*R,R*D], scale[3], base[(2+R)*R] -> h[*T,D], post[*T,R], comb[*T,R,R]",
    dtypes="x: float; fn: x | f32; scale: x | f32; base: x | f32; h: x; post: acc(x); comb: acc(x)",
    flops="T*(2*(2+R)*R*R*D + 4*R*D + R*R*(5 + 4*iterations))",
    accumulate="R*D",
    batch="*T",
    examples=_EXAMPLES,
)
def mhc_pre(
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
    """h = sum_j pre[j] * x[j]; post and comb are what `mhc_post` takes.

    With mix = (x_flat @ fn.T) / sqrt(mean(x_flat**2) + rms_eps), x_flat the R streams side by side:

        pre  = sigmoid(mix[:R]*scale[0] + base[:R]) + eps
        post = post_scale * sigmoid(mix[R:2R]*scale[1] + base[R:2R])
        comb = sinkhorn(mix[2R:]*scale[2] + base[2R:] as [R,R] row-major; iterations, eps)

    x           residual streams; leading dimensions are free.
    fn          [(2+R)*R, R*D]: R rows for pre, R for post, R*R for comb.
    post_scale  2 in DeepSeek-V4.
    iterations, eps  as for `sinkhorn`; eps is also added to pre.  rms_eps in units of x**2.

    Returns h [*T,D] in the dtype of x, post [*T,R] and comb [*T,R,R] in float32 (float64 for
    float64).  Mixes and sums are float32 or wider.  Raises ValueError for R < 1, iterations < 1,
               negative eps or rms_eps.

    *Source:* mHC, arXiv 2512.24880; constants and order of steps as DeepSeek-V4, arXiv 2606.19348.
    """
    (R, D), T = x.shape[-2:], x.shape[:-2].numel()
    lead, wide = x.shape[:-2], accumulator(x.dtype)
    h = torch.empty((*lead, D), dtype=x.dtype, device=x.device)
    post = torch.empty((*lead, R), dtype=wide, device=x.device)
    comb = torch.empty((*lead, R, R), dtype=wide, device=x.device)
    flat, hs = x.reshape(T, R, D), h.view(T, D)
    posts, combs = post.view(T, R), comb.view(T, R, R)
    fn, scale, base = fn.to(wide), scale.to(wide), base.to(wide)
    for rows in blocks(T, (2 * R + 1) * max(1, D) * wide.itemsize):
        xw = flat[rows].to(wide)
        a, _, _, _ = mixes(xw, fn, _spread(scale, R), base, rms_eps)
        pre = sigmoid(a[:, :R]) + eps
        hs[rows] = torch.bmm(pre[:, None], xw)[:, 0].to(x.dtype)
        posts[rows] = post_scale * sigmoid(a[:, R : 2 * R])
        combs[rows] = normalised(a[:, 2 * R :].unflatten(-1, (R, R)), iterations, eps)
    return h, post, comb


@op(
    "dh[*T,D], dpost[*T,R], dcomb[*T,R,R], x[*T,R,D], fn[(2+R)*R,R*D], scale[3], base[(2+R)*R]"
    " -> dx[*T,R,D], dfn[(2+R)*R,R*D], dscale[3], dbase[(2+R)*R]",
    dtypes="dh: x; dpost: acc(x); dcomb: acc(x); x: float; fn: x | f32; scale: x | f32;"
    " base: x | f32; dx: x; dfn: acc(x); dscale: acc(x); dbase: acc(x)",
    flops="T*(6*(2+R)*R*R*D + 8*R*D + R*R*(15 + 14*iterations))",
    accumulate="max(R*D, T*R*R)",
    examples=_EXAMPLES,
)
def mhc_pre_backward(
    dh: Tensor,
    dpost: Tensor,
    dcomb: Tensor,
    x: Tensor,
    fn: Tensor,
    scale: Tensor,
    base: Tensor,
    *,
    iterations: int,
    eps: float,
    rms_eps: float,
    post_scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients (dx, dfn, dscale, dbase) of `mhc_pre`; mixes and Sinkhorn steps are computed again.

    With u = x_flat @ fn.T, r = 1/sqrt(mean(x_flat**2) + rms_eps) and dmix the gradient of r*u:

        dx_flat = r*(dmix @ fn) - x_flat * r**3/(R*D) * (dmix . u) + pre*dh
        dfn     = (r*dmix).T @ x_flat

    Parameter gradients are float32 (float64 for float64), summed in a fixed order.

    *Source:* derived from the formula of `mhc_pre`.
    """
    (R, D), T = x.shape[-2:], x.shape[:-2].numel()
    wide = accumulator(x.dtype)
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    flat, dflat = x.reshape(T, R, D), dx.view(T, R, D)
    dhs, dposts, dcombs = dh.reshape(T, D), dpost.reshape(T, R), dcomb.reshape(T, R, R)
    fn, scale, base = fn.to(wide), _spread(scale.to(wide), R), base.to(wide)
    dfn, dscale, dbase = (
        torch.zeros(t.shape, dtype=wide, device=x.device) for t in (fn, base, base)
    )
    each = (6 * R + 1) * max(1, D) + (2 * iterations + 12) * R * R
    for rows in blocks(T, each * wide.itemsize):
        xw, dhw = flat[rows].to(wide), dhs[rows].to(wide)
        a, u, r, _ = mixes(xw, fn, scale, base, rms_eps)
        gates = sigmoid(a[:, : 2 * R])
        slope = gates * (1 - gates)
        da = torch.empty_like(a)
        torch.mul(torch.bmm(xw, dhw[:, :, None])[:, :, 0], slope[:, :R], out=da[:, :R])
        torch.mul(dposts[rows] * post_scale, slope[:, R:], out=da[:, R : 2 * R])
        logits = a[:, 2 * R :].unflatten(-1, (R, R))
        da[:, 2 * R :] = normalised_backward(dcombs[rows], logits, iterations, eps).flatten(1)
        dxw = mixes_backward(da, xw, fn, scale, u, r, (dfn, dscale, dbase))
        dxw += (gates[:, :R] + eps)[:, :, None] * dhw[:, None]
        dflat[rows] = dxw.to(x.dtype)
    parts = dscale.split((R, R, R * R))
    return dx, dfn, torch.stack([part.sum() for part in parts]), dbase


def mixes(
    x: Tensor, fn: Tensor, scale: Tensor, base: Tensor, rms_eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(mix*scale + base, u, r, mix) of x [t,R,D]: u = x_flat @ fn.T, r [t,1] = 1/rms, mix = r*u."""
    xf = x.flatten(1)
    r = torch.rsqrt(xf.square().sum(-1, keepdim=True) / max(1, xf.shape[1]) + rms_eps)
    u = multiply(xf, fn.T)
    # The norm is one number a token, so it may follow the product: exact, and x is read once.
    mix = u * r
    return mix * scale + base, u, r, mix


def mixes_backward(
    da: Tensor,
    x: Tensor,
    fn: Tensor,
    scale: Tensor,
    u: Tensor,
    r: Tensor,
    into: tuple[Tensor, Tensor, Tensor],
) -> Tensor:
    """The gradient of `mixes` towards x; those of fn, scale and base are added to `into`."""
    xf = x.flatten(1)
    dfn, dscale, dbase = into
    dbase += da.sum(0)
    dscale += (da * u * r).sum(0)
    dmix = da * scale
    dfn.addmm_((dmix * r).T, xf)
    along = (dmix * u).sum(-1, keepdim=True) * r.pow(3) / max(1, xf.shape[1])
    return (multiply(dmix * r, fn) - xf * along).view_as(x)


def _spread(scale: Tensor, R: int) -> Tensor:
    """The three scales, each repeated for its rows of fn."""
    return torch.cat([scale[i : i + 1].expand(n) for i, n in enumerate((R, R, R * R))])


@mhc_pre.gradient(save="x fn scale base")
def _(saved, dh, dpost, dcomb):
    dx, dfn, dscale, dbase = mhc_pre_backward(
        dh,
        dpost,
        dcomb,
        saved.x,
        saved.fn,
        saved.scale,
        saved.base,
        iterations=saved.iterations,
        eps=saved.eps,
        rms_eps=saved.rms_eps,
        post_scale=saved.post_scale,
    )
    return {
        "x": dx,
        "fn": dfn.to(saved.fn.dtype),
        "scale": dscale.to(saved.scale.dtype),
        "base": dbase.to(saved.base.dtype),
    }


def _sigmoid(a):
    return 1 / (1 + np.exp(-a))


@mhc_pre.reference
def _(x, fn, scale, base, iterations, eps, rms_eps, post_scale):
    R, D = x.shape[-2:]
    xf = x.reshape(*x.shape[:-2], R * D)
    normed = xf / np.sqrt((xf**2).sum(-1, keepdims=True) / max(1, R * D) + rms_eps)
    mix = normed @ fn.T
    pre = _sigmoid(mix[..., :R] * scale[0] + base[:R]) + eps
    post = post_scale * _sigmoid(mix[..., R : 2 * R] * scale[1] + base[R : 2 * R])
    logits = (mix[..., 2 * R :] * scale[2] + base[2 * R :]).reshape(*x.shape[:-2], R, R)
    return (pre[..., None] * x).sum(-2), post, sinkhorn_reference(logits, iterations, eps)


@mhc_pre_backward.reference
def _(dh, dpost, dcomb, x, fn, scale, base, iterations, eps, rms_eps, post_scale):
    R, D = x.shape[-2:]
    lead = x.shape[:-2]
    xf = x.reshape(*lead, R * D)
    rms = np.sqrt((xf**2).sum(-1, keepdims=True) / max(1, R * D) + rms_eps)
    normed = xf / rms
    mix = normed @ fn.T
    factor = np.repeat(scale, (R, R, R * R))
    a = mix * factor + base
    pre, post = _sigmoid(a[..., :R]), _sigmoid(a[..., R : 2 * R])
    logits = a[..., 2 * R :].reshape(*lead, R, R)
    dlogits = sinkhorn_backward_reference(dcomb, logits, iterations, eps)
    dpre = (x * dh[..., None, :]).sum(-1)
    da = np.concatenate(
        [
            dpre * pre * (1 - pre),
            dpost * post_scale * post * (1 - post),
            dlogits.reshape(*lead, R * R),
        ],
        axis=-1,
    )
    count = np.prod(lead, dtype=int)
    over = [a.reshape(count, a.shape[-1]) for a in (da, mix, normed)]
    dbase = over[0].sum(0)
    products = (over[0] * over[1]).sum(0)
    dscale = np.array([part.sum() for part in np.split(products, (R, 2 * R))])
    dfn = (over[0] * factor).T @ over[2]
    dnormed = (da * factor) @ fn
    # Through the norm: the part of the gradient along the row itself falls out.
    along = (dnormed * normed).sum(-1, keepdims=True) / max(1, R * D)
    dxf = (dnormed - normed * along) / rms
    dx = dxf.reshape(x.shape) + (pre + eps)[..., None] * dh[..., None, :]
    return dx, dfn, dscale, dbase


def _rules(R: int, iterations: int, eps: float, rms_eps: float) -> str | None:
    if R < 1:
        return f"x has R = {R} streams; must be >= 1"
    if iterations < 1:
        return f"iterations is {iterations}; must be >= 1"
    if text := bounds.above(bounds.ITERATIONS, iterations=iterations):
        return text
    for name, value in (("eps", eps), ("rms_eps", rms_eps)):
        if not value >= 0:
            return f"{name} is {value}; must be >= 0"
    return None


for _op in (mhc_pre, mhc_pre_backward):
    _op.check(_rules)
