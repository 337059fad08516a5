"""compress_kv_backward: an entry's weights are made again; each half of a row's channels belongs to
one entry, so that what it gets is written once."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from .._arrays import array, given, scratch
from .._compile import kernel, part
from .._numbers import exp, narrow, wide
from .._pool import for_each, threads
from ._slots import gates_of, pooled, values_of

CHANNELS = 64
"""Of a task, which takes all entries: the gradient of the bias is a sum over them."""
_LOWEST = np.float32(-math.inf)


@part
def _put(b, row, first, value, gate, rest, head, place, outs, dbias):
    """The gradients of some channels of a row: of a new token, or of the state."""
    dkv, dgate, dstate_kv, dstate_gate, dnext_kv, dnext_gate = outs
    size = value.shape[0]
    if row >= rest:  # the next state is a copy of these rows
        some = dnext_kv[b, row - rest, first : first + size]
        more = dnext_gate[b, row - rest, first : first + size]
        for c in range(size):
            value[c] += some[c]
            gate[c] += more[c]
    if row >= head:
        into = dkv[b, row - head, first : first + size]
        below = dgate[b, row - head, first : first + size]
        total = dbias[place, first : first + size]
        for c in range(size):
            into[c] = narrow(value[c], into)
            below[c] = narrow(gate[c], below)
            total[c] += gate[c]
    elif dstate_kv.size > 0:
        dstate_kv[b, row, first : first + size] = value
        dstate_gate[b, row, first : first + size] = gate


@part
def _entry(b, i, first, size, sources, before, head, pending, dentries, outs, dbias, room):
    kv, gate, bias, state_kv, state_gate = sources
    m, (blocks, D) = bias.shape[0], dentries.shape[1:]
    halves, rest, g, v = 2 if before else 1, blocks * m, room[1, :size], room[2, :size]
    peak, mass, total = pooled(b, i, first, sources, before, head, pending, D, room[:, :size])
    for c in range(size):
        total[c] /= mass[c]
    of = dentries[b, i, first : first + size]
    for half in range(halves):
        for row in range((i + half) * m, (i + half + 1) * m):
            gates_of(b, row, half * D + first, g, head, pending, gate, bias, state_gate)
            values_of(b, row, half * D + first, v, head, kv, state_kv)
            for c in range(size):
                held = np.float32(0) if g[c] == _LOWEST else v[c]
                d = exp(g[c] - peak[c]) / mass[c] * wide(of[c])
                v[c], g[c] = d, d * (held - total[c])
            _put(b, row, half * D + first, v, g, rest, head, (row - before) % m, outs, dbias)


@part
def _task(task, thread, sources, before, pending, dentries, outs, dbias, room):
    """Some channels of everything; rows are numbered as in compress_kv."""
    kv, bias = sources[0], sources[2]
    m, (blocks, D), first = bias.shape[0], dentries.shape[1:], task * CHANNELS
    size, head = min(CHANNELS, D - first), before + pending
    count, rest = head + kv.shape[1], blocks * m
    value, gate = room[thread, 0, :size], room[thread, 1, :size]
    for b in range(kv.shape[0]):
        for i in range(blocks):
            _entry(
                b,
                i,
                first,
                size,
                sources,
                before,
                head,
                pending,
                dentries,
                outs,
                dbias,
                room[thread],
            )
        for half in range(2 if before else 1):
            own = half == 1 or before == 0
            # Rows that no entry takes: beyond the last block; of own halves, the block before's.
            for row in range(count):
                if row >= rest + (before if own else 0) or (own and row < before):
                    value[:] = np.float32(0)
                    gate[:] = np.float32(0)
                    at, place = half * D + first, (row - before) % m
                    _put(b, row, at, value, gate, rest, head, place, outs, dbias)


@kernel
def _run(sources, before, pending, dentries, outs, dbias, room):
    tasks = -(-dentries.shape[2] // CHANNELS)
    args = (sources, before, pending, dentries, outs, dbias, room)
    for_each(_task, tasks, room.shape[0], args)


def numba(
    kv: Tensor,
    gate: Tensor,
    position_bias: Tensor,
    dentries: Tensor,
    dnext_kv: Tensor,
    dnext_gate: Tensor,
    *,
    overlap: bool,
    state_kv: Tensor | None = None,
    state_gate: Tensor | None = None,
    pending: int = 0,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dkv = p * dE, dgate = p * (kv - E) * dE, dbias = sum of dgate over blocks."""
    dkv, dgate = torch.empty(kv.shape, dtype=kv.dtype), torch.empty(gate.shape, dtype=gate.dtype)
    dstate_kv, dstate_gate = torch.zeros(dnext_kv.shape), torch.zeros(dnext_gate.shape)
    dbias = torch.zeros(position_bias.shape)
    none = torch.empty((0, 0, 0))
    states = (dstate_kv, dstate_gate) if state_kv is not None else (none, none)
    sources = (
        array(kv),
        array(gate),
        array(position_bias.float()),
        given(state_kv, 3, torch.float32),
        given(state_gate, 3, torch.float32),
    )
    outs = tuple(array(t) for t in (dkv, dgate, *states, dnext_kv, dnext_gate))
    _run(
        sources,
        overlap * position_bias.shape[0],
        pending,
        array(dentries),
        outs,
        array(dbias),
        scratch(threads(8 * kv.numel()), 5, CHANNELS),
    )
    return dkv, dgate, dbias.to(position_bias.dtype), dstate_kv, dstate_gate
