"""The rows that entries of compress_kv pool, those of its state included, and their softmax."""

from __future__ import annotations

import math

import numpy as np

from .._compile import part
from .._numbers import exp, wide

_LOWEST = np.float32(-math.inf)


@part
def gates_of(b, row, first, out, head, pending, gate, bias, state_gate):
    """out = the gates of a row with the position's bias; -inf where a state's row is not there."""
    size = out.shape[0]
    if row >= head:
        g = gate[b, row - head, first : first + size]
        p = bias[(row - head + pending) % bias.shape[0], first : first + size]
        for c in range(size):
            out[c] = wide(g[c]) + p[c]
    elif state_gate.size > 0:
        out[:] = state_gate[b, row, first : first + size]
    else:
        out[:] = _LOWEST


@part
def values_of(b, row, first, out, head, kv, state_kv):
    size = out.shape[0]
    if row >= head:
        some = kv[b, row - head, first : first + size]
        for c in range(size):
            out[c] = wide(some[c])
    elif state_kv.size > 0:
        out[:] = state_kv[b, row, first : first + size]
    else:
        out[:] = np.float32(0)


@part
def pooled(b, i, first, sources, before, head, pending, D, room):
    """An entry's channels from `first` on, and what their weights come from: (peak, mass, total),
    with weight exp(gate - peak) / mass and entry total / mass; a mass of 0 is given as 1.

    room [5, channels]: peak, a row's gates, its values, total, mass.
    """
    kv, gate, bias, state_kv, state_gate = sources
    peak, g, v, total, mass = room[0], room[1], room[2], room[3], room[4]
    m, size, halves = bias.shape[0], room.shape[1], 2 if before else 1
    peak[:] = _LOWEST
    for half in range(halves):
        for row in range((i + half) * m, (i + half + 1) * m):
            gates_of(b, row, half * D + first, g, head, pending, gate, bias, state_gate)
            for c in range(size):
                peak[c] = g[c] if g[c] > peak[c] or g[c] != g[c] else peak[c]
    for c in range(size):  # without any slot: from a finite peak exp gives 0
        peak[c] = np.float32(0) if peak[c] == _LOWEST else peak[c]
    total[:] = np.float32(0)
    mass[:] = np.float32(0)
    for half in range(halves):
        for row in range((i + half) * m, (i + half + 1) * m):
            gates_of(b, row, half * D + first, g, head, pending, gate, bias, state_gate)
            values_of(b, row, half * D + first, v, head, kv, state_kv)
            for c in range(size):
                share = exp(g[c] - peak[c])
                mass[c] += share
                total[c] += np.float32(0) if g[c] == _LOWEST else share * v[c]
    for c in range(size):
        mass[c] = np.float32(1) if mass[c] == 0 else mass[c]
    return peak, mass, total
