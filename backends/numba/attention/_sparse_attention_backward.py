"""sparse_attention_backward, some queries at a time.

A query's weights and their gradients are made in tiles of its keys, as in the forward, and kept.
Then tasks of some columns each add what these queries leave in the keys' rows, in the order of
queries and keys.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from transom.kernels.attention._online_softmax import kept_share, sink_share

from .._arrays import array, flat, given, scratch
from .._compile import kernel, part
from .._numbers import exp
from .._pool import for_each, threads
from .._product import LANES, ROWS, product
from ._tiles import KEYS, copy_row, meet, mix, pack, padded, whole

SPLIT = 1024
"""Keys of a query at a time, seen or not."""
HELD = 1 << 24
"""Bytes of weights that are kept at a time."""
SPAN = 4 * LANES
"""Columns of a task that adds rows."""


@part
def _meet_tile(queries, grads, keys, filled, scale, numbers, weights, slopes, dq):
    """A tile's weights, times what the sink leaves, and the gradients of its logits, which enter
    dq; numbers: lse, do . o, share and dlse of each head."""
    lse, delta, share, dlse = numbers[0], numbers[1], numbers[2], numbers[3]
    meet(queries, keys, filled, weights)
    meet(grads, keys, filled, slopes)
    for j in range(filled):
        p, ds = weights[j], slopes[j]
        for h in range(p.shape[0]):
            w = exp(p[h] - lse[h])
            ds[h] = ((ds[h] - delta[h]) * share[h] + dlse[h]) * w * scale
            p[h] = w * share[h]
    mix(slopes, keys, filled, dq)


@part
def _query(task, thread, at, q, do, kv, local, lists, sizes, scale, numbers, held, dq, room):
    """One query with its keys from at[1] to at[2]; task counts from query at[0]."""
    (entries, entry_batch, entry_row), (near, near_batch, near_row) = kv, local
    indices, visible, valid = lists
    base, S, N, M, window = sizes
    weights, slopes, rows, counts = held
    packed, dos, tiles = room
    queries, grads, keys, of = packed[thread], dos[thread], tiles[thread], rows[task]
    b, s, H, D = (at[0] + task) // S, (at[0] + task) % S, q.shape[1], queries.shape[1]
    pack(q, scale, task, 0, H, 0, H, queries)
    pack(do, np.float32(1), task, 0, H, 0, H, grads)
    bound = min(N, max(0, np.int64(visible[b, s]))) if visible.size > 0 else N
    listed = indices.shape[2] if indices.size > 0 else N
    count = done = 0
    for i in range(at[1], min(at[2], listed + window)):
        if i < listed:
            j = np.int64(indices[b, s, i]) if indices.size > 0 else i
            if j < 0 or j >= bound:
                continue
            copy_row(entries, b * entry_batch + j * entry_row, keys[count - done, :D])
            of[count] = b * N + j
        else:
            j = M - S + s - window + 1 + i - listed
            if j < 0 or (valid.size > 0 and not valid[b, j]):
                continue
            copy_row(near, b * near_batch + j * near_row, keys[count - done, :D])
            of[count] = base + b * M + j
        count += 1
        if count - done == KEYS:
            _meet_tile(
                queries,
                grads,
                keys,
                KEYS,
                scale,
                numbers[task],
                weights[task, done:],
                slopes[task, done:],
                dq[task],
            )
            done = count
    if count > done:
        _meet_tile(
            queries,
            grads,
            keys,
            count - done,
            scale,
            numbers[task],
            weights[task, done:],
            slopes[task, done:],
            dq[task],
        )
    counts[task] = count


@part
def _rows(task, thread, q, do, held, sums, tiles):
    """Some columns of all rows: slopes.T @ q + weights.T @ do of the queries at hand."""
    weights, slopes, rows, counts = held
    (Q, H, width), across, tile = q.shape, weights.shape[2], tiles[thread]
    first = task * SPAN
    size = min(SPAN, width - first)
    for s in range(Q):
        for j in range(0, counts[s], ROWS):
            count, at = min(ROWS, counts[s] - j), (s * weights.shape[1] + j) * across
            for c in range(0, size, LANES):
                place = s * H * width + first + c
                product(slopes, at, across, 1, q, place, width, tile, c, SPAN, count, H, False)
                product(weights, at, across, 1, do, place, width, tile, c, SPAN, count, H, True)
            for i in range(count):
                into, some = sums[rows[s, j + i], first : first + size], tile[i]
                for c in range(size):
                    into[c] += some[c]


@kernel
def _run(at, q, do, kv, local, lists, sizes, scale, numbers, held, dq, sums, room, tiles):
    """Takes the queries from at[0] on, which q and do [queries,H,width] hold, with their keys from
    at[1] to at[2]."""
    args = (at, q, do, kv, local, lists, sizes, scale, numbers, held, dq, room)
    for_each(_query, q.shape[0], tiles.shape[0], args)
    for_each(_rows, -(-q.shape[2] // SPAN), tiles.shape[0], (q, do, held, sums, tiles))


def numba(
    do: Tensor,
    dlse: Tensor,
    q: Tensor,
    kv: Tensor,
    indices: Tensor | None,
    visible: Tensor | None,
    local_kv: Tensor,
    sink: Tensor,
    local_valid: Tensor | None,
    o: Tensor,
    lse: Tensor,
    *,
    window: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dq, dkv, dlocal_kv, dsink; sums over queries are float32, in the order of the queries."""
    (B, S, H, D), N, M, v_dim = q.shape, kv.shape[1], local_kv.shape[1], do.shape[3]
    lanes, width, sinks = padded(H), padded(D), sink.float()
    dq, dsink = torch.empty(q.shape, dtype=q.dtype), torch.zeros(H)
    sums = torch.zeros((B * (N + M), width))
    longest = (N if indices is None else indices.shape[2]) + window
    length = max(1, min(SPLIT, longest))
    listed = kv
    if indices is not None and not indices.numel():
        indices, listed = None, kv[:, :0]  # to a kernel, an empty list is none: every entry
    lists = (
        given(whole(indices), 3, torch.int32),
        given(whole(visible), 2, torch.int32),
        given(local_valid, 2, torch.bool),
    )
    count, used = B * S, threads(B * S * H * D * longest)
    some = max(1, min(count, HELD // max(1, 8 * length * lanes)))
    held = (
        np.empty((some, length, lanes), np.float32),
        np.empty((some, length, lanes), np.float32),
        np.empty((some, length), np.int64),
        np.empty(some, np.int64),
    )
    room = (
        scratch(used, lanes // LANES, D, LANES),
        scratch(used, lanes // LANES, v_dim, LANES),
        np.zeros((used, KEYS, width), np.float32),
    )
    tiles = scratch(used, ROWS, SPAN)
    for first in range(0, count if H else 0, some):
        at = slice(first, first + some)
        qs, dos, os = (t.reshape(count, H, t.shape[3])[at].float() for t in (q, do, o))
        lses, dlses = (t.reshape(count, H)[at] for t in (lse, dlse))
        delta = (dos * os).sum(-1)
        dsink -= (sink_share(lses, sinks) * delta).sum(0)
        numbers = torch.stack((lses, delta, kept_share(lses, sinks), dlses), 1)
        numbers = functional.pad(numbers, (0, lanes - H))
        # Heads that are not there, and those that saw nothing, have weights of 0.
        numbers[:, 0, H:] = torch.inf
        numbers[:, 0].masked_fill_(numbers[:, 0] == -torch.inf, torch.inf)
        dx = torch.zeros(qs.shape[0], lanes, width)
        qs, dos = functional.pad(qs, (0, width - D)), functional.pad(dos, (0, width - v_dim))
        for start in range(0, longest, length):
            _run(
                (first, start, start + length),
                array(qs),
                array(dos),
                (flat(listed), *listed.stride()[:2]),
                (flat(local_kv), *local_kv.stride()[:2]),
                lists,
                (B * N, S, listed.shape[1], M, window),
                np.float32(scale),
                array(numbers),
                held,
                array(dx),
                array(sums),
                room,
                tiles,
            )
        dq.view(count, H, D)[at] = dx[:, :H, :D]
    dkv = sums[: B * N].view(B, N, width)[..., :D].to(kv.dtype)
    dlocal = sums[B * N :].view(B, M, width)[..., :D].to(local_kv.dtype)
    return dq, dkv.contiguous(), dlocal.contiguous(), dsink.to(sink.dtype)
