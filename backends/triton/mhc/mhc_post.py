"""mhc_post: all streams of some tokens at a time, one pass over the memory."""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor
from triton import cdiv, jit

from transom.kernels.mhc.mhc_post import mhc_post, mhc_post_backward
from transom.requires import at_most

from .._language import narrow
from .._launch import launch, programs, tile_for
from .._offer import floats, offer
from .sinkhorn import LARGEST, side


@jit
def _forward(
    f, x, post, comb, y, T, D, R: tl.constexpr, BR: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr
):
    # y[k] = post[k] f + sum_j comb[j,k] x[j], BT tokens and BD elements. Bound by memory.
    k = tl.arange(0, BR)
    for number in range(tl.program_id(0), tl.cdiv(T, BT) * tl.cdiv(D, BD), tl.num_programs(0)):
        t = (number // tl.cdiv(D, BD) * BT + tl.arange(0, BT)).to(tl.int64)
        d = number % tl.cdiv(D, BD) * BD + tl.arange(0, BD)
        some, streams = (t < T)[:, None], (t < T)[:, None] & (k < R)[None, :]
        inside = some & (d < D)[None, :]
        part = tl.load(f + t[:, None] * D + d[None, :], mask=inside, other=0.0).to(tl.float32)
        share = tl.load(post + t[:, None] * R + k[None, :], mask=streams, other=0.0).to(tl.float32)
        total = share[:, :, None] * part[:, None, :]
        for j in range(R):
            row = t * R + j
            stream = tl.load(x + row[:, None] * D + d[None, :], mask=inside, other=0.0)
            mixed = tl.load(comb + row[:, None] * R + k[None, :], mask=streams, other=0.0)
            total += mixed.to(tl.float32)[:, :, None] * stream.to(tl.float32)[:, None, :]
        at = y + (t[:, None] * R + k[None, :])[:, :, None] * D + d[None, None, :]
        cells = streams[:, :, None] & (d < D)[None, None, :]
        tl.store(at, narrow(total, y.dtype.element_ty), mask=cells)


@jit
def _backward(
    dy,
    f,
    x,
    post,
    comb,
    df,
    dx,
    dpost,
    dcomb,
    T,
    D,
    R: tl.constexpr,
    BR: tl.constexpr,
    BT: tl.constexpr,
    BD: tl.constexpr,
):
    # All gradients of BT tokens, BD elements at a time; the sums over elements stay in registers.
    k = tl.arange(0, BR)
    for number in range(tl.program_id(0), tl.cdiv(T, BT), tl.num_programs(0)):
        t = (number * BT + tl.arange(0, BT)).to(tl.int64)
        streams = (t < T)[:, None] & (k < R)[None, :]
        share = tl.load(post + t[:, None] * R + k[None, :], mask=streams, other=0.0).to(tl.float32)
        along_f = tl.zeros((BT, BR), tl.float32)
        along_x = tl.zeros((BT, BR, BR), tl.float32)
        for start in range(0, D, BD):
            d = start + tl.arange(0, BD)
            inside = (t < T)[:, None] & (d < D)[None, :]
            cells = (t[:, None] * R + k[None, :])[:, :, None] * D + d[None, None, :]
            read = streams[:, :, None] & (d < D)[None, None, :]
            slope = tl.load(dy + cells, mask=read, other=0.0).to(tl.float32)
            token = t[:, None] * D + d[None, :]
            part = tl.load(f + token, mask=inside, other=0.0).to(tl.float32)
            along_f += tl.sum(slope * part[:, None, :], 2)
            total = tl.sum(slope * share[:, :, None], 1)
            tl.store(df + token, narrow(total, df.dtype.element_ty), mask=inside)
            for j in range(R):
                row = t * R + j
                at = row[:, None] * D + d[None, :]
                stream = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
                mine = tl.sum(slope * stream[:, None, :], 2)[:, None, :]
                along_x += tl.where(k[None, :, None] == j, mine, 0.0)
                mixed = tl.load(comb + row[:, None] * R + k[None, :], mask=streams, other=0.0)
                back = tl.sum(slope * mixed.to(tl.float32)[:, :, None], 1)
                tl.store(dx + at, narrow(back, dx.dtype.element_ty), mask=inside)
        tl.store(dpost + t[:, None] * R + k[None, :], along_f, mask=streams)
        into = dcomb + (t[:, None] * R + k[None, :])[:, :, None] * R + k[None, None, :]
        tl.store(into, along_x, mask=streams[:, :, None] & (k < R)[None, None, :])


def _sizes(x: Tensor, entry: str):
    """(T, D, tile, constants): how many tokens and elements a tile of this many streams has."""
    (R, D), T = x.shape[-2:], x.shape[:-2].numel()
    tile = tile_for(entry, x)
    BD = min(tile["BD"], max(16, 1 << max(0, D - 1).bit_length()))
    BT = max(1, tile["ELEMENTS"] // (BD * side(R)))
    return T, D, tile, dict(R=R, BR=side(R), BT=BT, BD=BD)


@offer(mhc_post, *floats("x"), at_most("R", LARGEST))
def forward(f: Tensor, x: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    """y[k] = post[k] * f + sum_j comb[j,k] * x[j]."""
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if not y.numel():
        return y
    T, D, tile, sizes = _sizes(x, "mhc_post.forward")
    work = cdiv(T, sizes["BT"]) * cdiv(D, sizes["BD"])
    launch(
        _forward,
        programs(x, work, tile),
        *(a.contiguous() for a in (f, x, post, comb)),
        y,
        T,
        D,
        tile=tile,
        entry="mhc_post.forward",
        **sizes,
    )
    return y


@offer(mhc_post_backward, *floats("x"), at_most("R", LARGEST))
def backward(
    dy: Tensor, f: Tensor, x: Tensor, post: Tensor, comb: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(df, dx, dpost, dcomb)."""
    df, dx = (torch.empty(a.shape, dtype=a.dtype, device=a.device) for a in (f, x))
    dpost, dcomb = (
        torch.zeros(a.shape, dtype=torch.float32, device=a.device) for a in (post, comb)
    )
    if dpost.numel():
        T, D, tile, sizes = _sizes(x, "mhc_post.backward")
        launch(
            _backward,
            programs(x, cdiv(T, sizes["BT"]), tile),
            *(a.contiguous() for a in (dy, f, x, post, comb)),
            df,
            dx,
            dpost,
            dcomb,
            T,
            D,
            tile=tile,
            entry="mhc_post.backward",
            **sizes,
        )
    else:  # no stream
        df.zero_()
    return df, dx, dpost, dcomb
