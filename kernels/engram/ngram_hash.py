"""Row numbers of the n-grams that end at each token: multiply, XOR and floor modulo in 64 bits."""

from __future__ import annotations

from collections.abc import Iterator
from operator import add

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from transom import config
from transom.declare import op
from transom.kernels._extremes import FEW, extremes, few
from transom.ranges import satisfied_by

INT32_MAX = 2**31 - 1


@op(
    "tokens[B,S], multipliers[n], moduli[n-1,h], offsets?[(n-1)*h], lookback?[B,n-1], blocked?[B,S]"
    " -> rows[B,S,(n-1)*h]",
    dtypes="tokens: index; multipliers: i64; moduli: index; offsets: index; lookback: index;"
    " blocked: bool; rows: i32",
    flops="B*S*(2*n + (n-1)*h)",
    batch="B",
    examples=[
        dict(B=2, S=5, n=3, h=2, pad=2),
        dict(B=1, S=4096, n=3, h=8, pad=2),
        dict(B=1, S=4096, n=4, h=8, pad=2),
        dict(B=64, S=1, n=4, h=8, pad=2),
    ],
)
def _ngram_hash(
    tokens: Tensor,
    multipliers: Tensor,
    moduli: Tensor,
    *,
    offsets: Tensor | None = None,
    pad: int,
    lookback: Tensor | None = None,
    blocked: Tensor | None = None,
) -> Tensor:
    """rows[b,s,c] = the hash of the n-gram that ends at token s, for column c; lookback is whole.

    The declared operator behind `transom.ngram_hash`, which documents formula and arguments.
    """
    B, S = tokens.shape
    rows = torch.empty((B, S, moduli.numel()), dtype=torch.int32, device=tokens.device)
    for batch, span, columns in hash_columns(
        tokens, multipliers, moduli, offsets, pad, lookback, blocked
    ):
        rows[batch, span] = columns.to(torch.int32)
    return rows


@_ngram_hash.front
def ngram_hash(
    tokens: Tensor,
    multipliers: Tensor,
    moduli: Tensor,
    *,
    offsets: Tensor | None = None,
    pad: int,
    lookback: Tensor | None = None,
    blocked: Tensor | None = None,
) -> Tensor:
    """rows[b,s,(g-1)*h+j] = (t_0*m[0] XOR ... XOR t_g*m[g]) mod moduli[g-1,j], for g = 1..n-1.

    tokens       ids (after compression, if the model has one); t_g is the token g places before s.
    multipliers  one per place, the current token first; products wrap in two's complement.
    moduli       > 0; the modulo is a floor modulo, so a row is never negative.
    offsets      added to each column: the start of its slice in one flat table.  Row numbers are
                 int32; where offsets + moduli pass 2**31 use `hashed_embedding`, which addresses in
                 64 bits.
    pad          the id hashed where no token is: before the start of the sequence and from a block
                 on.
    lookback     [B, at most n-1], the tokens before this chunk, oldest first; a negative id stands
                 for "before the start" or "blocked".  Fewer than n-1 columns: the sequence starts
                 with them.  Absent: the chunk starts the sequence.
    blocked      True at positions that no n-gram may read (image spans, padding, other sequences).
                 The walk to the left stops there: that token and all earlier ones are hashed as
                 `pad`, also for the n-grams that end at the position itself.  A negative id blocks
                 likewise.

    Returns int32 row numbers, n-gram size major, then head; bit-exact on every device.  Raises
    ValueError for moduli <= 0, negative offsets, rows beyond int32, or a longer lookback.

    *Source:* Engram, arXiv 2601.07372, section 3; blocked positions as DeepSeek-V4.1-Flash has
    them.
    """
    rows: Tensor = _ngram_hash.call(
        tokens,
        multipliers,
        moduli,
        offsets=offsets,
        pad=pad,
        lookback=whole_lookback("ngram_hash", lookback, multipliers),
        blocked=blocked,
    )
    return rows


def whole_lookback(name: str, lookback: Tensor | None, multipliers: Tensor) -> Tensor | None:
    """`lookback` with its n-1 columns: -1, before the start, stands for those that it lacks."""
    if lookback is None or lookback.dim() != 2 or multipliers.dim() != 1:
        return lookback  # nothing to fill, or shapes that the operator refuses
    width = max(0, multipliers.shape[0] - 1)
    missing = width - lookback.shape[1]
    if missing < 0:
        raise ValueError(
            f"{name}: lookback has {lookback.shape[1]} columns; expected at most n-1 = {width};"
            " pass the newest"
        )
    return functional.pad(lookback, (missing, 0), value=-1) if missing else lookback


def hash_columns(
    tokens: Tensor,
    multipliers: Tensor,
    moduli: Tensor,
    offsets: Tensor | None,
    pad: int,
    lookback: Tensor | None,
    blocked: Tensor | None,
    bytes_per_token: int = 0,
) -> Iterator[tuple[slice, slice, Tensor]]:
    """Blocks (batch slice, position slice, int64 row numbers [b,s,(n-1)*h]) that cover the chunk.

    `bytes_per_token` is what the caller allocates itself per token of a block; the blocks are cut
    so that both fit the workspace.
    """
    B, S = tokens.shape
    n, (sizes, heads) = multipliers.shape[0], moduli.shape
    # Per token: n gathered ids, their flags and products, and twice the row numbers, in int64.
    fit = config.workspace_bytes() // (32 * n + 16 * sizes * heads + bytes_per_token)
    length = max(1, min(S, fit))
    height = max(1, min(B, fit // length))
    moduli, multipliers = moduli.to(torch.int64), multipliers.to(torch.int64)
    starts = None if offsets is None else offsets.to(torch.int64)
    for b in range(0, B, height):
        batch = slice(b, min(b + height, B))
        for s in range(0, S, length):
            span = slice(s, min(s + length, S))
            history = _history(tokens, lookback, blocked, n - 1, batch, span)
            width = span.stop - span.start
            columns = torch.empty(
                (history.shape[0], width, sizes * heads), dtype=torch.int64, device=tokens.device
            )
            alive = torch.ones((history.shape[0], width), dtype=torch.bool, device=tokens.device)
            mix = torch.zeros_like(alive, dtype=torch.int64)
            for g in range(n):
                token = history[:, n - 1 - g : n - 1 - g + width]
                alive = alive & (token >= 0)
                mix = mix ^ torch.where(alive, token, pad) * multipliers[g]
                if g > 0:
                    column = columns[:, :, (g - 1) * heads : g * heads]
                    torch.remainder(mix[:, :, None], moduli[g - 1], out=column)
            yield batch, span, columns if starts is None else columns.add_(starts)


def _history(
    tokens: Tensor,
    lookback: Tensor | None,
    blocked: Tensor | None,
    before: int,
    batch: slice,
    span: slice,
) -> Tensor:
    """int64 ids of positions span.start - before .. span.stop; -1 where no token may be read."""
    first = max(0, span.start - before)
    ids = tokens[batch, first : span.stop].to(torch.int64)
    if blocked is not None:
        ids = torch.where(blocked[batch, first : span.stop], -1, ids)
    missing = before - (span.start - first)
    if missing == 0:
        return ids
    if lookback is None:
        older = ids.new_full((ids.shape[0], missing), -1)
    else:
        older = lookback[batch, before - missing :].to(torch.int64)
    return torch.cat((older, ids), dim=1)


def hash_reference(tokens, multipliers, moduli, offsets, pad, lookback, blocked):
    """Row numbers [B,S,(n-1)*h], one token at a time with integers that do not overflow."""
    B, S = tokens.shape
    n, h = multipliers.shape[0], moduli.shape[1]
    factors, sizes = multipliers.tolist(), moduli.tolist()
    rows = np.zeros((B, S, (n - 1) * h), dtype=np.int64)
    if lookback is None:
        lookback = np.full((B, n - 1), -1)
    for b in range(B):
        stream = [int(t) for t in lookback[b]] + [int(t) for t in tokens[b]]
        if blocked is not None:
            stream[n - 1 :] = [-1 if dead else t for t, dead in zip(stream[n - 1 :], blocked[b])]
        for s in range(S):
            mix, dead = 0, False
            for g in range(n):
                token = stream[n - 1 + s - g]
                dead = dead or token < 0
                # Python integers never overflow: the wrap to 64 bits is written out.
                product = (pad if dead else token) * factors[g] % 2**64
                mix ^= product
                signed = mix - 2**64 if mix >= 2**63 else mix
                if g > 0:
                    rows[b, s, (g - 1) * h : g * h] = [signed % size for size in sizes[g - 1]]
    return rows if offsets is None else rows + offsets


ngram_hash.reference(hash_reference)


def hash_rules(n: int, pad: int) -> str | None:
    """The rules on the arguments of a hash, shared by the operators that hash."""
    if n < 2:
        return f"multipliers has n = {n}; must be >= 2, one for each place of the largest n-gram"
    if not 0 <= pad <= INT32_MAX:
        return f"pad is {pad}; must be a token id in 0..{INT32_MAX}"
    return None


def modulus_rules(moduli: Tensor, offsets: Tensor | None) -> str | None:
    """The rules on the values of moduli and offsets, shared by the operators that hash."""
    if moduli.numel() and (smallest := extremes(moduli)[0]) <= 0:
        return f"moduli has {smallest}; every entry must be > 0"
    if offsets is not None and offsets.numel() and (smallest := extremes(offsets)[0]) < 0:
        return f"offsets has {smallest}; every entry must be >= 0"
    return None


def last_row(moduli: Tensor, offsets: Tensor | None) -> int:
    """The largest row number that a hash can give; -1 where there are no columns."""
    if not moduli.numel():
        return -1
    if offsets is None:
        return extremes(moduli)[1] - 1
    if moduli.numel() <= FEW:
        return max(map(add, few(moduli), few(offsets))) - 1
    # Both are known to be positive: a sum that passes 63 bits does not pass 64.
    ends = moduli.numpy().reshape(-1).astype(np.uint64) + offsets.numpy().astype(np.uint64)
    return int(ends.max()) - 1


@_ngram_hash.check
def _(n, pad):
    return hash_rules(n, pad)


@_ngram_hash.check_values
@satisfied_by("1 <= moduli; 0 <= offsets; 1 <= moduli + offsets <= 2**31")
def _(moduli, offsets):
    if (text := modulus_rules(moduli, offsets)) is not None:
        return text
    if (last := last_row(moduli, offsets)) > INT32_MAX:
        return (
            f"offsets + moduli give rows up to {last}; row numbers are int32;"
            " use hashed_embedding, which addresses in 64 bits"
        )
    return None


def sample_hash(rng: np.random.Generator, dims: dict) -> dict:
    """Tokens, multipliers, distinct odd moduli with offsets, blocks, and a lookback with blocks."""
    B, S, n, h = dims["B"], dims["S"], dims["n"], dims["h"]
    columns = (n - 1) * h
    moduli = 11 + 2 * rng.permutation(columns + 5)[:columns].astype(np.int64)
    offsets = np.cumsum(moduli) - moduli
    lookback = rng.integers(-1, 1000, (B, n - 1))
    return {
        "tokens": rng.integers(0, 1000, (B, S)),
        "multipliers": 2 * rng.integers(0, 2**62, n) + 1,
        "moduli": moduli.reshape(n - 1, h),
        "offsets": offsets,
        "lookback": lookback,
        "blocked": rng.random((B, S)) < 0.2,
    }


@_ngram_hash.sample
def _(rng, dims):
    return sample_hash(rng, dims)
