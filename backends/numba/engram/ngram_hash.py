"""ngram_hash: a token's products are made once for all n-gram sizes, a division is a product."""

from __future__ import annotations

import torch
from torch import Tensor

from transom.kernels.engram.ngram_hash import ngram_hash
from transom.requires import device

from .._arrays import array
from .._pool import threads
from ._hash import hash_all, hash_arguments


@ngram_hash.impl(requires=(device("cpu"),))
def numba(
    tokens: Tensor,
    multipliers: Tensor,
    moduli: Tensor,
    *,
    offsets: Tensor | None = None,
    pad: int,
    lookback: Tensor | None = None,
    blocked: Tensor | None = None,
) -> Tensor:
    """rows[b,s,c] = the hash of the n-gram that ends at token s, for column c."""
    given = hash_arguments(tokens, multipliers, moduli, offsets, pad, lookback, blocked)
    rows = torch.empty((*tokens.shape, moduli.numel()), dtype=torch.int32)
    # A hash takes 3.4 ns (Xeon, 2026-11), as three or four elements of torch's do.
    hash_all(given, array(rows), threads(3 * rows.numel()))
    return rows
