"""What mhc_pre and mhc_head share: the products with fn, and the gradient through them.

    u = x_flat @ fn.T,  r = 1 / sqrt(mean(x_flat**2) + rms_eps),  a = u * r * scale + base

The products run over a token's R*D elements, by several programs where tokens are few; their parts
are added in order.
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor
from triton import cdiv, jit

from .._language import dot, mixture, narrow
from .._launch import launch, programs, tile_for
from ..moe._gemm import power_of_two
from ..moe._weights import precision

FEWEST = 1024
"""Elements that a part has at least, where a token's are shared out."""


@jit
def _products(
    x,
    fn,
    parts,
    T,
    W,
    C,
    splits,
    per,
    BC: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # parts[split,t] = u over a part of the W elements, and behind its C numbers the sum of squares.
    # Tokens are the columns of the product: fn has few rows. Bound by the reading of x.
    c = tl.arange(0, BC)
    for number in range(tl.program_id(0), splits * tl.cdiv(T, BT), tl.num_programs(0)):
        split = number % splits
        t = (number // splits * BT + tl.arange(0, BT)).to(tl.int64)
        total = tl.zeros((BC, BT), tl.float32)
        squares = tl.zeros((BT,), tl.float32)
        for start in range(split * per, tl.minimum(split * per + per, W), BK):
            k = start + tl.arange(0, BK)
            inside = (t < T)[:, None] & (k < W)[None, :]
            tile = tl.load(x + t[:, None] * W + k[None, :], mask=inside, other=0.0)
            inside = (c < C)[:, None] & (k < W)[None, :]
            rows = tl.load(fn + c[:, None] * W + k[None, :], mask=inside, other=0.0)
            total = mixture(rows.to(tl.float32), tl.trans(tile), total, PRECISION)
            squares += tl.sum(tile.to(tl.float32) * tile.to(tl.float32), 1)
        into = parts + (split * T + t) * (C + 1)
        inside = (c < C)[:, None] & (t < T)[None, :]
        tl.store(into[None, :] + c[:, None], total, mask=inside)
        tl.store(into + C, squares, mask=t < T)


@jit
def mix(parts, t, place, inside, T, W, C, splits, rms_eps):
    """(u, r) at the places `place` of the tokens t; u of the shape of both, and of `inside`."""
    u = tl.zeros(inside.shape, tl.float32)
    squares = tl.zeros(t.shape, tl.float32)
    for split in range(0, splits):
        at = parts + (split * T + t) * (C + 1)
        u += tl.load(at + place, mask=inside, other=0.0)
        squares += tl.load(at + C, mask=t < T, other=0.0)
    return u, tl.rsqrt(squares / W + rms_eps)


@jit
def _dx(
    dmix,
    along,
    pre,
    dh,
    x,
    fn,
    dx,
    T,
    D,
    C,
    R: tl.constexpr,
    BC: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # dx = dmix @ fn - x * along + pre[j] * dh, BT tokens and BK elements of one stream. Bound by
    # memory. dmix has r in it.
    c = tl.arange(0, BC)
    blocks = tl.cdiv(D, BK)
    for number in range(tl.program_id(0), R * tl.cdiv(T, BT) * blocks, tl.num_programs(0)):
        t = (number // blocks // R * BT + tl.arange(0, BT)).to(tl.int64)
        j, d = number // blocks % R, number % blocks * BK + tl.arange(0, BK)
        some, inside = t < T, (t < T)[:, None] & (d < D)[None, :]
        at = dmix + t[:, None] * C + c[None, :]
        slope = tl.load(at, mask=some[:, None] & (c < C)[None, :], other=0.0)
        at = fn + (c[:, None] * R + j) * D + d[None, :]
        rows = tl.load(at, mask=(c < C)[:, None] & (d < D)[None, :], other=0.0).to(tl.float32)
        total = dot(slope, rows, tl.zeros((BT, BK), tl.float32), PRECISION)
        at = (t[:, None] * R + j) * D + d[None, :]
        part = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
        total -= part * tl.load(along + t, mask=some, other=0.0)[:, None]
        part = tl.load(dh + t[:, None] * D + d[None, :], mask=inside, other=0.0).to(tl.float32)
        total += part * tl.load(pre + t * R + j, mask=some, other=0.0)[:, None]
        tl.store(dx + at, narrow(total, dx.dtype.element_ty), mask=inside)


@jit
def _dfn(
    dmix,
    x,
    dfn,
    T,
    W,
    C,
    BC: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # dfn = dmix.T @ x, all rows and BN columns of it; tokens are added in order, BK at a time.
    c = tl.arange(0, BC)
    for number in range(tl.program_id(0), tl.cdiv(W, BN), tl.num_programs(0)):
        n = number * BN + tl.arange(0, BN)
        total = tl.zeros((BC, BN), tl.float32)
        for start in range(0, T, BK):
            t = (start + tl.arange(0, BK)).to(tl.int64)
            inside = (c < C)[:, None] & (t < T)[None, :]
            slope = tl.load(dmix + t[None, :] * C + c[:, None], mask=inside, other=0.0)
            inside = (t < T)[:, None] & (n < W)[None, :]
            tile = tl.load(x + t[:, None] * W + n[None, :], mask=inside, other=0.0)
            total = mixture(slope, tile, total, PRECISION)
        inside = (c < C)[:, None] & (n < W)[None, :]
        tl.store(dfn + tl.cast(c, tl.int64)[:, None] * W + n[None, :], total, mask=inside)


def products(x: Tensor, fn: Tensor) -> Tensor:
    """parts [splits,T,C+1] of u and of the sum of squares, of contiguous x and fn."""
    (R, D), T, C = x.shape[-2:], x.shape[:-2].numel(), fn.shape[0]
    tile = tile_for("mhc.products", x)
    tiles, splits, W = cdiv(T, tile["BT"]), 1, R * D
    # A token's bits must not depend on how many there are.
    if not torch.are_deterministic_algorithms_enabled():
        splits = max(1, min(programs(x, 1 << 20, tile)[0] // tiles, W // FEWEST))
    per = cdiv(cdiv(W, splits), tile["BK"]) * tile["BK"]
    parts = torch.empty((splits, T, C + 1), dtype=torch.float32, device=x.device)
    launch(
        _products,
        programs(x, tiles * splits, tile),
        x,
        fn,
        parts,
        T,
        W,
        C,
        splits,
        per,
        tile=tile,
        entry="mhc.products",
        BC=power_of_two(C),
        PRECISION=precision(x.dtype, x.dtype, x),
    )
    return parts


def gradients(
    dmix: Tensor, along: Tensor, pre: Tensor, dh: Tensor, x: Tensor, fn: Tensor
) -> tuple[Tensor, Tensor]:
    """(dx, dfn) from dmix [T,C], the gradient of u, which has r in it."""
    (R, D), T, C = x.shape[-2:], x.shape[:-2].numel(), fn.shape[0]
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    dfn = torch.empty(fn.shape, dtype=torch.float32, device=x.device)
    tile = tile_for("mhc.dx", x)
    launch(
        _dx,
        programs(x, cdiv(T, tile["BT"]) * R * cdiv(D, tile["BK"]), tile),
        dmix,
        along,
        pre,
        dh,
        x,
        fn,
        dx,
        T,
        D,
        C,
        tile=tile,
        entry="mhc.dx",
        R=R,
        BC=power_of_two(C),
        PRECISION=precision(torch.float32, torch.float16, x),
    )
    tile = tile_for("mhc.dfn", x)
    launch(
        _dfn,
        programs(x, cdiv(R * D, tile["BN"]), tile),
        dmix,
        x,
        dfn,
        T,
        R * D,
        C,
        tile=tile,
        entry="mhc.dfn",
        BC=power_of_two(C),
        PRECISION=precision(x.dtype, x.dtype, x),
    )
    return dx, dfn
