"""block_sparse_attention_backward, some queries at a time.

The queries that share a list, or a cut of them, meet tiles of its tokens, as in the forward; their
weights and the gradients of the logits are kept. Then tasks of some columns of a key head each add
what these queries leave in the tokens' rows, in the order of queries and lists.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from transom.kernels.attention._online_softmax import kept_share, sink_share
from transom.kernels.attention.block_sparse_attention import span_of

from .._arrays import array, flat, scratch
from .._compile import kernel, part
from .._numbers import exp, narrow
from .._pool import for_each, threads
from .._product import LANES, ROWS, product
from ._tiles import KEYS, copy_row, meet, mix, pack, padded, whole

MOST = 128
"""Rows of a task, queries times heads of a key head (one query's heads at least)."""
SPLIT = 1024
"""Tokens of a list at a time, seen or not."""
HELD = 1 << 24
"""Bytes of weights that are kept at a time."""
SPAN = 4 * LANES
"""Columns of a task that adds rows."""


@part
def _cut(unit, shape):
    """(batch, list, first query, queries) of a cut of a list's queries; there may be none."""
    S, span, step, lists = shape[0], shape[2], shape[3], shape[4]
    cuts = -(-span // step)
    at, cut = unit // cuts % lists, unit % cuts
    first = at * span + cut * step
    return unit // (cuts * lists), at, first, min(first + step, min(at * span + span, S)) - first


@part
def _clean(row):
    """0 in place of what is not finite; whoever sees it has a gradient of NaN already."""
    for d in range(row.shape[0]):
        x = row[d]
        row[d] = x if abs(x) < np.float32(math.inf) else np.float32(0)


@part
def _meet_tile(queries, grads, keys, values, filled, ends, scale, numbers, weights, slopes, dq):
    """A tile's weights, times what the sink leaves, and the gradients of its logits, which enter
    dq; numbers: lse, do . o, share and dlse of each row. Only rows from ends[j] on see a token."""
    lse, delta, share, dlse = numbers[0], numbers[1], numbers[2], numbers[3]
    meet(queries, keys, filled, weights)
    meet(grads, values, filled, slopes)
    for j in range(filled):
        p, ds, end = weights[j], slopes[j], int(ends[j])
        for r in range(p.shape[0]):
            w = exp(p[r] - lse[r])
            ds[r] = ((ds[r] - delta[r]) * share[r] + dlse[r]) * w * scale
            p[r] = w * share[r]
        if end > 0:
            p[:end] = np.float32(0)
            ds[:end] = np.float32(0)
            _clean(keys[j])
    mix(slopes, keys, filled, dq)


@part
def _lists(task, thread, at, q, do, k, v, indices, shape, scale, numbers, held, sums, dq, room):
    """One cut and one key head, with the tokens from at[2] to at[3] of the list."""
    S, N, _, _, _, block_size, causal = shape
    heads, G = k[4], numbers.shape[1] // at[4]
    weights, slopes, tokens, counts = held
    packed, grads, key_tiles, value_tiles, statistics = room
    g, (b, of, first, count) = task % heads, _cut(at[0] + task // heads, shape)
    counts[task] = 0
    rows, start = count * G, (b * S + first - at[1]) * G
    if count <= 0:
        return
    queries, dos = packed[thread], grads[thread]
    keys, values = key_tiles[thread], value_tiles[thread]
    of_rows, ends, which = statistics[thread, :4], statistics[thread, 4], tokens[task]
    pack(q, scale, g, start, rows, 0, rows, queries)
    pack(do, np.float32(1), g, start, rows, 0, rows, dos)
    for r in range(queries.shape[0] * LANES):
        # A row that is not there has weights of 0.
        of_rows[0, r] = numbers[g, start + r, 0] if r < rows else np.float32(math.inf)
        for i in range(1, 4):
            of_rows[i, r] = numbers[g, start + r, i] if r < rows else np.float32(0)
    position, D, width = N - S + first, queries.shape[1], dos.shape[1]
    last = position + count - 1 if causal else N - 1
    found = done = 0
    for slot in range(at[2], at[3] + 1):
        if slot < at[3]:
            block = np.int64(indices[b, of, g, slot // block_size])
            token = block * block_size + slot % block_size
            if block >= 0 and block * block_size < N and token < N and token <= last:
                i = found - done
                copy_row(k[0], b * k[1] + token * k[2] + g * k[3], keys[i, :D])
                copy_row(v[0], b * v[1] + token * v[2] + g * v[3], values[i, :width])
                # Rows before this one do not see the token.
                ends[i] = max(0, token - position) * G if causal else 0
                which[found] = b * N + token
                found += 1
        filled = found - done
        if filled == KEYS or (filled > 0 and slot == at[3]):
            _meet_tile(
                queries,
                dos,
                keys,
                values,
                filled,
                ends,
                scale,
                of_rows,
                weights[task, done:],
                slopes[task, done:],
                sums[task],
            )
            done = found
    counts[task] = found
    for r in range(rows):  # what later tokens add is written over it
        row, into = sums[task, r], dq[b * S + first + r // G, g * G + r % G]
        for d in range(D):
            into[d] = narrow(row[d], into)


@part
def _rows(task, thread, at, q, do, shape, heads, held, dk, dv, tiles):
    """Some columns of one head's keys, slopes.T @ q of the queries at hand, or of its values,
    weights.T @ do."""
    weights, slopes, tokens, counts = held
    pieces, more = -(-q.shape[2] // SPAN), -(-do.shape[2] // SPAN)
    g, piece = task // (pieces + more), task % (pieces + more)
    if piece < pieces:
        _add(g, piece * SPAN, at, q, shape, heads, slopes, tokens, counts, dk, tiles[thread])
    else:
        first = (piece - pieces) * SPAN
        _add(g, first, at, do, shape, heads, weights, tokens, counts, dv, tiles[thread])


@part
def _add(g, first, at, x, shape, heads, factors, tokens, counts, sums, tile):
    units, width = counts.shape[0] // heads, x.shape[2]
    size, across, G = min(SPAN, width - first), factors.shape[2], x.shape[1] // at[4]
    for unit in range(min(units, at[5])):
        b, _, query, count = _cut(at[0] + unit, shape)
        task, rows = unit * heads + g, count * G
        base = (g * x.shape[1] + (b * shape[0] + query - at[1]) * G) * width + first
        for j in range(0, counts[task], ROWS):
            some, place = min(ROWS, counts[task] - j), (task * factors.shape[1] + j) * across
            for c in range(0, size, LANES):
                product(
                    factors, place, across, 1, x, base + c, width, tile, c, SPAN, some, rows, False
                )
            for i in range(some):
                into, row = sums[tokens[task, j + i], g, first : first + size], tile[i]
                for c in range(size):
                    into[c] += row[c]


@kernel
def _run(at, q, do, k, v, indices, shape, scale, numbers, held, sums, outs, room, tiles):
    """Takes at[5] cuts from at[0] on, with the tokens at[2] to at[3] of their lists; q and do
    [key heads, rows, width] hold at[4] queries from at[1] on."""
    dq, dk, dv = outs
    args = (at, q, do, k, v, indices, shape, scale, numbers, held, sums, dq, room)
    for_each(_lists, at[5] * k[4], tiles.shape[0], args)
    pieces = -(-q.shape[2] // SPAN) + -(-do.shape[2] // SPAN)
    args = (at, q, do, shape, k[4], held, dk, dv, tiles)
    for_each(_rows, k[4] * pieces, tiles.shape[0], args)


def numba(
    do: Tensor,
    dlse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_indices: Tensor,
    sink: Tensor,
    o: Tensor,
    lse: Tensor,
    *,
    block_size: int,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv, dsink; sums over queries are float32, in the order of queries and lists."""
    (B, S, H, D), (N, heads, Dv), lists = q.shape, v.shape[1:], block_indices.shape[1]
    block_size = min(block_size, max(1, N))
    group, span, total = H // heads, span_of(S, lists, block_size), block_indices.shape[3]
    step = max(1, min(span, MOST // max(1, group)))
    lanes, width, wide = padded(step * group), padded(D), padded(Dv)
    dq, dsink, sinks = torch.zeros(q.shape, dtype=q.dtype), torch.zeros(H), sink.float()
    dk, dv = torch.zeros((B * N, heads, width)), torch.zeros((B * N, heads, wide))
    total, cuts = total * block_size, -(-span // step)
    length, units = max(1, min(SPLIT, total)), B * lists * cuts if H else 0
    used = threads(B * S * H * D * max(1, min(N, total)))
    some = max(1, min(units, HELD // max(1, 8 * length * lanes * heads)))
    held = (
        np.empty((some * heads, length, lanes), np.float32),
        np.empty((some * heads, length, lanes), np.float32),
        np.empty((some * heads, length), np.int64),
        np.empty(some * heads, np.int64),
    )
    room = (
        scratch(used, lanes // LANES, D, LANES),
        scratch(used, lanes // LANES, Dv, LANES),
        np.zeros((used, KEYS, width), np.float32),
        np.zeros((used, KEYS, wide), np.float32),
        scratch(used, 5, max(lanes, KEYS)),
    )
    tiles, ids = scratch(used, ROWS, SPAN), array(whole(block_indices))
    shape = S, N, span, step, lists, block_size, causal
    outs = array(dq.view(B * S, H, D)), array(dk), array(dv)
    for unit in range(0, units, some):
        held_units = min(some, units - unit)
        first = _start(unit, cuts, span, step, lists, S)
        at = slice(first, _start(unit + held_units, cuts, span, step, lists, S))
        x, dy, y = (t.reshape(B * S, H, t.shape[3])[at].float() for t in (q, do, o))
        lses, dlses = (t.reshape(B * S, H)[at] for t in (lse, dlse))
        count = x.shape[0]
        delta = (dy * y).sum(-1)
        dsink -= (sink_share(lses, sinks) * delta).sum(0)
        # A query that saw nothing has weights of 0.
        norm = lses.masked_fill(lses == -torch.inf, torch.inf)
        numbers = torch.stack((norm, delta, kept_share(lses, sinks), dlses), -1)
        x, dy, numbers = (
            t.view(count, heads, group, t.shape[2])
            .transpose(0, 1)
            .reshape(heads, count * group, t.shape[2])
            for t in (x, dy, numbers)
        )
        dx = torch.zeros(held_units * heads, lanes, width)
        x, dy = functional.pad(x, (0, width - D)), functional.pad(dy, (0, wide - Dv))
        for start in range(0, total, length):
            stop = min(start + length, total)
            _run(
                (unit, first, start, stop, max(1, count), held_units),
                array(x),
                array(dy),
                (flat(k), *k.stride()[:3], heads),
                (flat(v), *v.stride()[:3]),
                ids,
                shape,
                np.float32(scale),
                array(numbers),
                held,
                array(dx),
                outs,
                room,
                tiles,
            )
    dk, dv = (
        sums.view(B, N, heads, sums.shape[2])[..., :size].to(like.dtype).contiguous()
        for sums, size, like in ((dk, D, k), (dv, Dv, v))
    )
    return dq, dk, dv, dsink.to(sink.dtype)


def _start(unit: int, cuts: int, span: int, step: int, lists: int, queries: int) -> int:
    """The first query of a cut, all batches' counted; the next one's is its end."""
    batch, rest = divmod(unit, lists * cuts)
    at, cut = divmod(rest, cuts)
    return batch * queries + min(at * span + min(cut * step, span), queries)
