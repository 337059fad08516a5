"""Gradients of a table: n-grams sorted by row, then each row's gradients added in token order."""

from __future__ import annotations

import torch
from torch import Tensor

from .._arrays import array, flat, scratch
from .._compile import kernel, part
from .._numbers import narrow, wide
from .._pool import for_each, threads
from ._hash import hash_all, hash_arguments
from ._lookup import ask_for

ROWS = 32
"""Of a task."""
AHEAD = 8
"""Rows of dy asked for before they are added."""


@part
def _place(strides, item):
    """Where the row of an n-gram begins."""
    of_batch, of_token, of_column, S, columns = strides
    t, c = item // columns, item % columns
    return t // S * of_batch + t % S * of_token + c * of_column


@part
def _task(task, thread, dy, strides, order, starts, places, out, room):
    total = room[thread]
    d = total.shape[0]
    for i in range(task * ROWS, min((task + 1) * ROWS, places.shape[0])):
        total[:] = 0.0
        for j in range(starts[i], starts[i + 1]):
            if j + AHEAD < order.shape[0]:
                ask_for(dy, _place(strides, order[j + AHEAD]), d)
            at = _place(strides, order[j])
            row = dy[at : at + d]
            for k in range(d):
                total[k] += wide(row[k])
        into = out[places[i]]
        for k in range(d):
            into[k] = narrow(total[k], into)


@kernel
def _run(dy, strides, order, starts, places, out, room):
    """out[places[i]] = the sum of the rows order[starts[i]] .. order[starts[i + 1]] of dy."""
    args = (dy, strides, order, starts, places, out, room)
    for_each(_task, -(-places.shape[0] // ROWS), room.shape[0], args)


def sorted_rows(
    tokens: Tensor,
    multipliers: Tensor,
    moduli: Tensor,
    offsets: Tensor,
    pad: int,
    rows: int,
    lookback: Tensor | None,
    blocked: Tensor | None,
    shard: tuple[int, ...],
) -> tuple[Tensor, Tensor, Tensor]:
    """(order, starts, ids): n-grams order[starts[i]] .. order[starts[i + 1]] read row ids[i]."""
    given = hash_arguments(tokens, multipliers, moduli, offsets, pad, lookback, blocked)
    read = torch.empty((*tokens.shape, moduli.numel()), dtype=torch.int64)
    hash_all(given, array(read), threads(8 * read.numel()))
    local = read.flatten() - (shard[0] if shard else 0)
    local = torch.where((local >= 0) & (local < rows), local, rows)
    found, order = torch.sort(local, stable=True)
    ids, counts = torch.unique_consecutive(found, return_counts=True)
    used = int((ids < rows).sum())
    starts = torch.zeros(used + 1, dtype=torch.int64)
    torch.cumsum(counts[:used], 0, out=starts[1:])
    return order, starts, ids[:used]


def add_rows(dy: Tensor, order: Tensor, starts: Tensor, places: Tensor, out: Tensor) -> None:
    """out[places[i]] = the sum of the rows order[starts[i]] .. order[starts[i + 1]] of dy."""
    if dy.numel() and places.numel():
        strides = (*dy.stride()[:3], *dy.shape[1:3])
        room = scratch(threads(dy.numel()), dy.shape[3])
        _run(flat(dy), strides, array(order), array(starts), array(places), array(out), room)
