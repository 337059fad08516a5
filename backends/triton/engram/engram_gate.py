"""engram_gate: whole rows in registers, so that each is read once; see _gate_rows for others."""

from __future__ import annotations

from math import sqrt

import torch
import triton.language as tl
from torch import Tensor
from triton import cdiv, jit

from transom.kernels.engram.engram_gate import engram_gate, engram_gate_backward

from .._language import narrow
from .._launch import as_bytes, gathers_whole_rows, launch, programs, tile_for
from .._offer import floats, offer
from ._gate_rows import backward_rows, forward_rows, gate_of

WIDEST = 4
"""Tiles of elements in a row that fits the registers; wider ones go in parts of one tile."""


@jit
def _similarity(x, key, w, D, root, eps):
    """(n_x, n_key, rstd of x, rstd of key, dot) of rows; normalised before they are multiplied,
    since the bare product leaves float32 at |x| ~ 1e18."""
    rx = tl.rsqrt(tl.sum(x * x, 1) / D + eps)
    rk = tl.rsqrt(tl.sum(key * key, 1) / D + eps)
    nx, nk = x * rx[:, None], key * rk[:, None]
    return nx, nk, rx, rk, tl.sum(nx * w * nk, 1) / root


@jit
def _rows(number, mask, T, R, D, BR: tl.constexpr, BD: tl.constexpr):
    """(row, token, stream, d, inside, takes part, both of the latter with d < D) of a tile."""
    row = (number * BR + tl.arange(0, BR)).to(tl.int64)
    d = tl.arange(0, BD)
    there = row < T * R
    taking = there
    if mask is not None:
        taking = there & (tl.load(mask + tl.minimum(row // R, T - 1)) != 0)
    columns = (d < D)[None, :]
    return row, row // R, row % R, d, there[:, None] & columns, taking, taking[:, None] & columns


@jit
def _forward(
    x,
    key,
    value,
    weight,
    mask,
    y,
    T,
    R,
    D,
    root,
    eps,
    clamp,
    RESIDUAL: tl.constexpr,
    BR: tl.constexpr,
    BD: tl.constexpr,
):
    for number in range(tl.program_id(0), tl.cdiv(T * R, BR), tl.num_programs(0)):
        row, t, j, d, inside, taking, read = _rows(number, mask, T, R, D, BR, BD)
        at = row[:, None] * D + d[None, :]
        kept = tl.load(x + at, mask=inside, other=0.0)
        xs = kept.to(tl.float32)
        ks = tl.load(key + at, mask=read, other=0.0).to(tl.float32)
        vs = tl.load(value + t[:, None] * D + d[None, :], mask=read, other=0.0).to(tl.float32)
        w = tl.load(weight + j[:, None] * D + d[None, :], mask=inside, other=0.0).to(tl.float32)
        _, _, _, _, dot = _similarity(xs, ks, w, D, root, eps)
        gate, _ = gate_of(dot, clamp)
        moved = gate[:, None] * vs
        if RESIDUAL:
            # Where masked, x itself: a NaN keeps its bits.
            out = tl.where(taking[:, None], narrow(xs + moved, y.dtype.element_ty), kept)
        else:
            out = narrow(tl.where(taking[:, None], moved, 0.0), y.dtype.element_ty)
        tl.store(y + at, out, mask=inside)


@jit
def _backward(
    dy,
    x,
    key,
    value,
    weight,
    mask,
    dx,
    dkey,
    gates,
    slopes,
    T,
    R,
    D,
    root,
    eps,
    clamp,
    RESIDUAL: tl.constexpr,
    BR: tl.constexpr,
    BD: tl.constexpr,
):
    # dx and dkey; for the sums over streams and tokens, which follow, each row's gate and
    # c * rstd_x * rstd_key / root.
    for number in range(tl.program_id(0), tl.cdiv(T * R, BR), tl.num_programs(0)):
        row, t, j, d, inside, taking, read = _rows(number, mask, T, R, D, BR, BD)
        at = row[:, None] * D + d[None, :]
        kept = tl.load(dy + at, mask=inside, other=0.0)
        gs = tl.where(read, kept.to(tl.float32), 0.0)
        xs = tl.load(x + at, mask=read, other=0.0).to(tl.float32)
        ks = tl.load(key + at, mask=read, other=0.0).to(tl.float32)
        vs = tl.load(value + t[:, None] * D + d[None, :], mask=read, other=0.0).to(tl.float32)
        w = tl.load(weight + j[:, None] * D + d[None, :], mask=inside, other=0.0).to(tl.float32)
        nx, nk, rx, rk, dot = _similarity(xs, ks, w, D, root, eps)
        gate, size = gate_of(dot, clamp)
        slope = tl.sum(gs * vs, 1) * 0.5 * gate * (1.0 - gate) / size
        c = tl.where(taking & (tl.abs(dot) >= clamp), slope, 0.0)
        through = (dot / D)[:, None]
        moved = (c * rk)[:, None] * (nx * w / root - nk * through)
        moved = tl.where(read, moved, 0.0)
        tl.store(dkey + at, narrow(moved, dkey.dtype.element_ty), mask=inside)
        moved = (c * rx)[:, None] * (nk * w / root - nx * through)
        if RESIDUAL:
            out = tl.where(taking[:, None], narrow(gs + moved, dx.dtype.element_ty), kept)
        else:
            out = narrow(tl.where(read, moved, 0.0), dx.dtype.element_ty)
        tl.store(dx + at, out, mask=inside)
        tl.store(gates + row, tl.where(taking, gate, 0.0), mask=row < T * R)
        tl.store(slopes + row, tl.where(taking, c * rx * rk / root, 0.0), mask=row < T * R)


@jit
def _dvalue(dy, mask, gates, dvalue, T, R, D, BT: tl.constexpr, BD: tl.constexpr):
    # dvalue[t] = sum_j gate[t,j] dy[t,j]. Bound by memory.
    blocks = tl.cdiv(D, BD)
    for number in range(tl.program_id(0), tl.cdiv(T, BT) * blocks, tl.num_programs(0)):
        t = (number // blocks * BT + tl.arange(0, BT)).to(tl.int64)
        d = number % blocks * BD + tl.arange(0, BD)
        taking = t < T
        if mask is not None:
            taking = taking & (tl.load(mask + tl.minimum(t, T - 1)) != 0)
        total = tl.zeros((BT, BD), tl.float32)
        for j in range(0, R):
            # Selected, no mask: where a mask is itself loaded, Ascend reads the whole tile.
            inside = (t < T)[:, None] & (d < D)[None, :]
            slope = tl.load(dy + (t * R + j)[:, None] * D + d[None, :], mask=inside, other=0.0)
            gate = tl.load(gates + t * R + j, mask=t < T, other=0.0)
            total += tl.where(taking[:, None], gate[:, None] * slope.to(tl.float32), 0.0)
        at = dvalue + t[:, None] * D + d[None, :]
        inside = (t < T)[:, None] & (d < D)[None, :]
        tl.store(at, narrow(total, dvalue.dtype.element_ty), mask=inside)


@jit
def _dweight(x, key, mask, slopes, dweight, T, R, D, BT: tl.constexpr, BD: tl.constexpr):
    # dweight[j] = sum_t slope[t,j] x[t,j] key[t,j], BD elements of a stream: the tokens in order.
    blocks = tl.cdiv(D, BD)
    for number in range(tl.program_id(0), R * blocks, tl.num_programs(0)):
        j, d = number // blocks, number % blocks * BD + tl.arange(0, BD)
        total = tl.zeros((BT, BD), tl.float32)
        for start in range(0, T, BT):
            t = (start + tl.arange(0, BT)).to(tl.int64)
            taking = t < T
            if mask is not None:
                taking = taking & (tl.load(mask + tl.minimum(t, T - 1)) != 0)
            inside = (t < T)[:, None] & (d < D)[None, :]
            at = (t * R + j)[:, None] * D + d[None, :]
            xs = tl.load(x + at, mask=inside, other=0.0).to(tl.float32)
            ks = tl.load(key + at, mask=inside, other=0.0).to(tl.float32)
            slope = tl.load(slopes + t * R + j, mask=t < T, other=0.0)
            # In this order: x * key alone may leave float32.
            total += tl.where(taking[:, None], slope[:, None] * xs * ks, 0.0)
        tl.store(dweight + j * D + d, tl.sum(total, 0), mask=d < D)


def _tile(x: Tensor, entry: str):
    """(tile, sizes, programs); sizes without BR: a row at a time."""
    (R, D), T, tile = x.shape[-2:], x.shape[:-2].numel(), tile_for(entry, x)
    BD = max(16, 1 << max(0, D - 1).bit_length())
    if BD > WIDEST * tile["ELEMENTS"] or gathers_whole_rows(x):
        return tile, dict(BD=min(BD, tile["ELEMENTS"])), programs(x, T * R, tile)
    BR = max(1, tile["ELEMENTS"] // BD)
    return tile, dict(BR=BR, BD=BD), programs(x, cdiv(T * R, BR), tile)


@offer(engram_gate, *floats("x"))
def forward(
    x: Tensor,
    key: Tensor,
    value: Tensor,
    weight: Tensor,
    *,
    eps: float,
    clamp: float = 1e-6,
    mask: Tensor | None = None,
    residual: bool = True,
) -> Tensor:
    """y = x + gate * value."""
    (R, D), T = x.shape[-2:], x.shape[:-2].numel()
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if not y.numel():
        return y
    tile, sizes, grid = _tile(x, "engram_gate.forward")
    launch(
        _forward if "BR" in sizes else forward_rows,
        grid,
        *(a.contiguous() for a in (x, key, value, weight)),
        as_bytes(mask),
        y,
        T,
        R,
        D,
        sqrt(D),
        eps,
        clamp,
        tile=tile,
        entry="engram_gate.forward",
        RESIDUAL=residual,
        **sizes,
    )
    return y


@offer(engram_gate_backward, *floats("x"))
def backward(
    dy: Tensor,
    x: Tensor,
    key: Tensor,
    value: Tensor,
    weight: Tensor,
    *,
    eps: float,
    clamp: float = 1e-6,
    mask: Tensor | None = None,
    residual: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dx, dkey, dvalue, dweight)."""
    (R, D), T = x.shape[-2:], x.shape[:-2].numel()
    dx, dkey, dvalue = (
        torch.empty(a.shape, dtype=a.dtype, device=a.device) for a in (x, key, value)
    )
    dweight = torch.zeros(weight.shape, dtype=torch.float32, device=x.device)
    if not x.numel():
        return dx, dkey, dvalue.zero_(), dweight
    dy, x, key, value = (a.contiguous() for a in (dy, x, key, value))
    flags = as_bytes(mask)
    gates, slopes = (torch.empty((T, R), device=x.device) for _ in range(2))
    tile, sizes, grid = _tile(x, "engram_gate.backward")
    launch(
        _backward if "BR" in sizes else backward_rows,
        grid,
        dy,
        x,
        key,
        value,
        weight.contiguous(),
        flags,
        dx,
        dkey,
        gates,
        slopes,
        T,
        R,
        D,
        sqrt(D),
        eps,
        clamp,
        tile=tile,
        entry="engram_gate.backward",
        RESIDUAL=residual,
        **sizes,
    )
    tile = tile_for("engram_gate.sums", x)
    launch(
        _dvalue,
        programs(x, cdiv(T, tile["BT"]) * cdiv(D, tile["BD"]), tile),
        dy,
        flags,
        gates,
        dvalue,
        T,
        R,
        D,
        tile=tile,
        entry="engram_gate.sums",
    )
    launch(
        _dweight,
        programs(x, R * cdiv(D, tile["BD"]), tile),
        x,
        key,
        flags,
        slopes,
        dweight,
        T,
        R,
        D,
        tile=tile,
        entry="engram_gate.sums",
    )
    return dx, dkey, dvalue, dweight
