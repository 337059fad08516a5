"""engram_gate a row at a time, in parts: rows too wide for the registers, and all of them on
Ascend, whose lowering wants the first element of a row to be a number and not a vector of them.

A row is read three times: for its norms, for the dot product of what is normalised, for the output.
"""

from __future__ import annotations

import triton.language as tl
from triton import jit

from .._language import narrow, sigmoid


@jit
def gate_of(dot, clamp):
    """(gate, sqrt(max(|dot|, clamp)))."""
    root = tl.sqrt(tl.maximum(tl.abs(dot), clamp))
    return sigmoid(tl.where(dot < 0, -root, root)), root


@jit
def _taking(mask, t):
    taking = t >= 0
    if mask is not None:
        taking = tl.load(mask + t) != 0
    return taking


@jit
def _part(p, d, D):
    return tl.load(p + d, mask=d < D, other=0.0).to(tl.float32)


@jit
def _similarity(x, key, weight, stop, D, root, eps, BD: tl.constexpr):
    """(rstd of x, rstd of key, dot) of a row, of which `stop` elements are read."""
    first, second = tl.zeros((BD,), tl.float32), tl.zeros((BD,), tl.float32)
    for start in range(0, stop, BD):
        d = start + tl.arange(0, BD)
        xs, ks = _part(x, d, D), _part(key, d, D)
        first += xs * xs
        second += ks * ks
    rx, rk = tl.rsqrt(tl.sum(first, 0) / D + eps), tl.rsqrt(tl.sum(second, 0) / D + eps)
    total = tl.zeros((BD,), tl.float32)
    for start in range(0, stop, BD):
        d = start + tl.arange(0, BD)
        total += _part(x, d, D) * rx * _part(weight, d, D) * (_part(key, d, D) * rk)
    return rx, rk, tl.sum(total, 0) / root


@jit
def forward_rows(
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
    BD: tl.constexpr,
):
    for row in range(tl.program_id(0), T * R, tl.num_programs(0)):
        t = row // R
        at = tl.cast(row, tl.int64) * D
        taking = _taking(mask, t)
        stop = tl.where(taking, D, 0)
        w = weight + (row - t * R) * D
        _, _, dot = _similarity(x + at, key + at, w, stop, D, root, eps, BD)
        gate, _ = gate_of(dot, clamp)
        for start in range(0, D, BD):
            d = start + tl.arange(0, BD)
            kept = tl.load(x + at + d, mask=d < D, other=0.0)
            moved = gate * _part(value + tl.cast(t, tl.int64) * D, d, D)
            if RESIDUAL:
                # Where masked, x itself: a NaN keeps its bits.
                out = narrow(kept.to(tl.float32) + moved, y.dtype.element_ty)
                out = tl.where(taking, out, kept)
            else:
                out = narrow(tl.where(taking, moved, 0.0), y.dtype.element_ty)
            tl.store(y + at + d, out, mask=d < D)


@jit
def backward_rows(
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
    BD: tl.constexpr,
):
    # dx and dkey; for the sums over streams and tokens, which follow, each row's gate and
    # c * rstd_x * rstd_key / root.
    for row in range(tl.program_id(0), T * R, tl.num_programs(0)):
        t = row // R
        at = tl.cast(row, tl.int64) * D
        taking = _taking(mask, t)
        stop = tl.where(taking, D, 0)
        w = weight + (row - t * R) * D
        rx, rk, dot = _similarity(x + at, key + at, w, stop, D, root, eps, BD)
        gate, size = gate_of(dot, clamp)
        v = value + tl.cast(t, tl.int64) * D
        total = tl.zeros((BD,), tl.float32)
        for start in range(0, stop, BD):
            d = start + tl.arange(0, BD)
            total += _part(dy + at, d, D) * _part(v, d, D)
        slope = tl.sum(total, 0) * 0.5 * gate * (1.0 - gate) / size
        c = tl.where(taking & (tl.abs(dot) >= clamp), slope, 0.0)
        through = dot / D
        for start in range(0, D, BD):
            d = start + tl.arange(0, BD)
            kept = tl.load(dy + at + d, mask=d < D, other=0.0)
            nx, nk = _part(x + at, d, D) * rx, _part(key + at, d, D) * rk
            ws = _part(w, d, D) / root
            moved = tl.where(taking, c * rk * (nx * ws - nk * through), 0.0)
            tl.store(dkey + at + d, narrow(moved, dkey.dtype.element_ty), mask=d < D)
            moved = c * rx * (nk * ws - nx * through)
            if RESIDUAL:
                out = narrow(kept.to(tl.float32) + moved, dx.dtype.element_ty)
                out = tl.where(taking, out, kept)
            else:
                out = narrow(tl.where(taking, moved, 0.0), dx.dtype.element_ty)
            tl.store(dx + at + d, out, mask=d < D)
        tl.store(gates + row, tl.where(taking, gate, 0.0))
        tl.store(slopes + row, tl.where(taking, c * rx * rk / root, 0.0))
