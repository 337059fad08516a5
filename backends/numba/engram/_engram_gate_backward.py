"""engram_gate_backward: the statistics again, then all gradients of a stream from the cache."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from .._arrays import array, given, scratch
from .._compile import kernel, part
from .._numbers import narrow, sigmoid, wide
from .._pool import for_each, threads

PARTS = 16
"""Of the tokens at the most, with sums for dweight of their own, whatever the number of threads."""


@part
def _masked(dy, residual, dx, dkey, dvalue):
    """The gradients of a token that takes no part."""
    for j in range(dy.shape[0]):
        row, into, keys = dy[j], dx[j], dkey[j]
        for d in range(row.shape[0]):
            into[d] = row[d] if residual else narrow(np.float32(0), into)
            keys[d] = narrow(np.float32(0), keys)
    for d in range(dvalue.shape[0]):
        dvalue[d] = narrow(np.float32(0), dvalue)


@part
def _stream(dys, row, keys, values, w, numbers, residual, dxs, dkeys, sums, total):
    """One stream: dvalue is added up in `total`, dweight in `sums`."""
    D, eps, clamp, root = row.shape[0], numbers[0], numbers[1], numbers[2]
    xx = kk = dgate = np.float32(0)
    for d in range(D):
        a, b = wide(row[d]), wide(keys[d])
        xx += a * a
        kk += b * b
        dgate += wide(dys[d]) * wide(values[d])
    count = np.float32(max(1, D))
    rx, rk = np.float32(1) / np.sqrt(xx / count + eps), np.float32(1) / np.sqrt(kk / count + eps)
    dot = np.float32(0)
    for d in range(D):
        dot += (wide(row[d]) * rx) * w[d] * (wide(keys[d]) * rk)
    dot /= root
    length = np.sqrt(max(abs(dot), clamp)) if dot == dot else dot
    gate = sigmoid(-length if dot < 0 else length)
    c = np.float32(0)
    if not abs(dot) < clamp:
        c = dgate * np.float32(0.5) * gate * (np.float32(1) - gate) / length
    along, cx, ck, over = dot / count, c * rx, c * rk, c / root
    for d in range(D):
        g, by = wide(dys[d]), w[d] / root
        nx, nk = wide(row[d]) * rx, wide(keys[d]) * rk
        moved = cx * (nk * by - nx * along)
        dxs[d] = narrow(g + moved if residual else moved, dxs)
        dkeys[d] = narrow(ck * (nx * by - nk * along), dkeys)
        total[d] += gate * g
        sums[d] += over * nx * nk


@part
def _task(task, thread, dy, x, key, value, weight, numbers, mask, residual, outs, partial, room):
    """A part of the tokens."""
    dx, dkey, dvalue = outs
    (T, R), parts, total = x.shape[:2], partial.shape[0], room[thread]
    for j in range(R):
        partial[task, j, :] = np.float32(0)
    for t in range(T * task // parts, T * (task + 1) // parts):
        if mask.size > 0 and not mask[t]:
            _masked(dy[t], residual, dx[t], dkey[t], dvalue[t])
            continue
        total[:] = np.float32(0)
        for j in range(R):
            _stream(
                dy[t, j],
                x[t, j],
                key[t, j],
                value[t],
                weight[j],
                numbers,
                residual,
                dx[t, j],
                dkey[t, j],
                partial[task, j],
                total,
            )
        into = dvalue[t]
        for d in range(total.shape[0]):
            into[d] = narrow(total[d], into)


@kernel
def _run(dy, x, key, value, weight, numbers, mask, residual, outs, partial, room):
    args = (dy, x, key, value, weight, numbers, mask, residual, outs, partial, room)
    for_each(_task, partial.shape[0], room.shape[0], args)


def numba(
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
    """dx, dkey, dvalue and dweight; where |dot| < clamp the gate is constant."""
    (R, D), T = x.shape[-2:], x.shape[:-2].numel()
    dx, dkey, dvalue = (torch.empty(t.shape, dtype=t.dtype) for t in (x, key, value))
    taking = None if mask is None else mask.reshape(T)
    numbers = np.array((eps, clamp, math.sqrt(max(1, D))), np.float32)
    partial = np.empty((max(1, min(PARTS, T // 8)), R, D), np.float32)
    _run(
        array(dy.reshape(T, R, D)),
        array(x.reshape(T, R, D)),
        array(key.reshape(T, R, D)),
        array(value.reshape(T, D)),
        array(weight.float()),
        numbers,
        given(taking, 1, torch.bool),
        residual,
        (array(dx.view(T, R, D)), array(dkey.view(T, R, D)), array(dvalue.view(T, D))),
        partial,
        scratch(threads(4 * T * R * D), D),
    )
    return dx, dkey, dvalue, torch.from_numpy(partial).sum(0)
