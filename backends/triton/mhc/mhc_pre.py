"""mhc_pre: the products of all streams, then a pass that makes the coefficients and mixes."""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor
from triton import cdiv, jit

from transom.kernels.mhc.mhc_pre import mhc_pre, mhc_pre_backward
from transom.requires import at_most

from .._language import narrow, sigmoid
from .._launch import launch, programs, tile_for
from .._offer import floats, offer
from ._mixes import gradients, mix, products
from .sinkhorn import normalised, normalised_backward, side

LARGEST = 16
"""Streams, whose coefficients a program holds for some tokens."""


@jit
def logits_of(parts, scale, base, FIRST, t, place, inside, T, W, C, splits, rms_eps, which):
    """(a, u*r) of the coefficients at FIRST + place, of the scale number `which`."""
    u, r = mix(parts, t, FIRST + place, inside, T, W, C, splits, rms_eps)
    at = FIRST + tl.where(inside, place, 0)
    u *= r
    factor = tl.load(scale + which).to(tl.float32)
    return u * factor + tl.load(base + at).to(tl.float32), u


@jit
def _forward(
    parts,
    scale,
    base,
    x,
    h,
    post,
    comb,
    T,
    D,
    splits,
    iterations,
    eps,
    rms_eps,
    post_scale,
    R: tl.constexpr,
    BR: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
    HEAD: tl.constexpr,
):
    # h, post and comb of BT tokens; HEAD: h alone. x comes a second time, from the cache at best.
    k = tl.arange(0, BR)
    W, C = tl.maximum(R * D, 1), R if HEAD else (2 + R) * R
    for number in range(tl.program_id(0), tl.cdiv(T, BT), tl.num_programs(0)):
        t = (number * BT + tl.arange(0, BT)).to(tl.int64)
        streams = (t < T)[:, None] & (k < R)[None, :]
        a, _ = logits_of(
            parts, scale, base, 0, t[:, None], k[None, :], streams, T, W, C, splits, rms_eps, 0
        )
        pre = tl.where(streams, sigmoid(a) + eps, 0.0)
        if not HEAD:
            a, _ = logits_of(
                parts, scale, base, R, t[:, None], k[None, :], streams, T, W, C, splits, rms_eps, 1
            )
            tl.store(post + t[:, None] * R + k[None, :], post_scale * sigmoid(a), mask=streams)
            cells = k[None, :, None] * R + k[None, None, :]
            inside = streams[:, :, None] & (k < R)[None, None, :]
            a, _ = logits_of(
                parts,
                scale,
                base,
                2 * R,
                t[:, None, None],
                cells,
                inside,
                T,
                W,
                C,
                splits,
                rms_eps,
                2,
            )
            at = comb + t[:, None, None] * (R * R) + cells
            tl.store(at, normalised(a, inside, iterations, eps), mask=inside)
        for start in range(0, D, BD):
            d = start + tl.arange(0, BD)
            from_x = x + (t[:, None] * R + k[None, :])[:, :, None] * D + d[None, None, :]
            read = streams[:, :, None] & (d < D)[None, None, :]
            part = tl.load(from_x, mask=read, other=0.0).to(tl.float32)
            total = tl.sum(pre[:, :, None] * part, 1)
            into = h + t[:, None] * D + d[None, :]
            written = (t < T)[:, None] & (d < D)[None, :]
            tl.store(into, narrow(total, h.dtype.element_ty), mask=written)


@jit
def _slopes(
    parts,
    scale,
    base,
    x,
    dh,
    dpost,
    dcomb,
    dmix,
    da,
    products,
    pre,
    along,
    T,
    D,
    splits,
    iterations,
    eps,
    rms_eps,
    post_scale,
    R: tl.constexpr,
    BR: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
    HEAD: tl.constexpr,
):
    # Per token: da, the gradient of a; da * u * r, whose sum is dscale; dmix, that of u; pre; and
    # along = r**2 / W * sum(dmix * u), what the norm takes off x.
    k = tl.arange(0, BR)
    W, C = tl.maximum(R * D, 1), R if HEAD else (2 + R) * R
    for number in range(tl.program_id(0), tl.cdiv(T, BT), tl.num_programs(0)):
        t = (number * BT + tl.arange(0, BT)).to(tl.int64)
        streams = (t < T)[:, None] & (k < R)[None, :]
        share = tl.zeros((BT, BR), tl.float32)
        for start in range(0, D, BD):
            d = start + tl.arange(0, BD)
            inside = streams[:, :, None] & (d < D)[None, None, :]
            at = x + (t[:, None] * R + k[None, :])[:, :, None] * D + d[None, None, :]
            part = tl.load(at, mask=inside, other=0.0).to(tl.float32)
            at = dh + t[:, None] * D + d[None, :]
            slope = tl.load(at, mask=(t < T)[:, None] & (d < D)[None, :], other=0.0)
            share += tl.sum(part * slope.to(tl.float32)[:, None, :], 2)
        a, m = logits_of(
            parts, scale, base, 0, t[:, None], k[None, :], streams, T, W, C, splits, rms_eps, 0
        )
        gate = sigmoid(a)
        tl.store(pre + t[:, None] * R + k[None, :], gate + eps, mask=streams)
        slope = tl.where(streams, share * gate * (1.0 - gate), 0.0)
        factor = tl.load(scale).to(tl.float32)
        at = t[:, None] * C + k[None, :]
        _, r = mix(parts, t, t * 0, t < T, T, W, C, splits, rms_eps)
        tl.store(da + at, slope, mask=streams)
        tl.store(products + at, slope * m, mask=streams)
        tl.store(dmix + at, slope * factor * r[:, None], mask=streams)
        total = tl.sum(slope * factor * m, 1)
        if not HEAD:
            a, m = logits_of(
                parts, scale, base, R, t[:, None], k[None, :], streams, T, W, C, splits, rms_eps, 1
            )
            gate = sigmoid(a)
            slope = tl.load(dpost + t[:, None] * R + k[None, :], mask=streams, other=0.0)
            slope = tl.where(streams, slope * post_scale * gate * (1.0 - gate), 0.0)
            factor = tl.load(scale + 1).to(tl.float32)
            at += R
            tl.store(da + at, slope, mask=streams)
            tl.store(products + at, slope * m, mask=streams)
            tl.store(dmix + at, slope * factor * r[:, None], mask=streams)
            total += tl.sum(slope * factor * m, 1)
            cells = k[None, :, None] * R + k[None, None, :]
            inside = streams[:, :, None] & (k < R)[None, None, :]
            a, m = logits_of(
                parts,
                scale,
                base,
                2 * R,
                t[:, None, None],
                cells,
                inside,
                T,
                W,
                C,
                splits,
                rms_eps,
                2,
            )
            slope = tl.load(dcomb + t[:, None, None] * (R * R) + cells, mask=inside, other=0.0)
            slope = normalised_backward(slope, a, inside, iterations, eps)
            slope = tl.where(inside, slope, 0.0)
            factor = tl.load(scale + 2).to(tl.float32)
            at = t[:, None, None] * C + 2 * R + cells
            tl.store(da + at, slope, mask=inside)
            tl.store(products + at, slope * m, mask=inside)
            tl.store(dmix + at, slope * factor * r[:, None, None], mask=inside)
            total += tl.sum(tl.sum(slope * factor * m, 2), 1)
        tl.store(along + t, total * r * r / W, mask=t < T)


def _tile(x: Tensor):
    (R, D), tile = x.shape[-2:], tile_for("mhc.tokens", x)
    BD = min(tile["BD"], max(16, 1 << max(0, D - 1).bit_length()))
    BT = max(1, tile["ELEMENTS"] // (side(R) * max(BD, side(R))))
    return tile, dict(R=R, BR=side(R), BT=BT, BD=BD)


def mixed(
    x: Tensor,
    fn: Tensor,
    scale: Tensor,
    base: Tensor,
    iterations: int,
    eps: float,
    rms_eps: float,
    post_scale: float,
    head: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """h, post and comb of mhc_pre; `head`: h of mhc_head, and nothing in the others."""
    (R, D), T, lead = x.shape[-2:], x.shape[:-2].numel(), x.shape[:-2]
    h = torch.empty((*lead, D), dtype=x.dtype, device=x.device)
    post, comb = (
        torch.empty((*lead, *more), dtype=torch.float32, device=x.device) for more in ((R,), (R, R))
    )
    if not T:
        return h, post, comb
    x, fn = x.contiguous(), fn.contiguous()
    parts = products(x, fn)
    tile, sizes = _tile(x)
    launch(
        _forward,
        programs(x, cdiv(T, sizes["BT"]), tile),
        parts,
        scale.contiguous(),
        base.contiguous(),
        x,
        h,
        post,
        comb,
        T,
        D,
        parts.shape[0],
        iterations,
        eps,
        rms_eps,
        post_scale,
        tile=tile,
        entry="mhc.tokens",
        HEAD=head,
        **sizes,
    )
    return h, post, comb


def mixed_backward(
    dh: Tensor,
    dpost: Tensor | None,
    dcomb: Tensor | None,
    x: Tensor,
    fn: Tensor,
    scale: Tensor,
    base: Tensor,
    iterations: int,
    eps: float,
    rms_eps: float,
    post_scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dx, dfn, dscale, dbase); without dpost and dcomb those of mhc_head."""
    (R, D), T, C = x.shape[-2:], x.shape[:-2].numel(), fn.shape[0]
    if not T:
        wide = (fn.shape, scale.shape, base.shape)
        return x.new_empty(x.shape), *(x.new_zeros(s, dtype=torch.float32) for s in wide)
    x, fn, dh = x.contiguous(), fn.contiguous(), dh.contiguous()
    head = dpost is None or dcomb is None
    parts = products(x, fn)
    dmix, da, scaled = (torch.empty((T, C), dtype=torch.float32, device=x.device) for _ in range(3))
    pre, along = torch.empty((T, R), device=x.device), torch.empty(T, device=x.device)
    tile, sizes = _tile(x)
    launch(
        _slopes,
        programs(x, cdiv(T, sizes["BT"]), tile),
        parts,
        scale.contiguous(),
        base.contiguous(),
        x,
        dh,
        None if head else dpost.contiguous(),
        None if head else dcomb.contiguous(),
        dmix,
        da,
        scaled,
        pre,
        along,
        T,
        D,
        parts.shape[0],
        iterations,
        eps,
        rms_eps,
        post_scale,
        tile=tile,
        entry="mhc.tokens",
        HEAD=head,
        **sizes,
    )
    dx, dfn = gradients(dmix, along, pre, dh, x, fn)
    groups = (C,) if head else (R, R, R * R)
    dscale = torch.stack([part.sum() for part in scaled.sum(0).split(groups)])
    return dx, dfn, dscale, da.sum(0)


@offer(mhc_pre, *floats("x"), at_most("R", LARGEST))
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
    """h, post and comb."""
    return mixed(x, fn, scale, base, iterations, eps, rms_eps, post_scale, False)


@offer(mhc_pre_backward, *floats("x"), at_most("R", LARGEST))
def backward(
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
    """(dx, dfn, dscale, dbase)."""
    return mixed_backward(
        dh, dpost, dcomb, x, fn, scale, base, iterations, eps, rms_eps, post_scale
    )
