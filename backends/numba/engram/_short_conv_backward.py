"""short_conv_backward: down the rows once; a ring holds the gradients before SiLU that later rows
still need."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from .._arrays import array, scratch
from .._compile import kernel, part
from .._numbers import narrow, sigmoid, wide
from .._pool import for_each, threads

CHANNELS = 128
"""Of a task, which takes all rows of them: the weight's gradient is a sum over rows."""
ROWS = 64
"""Whose products are added before they are added to the whole sum: long sums stay accurate."""


@part
def _some(b, at, first, size, v, state):
    """Channels from `first` on of row `at` of state and v together."""
    if at < state.shape[1]:
        return state[b, at, first : first + size]
    return v[b, at - state.shape[1], first : first + size]


@part
def _position(b, s, first, dy, v, weight, state, dilation, dz, sums):
    """dz of position s; what it adds to the weight's gradient goes into sums."""
    K, size = weight.shape[0], dz.shape[0]
    dz[:] = np.float32(0)
    for i in range(K):
        w, row = weight[i, first : first + size], _some(b, s + i * dilation, first, size, v, state)
        for c in range(size):
            dz[c] += w[c] * wide(row[c])
    g = dy[b, s, first : first + size]
    for c in range(size):
        z, open_ = dz[c], sigmoid(dz[c])
        dz[c] = wide(g[c]) * open_ * (np.float32(1) + z * (np.float32(1) - open_))
    for i in range(K):
        into, row = sums[i, :size], _some(b, s + i * dilation, first, size, v, state)
        for c in range(size):
            into[c] += dz[c] * wide(row[c])


@part
def _gradient(b, at, first, dnew, weight, dilation, S, ring, total):
    """The gradient of row `at` of state and v together, whose readers have all passed."""
    size = total.shape[0]
    total[:] = np.float32(0)
    if at >= S:
        kept = dnew[b, at - S, first : first + size]
        for c in range(size):
            total[c] = wide(kept[c])
    for i in range(weight.shape[0]):
        s = at - i * dilation
        if 0 <= s < S:
            w, dz = weight[i, first : first + size], ring[s % ring.shape[0], :size]
            for c in range(size):
                total[c] += w[c] * dz[c]


@part
def _task(task, thread, dy, dnew, v, weight, state, dilation, dv, dweight, dstate, rings, room):
    (B, S, C), K, reach, first = v.shape, weight.shape[0], state.shape[1], task * CHANNELS
    size = min(CHANNELS, C - first)
    ring, total, sums = rings[thread], room[thread, 0, :size], room[thread, 1:]
    for i in range(K):
        sums[i, :] = np.float32(0)
        dweight[i, first : first + size] = np.float32(0)
    for b in range(B):
        for at in range(S + reach):
            if at < S:
                dz = ring[at % ring.shape[0], :size]
                _position(b, at, first, dy, v, weight, state, dilation, dz, sums)
            _gradient(b, at, first, dnew, weight, dilation, S, ring, total)
            out = _some(b, at, first, size, dv, dstate)
            for c in range(size):
                out[c] = narrow(total[c], out)
            if at % ROWS == ROWS - 1 or at == S + reach - 1:
                for i in range(K):
                    into, some = dweight[i, first : first + size], sums[i, :size]
                    for c in range(size):
                        into[c] += some[c]
                        some[c] = np.float32(0)


@kernel
def _run(dy, dnew, v, weight, state, dilation, dv, dweight, dstate, rings, room):
    args = (dy, dnew, v, weight, state, dilation, dv, dweight, dstate, rings, room)
    for_each(_task, -(-v.shape[2] // CHANNELS), room.shape[0], args)


def numba(
    dy: Tensor,
    dnew_state: Tensor,
    v: Tensor,
    weight: Tensor,
    *,
    dilation: int,
    state: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """dv, dweight, dstate; dz = dy * sigmoid(z) * (1 + z * (1 - sigmoid(z)))."""
    (B, _, C), K = v.shape, weight.shape[1]
    reach = (K - 1) * dilation
    dv, dstate = torch.empty(v.shape, dtype=v.dtype), torch.empty((B, reach, C), dtype=v.dtype)
    dweight, used = torch.empty((K, C)), threads(4 * K * v.numel())
    older = v.new_zeros((B, reach, C)) if state is None else state
    _run(
        array(dy),
        array(dnew_state),
        array(v),
        array(weight.t().float()),
        array(older),
        dilation,
        array(dv),
        array(dweight),
        array(dstate),
        scratch(used, reach + 1, CHANNELS),
        scratch(used, 1 + K, CHANNELS),
    )
    return dv, dweight.t().contiguous(), dstate
