"""The rows that entries of compress_kv pool, those of its state included."""

from __future__ import annotations

import math

import numpy as np

from .._compile import part
from .._numbers import wide

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
