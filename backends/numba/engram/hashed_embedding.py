"""hashed_embedding: hash and copy in one pass; no row numbers in memory."""

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
from transom.requires import device, last_dim_contiguous

from .._arrays import floats
from .._quant import stored_contiguously
from ._lookup import lookup_into, same_or_narrow
from ._row_sums import add_rows, sorted_rows

TABLE = (device("cpu"), last_dim_contiguous("table"), stored_contiguously("table"))


@hashed_embedding.impl(requires=TABLE)
def numba(
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
    dtype = table.dtype if isinstance(table, Tensor) else torch.float32
    y = torch.empty((*tokens.shape, moduli.numel() * table.shape[1]), dtype=dtype)
    lookup_into(y, tokens, table, multipliers, moduli, offsets, pad, lookback, blocked, shard)
    return y


def _numba_out(
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
    y = out if out.is_contiguous() else torch.empty(out.shape, dtype=out.dtype)
    lookup_into(y, tokens, table, multipliers, moduli, offsets, pad, lookback, blocked, shard)
    if y is not out:
        out.copy_(y)


_numba_out.__name__ = "numba"
hashed_embedding_out.impl(requires=(*TABLE, same_or_narrow("table", "out")))(_numba_out)


GRADIENT = (*floats("dy"), last_dim_contiguous("dy"))


def _numba_backward(
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
    """dtable[r] = sum of dy[b,s,c] over all (b,s,c) that read row r; zero for rows not read."""
    order, starts, ids = sorted_rows(
        tokens, multipliers, moduli, offsets, pad, rows, lookback, blocked, shard
    )
    dtable = torch.zeros((rows, dy.shape[3]), dtype=dy.dtype)
    add_rows(dy, order, starts, ids, dtable)
    return dtable


def _numba_row_gradient(
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
    """(ids, gradients): the rows that were read, ascending, and gradients[i] = dtable[ids[i]]."""
    order, starts, found = sorted_rows(
        tokens, multipliers, moduli, offsets, pad, rows, lookback, blocked, shard
    )
    used = found.numel()
    ids = torch.full((order.numel(),), -1, dtype=torch.int64)
    ids[:used] = found
    gradients = torch.empty((order.numel(), dy.shape[3]), dtype=dy.dtype)
    gradients[used:] = 0
    add_rows(dy, order, starts, torch.arange(used), gradients)
    return ids, gradients


_numba_backward.__name__ = _numba_row_gradient.__name__ = "numba"
hashed_embedding_backward.impl(requires=GRADIENT)(_numba_backward)
hashed_embedding_backward_rows.impl(requires=GRADIENT)(_numba_row_gradient)
