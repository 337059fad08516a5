"""short_conv: each row's taps are added and passed through SiLU a piece of the channels at a
time."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from transom.kernels.engram.short_conv import short_conv, short_conv_backward

from .._arrays import array, floats, scratch
from .._compile import kernel, part
from .._numbers import exp, narrow, wide
from .._pool import for_each, threads
from ._short_conv_backward import numba as backward

ROWS, CHANNELS = 16, 1024
"""Of a task: the rows that taps reach again stay in the second-level cache."""


@part
def _task(task, thread, v, weight, state, dilation, y, room):
    (S, C), K = v.shape[1:], weight.shape[0]
    spans, pieces = -(-S // ROWS), -(-C // CHANNELS)
    b, rest = task // (spans * pieces), task % (spans * pieces)
    span, first = rest % spans, rest // spans * CHANNELS
    size = min(CHANNELS, C - first)
    total = room[thread, :size]
    for s in range(span * ROWS, min((span + 1) * ROWS, S)):
        out = y[b, s, first : first + size]
        total[:] = np.float32(0)
        for i in range(K):
            back = (K - 1 - i) * dilation
            w = weight[i, first : first + size]
            if back <= s:
                row = v[b, s - back, first : first + size]
            elif state.size > 0:
                row = state[b, state.shape[1] + s - back, first : first + size]
            else:
                continue
            for c in range(size):
                total[c] += w[c] * wide(row[c])
        for c in range(size):
            z = total[c]
            out[c] = narrow(z / (np.float32(1) + exp(-z)), out)


@kernel
def _run(v, weight, state, dilation, y, room):
    B, S, C = v.shape
    tasks = B * -(-S // ROWS) * -(-C // CHANNELS)
    for_each(_task, tasks, room.shape[0], (v, weight, state, dilation, y, room))


@short_conv.impl(requires=floats("v"))
def numba(
    v: Tensor, weight: Tensor, *, dilation: int, state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """y[b,s,c] = SiLU(sum_i weight[c,i] * v[b, s-(K-1-i)*dilation, c]), and the last rows."""
    (B, S, C), K = v.shape, weight.shape[1]
    reach = (K - 1) * dilation
    y = torch.empty(v.shape, dtype=v.dtype)
    older = v.new_empty((0, 0, 0)) if state is None else state
    room = scratch(threads(K * v.numel()), CHANNELS)
    _run(array(v), array(weight.t().float()), array(older), dilation, array(y), room)
    rows = torch.empty((B, reach, C), dtype=v.dtype)
    kept = max(0, reach - S)
    rows[:, kept:] = v[:, S - (reach - kept) :]
    if kept:
        rows[:, :kept] = 0 if state is None else state[:, reach - kept :]
    return y, rows


short_conv_backward.impl(requires=floats("v"))(backward)
