"""Engram lookup with the rows of a token added up, as an embedding bag does."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from transom.declare import op
from transom.dtypes import accumulator
from transom.op import Weight
from transom.weights import gather_rows

from .hashed_embedding import (
    EXAMPLES,
    HASHED,
    HASHED_DTYPES,
    hashed_embedding_backward,
    lookup_rules,
    row_rules,
    sample_lookup,
    shard_of,
)
from .ngram_hash import hash_columns, hash_reference, whole_lookback


@op(
    f"tokens[B,S], table[V,d], {HASHED} -> y[B,S,d]",
    dtypes=f"{HASHED_DTYPES}; table: float | quant; y: table",
    flops="B*S*(2*n + (n-1)*h*(1+d))",
    bytes="B*S*((n-1)*h*d*size.table + d*size.table + size.tokens)",
    accumulate="(n-1)*h",
    batch="B",
    host="table",
    examples=EXAMPLES,
)
def _hashed_embedding_pooled(
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
    """y[b,s] = sum (or mean) of table[row(b,s,c)] over c; see `transom.hashed_embedding_pooled`."""
    (B, S), (count, d), columns = tokens.shape, table.shape, moduli.numel()
    plain = isinstance(table, Tensor)
    dtype = table.dtype if plain else torch.float32
    wide, first = accumulator(dtype), shard[0] if shard else 0
    if count == 0:
        return torch.zeros((B, S, d), dtype=dtype, device=table.device)
    y = torch.empty((B, S, d), dtype=dtype, device=table.device)
    # Per token: one column's rows (decoded once more if quantised) and the sum.
    bytes_per_token = d * 4 * wide.itemsize + 17 * columns
    for batch, span, rows in hash_columns(
        tokens, multipliers, moduli, offsets, pad, lookback, blocked, bytes_per_token
    ):
        local = rows - first
        inside = (local >= 0) & (local < count)
        local.clamp_(0, count - 1)
        total = torch.zeros((*rows.shape[:2], d), dtype=wide, device=table.device)
        for c in range(columns):
            values = gather_rows(table, local[:, :, c].flatten(), wide).view(total.shape)
            total += torch.where(inside[:, :, c, None], values, 0)
        y[batch, span] = (total / columns if mean else total).to(dtype)
    return y


@_hashed_embedding_pooled.front
def hashed_embedding_pooled(
    tokens: Tensor,
    table: Weight,
    *,
    multipliers: Tensor,
    moduli: Tensor,
    offsets: Tensor,
    pad: int,
    lookback: Tensor | None = None,
    blocked: Tensor | None = None,
    shard: tuple[int, int] | None = None,
    mean: bool = False,
) -> Tensor:
    """y[b,s] = sum over columns c of table[row(b,s,c)], rows as `ngram_hash` gives them.

    What `hashed_embedding` puts side by side is added up: the output, and what must be written, is
    (n-1)*h times smaller.

    tokens, multipliers, moduli, offsets, pad, lookback, blocked
             as for `hashed_embedding`.
    table    [rows,d], float, or a QuantizedWeight whose rows are decoded as they are read; may lie
             in pinned host memory, as for `hashed_embedding`.
    shard    (first row, row count): `table` holds only these rows of the whole table; others count
             as zeros, so that the results of all shards add up to the lookup in the whole table.
    mean     True: the sum is divided by the number of columns (n-1)*h, also in a shard.

    Returns [B,S,d], new memory; dtype of `table`, float32 for a QuantizedWeight.  Sums run in
    column order in float32 (float64 for float64) and are rounded once.  Raises ValueError as
    `hashed_embedding` does.

    *Source:* Engram, arXiv 2601.07372, section 3, with the pooling of torch.nn.EmbeddingBag.
    """
    y: Tensor = _hashed_embedding_pooled.call(
        tokens,
        table,
        multipliers=multipliers,
        moduli=moduli,
        offsets=offsets,
        pad=pad,
        lookback=whole_lookback("hashed_embedding_pooled", lookback, multipliers),
        blocked=blocked,
        shard=shard_of("hashed_embedding_pooled", shard, table),
        mean=mean,
    )
    return y


@_hashed_embedding_pooled.gradient(save="tokens table multipliers moduli offsets lookback blocked")
def _(saved, dy):
    if not saved.needs("table"):
        return {}
    columns = saved.moduli.numel()
    # Every column has the token's gradient; expanded, so that it exists once.
    each = dy / columns if saved.mean and columns else dy
    dtable = hashed_embedding_backward(
        each[:, :, None].expand(-1, -1, columns, -1),
        saved.tokens,
        multipliers=saved.multipliers,
        moduli=saved.moduli,
        offsets=saved.offsets,
        pad=saved.pad,
        rows=saved.table.shape[0],
        lookback=saved.lookback,
        blocked=saved.blocked,
        shard=saved.shard,
    )
    return {"table": dtable}


@_hashed_embedding_pooled.reference
def _(tokens, table, multipliers, moduli, offsets, pad, lookback, blocked, shard, mean):
    rows = hash_reference(tokens, multipliers, moduli, offsets, pad, lookback, blocked)
    local = rows - (shard[0] if shard else 0)
    inside = (local >= 0) & (local < len(table))
    y = np.zeros((*rows.shape, table.shape[1]))
    y[inside] = table[local[inside]]
    return y.sum(2) / (max(1, rows.shape[2]) if mean else 1)


hashed_embedding_pooled.check(lookup_rules)
hashed_embedding_pooled.check_values(row_rules)


@_hashed_embedding_pooled.sample
def _(rng, dims):
    return {**sample_lookup(rng, dims), "mean": bool(rng.random() < 0.5)}
