"""compress_kv: an entry's slots are read twice, for each channel's largest gate and for its sum."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from transom.kernels.attention.compress_kv import compress_kv, compress_kv_backward

from .._arrays import array, floats, given, scratch
from .._compile import kernel, part
from .._numbers import narrow
from .._pool import for_each, threads
from ._compress_kv_backward import numba as backward
from ._slots import gates_of, pooled, values_of

CHANNELS = 256
"""Of a task."""
_LOWEST = np.float32(-math.inf)


@part
def _entry(task, thread, kv, gate, bias, state_kv, state_gate, before, pending, entries, room):
    """One block's entry, some of its channels.

    Rows are numbered as: the block before, if blocks overlap; those pending; the new ones.
    """
    blocks, D = entries.shape[1:]
    head, pieces = before + pending, -(-entries.shape[2] // CHANNELS)
    b, i, first = task // (blocks * pieces), task // pieces % blocks, task % pieces * CHANNELS
    size = min(CHANNELS, D - first)
    sources = kv, gate, bias, state_kv, state_gate
    _, mass, total = pooled(b, i, first, sources, before, head, pending, D, room[thread][:, :size])
    out = entries[b, i, first : first + size]
    for c in range(size):
        out[c] = narrow(total[c] / mass[c], out)


@part
def _kept(
    task, thread, kv, gate, bias, state_kv, state_gate, before, pending, entries, next_kv, next_gate
):
    """One row of the next state."""
    kept, m, head = next_kv.shape[1], bias.shape[0], before + pending
    b, r = task // kept, task % kept
    row = entries.shape[1] * m + r
    if row < head + kv.shape[1]:
        gates_of(b, row, 0, next_gate[b, r], head, pending, gate, bias, state_gate)
        values_of(b, row, 0, next_kv[b, r], head, kv, state_kv)
    else:
        next_gate[b, r, :] = _LOWEST
        next_kv[b, r, :] = np.float32(0)


@kernel
def _run(kv, gate, bias, state_kv, state_gate, before, pending, entries, next_kv, next_gate, room):
    args = (kv, gate, bias, state_kv, state_gate, before, pending, entries)
    B, blocks, D = entries.shape
    tasks = B * blocks * -(-D // CHANNELS)
    for_each(_entry, tasks, room.shape[0], (*args, room))
    for_each(_kept, B * next_kv.shape[1], room.shape[0], (*args, next_kv, next_gate))


@compress_kv.impl(requires=floats("kv"))
def numba(
    kv: Tensor,
    gate: Tensor,
    position_bias: Tensor,
    *,
    overlap: bool,
    state_kv: Tensor | None = None,
    state_gate: Tensor | None = None,
    pending: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """entries[i] = sum over the slots p of block i of softmax_p(gate + bias)[p] * kv[p]."""
    (B, S, W), m = kv.shape, position_bias.shape[0]
    entries = torch.empty((B, (pending + S) // m, W // (1 + overlap)), dtype=kv.dtype)
    next_kv, next_gate = (torch.empty((B, (1 + overlap) * m, W)) for _ in range(2))
    _run(
        array(kv),
        array(gate),
        array(position_bias.float()),
        given(state_kv, 3, torch.float32),
        given(state_gate, 3, torch.float32),
        overlap * m,
        pending,
        array(entries),
        array(next_kv),
        array(next_gate),
        scratch(threads(4 * kv.numel()), 5, CHANNELS),
    )
    return entries, next_kv, next_gate


compress_kv_backward.impl(requires=floats("kv"))(backward)
