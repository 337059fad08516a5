"""lightning_indexer_kl_backward, some queries at a time.

A query's scores are made again, and of its dots their gradients, which are kept. Then tasks of some
columns each add what these queries leave in the keys, in the order of queries and lists.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from .._arrays import array, flat, scratch
from .._compile import kernel, part
from .._numbers import narrow, wide
from .._pool import for_each, threads
from .._product import LANES, ROWS, product
from ._scores import log_mass, score_listed
from ._tiles import KEYS, copy_row, mix, pack, padded, whole

HELD = 1 << 22
"""Bytes of gradients of dots that are kept at a time."""
SPAN = 2 * LANES
"""Columns of a task that adds rows."""


@part
def _query(task, thread, first, q, k, N, weights, lists, outer, held, outs, room):
    """One query: what it leaves in `held`, and its own gradients; task counts from `first`."""
    target, indices = lists
    slopes, rows, counts = held
    dq, dweights, dtarget = outs
    packed, tiles, scores, places = room
    queries, tile, score, place = packed[thread], tiles[thread], scores[thread], places[thread]
    S, H, D = indices.shape[1], q.shape[1], queries.shape[1]
    b, s = (first + task) // S, (first + task) % S
    dots, of, listed, goals = slopes[task], rows[task], indices[b, s], target[b, s]
    factors, into, total = weights[first + task], dtarget[first + task], dweights[first + task]
    pack(q, np.float32(1), task, 0, H, 0, H, queries)
    count = score_listed(b, k, N, listed, queries, factors, tile, dots, score, place)
    counts[task] = count
    norm = log_mass(score, count) if count > 0 else np.float32(0)
    mass, d = np.float32(0), outer[first + task]
    for i in range(count):
        mass += wide(goals[place[i]])
    for i in range(count):
        goal, log_p = wide(goals[place[i]]), score[i] - norm
        if goal != 0:
            into[place[i]] = narrow(d * (np.float32(1) + np.log(goal) - log_p), into)
        dscore, row = d * (np.exp(log_p) * mass - goal), dots[i]
        for h in range(H):
            x = row[h]
            total[h] += dscore * (x if x > 0 or x != x else np.float32(0))
            row[h] = factors[h] * dscore if x > 0 else np.float32(0)
        for h in range(H, row.shape[0]):
            row[h] = np.float32(0)
        of[i] = b * N + np.int64(listed[place[i]])
    keys, of_batch, of_row = k
    for done in range(0, count, KEYS):
        filled = min(KEYS, count - done)
        for i in range(filled):
            j = np.int64(listed[place[done + i]])
            copy_row(keys, b * of_batch + j * of_row, tile[i, :D])
        mix(dots[done:], tile, filled, dq[task])


@part
def _rows(task, thread, q, held, sums, tiles):
    """Some columns of all keys: slopes.T @ q of the queries at hand."""
    slopes, rows, counts = held
    (Q, H, width), across, tile = q.shape, slopes.shape[2], tiles[thread]
    first = task * SPAN
    size = min(SPAN, width - first)
    for s in range(Q):
        for j in range(0, counts[s], ROWS):
            count, at = min(ROWS, counts[s] - j), (s * slopes.shape[1] + j) * across
            for c in range(0, size, LANES):
                place = s * H * width + first + c
                product(slopes, at, across, 1, q, place, width, tile, c, SPAN, count, H, False)
            for i in range(count):
                into, some = sums[rows[s, j + i], first : first + size], tile[i]
                for c in range(size):
                    into[c] += some[c]


@kernel
def _run(first, q, k, N, weights, lists, outer, held, outs, sums, room, tiles):
    """Takes the queries from `first` on, which q [queries,H,width] holds."""
    args = (first, q, k, N, weights, lists, outer, held, outs, room)
    for_each(_query, q.shape[0], tiles.shape[0], args)
    for_each(_rows, -(-q.shape[2] // SPAN), tiles.shape[0], (q, held, sums, tiles))


def numba(
    q: Tensor, k: Tensor, weights: Tensor, target: Tensor, indices: Tensor, dloss: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dweights, dtarget; sums over queries are float32, in the order of the queries."""
    (B, S, H, D), N, L = q.shape, k.shape[1], indices.shape[2]
    dq, dtarget = torch.zeros(q.shape, dtype=q.dtype), torch.zeros(target.shape, dtype=target.dtype)
    width, lanes, count = padded(D), max(LANES, padded(H)), B * S if L else 0
    dweights, sums = torch.zeros((B * S, H)), torch.zeros((B * N, width))
    used = threads(3 * count * L * H * D)
    some = max(1, min(count, HELD // max(1, 4 * L * lanes)))
    held = (
        np.empty((some, L, lanes), np.float32),
        np.empty((some, L), np.int64),
        np.empty(some, np.int64),
    )
    room = (
        scratch(used, lanes // LANES, D, LANES),
        np.zeros((used, KEYS, width), np.float32),
        scratch(used, L),
        np.empty((used, L), np.int64),
    )
    factors, outer = weights.float().reshape(B * S, H), dloss.float().reshape(B * S)
    for first in range(0, count, some):
        qs = q.reshape(B * S, H, D)[first : first + some].float()
        dx = torch.zeros(qs.shape[0], lanes, width)
        _run(
            first,
            array(functional.pad(qs, (0, width - D))),
            (flat(k), *k.stride()[:2]),
            N,
            array(factors),
            (array(target), array(whole(indices))),
            array(outer),
            held,
            (array(dx), array(dweights), array(dtarget.view(B * S, L))),
            array(sums),
            room,
            scratch(used, ROWS, SPAN),
        )
        dq.view(B * S, H, D)[first : first + some] = dx[:, :H, :D]
    dk = sums.view(B, N, width)[..., :D].to(k.dtype).contiguous()
    return dq, dk, dweights.view(B, S, H).to(weights.dtype), dtarget
