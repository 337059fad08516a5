"""Engram gate: how far a looked-up value enters each residual stream, by a signed square root of a
similarity."""

from __future__ import annotations

from collections.abc import Iterator
from math import sqrt

import numpy as np
import torch
from torch import Tensor

from transom import config
from transom.declare import op
from transom.dtypes import accumulator
from transom.kernels._same_bits import sigmoid

_EXAMPLES = [
    dict(T=(3,), R=2, D=8, eps=1e-20),
    dict(T=(4096,), R=4, D=2560, eps=1e-20),
    dict(T=(64,), R=4, D=5120, eps=1e-20),
]


@op(
    "x[*T,R,D], key[*T,R,D], value[*T,D], weight[R,D], mask?[*T] -> y[*T,R,D]",
    dtypes="x: float; key: x; value: x; weight: x | f32; mask: bool; y: x",
    flops="10*T*R*D",
    accumulate="D",
    autocast="f32: x key value",
    batch="*T",
    examples=_EXAMPLES,
)
def engram_gate(
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
    """y[t,j] = x[t,j] + g[t,j] * value[t], g = sigmoid(+-sqrt(max(|dot|, clamp))), the sign of dot.

    dot = sum_d weight[j,d] * norm(x[t,j])_d * norm(key[t,j])_d / sqrt(D), where
    norm(v) = v / sqrt(mean(v**2) + eps).

    x         residual streams; leading dimensions are free.
    weight    the product of both norms' weights, w_x * w_key (only it matters).
    eps       added to both mean squares, in units of x**2; >= 0.
    clamp     smallest |dot| under the root; > 0.  A dot of zero counts as positive.
    mask      True where the token takes part.  Elsewhere the gate is 0: x is returned bit for bit,
              and whatever stands in key and value, NaN included, is not read.
    residual  False: g * value alone, without x (zeros where masked).

    Sums and the gate are float32 (float64 for float64 inputs); y is rounded once.  Raises
    ValueError for clamp <= 0 or eps < 0.

    *Source:* Engram, arXiv 2601.07372, section 3; signed square root as in its demo code and
    DeepSeek-V4.1-Flash.
    """
    (R, D), T = x.shape[-2:], x.shape[:-2].numel()
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    xs, keys, out = x.reshape(T, R, D), key.reshape(T, R, D), y.view(T, R, D)
    values, masks = value.reshape(T, D), None if mask is None else mask.reshape(T)
    w = weight.to(accumulator(x.dtype))
    for rows in _blocks(xs, 8):
        taking = None if masks is None else masks[rows, None, None]
        xw, kw, vw = (part[rows].to(w.dtype) for part in (xs, keys, values))
        dot, _, _ = _similarity(xw, kw, w, eps)
        moved = _gate(dot, clamp)[..., None] * vw[:, None]
        moved = (xw + moved if residual else moved).to(x.dtype)
        if taking is not None:
            moved = torch.where(taking, moved, xs[rows] if residual else 0)
        out[rows] = moved
    return y


@op(
    "dy[*T,R,D], x[*T,R,D], key[*T,R,D], value[*T,D], weight[R,D], mask?[*T]"
    " -> dx[*T,R,D], dkey[*T,R,D], dvalue[*T,D], dweight[R,D]",
    dtypes="dy: x; x: float; key: x; value: x; weight: x | f32; mask: bool;"
    " dx: x; dkey: x; dvalue: x; dweight: acc(x)",
    flops="24*T*R*D",
    accumulate="max(D, T)",
    examples=_EXAMPLES,
)
def engram_gate_backward(
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
    """Gradients (dx, dkey, dvalue, dweight) of `engram_gate`; where |dot| < clamp the gate is
    constant.

    With g the gate, c = (sum_d dy*value) * g*(1-g) / (2*sqrt(|dot|)) and n_x, n_key the normalised
    rows: dx = dy + c*rstd_x*(n_key*weight/sqrt(D) - n_x*dot/D), dkey likewise, dvalue = sum_j
    g_j*dy_j, dweight = sum_t c*n_x*n_key/sqrt(D).  dweight is float32 (float64 for float64) and
    summed in a fixed order.

    *Source:* derived from the formula of `engram_gate`.
    """
    (R, D), T = x.shape[-2:], x.shape[:-2].numel()
    dx, dkey, dvalue = (
        torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (x, key, value)
    )
    flat = [t.reshape(T, R, D) for t in (dy, x, key)]
    values, masks = value.reshape(T, D), None if mask is None else mask.reshape(T)
    w = weight.to(accumulator(x.dtype))
    dweight = torch.zeros(w.shape, dtype=w.dtype, device=w.device)
    root = sqrt(max(1, D))
    for rows in _blocks(flat[1], 12):
        taking = None if masks is None else masks[rows, None, None]
        dyw, xw, kw = (_taken(part[rows], taking).to(w.dtype) for part in flat)
        vw = _taken(values[rows, None], taking).to(w.dtype)
        dot, rx, rk = _similarity(xw, kw, w, eps)
        gate = _gate(dot, clamp)
        nx, nk = xw * rx[..., None], kw * rk[..., None]
        dgate = (dyw * vw).sum(-1)
        slope = 0.5 * gate * (1 - gate) / dot.abs().clamp_min(clamp).sqrt()
        c = torch.where(dot.abs() < clamp, 0, dgate * slope)[..., None]
        through = dot[..., None] / max(1, D)
        gx = c * rx[..., None] * (nk * w / root - nx * through)
        gk = c * rk[..., None] * (nx * w / root - nk * through)
        dvalue.view(T, D)[rows] = (gate[..., None] * dyw).sum(1).to(x.dtype)
        dkey.view(T, R, D)[rows] = gk.to(x.dtype)
        gx = (dyw + gx if residual else gx).to(x.dtype)
        if taking is not None and residual:
            gx = torch.where(taking, gx, flat[0][rows])
        dx.view(T, R, D)[rows] = gx
        dweight += (c * nx * nk).sum(0) / root
    return dx, dkey, dvalue, dweight


def _blocks(x: Tensor, copies: int) -> Iterator[slice]:
    """Slices of rows such that `copies` arrays of x's rows fit the workspace in the accumulator's
    dtype."""
    row = max(1, x.shape[1] * x.shape[2]) * accumulator(x.dtype).itemsize * copies
    step = max(1, config.workspace_bytes() // row)
    for start in range(0, x.shape[0], step):
        yield slice(start, min(start + step, x.shape[0]))


def _taken(rows: Tensor, taking: Tensor | None) -> Tensor:
    """Rows with zeros where a token is masked: a product with zero would let NaN through."""
    return rows if taking is None else torch.where(taking, rows, 0)


def _similarity(
    x: Tensor, key: Tensor, weight: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """(dot, rstd of x, rstd of key), each [t,R]."""
    D = max(1, x.shape[-1])
    rx = torch.rsqrt(x.square().sum(-1) / D + eps)
    rk = torch.rsqrt(key.square().sum(-1) / D + eps)
    # Rows are normalised before they are multiplied: the bare product leaves float32 at |x| ~ 1e18.
    dot = (x * rx[..., None] * weight * (key * rk[..., None])).sum(-1) / sqrt(D)
    return dot, rx, rk


def _gate(dot: Tensor, clamp: float) -> Tensor:
    # Compared with 0 rather than by sign bit: whether a sum of negative zeros is +0 or -0 depends
    # on where it starts.
    root = dot.abs().clamp_min(clamp).sqrt()
    return sigmoid(torch.where(dot < 0, -root, root))


@engram_gate.gradient(save="x key value weight mask")
def _(saved, dy):
    dx, dkey, dvalue, dweight = engram_gate_backward(
        dy,
        saved.x,
        saved.key,
        saved.value,
        saved.weight,
        eps=saved.eps,
        clamp=saved.clamp,
        mask=saved.mask,
        residual=saved.residual,
    )
    return {"x": dx, "key": dkey, "value": dvalue, "weight": dweight.to(saved.weight.dtype)}


@engram_gate.reference
def _(x, key, value, weight, eps, clamp, mask, residual):
    D = max(1, x.shape[-1])
    nx = x / np.sqrt((x**2).sum(-1, keepdims=True) / D + eps)
    nk = key / np.sqrt((key**2).sum(-1, keepdims=True) / D + eps)
    dot = (nx * nk * weight).sum(-1) / np.sqrt(D)
    root = np.sqrt(np.maximum(np.abs(dot), clamp))
    gate = 1 / (1 + np.exp(-np.where(dot < 0, -root, root)))
    moved = gate[..., None] * value[..., None, :]
    y = x + moved if residual else moved
    return y if mask is None else np.where(mask[..., None, None], y, x if residual else 0.0)


@engram_gate_backward.reference
def _(dy, x, key, value, weight, eps, clamp, mask, residual):
    R, D = x.shape[-2:]
    dx = dy.copy() if residual else np.zeros_like(dy)
    dkey, dvalue, dweight = np.zeros_like(key), np.zeros_like(value), np.zeros_like(weight)
    for t in np.ndindex(*x.shape[:-2]):
        for j in range(R if mask is None or mask[t] else 0):
            xj, kj, wj = x[t][j], key[t][j], weight[j]
            rx = 1 / np.sqrt(np.sum(xj**2) / max(1, D) + eps)
            rk = 1 / np.sqrt(np.sum(kj**2) / max(1, D) + eps)
            raw = np.sum(xj * kj * wj)
            scale = rx * rk / np.sqrt(max(1, D))
            dot = raw * scale
            gate = 1 / (1 + np.exp(-np.sqrt(max(abs(dot), clamp)) * (-1 if dot < 0 else 1)))
            dvalue[t] += gate * dy[t][j]
            if abs(dot) < clamp:
                continue
            u = np.sum(dy[t][j] * value[t]) * gate * (1 - gate) * 0.5 * np.sqrt(scale / abs(raw))
            dx[t][j] += u * (kj * wj - xj * raw * rx**2 / D)
            dkey[t][j] = u * (xj * wj - kj * raw * rk**2 / D)
            dweight[j] += u * xj * kj
    return dx, dkey, dvalue, dweight


def _rules(eps: float, clamp: float) -> str | None:
    if not eps >= 0:
        return f"eps is {eps}; must be >= 0"
    if not clamp > 0:
        return f"clamp is {clamp}; must be > 0"
    return None


def _sample(rng: np.random.Generator, dims: dict) -> dict:
    drawn: dict = {"mask": rng.random(dims["T"]) < 0.8}
    if dims["D"] == 1:
        # One element divided by its own size is its sign: the slope is all cancellation, unless eps
        # is large.
        drawn["eps"] = 1.0
    return drawn


for _op in (engram_gate, engram_gate_backward):
    _op.check(_rules)
    _op.sample(_sample)
