"""short_conv: tiles of rows and channels; what the gradient sums is written once, in float32."""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor
from triton import cdiv, jit

from transom.kernels.engram.short_conv import short_conv, short_conv_backward

from .._language import column, narrow, sigmoid
from .._launch import launch, programs, ragged, tile_for
from .._offer import floats, offer


@jit
def _place(number, B, S, C, BS: tl.constexpr, BC: tl.constexpr):
    """(batch, rows, channels) of a tile."""
    wide = tl.cdiv(C, BC)
    high = tl.cdiv(S, BS)
    s = number // wide % high * BS + tl.arange(0, BS)
    return tl.cast(number // wide // high, tl.int64), s, number % wide * BC + tl.arange(0, BC)


@jit
def _row(v, state, batch, s, c, inside, S, C, reach, RAGGED: tl.constexpr):
    """Rows at positions s, of v, or of the state for those below 0; float32."""
    new = inside & (s >= 0)[:, None]
    c = column(c, C, RAGGED)
    at = (batch * S + tl.minimum(tl.maximum(s, 0), S - 1))[:, None] * C + c[None, :]
    part = tl.load(v + at, mask=new, other=0.0).to(tl.float32)
    if state is not None:
        at = (batch * reach + tl.minimum(tl.maximum(reach + s, 0), reach - 1))[:, None] * C
        old = inside & ((s < 0) & (s >= -reach))[:, None]
        part += tl.load(state + at + c[None, :], mask=old, other=0.0).to(tl.float32)
    return part


@jit
def _sum(v, state, weight, batch, s, c, inside, S, C, K, dilation, RAGGED: tl.constexpr):
    """z at positions s."""
    total = tl.zeros((s.shape[0], c.shape[0]), tl.float32)
    for i in range(0, K):
        w = tl.load(weight + column(c, C, RAGGED) * K + i, mask=c < C, other=0.0).to(tl.float32)
        at = s - (K - 1 - i) * dilation
        part = _row(v, state, batch, at, c, inside, S, C, (K - 1) * dilation, RAGGED)
        total += part * w[None, :]
    return total


@jit
def _forward(
    v,
    state,
    weight,
    y,
    B,
    S,
    C,
    K,
    dilation,
    RAGGED: tl.constexpr,
    BS: tl.constexpr,
    BC: tl.constexpr,
):
    work = B * tl.cdiv(S, BS) * tl.cdiv(C, BC)
    for number in range(tl.program_id(0), work, tl.num_programs(0)):
        batch, s, c = _place(number, B, S, C, BS, BC)
        inside = (s < S)[:, None] & (c < C)[None, :]
        z = _sum(v, state, weight, batch, s, c, inside, S, C, K, dilation, RAGGED)
        at = y + (batch * S + s)[:, None] * C + c[None, :]
        tl.store(at, narrow(z * sigmoid(z), y.dtype.element_ty), mask=inside)


@jit
def _dz(
    dy,
    v,
    state,
    weight,
    dz,
    B,
    S,
    C,
    K,
    dilation,
    RAGGED: tl.constexpr,
    BS: tl.constexpr,
    BC: tl.constexpr,
):
    work = B * tl.cdiv(S, BS) * tl.cdiv(C, BC)
    for number in range(tl.program_id(0), work, tl.num_programs(0)):
        batch, s, c = _place(number, B, S, C, BS, BC)
        inside = (s < S)[:, None] & (c < C)[None, :]
        z = _sum(v, state, weight, batch, s, c, inside, S, C, K, dilation, RAGGED)
        at = (batch * S + s)[:, None] * C + c[None, :]
        slope = tl.load(dy + at, mask=inside, other=0.0).to(tl.float32)
        share = sigmoid(z)
        tl.store(dz + at, slope * share * (1.0 + z * (1.0 - share)), mask=inside)


@jit
def _drows(
    dz,
    weight,
    dkept,
    dv,
    dstate,
    B,
    S,
    C,
    K,
    dilation,
    RAGGED: tl.constexpr,
    BS: tl.constexpr,
    BC: tl.constexpr,
):
    # The gradient of every row, of the state (first) and of v: from the rows that read it, tap by
    # tap, and from the new state if it is kept there.
    reach = (K - 1) * dilation
    work = B * tl.cdiv(S + reach, BS) * tl.cdiv(C, BC)
    for number in range(tl.program_id(0), work, tl.num_programs(0)):
        batch, row, c = _place(number, B, S + reach, C, BS, BC)
        inside = (row < S + reach)[:, None] & (c < C)[None, :]
        kept = inside & (row >= S)[:, None]
        to = column(c, C, RAGGED)
        at = tl.minimum(tl.maximum(row - S, 0), tl.maximum(reach - 1, 0))
        at = (batch * reach + at)[:, None] * C + to[None, :]
        total = tl.load(dkept + at, mask=kept, other=0.0).to(tl.float32)
        for i in range(0, K):
            s = row - i * dilation
            read = inside & ((s >= 0) & (s < S))[:, None]
            s = tl.minimum(tl.maximum(s, 0), S - 1)
            slope = tl.load(dz + (batch * S + s)[:, None] * C + to[None, :], mask=read, other=0.0)
            w = tl.load(weight + to * K + i, mask=c < C, other=0.0).to(tl.float32)
            total += slope * w[None, :]
        total = narrow(total, dv.dtype.element_ty)
        at = (batch * S + tl.maximum(row - reach, 0))[:, None] * C + c[None, :]
        tl.store(dv + at, total, mask=inside & (row >= reach)[:, None])
        at = (batch * reach + row)[:, None] * C + c[None, :]
        tl.store(dstate + at, total, mask=inside & (row < reach)[:, None])


@jit
def _dweight(
    dz,
    v,
    state,
    dweight,
    B,
    S,
    C,
    K,
    dilation,
    RAGGED: tl.constexpr,
    BS: tl.constexpr,
    BC: tl.constexpr,
):
    # dweight[c,i] of BC channels: batches and rows in order.
    for number in range(tl.program_id(0), K * tl.cdiv(C, BC), tl.num_programs(0)):
        i, c = number % K, number // K * BC + tl.arange(0, BC)
        total = tl.zeros((BS, BC), tl.float32)
        for tile in range(0, B * tl.cdiv(S, BS)):
            batch = tl.cast(tile // tl.cdiv(S, BS), tl.int64)
            s = tile % tl.cdiv(S, BS) * BS + tl.arange(0, BS)
            inside = (s < S)[:, None] & (c < C)[None, :]
            at = (batch * S + s)[:, None] * C + c[None, :]
            slope = tl.load(dz + at, mask=inside, other=0.0)
            at = s - (K - 1 - i) * dilation
            total += slope * _row(v, state, batch, at, c, inside, S, C, (K - 1) * dilation, RAGGED)
        tl.store(dweight + c * K + i, tl.sum(total, 0), mask=c < C)


@offer(short_conv, *floats("v"))
def forward(
    v: Tensor, weight: Tensor, *, dilation: int, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """y and the rows that the next chunk takes as state."""
    (B, S, C), K = v.shape, weight.shape[1]
    reach = (K - 1) * dilation
    y = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    kept = torch.empty((B, reach, C), dtype=v.dtype, device=v.device)
    older = max(0, reach - S)
    if state is None:
        kept[:, :older] = 0
    else:
        kept[:, :older] = state[:, S : S + older]
    kept[:, older:] = v[:, S - (reach - older) :]
    if y.numel():
        tile = tile_for("short_conv.rows", v)
        launch(
            _forward,
            programs(v, _work(B, S, C, tile), tile),
            v.contiguous(),
            _given(state),
            weight.contiguous(),
            y,
            B,
            S,
            C,
            K,
            dilation,
            tile=tile,
            entry="short_conv.rows",
            RAGGED=ragged(v, C, tile["BC"]),
        )
    return y, kept


def _given(state: Tensor | None) -> Tensor | None:
    return None if state is None or not state.numel() else state.contiguous()


def _work(B: int, S: int, C: int, tile) -> int:
    return B * cdiv(S, tile["BS"]) * cdiv(C, tile["BC"])


@offer(short_conv_backward, *floats("v"))
def backward(
    dy: Tensor,
    dnew_state: Tensor,
    v: Tensor,
    weight: Tensor,
    *,
    dilation: int,
    state: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dv, dweight, dstate)."""
    (B, S, C), K = v.shape, weight.shape[1]
    dv, dstate = (torch.empty(a.shape, dtype=a.dtype, device=a.device) for a in (v, dnew_state))
    dweight = torch.zeros(weight.shape, dtype=torch.float32, device=v.device)
    if not v.numel():
        return dv, dweight, dstate.copy_(dnew_state)
    v, weight, state = v.contiguous(), weight.contiguous(), _given(state)
    dz = torch.empty(v.shape, dtype=torch.float32, device=v.device)
    tile = tile_for("short_conv.rows", v)
    more = dict(tile=tile, entry="short_conv.rows", RAGGED=ragged(v, C, tile["BC"]))
    sizes = (B, S, C, K, dilation)
    launch(
        _dz,
        programs(v, _work(B, S, C, tile), tile),
        dy.contiguous(),
        v,
        state,
        weight,
        dz,
        *sizes,
        **more,
    )
    launch(
        _drows,
        programs(v, _work(B, S + (K - 1) * dilation, C, tile), tile),
        dz,
        weight,
        dnew_state.contiguous(),
        dv,
        dstate,
        *sizes,
        **more,
    )
    launch(
        _dweight, programs(v, K * cdiv(C, tile["BC"]), tile), dz, v, state, dweight, *sizes, **more
    )
    return dv, dweight, dstate
