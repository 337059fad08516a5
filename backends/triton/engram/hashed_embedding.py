"""hashed_embedding: hashed and copied in one launch; its gradient sorted by row and summed."""

from __future__ import annotations

import torch
from torch import Tensor

from transom.kernels.engram.hashed_embedding import (
    hashed_embedding,
    hashed_embedding_backward,
    hashed_embedding_backward_rows,
    hashed_embedding_out,
)
from transom.op import Weight
from transom.requires import dtype

from .._offer import floats, offer, usable
from .._segments import by_target, sum_rows
from ._lookup import look_up, tables
from .ngram_hash import hash_into


@offer(hashed_embedding, *tables())
def forward(
    tokens: Tensor,
    table: Weight,
    *,
    multipliers: Tensor,
    moduli: Tensor,
    offsets: Tensor,
    pad: int,
    lookback: Tensor | None = None,
    blocked: Tensor | None = None,
    shard: tuple[int, ...] = (),
) -> Tensor:
    """y[b,s] = concatenation of table[row(b,s,c)] over c."""
    kind = table.dtype if isinstance(table, Tensor) else torch.float32
    shape = (*tokens.shape, moduli.numel() * table.shape[1])
    y = torch.empty(shape, dtype=kind, device=tokens.device)
    look_up(y, tokens, table, multipliers, moduli, offsets, pad, lookback, blocked, shard)
    return y


@offer(hashed_embedding_out, *tables(), dtype("out", *usable()))
def _out(
    tokens: Tensor,
    table: Weight,
    out: Tensor,
    *,
    multipliers: Tensor,
    moduli: Tensor,
    offsets: Tensor,
    pad: int,
    lookback: Tensor | None = None,
    blocked: Tensor | None = None,
    shard: tuple[int, ...] = (),
) -> None:
    """out[b,s] = concatenation of table[row(b,s,c)] over c."""
    y = out if out.is_contiguous() else torch.empty_like(out, memory_format=torch.contiguous_format)
    look_up(y, tokens, table, multipliers, moduli, offsets, pad, lookback, blocked, shard)
    if y is not out:
        out.copy_(y)


def _read(
    tokens: Tensor,
    multipliers: Tensor,
    moduli: Tensor,
    offsets: Tensor,
    pad: int,
    rows: int,
    lookback: Tensor | None,
    blocked: Tensor | None,
    shard: tuple[int, ...],
) -> Tensor:
    """The table row of each (b,s,c), flat, int64; `rows` where it lies outside the table."""
    ids = torch.empty((*tokens.shape, moduli.numel()), dtype=torch.int64, device=tokens.device)
    first = shard[0] if shard else 0
    hash_into(ids, tokens, multipliers, moduli, offsets, pad, lookback, blocked, first, rows)
    return ids.flatten()


@offer(hashed_embedding_backward, *floats("dy"))
def _backward(
    dy: Tensor,
    tokens: Tensor,
    *,
    multipliers: Tensor,
    moduli: Tensor,
    offsets: Tensor,
    pad: int,
    rows: int,
    lookback: Tensor | None = None,
    blocked: Tensor | None = None,
    shard: tuple[int, ...] = (),
) -> Tensor:
    """dtable[r] = sum of dy[b,s,c] over all (b,s,c) that read row r."""
    ids = _read(tokens, multipliers, moduli, offsets, pad, rows, lookback, blocked, shard)
    dtable = dy.new_empty((rows, dy.shape[-1]))
    sum_rows(dy.flatten(0, 1), *by_target(ids, rows), dtable)
    return dtable


@offer(hashed_embedding_backward_rows, *floats("dy"))
def _row_gradient(
    dy: Tensor,
    tokens: Tensor,
    *,
    multipliers: Tensor,
    moduli: Tensor,
    offsets: Tensor,
    pad: int,
    rows: int,
    lookback: Tensor | None = None,
    blocked: Tensor | None = None,
    shard: tuple[int, ...] = (),
) -> tuple[Tensor, Tensor]:
    """(ids, gradients): the rows that were read, ascending, and their gradients; -1 and 0 behind
    them."""
    ids = _read(tokens, multipliers, moduli, offsets, pad, rows, lookback, blocked, shard)
    gradients = dy.new_empty((ids.shape[0], dy.shape[-1]))
    if not ids.numel():
        return ids, gradients
    ascending, order = torch.sort(ids, stable=True)
    # Each row's place among those that were read: where a number differs from the one before.
    place = (ascending.diff(prepend=ascending[:1]) != 0).cumsum(0)
    place = torch.where(ascending < rows, place, ids.shape[0])
    starts = torch.searchsorted(place, torch.arange(ids.shape[0] + 1, device=ids.device))
    used = starts[:-1] < starts[1:]
    packed = torch.where(used, ascending[starts[:-1].clamp(max=ids.shape[0] - 1)], -1)
    sum_rows(dy.flatten(0, 1), order, starts, gradients)
    return packed, gradients
