"""sparse_attention: a query's keys are copied into tiles, those it does not see left out."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from transom.kernels.attention.sparse_attention import sparse_attention, sparse_attention_backward
from transom.requires import at_most, last_dim_contiguous

from .._arrays import array, flat, floats, given, scratch
from .._compile import kernel, part
from .._numbers import narrow
from .._pool import for_each, threads
from .._product import LANES
from ._sparse_attention_backward import numba as backward
from ._tiles import KEYS, LOWEST, attend, clear, finish, merge, pack, padded, read_key, whole

SPLIT = 1024
"""Keys of a task, seen or not: longer lists are cut, and their parts merged in order."""
HELD = 1 << 24
"""Bytes of parts that wait to be merged."""


@part
def _part(task, thread, first, cut, q, kv, local, lists, numbers, sums, room):
    """One cut of one query's keys, for some of its heads."""
    splits, blocks, heads = cut
    parts, largest, mass = sums
    packed, tiles, logits = room
    indices, visible, valid = lists
    S, N, M, window, scale = numbers
    which, split, block = task // (splits * blocks), task // blocks % splits, task % blocks
    b, s = (first + which) // S, (first + which) % S
    at, h = which * splits + split, block * heads
    tops, masses, o = largest[at, h : h + heads], mass[at, h : h + heads], parts[at, h : h + heads]
    queries, keys, weights = packed[thread], tiles[thread], logits[thread]
    D, filled = q.shape[2], 0
    pack(q, scale, first + which, 0, q.shape[1], h, q.shape[1], queries)
    clear(tops, masses, o)
    bound = min(N, max(0, np.int64(visible[b, s]))) if visible.size > 0 else N
    listed = indices.shape[2] if indices.size > 0 else N
    # Local tokens follow the longest list: where they stand does not depend on the query.
    stop = min((split + 1) * SPLIT, listed + window)
    for i in range(split * SPLIT, stop):
        if i < listed:
            j = np.int64(indices[b, s, i]) if indices.size > 0 else i
            if j < 0 or j >= bound:
                continue
            read_key(kv, b * kv[1] + j * kv[2], keys[filled, :D])
        else:
            j = M - S + s - window + 1 + i - listed
            if j < 0 or (valid.size > 0 and not valid[b, j]):
                continue
            read_key(local, b * local[1] + j * local[2], keys[filled, :D])
        filled += 1
        if filled == KEYS:
            attend(queries, keys, keys, filled, weights, tops, masses, o)
            filled = 0
    if filled > 0:
        attend(queries, keys, keys, filled, weights, tops, masses, o)


@part
def _merge(task, thread, first, splits, sums, sink, o, lse):
    parts, largest, mass = sums
    H, width = o.shape[1:]
    which, h = task // H, task % H
    some = slice(which * splits, (which + 1) * splits)
    total = parts[which * splits, h, :width]
    top, amount = largest[which * splits, h], mass[which * splits, h]
    if splits > 1:  # which reads the first part before it writes there
        top, amount = merge(parts[some, :, :width], largest[some], mass[some], h, total)
    lse[first + which, h] = finish(top, amount, sink[h], total)
    out = o[first + which, h]
    for d in range(width):
        out[d] = narrow(total[d], out)


@kernel
def _run(cut, q, kv, local, lists, numbers, sink, o, lse, sums, room):
    splits, blocks, _ = cut
    at_once, threads = sums[0].shape[0] // splits, room[0].shape[0]
    for first in range(0, q.shape[0], at_once):
        some = min(at_once, q.shape[0] - first)
        args = (first, cut, q, kv, local, lists, numbers, sums, room)
        for_each(_part, some * splits * blocks, threads, args)
        for_each(_merge, some * o.shape[1], threads, (first, splits, sums, sink, o, lse))


REQUIRED = (*floats("q"), last_dim_contiguous("kv", "local_kv"), at_most("N", 2**31 - 1))


@sparse_attention.impl(requires=REQUIRED)
def numba(
    q: Tensor,
    kv: Tensor,
    indices: Tensor | None = None,
    *,
    visible: Tensor | None = None,
    local_kv: Tensor | None = None,
    window: int = 0,
    sink: Tensor | None = None,
    scale: float,
    v_dim: int,
    local_valid: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """o = sum_j softmax(scale * q . K)_j K_j[:v_dim] over entries, local tokens and sink; lse."""
    return attention(q, kv, indices, visible, local_kv, window, sink, scale, v_dim, local_valid)


def attention(
    q: Tensor,
    kv: Tensor,
    indices: Tensor | None,
    visible: Tensor | None,
    local_kv: Tensor | None,
    window: int,
    sink: Tensor | None,
    scale: float,
    v_dim: int,
    local_valid: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """o and lse of `sparse_attention`, and of `sparse_attention_rows`, whose kv are bytes."""
    (B, S, H, D), N = q.shape, kv.shape[1]
    o, lse = torch.empty((B, S, H, v_dim), dtype=q.dtype), torch.empty((B, S, H))
    if not lse.numel():
        return o, lse
    near = q[:, :0, 0] if local_kv is None else local_kv
    sinks = torch.full((H,), float(LOWEST)) if sink is None else sink.float()
    longest = (N if indices is None else indices.shape[2]) + window
    splits, lanes, width = max(1, -(-longest // SPLIT)), padded(H), padded(v_dim)
    used = threads(B * S * H * D * max(1, longest))
    # Where queries are few, each one's heads are shared by the threads.
    heads = lanes if B * S * splits >= 2 * used else LANES
    at_once = max(1, min(B * S, HELD // max(1, 4 * splits * lanes * width)))
    if indices is not None and not indices.numel():
        indices, kv, N = None, kv[:, :0], 0  # to a kernel, an empty list is none: every entry
    lists = (
        given(whole(indices), 3, torch.int32),
        given(whole(visible), 2, torch.int32),
        given(local_valid, 2, torch.bool),
    )
    _run(
        (splits, lanes // heads, heads),
        array(q.reshape(B * S, H, D)),
        (flat(kv), *kv.stride()[:2], kv.shape[2]),
        (flat(near), *near.stride()[:2], D),
        lists,
        (S, N, near.shape[1], window, np.float32(scale)),
        array(sinks),
        array(o.view(B * S, H, v_dim)),
        array(lse.view(B * S, H)),
        (
            np.empty((at_once * splits, lanes, width), np.float32),
            np.empty((at_once * splits, lanes), np.float32),
            np.empty((at_once * splits, lanes), np.float32),
        ),
        (
            scratch(used, heads // LANES, D, LANES),
            scratch(used, KEYS, max(D, width)),
            scratch(used, KEYS + 1, heads),
        ),
    )
    return o, lse


sparse_attention_backward.impl(requires=REQUIRED)(backward)
