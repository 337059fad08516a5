"""Engram lookup: the n-grams that end at a token choose rows of one flat table."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from transom import config
from transom.declare import op
from transom.errors import shown
from transom.kernels import _bounds as bounds
from transom.kernels._ordered_sum import add_rows
from transom.op import Weight
from transom.ranges import satisfied_by
from transom.weights import gather_rows

from .ngram_hash import (
    hash_columns,
    hash_reference,
    hash_rules,
    last_row,
    modulus_rules,
    sample_hash,
    whole_lookback,
)

HASHED = "multipliers[n], moduli[n-1,h], offsets[(n-1)*h], lookback?[B,n-1], blocked?[B,S]"
HASHED_DTYPES = (
    "tokens: index; multipliers: i64; moduli: index; offsets: index; lookback: index; blocked: bool"
)
EXAMPLES = [
    dict(B=2, S=5, n=3, h=2, V=200, d=4, pad=2),
    dict(B=1, S=4096, n=3, h=8, V=2**20, d=64, pad=2),
    dict(B=1, S=4096, n=4, h=8, V=2**20, d=256, pad=2),
    dict(B=64, S=1, n=4, h=8, V=2**20, d=256, pad=2),
]


@op(
    f"tokens[B,S], table[V,d], {HASHED} -> y[B,S,(n-1)*h*d]",
    dtypes=f"{HASHED_DTYPES}; table: float | quant; y: table",
    flops="B*S*(2*n + (n-1)*h)",
    bytes="B*S*(n-1)*h*d*size.table*2 + B*S*size.tokens",
    batch="B",
    host="table",
    examples=EXAMPLES,
)
def _hashed_embedding(
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
    """y[b,s] = concatenation of table[row(b,s,c)] over c; see `transom.hashed_embedding`."""
    B, S = tokens.shape
    width = moduli.numel() * table.shape[1]
    dtype = table.dtype if isinstance(table, Tensor) else torch.float32
    y = torch.empty((B, S, width), dtype=dtype, device=table.device)
    _gather_into(y, tokens, table, multipliers, moduli, offsets, pad, lookback, blocked, shard)
    return y


@_hashed_embedding.front
def hashed_embedding(
    tokens: Tensor,
    table: Weight,
    *,
    multipliers: Tensor,
    moduli: Tensor,
    offsets: Tensor,
    pad: int,
    lookback: Tensor | None = None,
    blocked: Tensor | None = None,
    out: Tensor | None = None,
    shard: tuple[int, int] | None = None,
    sparse_gradient: bool = False,
) -> Tensor:
    """y[b,s] = concatenation over columns c of table[row(b,s,c)], rows as `ngram_hash` gives them.

    tokens, multipliers, moduli, pad, lookback, blocked
                 as for `ngram_hash`; row numbers are formed in 64 bits and may pass 2**31.
    table        [rows,d], float, or a QuantizedWeight whose rows are decoded after the gather. With
                 the other tensors on a CUDA device it may lie in pinned host memory: the kernel
                 reads its rows there, over the bus (inference only; no other implementation takes
                 such a call, nothing is copied).
    offsets      [(n-1)*h], the first row of each column's slice: offsets + moduli <= rows.
    out          [B,S,(n-1)*h*d], written and returned; any float dtype, values are rounded to it
                 once.  No gradient.
    shard        (first row, row count): `table` holds only these rows of the whole table.  A row
                 outside gives zeros, so that the results of all shards add up to the lookup in the
                 whole table.
    sparse_gradient
                 True: the gradient of `table` is a coalesced sparse COO tensor with one entry for
                 each row that was read (as torch.nn.Embedding(sparse=True) gives; eager only).
                 False: a dense tensor.

    Returns [B,S,(n-1)*h*d], new memory, column order n-gram size major, then head; dtype of
    `table`, float32 for a QuantizedWeight.  Raises ValueError for moduli <= 0, rows outside the
    table, or a lookback of more than n-1 columns.

    *Source:* Engram, arXiv 2601.07372, section 3.
    """
    lookback = whole_lookback("hashed_embedding", lookback, multipliers)
    part = shard_of("hashed_embedding", shard, table)
    hashed = dict(
        multipliers=multipliers,
        moduli=moduli,
        offsets=offsets,
        pad=pad,
        lookback=lookback,
        blocked=blocked,
        shard=part,
    )
    if out is not None:
        if torch.is_grad_enabled() and isinstance(table, Tensor) and table.requires_grad:
            raise ValueError(
                "hashed_embedding: out is given and table requires a gradient; out has none;"
                " leave out away, or call under torch.no_grad()"
            )
        hashed_embedding_out.call(tokens, table, out, **hashed)
        return out
    if sparse_gradient and torch.is_grad_enabled() and table.requires_grad:
        return _SparseGradient.apply(
            tokens, table, multipliers, moduli, offsets, pad, lookback, blocked, part
        )
    y: Tensor = _hashed_embedding.call(tokens, table, **hashed)
    return y


def shard_of(name: str, shard: tuple[int, int] | None, table: Weight) -> tuple[int, ...]:
    """`shard` as the operators that look up declare it; () is the whole table."""
    if shard is None:
        return ()
    part = tuple(int(number) for number in shard)
    if len(part) != 2 or part[0] < 0 or part[1] != table.shape[0]:
        raise ValueError(
            f"{name}: shard is {shown(shard)}; table has {table.shape[0]} rows;"
            " expected (first row >= 0, row count of the table)"
        )
    return part


@op(
    f"tokens[B,S], table[V,d], out[B,S,(n-1)*h*d], {HASHED} -> ",
    dtypes=f"{HASHED_DTYPES}; table: float | quant; out: float",
    flops="B*S*(2*n + (n-1)*h)",
    bytes="B*S*(n-1)*h*d*size.out*2 + B*S*size.tokens",
    mutates="out",
    host="table",
    examples=EXAMPLES,
)
def hashed_embedding_out(
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
    """out[b,s] = concatenation of table[row(b,s,c)] over c; see `transom.hashed_embedding`."""
    _gather_into(out, tokens, table, multipliers, moduli, offsets, pad, lookback, blocked, shard)


def _gather_into(
    out: Tensor,
    tokens: Tensor,
    table: Weight,
    multipliers: Tensor,
    moduli: Tensor,
    offsets: Tensor,
    pad: int,
    lookback: Tensor | None,
    blocked: Tensor | None,
    shard: tuple[int, ...],
) -> None:
    count, d = table.shape
    first = shard[0] if shard else 0
    if count == 0:
        out.zero_()
        return
    plain = isinstance(table, Tensor)
    dtype = table.dtype if plain else torch.float32
    # Per token: the gathered rows (decoded once more if quantised), clamped row numbers and flags.
    bytes_per_token = moduli.numel() * (d * (2 if plain else 3) * dtype.itemsize + 17)
    for batch, span, rows in hash_columns(
        tokens, multipliers, moduli, offsets, pad, lookback, blocked, bytes_per_token
    ):
        local = rows.flatten() - first
        inside = (local >= 0) & (local < count)
        values = gather_rows(table, local.clamp_(0, count - 1), dtype)
        values = torch.where(inside[:, None], values, 0)
        out[batch, span] = values.view(out[batch, span].shape).to(out.dtype)


@op(
    f"dy[B,S,(n-1)*h,d], tokens[B,S], {HASHED} -> dtable[rows,d]",
    dtypes=f"{HASHED_DTYPES}; dy: float; dtable: dy",
    flops="B*S*(n-1)*h*d",
    bytes="B*S*(n-1)*h*d*size.dy + rows*d*size.dy",
    accumulate="B*S",
    examples=[{**{k: v for k, v in e.items() if k != "V"}, "rows": e["V"]} for e in EXAMPLES],
)
def hashed_embedding_backward(
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
    """dtable[r] = sum of dy[b,s,c] over all (b,s,c) that read row r; zero for rows not read.

    dy is the gradient of the lookup with its last dim split in columns and d.  `rows` is the row
    count of the table (of the shard, if `shard` is given).  Sums run in token order in float32
    (float64 for float64) and are rounded once: deterministic, duplicates included.

    *Source:* the transpose of the gather; Engram, arXiv 2601.07372, section 4.
    """
    ids = _table_rows(tokens, multipliers, moduli, offsets, pad, lookback, blocked, rows, shard)
    unique, place = torch.unique(ids, return_inverse=True)
    dtable = dy.new_zeros((rows, dy.shape[-1]))
    used = int((unique < rows).sum())
    for columns, sums in _row_sums(dy, place, unique.shape[0]):
        dtable[unique[:used], columns] = sums[:used].to(dy.dtype)
    return dtable


@op(
    f"dy[B,S,(n-1)*h,d], tokens[B,S], {HASHED} -> ids[B*S*(n-1)*h], gradients[B*S*(n-1)*h,d]",
    dtypes=f"{HASHED_DTYPES}; dy: float; ids: i64; gradients: dy",
    flops="B*S*(n-1)*h*d",
    accumulate="B*S",
    examples=[{**{k: v for k, v in e.items() if k != "V"}, "rows": e["V"]} for e in EXAMPLES],
)
def hashed_embedding_backward_rows(
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
    """(ids, gradients): the rows that were read, ascending, and gradients[i] = dtable[ids[i]].

    The sparse form of `hashed_embedding_backward`, of a size that does not depend on values: behind
    the last row read, ids are -1 and gradients zero.  ids are int64, as a table may have more than
    2**31 rows.

    *Source:* as `hashed_embedding_backward`.
    """
    ids = _table_rows(tokens, multipliers, moduli, offsets, pad, lookback, blocked, rows, shard)
    unique, place = torch.unique(ids, return_inverse=True)
    used = int((unique < rows).sum())
    packed = torch.full_like(ids, -1)
    packed[:used] = unique[:used]
    gradients = dy.new_zeros((ids.shape[0], dy.shape[-1]))
    for columns, sums in _row_sums(dy, place, unique.shape[0]):
        gradients[:used, columns] = sums[:used].to(dy.dtype)
    return packed, gradients


def _table_rows(
    tokens: Tensor,
    multipliers: Tensor,
    moduli: Tensor,
    offsets: Tensor,
    pad: int,
    lookback: Tensor | None,
    blocked: Tensor | None,
    rows: int,
    shard: tuple[int, ...],
) -> Tensor:
    """The table row of each (b,s,c), flat, int64; `rows` where it lies outside the table."""
    first = shard[0] if shard else 0
    ids = torch.empty((*tokens.shape, moduli.numel()), dtype=torch.int64, device=tokens.device)
    for batch, span, columns in hash_columns(
        tokens, multipliers, moduli, offsets, pad, lookback, blocked
    ):
        local = columns - first
        ids[batch, span] = torch.where((local >= 0) & (local < rows), local, rows)
    return ids.flatten()


def _row_sums(dy: Tensor, place: Tensor, count: int):
    """Yields (column slice, sums [count,w]): sums[place[i]] += the i-th row of dy [B,S,c,d], in
    order of i."""
    wide = torch.float64 if dy.dtype == torch.float64 else torch.float32
    budget = config.workspace_bytes() // 2
    each, d = dy.shape[2:]
    # Blocks of whole tokens: a gradient that is expanded over the columns is never copied whole.
    rows = dy.flatten(0, 1)
    width = max(1, min(d, budget // (max(1, count) * wide.itemsize)))
    height = max(1, budget // (max(1, each) * width * wide.itemsize))
    for start in range(0, d, width):
        columns = slice(start, min(start + width, d))
        sums = torch.zeros((count, columns.stop - start), dtype=wide, device=dy.device)
        for i in range(0, rows.shape[0], height):
            values = rows[i : i + height, :, columns].to(wide).flatten(0, 1)
            add_rows(sums, place[i * each : i * each + values.shape[0]], values)
        yield columns, sums


class _SparseGradient(torch.autograd.Function):
    """The lookup with a sparse COO gradient: torch's custom operators cannot state a sparse
    output."""

    @staticmethod
    def forward(ctx, tokens, table, multipliers, moduli, offsets, pad, lookback, blocked, shard):
        ctx.save_for_backward(tokens, multipliers, moduli, offsets, lookback, blocked)
        ctx.pad, ctx.shard, ctx.table = pad, shard, table.shape
        return _hashed_embedding.call(
            tokens,
            table.detach(),
            multipliers=multipliers,
            moduli=moduli,
            offsets=offsets,
            pad=pad,
            lookback=lookback,
            blocked=blocked,
            shard=shard,
        )

    @staticmethod
    def backward(ctx, dy):
        tokens, multipliers, moduli, offsets, lookback, blocked = ctx.saved_tensors
        ids, gradients = hashed_embedding_backward_rows(
            dy.unflatten(-1, (moduli.numel(), ctx.table[1])),
            tokens,
            multipliers=multipliers,
            moduli=moduli,
            offsets=offsets,
            pad=ctx.pad,
            rows=ctx.table[0],
            lookback=lookback,
            blocked=blocked,
            shard=ctx.shard,
        )
        used = int((ids >= 0).sum())
        dtable = torch.sparse_coo_tensor(
            ids[None, :used], gradients[:used], ctx.table, is_coalesced=True, check_invariants=False
        )
        return (None, dtable, *[None] * 7)


@_hashed_embedding.gradient(save="tokens table multipliers moduli offsets lookback blocked")
def _(saved, dy):
    if not saved.needs("table"):
        return {}
    dtable = hashed_embedding_backward(
        dy.unflatten(-1, (saved.moduli.numel(), saved.table.shape[1])),
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


def _reference(tokens, table, multipliers, moduli, offsets, pad, lookback, blocked, shard):
    rows = hash_reference(tokens, multipliers, moduli, offsets, pad, lookback, blocked)
    local = rows - (shard[0] if shard else 0)
    inside = (local >= 0) & (local < len(table))
    y = np.zeros((*rows.shape, table.shape[1]))
    y[inside] = table[local[inside]]
    return y.reshape(*tokens.shape, rows.shape[-1] * table.shape[1])


hashed_embedding.reference(_reference)


@hashed_embedding_out.reference
def _(tokens, table, out, multipliers, moduli, offsets, pad, lookback, blocked, shard):
    return _reference(tokens, table, multipliers, moduli, offsets, pad, lookback, blocked, shard)


@hashed_embedding_backward.reference
def _(dy, tokens, multipliers, moduli, offsets, pad, rows, lookback, blocked, shard):
    local = hash_reference(tokens, multipliers, moduli, offsets, pad, lookback, blocked)
    local = local - (shard[0] if shard else 0)
    dtable = np.zeros((rows, dy.shape[-1]))
    for place in np.ndindex(*local.shape):
        if 0 <= local[place] < rows:
            dtable[local[place]] += dy[place]
    return dtable


@hashed_embedding_backward_rows.reference
def _(dy, tokens, multipliers, moduli, offsets, pad, rows, lookback, blocked, shard):
    local = hash_reference(tokens, multipliers, moduli, offsets, pad, lookback, blocked)
    local = local - (shard[0] if shard else 0)
    sums: dict[int, np.ndarray] = {}
    for place in np.ndindex(*local.shape):
        if 0 <= local[place] < rows:
            row = int(local[place])
            sums[row] = sums.get(row, 0.0) + dy[place]
    ids = np.full(local.size, -1)
    gradients = np.zeros((local.size, dy.shape[-1]))
    for i, row in enumerate(sorted(sums)):
        ids[i], gradients[i] = row, sums[row]
    return ids, gradients


def lookup_rules(n: int, pad: int, shard: tuple[int, ...]) -> str | None:
    """The rules on the arguments of a lookup, shared by the operators that look up."""
    if len(shard) not in (0, 2) or any(entry < 0 for entry in shard):
        return f"shard is {tuple(shard)}; expected () or (first row, row count), both >= 0"
    return hash_rules(n, pad)


def _gradient_rules(n: int, pad: int, rows: int, shard: tuple[int, ...]) -> str | None:
    if rows < 0:
        return f"rows is {rows}; must be >= 0"
    return bounds.above(bounds.ROWS, rows=rows) or lookup_rules(n, pad, shard)


# A shard need not hold every row; the whole table must.
LOOKUP_RANGES = (
    "1 <= moduli; 0 <= offsets; 1 <= moduli + offsets <= (2**63 - 1 if shard else {rows})"
)


@satisfied_by(LOOKUP_RANGES.format(rows="V"))
def row_rules(moduli: Tensor, offsets: Tensor, V: int, shard: tuple[int, ...]) -> str | None:
    """The rules on the values of a lookup's moduli and offsets in a table of V rows."""
    if (text := modulus_rules(moduli, offsets)) is not None:
        return text
    if not shard and (last := last_row(moduli, offsets)) >= V:
        return f"offsets + moduli give rows up to {last}; table has {V} rows"
    return None


@satisfied_by(LOOKUP_RANGES.format(rows="rows"))
def _gradient_row_rules(moduli: Tensor, offsets: Tensor, rows: int, shard: tuple[int, ...]):
    """The same in the gradients, which have no table to tell its rows."""
    return row_rules(moduli, offsets, rows, shard)


def sample_lookup(rng: np.random.Generator, dims: dict) -> dict:
    """As for a hash, with moduli that share out the rows of the table."""
    drawn = sample_hash(rng, dims)
    columns = (dims["n"] - 1) * dims["h"]
    rows = dims["V"] if "V" in dims else dims["rows"]
    ends = np.linspace(0, rows, columns + 1).astype(np.int64)
    drawn["offsets"] = ends[:-1]
    drawn["moduli"] = np.diff(ends).reshape(dims["n"] - 1, dims["h"])
    return drawn


for _op in (hashed_embedding, hashed_embedding_out):
    _op.check(lookup_rules)
    _op.check_values(row_rules)
    _op.sample(sample_lookup)
for _op in (hashed_embedding_backward, hashed_embedding_backward_rows):
    _op.check(_gradient_rules)
    _op.check_values(_gradient_row_rules)
    _op.sample(sample_lookup)
