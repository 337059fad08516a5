"""engram_gate: a stream's two norms, its similarity and its sum, while it is in the cache."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from transom.kernels.engram.engram_gate import engram_gate, engram_gate_backward

from .._arrays import array, floats, given
from .._compile import kernel, part
from .._numbers import narrow, sigmoid, wide
from .._pool import for_each, threads
from ._engram_gate_backward import numba as backward


@part
def _stream(task, thread, x, key, value, weight, numbers, mask, residual, y):
    R, D = weight.shape
    t, j = task // R, task % R
    row, keys, values, w, out = x[t, j], key[t, j], value[t], weight[j], y[t, j]
    eps, clamp, root = numbers[0], numbers[1], numbers[2]
    if mask.size > 0 and not mask[t]:
        for d in range(D):
            out[d] = row[d] if residual else narrow(np.float32(0), out)
        return
    xx = kk = np.float32(0)
    for d in range(D):
        a, b = wide(row[d]), wide(keys[d])
        xx += a * a
        kk += b * b
    count = np.float32(max(1, D))
    rx, rk = np.float32(1) / np.sqrt(xx / count + eps), np.float32(1) / np.sqrt(kk / count + eps)
    # Rows are normalised before they are multiplied: the bare product leaves float32 at 1e18.
    dot = np.float32(0)
    for d in range(D):
        dot += (wide(row[d]) * rx) * w[d] * (wide(keys[d]) * rk)
    dot /= root
    size = np.sqrt(max(abs(dot), clamp)) if dot == dot else dot
    gate = sigmoid(-size if dot < 0 else size)
    if residual:
        for d in range(D):
            out[d] = narrow(wide(row[d]) + gate * wide(values[d]), out)
    else:
        for d in range(D):
            out[d] = narrow(gate * wide(values[d]), out)


@kernel
def _run(x, key, value, weight, numbers, mask, residual, y, threads):
    args = (x, key, value, weight, numbers, mask, residual, y)
    for_each(_stream, x.shape[0] * x.shape[1], threads, args)


@engram_gate.impl(requires=floats("x"))
def numba(
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
    """y[t,j] = x[t,j] + g[t,j] * value[t], g = sigmoid(+-sqrt(max(|dot|, clamp)))."""
    (R, D), T = x.shape[-2:], x.shape[:-2].numel()
    y = torch.empty(x.shape, dtype=x.dtype)
    taking = None if mask is None else mask.reshape(T)
    numbers = np.array((eps, clamp, math.sqrt(max(1, D))), np.float32)
    _run(
        array(x.reshape(T, R, D)),
        array(key.reshape(T, R, D)),
        array(value.reshape(T, D)),
        array(weight.float()),
        numbers,
        given(taking, 1, torch.bool),
        residual,
        array(y.view(T, R, D)),
        threads(2 * T * R * D),
    )
    return y


engram_gate_backward.impl(requires=floats("x"))(backward)
