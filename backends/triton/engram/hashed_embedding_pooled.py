"""hashed_embedding_pooled: rows are added up as they are read, none is written."""

from __future__ import annotations

import torch
from torch import Tensor

from transom.kernels.engram.hashed_embedding_pooled import hashed_embedding_pooled
from transom.op import Weight

from .._offer import offer
from ._lookup import look_up, tables


@offer(hashed_embedding_pooled, *tables())
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
    mean: bool = False,
) -> Tensor:
    """y[b,s] = sum (or mean) of table[row(b,s,c)] over c."""
    kind = table.dtype if isinstance(table, Tensor) else torch.float32
    y = torch.empty((*tokens.shape, table.shape[1]), dtype=kind, device=tokens.device)
    look_up(
        y,
        tokens,
        table,
        multipliers,
        moduli,
        offsets,
        pad,
        lookback,
        blocked,
        shard,
        moduli.numel() if mean and moduli.numel() else 1,
    )
    return y
