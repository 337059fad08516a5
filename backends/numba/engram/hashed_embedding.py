"""hashed_embedding: hash and copy in one pass; no row numbers in memory."""

from __future__ import annotations

import torch
from torch import Tensor

from transom.kernels.engram.hashed_embedding import hashed_embedding, hashed_embedding_out
from transom.op import Weight
from transom.requires import device, last_dim_contiguous

from .._quant import stored_contiguously
from ._lookup import lookup_into, same_or_narrow

TABLE = (device("cpu"), last_dim_contiguous("table"), stored_contiguously("table"))


@hashed_embedding.impl(requires=TABLE)
def numba(
    tokens: Tensor, table: Weight, *, multipliers: Tensor, moduli: Tensor, offsets: Tensor,
    pad: int, lookback: Tensor | None = None, blocked: Tensor | None = None,
    shard: tuple[int, ...] = (),
) -> Tensor:  # fmt: skip
    """y[b,s] = concatenation of table[row(b,s,c)] over c."""
    dtype = table.dtype if isinstance(table, Tensor) else torch.float32
    y = torch.empty((*tokens.shape, moduli.numel() * table.shape[1]), dtype=dtype)
    lookup_into(y, tokens, table, multipliers, moduli, offsets, pad, lookback, blocked, shard)
    return y


def _numba_out(
    tokens: Tensor, table: Weight, out: Tensor, *, multipliers: Tensor, moduli: Tensor,
    offsets: Tensor, pad: int, lookback: Tensor | None = None, blocked: Tensor | None = None,
    shard: tuple[int, ...] = (),
) -> None:  # fmt: skip
    """out[b,s] = concatenation of table[row(b,s,c)] over c."""
    y = out if out.is_contiguous() else torch.empty(out.shape, dtype=out.dtype)
    lookup_into(y, tokens, table, multipliers, moduli, offsets, pad, lookback, blocked, shard)
    if y is not out:
        out.copy_(y)


_numba_out.__name__ = "numba"
hashed_embedding_out.impl(requires=(*TABLE, same_or_narrow("table", "out")))(_numba_out)
