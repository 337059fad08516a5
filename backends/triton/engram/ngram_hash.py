"""ngram_hash: a tile of tokens and one n-gram size at a time."""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor
from triton import cdiv, jit

from transom.kernels.engram.ngram_hash import ngram_hash

from .._launch import launch, programs, tile_for
from .._offer import offer
from ._hash import floor_modulo, hash_arguments, mixed


@jit
def _hash(
    tokens,
    lookback,
    blocked,
    multipliers,
    pad,
    moduli,
    offsets,
    rows,
    T,
    S,
    n,
    h,
    first,
    count,
    BH: tl.constexpr,
    BT: tl.constexpr,
):
    # rows[t,c], less `first`; where that is not in 0..count-1, count (count < 0: whatever it is).
    # Integer arithmetic on a few numbers a token.
    sizes = n - 1
    for number in range(tl.program_id(0), tl.cdiv(T, BT) * sizes, tl.num_programs(0)):
        g = number % sizes
        t = number // sizes * BT + tl.arange(0, BT)
        inside = t < T
        mix = mixed(tokens, lookback, blocked, multipliers, pad, tl.minimum(t, T - 1), S, n, g + 1)
        head = tl.arange(0, BH)
        column = g * h + tl.minimum(head, h - 1)
        row = floor_modulo(mix[:, None], tl.load(moduli + column).to(tl.int64)[None, :])
        if offsets is not None:
            row += tl.load(offsets + column).to(tl.int64)[None, :]
        row -= first
        if count >= 0:
            row = tl.where((row >= 0) & (row < count), row, count)
        at = rows + t.to(tl.int64)[:, None] * (sizes * h) + column[None, :]
        tl.store(at, row.to(rows.dtype.element_ty), mask=inside[:, None] & (head < h)[None, :])


def hash_into(
    rows: Tensor,
    tokens: Tensor,
    multipliers: Tensor,
    moduli: Tensor,
    offsets: Tensor | None,
    pad: int,
    lookback: Tensor | None,
    blocked: Tensor | None,
    first: int = 0,
    count: int = -1,
) -> None:
    """rows[B,S,(n-1)*h] = the row numbers less `first`; with count >= 0, count for those that are
    not in 0..count-1."""
    if not rows.numel():
        return
    (T, S), (sizes, h) = (tokens.numel(), tokens.shape[1]), moduli.shape
    tile = tile_for("ngram_hash.rows", rows)
    launch(
        _hash,
        programs(rows, cdiv(T, tile["BT"]) * sizes, tile),
        *hash_arguments(tokens, lookback, blocked, multipliers, pad),
        moduli.contiguous(),
        None if offsets is None else offsets.contiguous(),
        rows,
        T,
        S,
        sizes + 1,
        h,
        first,
        count,
        tile=tile,
        entry="ngram_hash.rows",
        BH=1 << (h - 1).bit_length(),
    )


@offer(ngram_hash)
def forward(
    tokens: Tensor,
    multipliers: Tensor,
    moduli: Tensor,
    *,
    offsets: Tensor | None = None,
    pad: int,
    lookback: Tensor | None = None,
    blocked: Tensor | None = None,
) -> Tensor:
    """The hashes of the n-grams that end at each token."""
    rows = torch.empty((*tokens.shape, moduli.numel()), dtype=torch.int32, device=tokens.device)
    hash_into(rows, tokens, multipliers, moduli, offsets, pad, lookback, blocked)
    return rows
