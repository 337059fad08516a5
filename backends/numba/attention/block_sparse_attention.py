"""block_sparse_attention: a list's tokens are copied into tiles for all queries and heads that
share it."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from transom.kernels.attention.block_sparse_attention import (
    block_sparse_attention,
    block_sparse_attention_backward,
    span_of,
)
from transom.requires import at_most, last_dim_contiguous

from .._arrays import array, flat, floats, scratch
from .._compile import kernel, part
from .._numbers import narrow
from .._pool import for_each, threads
from .._product import LANES
from ._block_sparse_attention_backward import numba as backward
from ._tiles import KEYS, LOWEST, clear, copy_row, finish, meet, mix, pack, padded, softmax, whole

MOST = 128
"""Rows of a task, queries times heads of a key head (one query's heads at least)."""


@part
def _spoilt(row):
    """Whether a row holds NaN or Inf."""
    total = np.float32(0)
    for d in range(row.shape[0]):
        total += row[d] * np.float32(0)
    return total != total


@part
def _task(task, thread, q, k, v, indices, shape, scale, sink, o, lse, room):
    """Some queries of one list, and the heads of one key head."""
    S, N, span, step, block_size, causal = shape
    width = o.shape[2]
    packed, key_tiles, value_tiles, logits, sums, statistics = room
    (lists, Hkv, L), cuts = indices.shape[1:], -(-span // step)
    G, cut, g = q.shape[1] // Hkv, task % cuts, task // cuts % Hkv
    b, at = task // (cuts * Hkv * lists), task // (cuts * Hkv) % lists
    first = at * span + cut * step
    rows = (min(first + step, min(at * span + span, S)) - first) * G
    if rows <= 0:
        return
    queries, keys, values = packed[thread], key_tiles[thread], value_tiles[thread]
    weights, total = logits[thread], sums[thread]
    largest, mass, ends = statistics[thread, 0], statistics[thread, 1], statistics[thread, 2]
    pack(q, scale, b * S + first, g * G, G, 0, rows, queries)
    clear(largest, mass, total)
    (k_rows, k_batch, k_token, k_head), (v_rows, v_batch, v_token, v_head) = k, v
    position, filled = N - S + first, 0
    last = position + rows // G - 1 if causal else N - 1
    D = q.shape[2]
    for i in range(L + 1):
        block = np.int64(indices[b, at, g, i]) if i < L else np.int64(-1)
        start = block * block_size
        stop = min(min(start + block_size, N), last + 1) if block >= 0 else start
        token = start
        while token < stop or (i == L and filled > 0):
            while token < stop and filled < KEYS:
                copy_row(k_rows, b * k_batch + token * k_token + g * k_head, keys[filled, :D])
                copy_row(v_rows, b * v_batch + token * v_token + g * v_head, values[filled, :width])
                # Rows before this one do not see the token.
                ends[filled] = max(0, token - position) * G if causal else 0
                filled += 1
                token += 1
            if filled < KEYS and i < L:
                break
            _attend(queries, keys, values, filled, weights, largest, mass, total, ends, rows)
            filled = 0
    for r in range(rows):
        which, h = b * S + first + r // G, g * G + r % G
        row = total[r, :width]
        lse[which, h] = finish(largest[r], mass[r], sink[h], row)
        out = o[which, h]
        for d in range(width):
            out[d] = narrow(row[d], out)


@part
def _attend(queries, keys, values, count, weights, largest, mass, total, ends, rows):
    """As `attend`, with tokens that only the rows from ends[j] on see."""
    meet(queries, keys, count, weights)
    for j in range(count):
        weights[j, : int(ends[j])] = LOWEST
    softmax(weights, count, largest, mass, total)
    for j in range(count):
        # A weight of 0 times NaN is NaN: such a value reaches the rows that see it, and only those.
        if ends[j] > 0 and _spoilt(values[j]):
            values[j, :] = np.float32(0)
            weights[j, int(ends[j]) :] = np.float32(math.nan)
    mix(weights, values, count, total)


@kernel
def _run(q, k, v, indices, shape, scale, sink, o, lse, room):
    B, lists, Hkv = indices.shape[:3]
    tasks = B * lists * Hkv * -(-shape[2] // shape[3])
    args = (q, k, v, indices, shape, scale, sink, o, lse, room)
    for_each(_task, tasks, room[0].shape[0], args)


REQUIRED = (*floats("q"), last_dim_contiguous("k", "v"), at_most("N", 2**31 - 1))


@block_sparse_attention.impl(requires=REQUIRED)
def numba(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_indices: Tensor,
    *,
    block_size: int,
    causal: bool,
    sink: Tensor | None = None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """o = sum_j softmax(scale * q . k)_j v_j over the tokens of listed blocks and the sink; lse."""
    (B, S, H, D), (N, Hkv, width), lists = q.shape, v.shape[1:], block_indices.shape[1]
    o, lse = torch.empty((B, S, H, width), dtype=q.dtype), torch.empty((B, S, H))
    if not lse.numel():
        return o, lse
    group, span = H // Hkv, span_of(S, lists, block_size)
    step = max(1, min(span, MOST // group))
    rows, across, most = padded(step * group), padded(width), block_indices.shape[3] * block_size
    used = threads(B * S * H * D * max(1, min(N, most)))
    sinks = torch.full((H,), float(LOWEST)) if sink is None else sink.float()
    values = scratch(used, KEYS, across)
    values[:] = 0  # what stands behind a value's width is multiplied, and must not look spoilt
    _run(
        array(q.reshape(B * S, H, D)),
        (flat(k), *k.stride()[:3]),
        (flat(v), *v.stride()[:3]),
        array(whole(block_indices)),
        (S, N, span, step, min(block_size, max(1, N)), causal),
        np.float32(scale),
        array(sinks),
        array(o.view(B * S, H, width)),
        array(lse.view(B * S, H)),
        (
            scratch(used, rows // LANES, D, LANES),
            scratch(used, KEYS, D),
            values,
            scratch(used, KEYS + 1, rows),
            scratch(used, rows, across),
            scratch(used, 3, max(rows, KEYS)),
        ),
    )
    return o, lse


block_sparse_attention_backward.impl(requires=REQUIRED)(backward)
