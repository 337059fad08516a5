"""lightning_indexer: scores of some queries and keys at a time, and the best of them so far."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from transom.kernels.attention.lightning_indexer import (
    lightning_indexer,
    lightning_indexer_kl,
    lightning_indexer_kl_backward,
)
from transom.requires import at_most, last_dim_contiguous

from .._arrays import array, flat, floats, given, scratch
from .._compile import kernel, part
from .._pool import for_each, threads
from .._product import LANES
from ._lightning_indexer_kl import numba as divergence
from ._lightning_indexer_kl_backward import numba as divergence_backward
from ._scores import score_of
from ._tiles import KEYS, copy_row, meet, pack, padded, whole

QUERIES, TOGETHER = 64, 8
"""Queries whose scores are held, and those that meet a tile of keys in one task."""
HELD, SPAN = 1 << 14, 512
"""Keys whose scores are held for each query, and those of a task."""
_LOWEST = np.float32(-math.inf)


@part
def _pack(task, thread, first, q, packed):
    heads = q.shape[1]
    pack(q, np.float32(1), first + task, 0, heads, 0, heads, packed[task])


@part
def _score(task, thread, first, some, q_shape, start, k, weights, visible, packed, scores, room):
    """Scores of some queries and SPAN keys, from key `start` + its place on."""
    (S, N), spans = q_shape, -(-scores.shape[1] // SPAN)
    (keys, of_batch, of_row), (tiles, dots) = k, room
    tile, dot = tiles[thread], dots[thread]
    group, at = task // spans * TOGETHER, task % spans * SPAN
    for place in range(at, min(at + SPAN, N - start), KEYS):
        held, batch = 0, np.int64(-1)
        for i in range(group, min(group + TOGETHER, some)):
            b, s = (first + i) // S, (first + i) % S
            seen = min(np.int64(visible[b, s]), N) - start - place
            if seen <= 0:
                continue
            if b != batch:
                batch, held = b, min(KEYS, N - start - place)
                for j in range(held):
                    row = (start + place + j) * of_row
                    copy_row(keys, b * of_batch + row, tile[j])
            count = min(held, seen)
            meet(packed[i], tile, count, dot)
            factors = weights[first + i]
            for j in range(count):
                scores[i, place + j] = score_of(dot[j], factors)


@part
def _nth_largest(x, n):
    """The n-th largest of x, n from 1 on; x is reordered."""
    low, high, want = 0, x.shape[0], n - 1
    while True:
        a, b, c = x[low], x[(low + high) // 2], x[high - 1]
        pivot = max(min(a, b), min(max(a, b), c))
        above, i, below = low, low, high
        while i < below:  # above the pivot, equal to it, below it
            value = x[i]
            if value > pivot:
                x[i], x[above] = x[above], value
                above += 1
                i += 1
            elif value < pivot:
                below -= 1
                x[i], x[below] = x[below], value
            else:
                i += 1
        if want < above:
            high = above
        elif want < below:
            return pivot
        else:
            low = below


@part
def _keep(score, index, held, top_k, order):
    """Keep the top_k best of `held` candidates, in their order; returns the lowest of them."""
    for i in range(held):
        order[i] = score[i]
    last = _nth_largest(order[:held], top_k)
    level = top_k
    for i in range(held):
        level -= 1 if score[i] > last else 0
    kept = 0
    for i in range(held):
        if score[i] < last:
            continue
        if score[i] == last:
            if level == 0:
                continue
            level -= 1
        score[kept], index[kept] = score[i], index[i]
        kept += 1
    return last


@part
def _select(task, thread, first, S, start, visible, scores, best, index, held, orders):
    """Take the scores of one query among its candidates. Once there were enough of them only a
    higher score than the lowest kept can enter: of equal ones the lower index stays."""
    top_k = best.shape[1] // 2
    query, row = first + task, scores[task]
    kept, names, order = best[task], index[task], orders[thread]
    seen = min(np.int64(visible[query // S, query % S]) - start, row.shape[0])
    if start == 0:
        held[task, 0], held[task, 1] = 0, 0
    count, full = held[task, 0], held[task, 1] == 1
    last = _LOWEST
    if full:
        last = kept[0]
        for i in range(1, count):
            last = min(last, kept[i])
    for j in range(seen):
        x = row[j]
        if x > last or (x == _LOWEST and not full):
            kept[count], names[count] = x, start + j
            count += 1
            if count == 2 * top_k:
                last = _keep(kept, names, count, top_k, order)
                count, full = top_k, True
    if count > top_k:
        _keep(kept, names, count, top_k, order)
        count, full = top_k, True
    held[task, 0], held[task, 1] = count, 1 if full else 0


@part
def _write(task, thread, first, index, held, out):
    row = out[first + task]
    row[:] = np.int32(-1)
    row[: held[task, 0]] = index[task, : held[task, 0]]


@kernel
def _run(q, shape, k, weights, visible, out, packed, scores, best, index, held, room, orders):
    S, N = shape
    threads = orders.shape[0]
    for first in range(0, q.shape[0], QUERIES):
        some = min(QUERIES, q.shape[0] - first)
        for_each(_pack, some, threads, (first, q, packed))
        for start in range(0, max(1, N), HELD):
            spans = -(-scores.shape[1] // SPAN)
            args = (first, some, shape, start, k, weights, visible, packed, scores, room)
            for_each(_score, -(-some // TOGETHER) * spans, threads, args)
            args = (first, S, start, visible, scores, best, index, held, orders)
            for_each(_select, some, threads, args)
        for_each(_write, some, threads, (first, index, held, out))


REQUIRED = (*floats("q"), last_dim_contiguous("k"), at_most("N", 2**31 - 1))


@lightning_indexer.impl(requires=REQUIRED)
def numba(q: Tensor, k: Tensor, weights: Tensor, top_k: int, *, visible: Tensor) -> Tensor:
    """The top_k keys j < visible[b,s] by sum_h weights[b,s,h] * relu(q[b,s,h] . k[b,j])."""
    (B, S, H, D), N = q.shape, k.shape[1]
    indices = torch.empty((B, S, top_k), dtype=torch.int32)
    if not indices.numel():
        return indices
    some, used, most = min(QUERIES, B * S), threads(B * S * N * H), min(top_k, max(1, N))
    lanes, span = padded(H), min(HELD, max(1, N))
    _run(
        array(q.reshape(B * S, H, D)),
        (S, N),
        (flat(k), *k.stride()[:2]),
        array(weights.float().reshape(B * S, H)),
        given(whole(visible.clamp(0, N)), 2, torch.int32),
        array(indices.view(B * S, top_k)),
        scratch(some, lanes // LANES, D, LANES),
        np.empty((some, span), np.float32),
        np.empty((some, 2 * most), np.float32),
        np.empty((some, 2 * most), np.int32),
        np.empty((some, 2), np.int64),
        (scratch(used, KEYS, D), scratch(used, KEYS, lanes)),
        scratch(used, 2 * most),
    )
    return indices


lightning_indexer_kl.impl(requires=REQUIRED)(divergence)
lightning_indexer_kl_backward.impl(requires=REQUIRED)(divergence_backward)
