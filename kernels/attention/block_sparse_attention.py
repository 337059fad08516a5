"""Attention over blocks of keys that each query, or block of queries, has selected."""

from __future__ import annotations

from collections.abc import Iterator
from math import gcd
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from transom.config import workspace_bytes
from transom.declare import op
from transom.dtypes import accumulator
from transom.kernels import _bounds as bounds
from transom.kernels._ordered_sum import add_rows

from . import _block_groups as block_groups
from ._online_softmax import (
    OnlineSoftmax,
    finite,
    gathered_back,
    kept_share,
    mixtures,
    products,
    recomputed_weights,
    sink_share,
)

# Keys of a tile when a list is shared by more queries than fit with all its keys.
SHARED_TILE = 1024
# Temporaries of lists that no two queries share: their keys are loaded for a single query, so the
# time goes into moving them, and what leaves the caches between two steps is moved again.
CACHED = 16 * 2**20


@op(
    "q[B,S,Hq,D], k[B,N,Hkv,D], v[B,N,Hkv,Dv], block_indices[B,Sq,Hkv,L], sink?[Hq]"
    " -> o[B,S,Hq,Dv], lse[B,S,Hq]",
    dtypes="q: float; k: q; v: q; block_indices: index; sink: q | f32; o: q; lse: acc(q)",
    flops="2*B*S*Hq*(D+Dv)*L*block_size",
    bytes="B*(D+Dv)*(S*Hq+min(N, Sq*L*block_size)*Hkv)*size.q+4*B*(Sq*Hkv*L+S*Hq)",
    accumulate="D+L*block_size",
    autocast="low: q k v",
    batch="B",
    varying="B S M N",
    examples=[
        dict(
            B=2, S=5, Hq=4, Hkv=2, D=8, Dv=6, N=9, Sq=5, L=2, block_size=4, causal=True, scale=0.35
        ),
        # The same with one list for two queries.
        dict(
            B=1,
            S=5,
            Hq=2,
            Hkv=2,
            D=8,
            Dv=8,
            N=11,
            Sq=3,
            L=3,
            block_size=2,
            causal=False,
            scale=0.35,
        ),
        # Native sparse attention, 64 k tokens: 16 blocks of 64 keys, 4 key heads.
        dict(
            B=1,
            S=4096,
            Hq=64,
            Hkv=4,
            D=128,
            Dv=128,
            N=65536,
            Sq=4096,
            L=16,
            block_size=64,
            causal=True,
            scale=128**-0.5,
        ),
        # MiniMax-M3 decode: 16 blocks of 128 keys.
        dict(
            B=8,
            S=1,
            Hq=64,
            Hkv=4,
            D=128,
            Dv=128,
            N=32768,
            Sq=1,
            L=16,
            block_size=128,
            causal=True,
            scale=128**-0.5,
        ),
    ],
)
def _block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_indices: Tensor,
    *,
    block_size: int,
    causal: bool,
    sink: Tensor | None = None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """o = sum_j softmax(scale * q . k)_j v_j over the tokens of listed blocks and the sink; lse.

    The declared operator behind the public function, which documents the arguments; here `scale` is
    given and the lse is always returned. Temporaries stay within the workspace. Blocks that many
    queries name are taken one by one, with all those queries; otherwise lists are taken a few at a
    time, long ones in tiles of keys with an online softmax over the tiles.
    """
    if at_once := block_groups.queries_at_once(q, v, block_indices, block_size):
        return block_groups.forward(
            q, k, v, block_indices, block_size, causal, sink, scale, at_once
        )
    dtype = accumulator(q.dtype)
    o = q.new_empty((*q.shape[:3], v.shape[3]))
    lse = q.new_empty(q.shape[:3], dtype=dtype)
    work = _Work.of(q, k, v, block_indices, block_size, causal, copies=(2, 3))
    sources = _Rows.of(k), _Rows.of(v)
    sinks = None if sink is None else sink.to(dtype).view(work.kv_heads, 1, -1)
    for block in work.blocks():
        x = work.take(q, block).to(dtype) * scale
        softmax = OnlineSoftmax(x.shape[:-1], v.shape[3], x)
        for tile in work.tiles(block, block_indices):
            keys, values = (y.load(block.batches, tile.place).to(dtype) for y in sources)
            logits = products(x, keys).masked_fill_(~tile.seen, -torch.inf)
            weights = softmax.weights(logits)
            if work.span == 1:
                softmax.add(mixtures(weights, values).masked_fill_(tile.blind, 0))
                continue
            # Queries that share a list share its tokens, seen or not: NaN among the values must
            # reach the queries that see it, and only those. 0 * v is not 0 where v is not finite.
            spoilt = values.mul(0).sum(-1) != 0
            weights.masked_fill_(tile.seen & spoilt[..., None, None, :], torch.nan)
            softmax.add(mixtures(weights, finite(values)))
        part, part_lse = softmax.finish(sinks)
        work.put(o, block, part)
        work.put(lse, block, part_lse)
    return o, lse


class _Block(NamedTuple):
    """Some batches, some lists, and the queries `first`.. of each list: `width` of them."""

    batches: slice
    lists: slice
    first: int
    width: int


class _Tile(NamedTuple):
    """The n keys that a block meets next, by token, as [batches, lists, Hkv, n].

    `place` is safe to load. Where a list is one query's own, what the query does not see is
    replaced by a token that it sees: then no weight of 0 meets a value that it must not meet.
    `seen` says which query sees which key and broadcasts against the logits; `blind`, against what
    a query collects from the tile, which list has no key that any of its queries sees. `loaded`
    marks the keys that some query of the list sees.
    """

    place: Tensor
    loaded: Tensor
    seen: Tensor
    blind: Tensor


class _Work(NamedTuple):
    """How one call is cut. Inside a block tensors are [batches, lists, Hkv, queries, Hq/Hkv, ...]:
    what shares its keys stands together."""

    batch: int
    queries: int
    lists: int
    keys: int
    kv_heads: int
    block_size: int
    causal: bool
    span: int
    """Queries that share a list."""
    batches_at_once: int
    lists_at_once: int
    queries_at_once: int
    keys_at_once: int

    @classmethod
    def of(
        cls,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        indices: Tensor,
        block_size: int,
        causal: bool,
        copies: tuple[int, int],
    ) -> _Work:
        """The cut with which a block's keys and values, and its logits and sums, fit the workspace,
        `copies` of the former and of the latter; at least one query and 16 keys."""
        (b, s, hq, d), (_, lists, kv_heads, length) = q.shape, indices.shape
        n, dv = k.shape[1], v.shape[3]
        item, budget = accumulator(q.dtype).itemsize, workspace_bytes()
        span = span_of(s, lists, block_size)
        if span == 1:
            budget = min(budget, CACHED)
        block_size = min(block_size, max(1, n))  # a longer block ends with the keys
        total = max(1, length * block_size)
        per_key = item * kv_heads * (d + dv) * copies[0] + 64 * kv_heads
        per_query = item * hq * (d + dv) * copies[1]
        per_pair = item * hq * copies[1]
        whole = span * per_query + total * (per_key + span * per_pair)
        batches, at_once, width, tile = 1, 1, span, total
        if whole <= budget:
            at_once = max(1, min(lists, budget // max(1, whole)))
            if at_once == lists:
                batches = max(1, min(b, budget // max(1, whole * lists)))
        else:
            tile = min(total, SHARED_TILE)
            width = (budget - tile * per_key) // (per_query + tile * per_pair)
            width = max(1, min(width, span))
            tile = min(tile, max(16, (budget - width * per_query) // (per_key + width * per_pair)))
        return cls(
            b, s, lists, n, kv_heads, block_size, causal, span, batches, at_once, width, tile
        )

    def blocks(self) -> Iterator[_Block]:
        for b in range(0, self.batch, self.batches_at_once):
            batches = slice(b, min(b + self.batches_at_once, self.batch))
            for i in range(0, self.lists, self.lists_at_once):
                lists = slice(i, min(i + self.lists_at_once, self.lists))
                inside = min(self.span, self.queries - i * self.span)
                for x in range(0, inside, self.queries_at_once):
                    yield _Block(batches, lists, x, min(self.queries_at_once, inside - x))

    def _rows(self, block: _Block) -> slice:
        """The queries of a block: it has one list, or all queries of its lists."""
        start = block.lists.start * self.span + block.first
        count = (block.lists.stop - block.lists.start) * block.width
        return slice(start, min(start + count, self.queries))

    def take(self, x: Tensor, block: _Block, fill: float = 0.0) -> Tensor:
        """x[B,S,Hq,*X] -> [batches, lists, Hkv, width, Hq/Hkv, *X]; queries that the last list
        lacks are `fill`."""
        rows = self._rows(block)
        lists = block.lists.stop - block.lists.start
        lacking = lists * block.width - (rows.stop - rows.start)
        part = x[block.batches, rows]
        if lacking:
            part = F.pad(part, (0, 0) * (x.dim() - 2) + (0, lacking), value=fill)
        part = part.unflatten(2, (self.kv_heads, -1)).unflatten(1, (lists, block.width))
        return part.transpose(2, 3)

    def put(self, into: Tensor, block: _Block, part: Tensor) -> None:
        """The reverse of take: write a block's result."""
        rows = self._rows(block)
        part = part.transpose(2, 3).flatten(1, 2).flatten(2, 3)
        into[block.batches, rows] = part[:, : rows.stop - rows.start]

    def tiles(self, block: _Block, indices: Tensor) -> Iterator[_Tile]:
        """The keys of a block, a tile at a time, in the order of the lists."""
        if self.keys == 0:
            return
        device = indices.device
        # Clamped before it is multiplied: an id of 2**62 must not wrap round to a token.
        named = indices[block.batches, block.lists].long().clamp(-1, self.keys)
        first = self.keys - self.queries + block.first
        lists = torch.arange(block.lists.start, block.lists.stop, device=device)
        position = first + lists[:, None] * self.span + torch.arange(block.width, device=device)
        for start in range(0, indices.shape[3] * self.block_size, self.keys_at_once):
            stop = min(start + self.keys_at_once, indices.shape[3] * self.block_size)
            slot = torch.arange(start, stop, device=device)
            number = named.index_select(3, slot // self.block_size)
            place = number * self.block_size + slot % self.block_size
            exists = (number >= 0) & (place < self.keys)
            seen = exists[..., None, None, :]
            if self.causal:
                seen = seen & (place[..., None, None, :] <= position[:, None, :, None, None])
                exists = seen.any(3).squeeze(3) if self.span > 1 else seen[..., 0, 0, :]
            largest = place.masked_fill(~exists, -1).amax(-1, keepdim=True)
            place = torch.where(exists, place, largest.clamp(min=0))
            yield _Tile(place, exists, seen, (largest < 0)[..., None, None])


class _Rows(NamedTuple):
    """x[B,N,Hkv,D] as a matrix, without a copy: token t of a batch and a head is its row
    first[batch,0,head,0] + t * apart. Rows overlap where x's strides ask for it."""

    matrix: Tensor
    first: Tensor
    apart: int

    @classmethod
    def of(cls, x: Tensor) -> _Rows:
        (b, n, h, d), (of_batch, of_token, of_head, of_element) = x.shape, x.stride()
        moving = ((b, of_batch), (n, of_token), (h, of_head))
        unit = gcd(*(stride for size, stride in moving if size > 1)) or 1
        end = (b - 1) * of_batch + (n - 1) * of_token + (h - 1) * of_head
        batches = torch.arange(b, device=x.device)[:, None, None, None] * (of_batch // unit)
        heads = torch.arange(h, device=x.device)[:, None] * (of_head // unit)
        matrix = x.as_strided((end // unit + 1 if b * n * h else 0, d), (unit, of_element))
        return cls(matrix, batches + heads, of_token // unit)

    def load(self, batches: slice, place: Tensor) -> Tensor:
        """[batches, lists, Hkv, n, D] at the tokens `place`."""
        number = place * self.apart + self.first[batches]
        # Whole rows: torch takes several times as long to index with one tensor for each dim.
        taken = self.matrix.index_select(0, number.flatten())
        return taken.view(*place.shape, taken.shape[1])

    def add(self, batches: slice, tile: _Tile, parts: Tensor) -> None:
        """Add [batches, lists, Hkv, n, D] to the tokens of a tile that were loaded, in order."""
        number = torch.where(tile.loaded, tile.place * self.apart + self.first[batches], -1)
        add_rows(self.matrix, number.flatten(), parts.flatten(0, 3))


def span_of(queries: int, lists: int, block_size: int) -> int:
    """How many queries share a list: one, or those of a block."""
    return 1 if lists == queries else max(1, min(block_size, queries))


@op(
    "do[B,S,Hq,Dv], dlse[B,S,Hq], q[B,S,Hq,D], k[B,N,Hkv,D], v[B,N,Hkv,Dv],"
    " block_indices[B,Sq,Hkv,L], sink[Hq], o[B,S,Hq,Dv], lse[B,S,Hq]"
    " -> dq[B,S,Hq,D], dk[B,N,Hkv,D], dv[B,N,Hkv,Dv], dsink[Hq]",
    dtypes="do: q; dlse: acc(q); q: float; k: q; v: q; block_indices: index; sink: q | f32; o: q;"
    " lse: acc(q); dq: q; dk: q; dv: q; dsink: sink",
    flops="2*B*S*Hq*(3*D+2*Dv)*L*block_size",
    accumulate="S*ceil(Hq/max(Hkv, 1))*L+D+L*block_size",
    batch="B",
    examples=[
        dict(
            B=2, S=5, Hq=4, Hkv=2, D=8, Dv=6, N=9, Sq=5, L=2, block_size=4, causal=True, scale=0.35
        ),
        dict(
            B=1,
            S=4096,
            Hq=64,
            Hkv=4,
            D=128,
            Dv=128,
            N=65536,
            Sq=4096,
            L=16,
            block_size=64,
            causal=True,
            scale=128**-0.5,
        ),
    ],
)
def block_sparse_attention_backward(
    do: Tensor,
    dlse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_indices: Tensor,
    sink: Tensor,
    o: Tensor,
    lse: Tensor,
    *,
    block_size: int,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dS = p (share (do . v - do . o) + dlse), p = exp(scale * q . k - lse), and from it the
    gradients of block_sparse_attention; share = exp(lse) / (exp(lse) + exp(sink)).

    dq = scale sum_j dS_j k_j; dk_j = scale sum dS_j q; dv_j = sum share p_j do, over the queries
    that see token j and the query heads of its key head; dsink = -sum (1 - share) (do . o).

    do, o        [B,S,Hq,Dv], q's dtype: gradient and result of the forward.
    dlse, lse    [B,S,Hq], float32 (float64 for float64).
    sink         [Hq]; -inf where the forward had none.
    The rest as in block_sparse_attention. Returns dq, dk, dv and dsink with the shape and dtype of
    q, k, v and sink. Weights are recomputed in blocks; sums over queries are float32 (float64 for
    float64), in a fixed order, and rounded once.
    *Source:* Dao et al. 2022, arXiv:2205.14135, appendix B, with a sink and a gradient of the lse.
    """
    if at_once := block_groups.queries_at_once(q, v, block_indices, block_size):
        dq, dk, dv, dsink = block_groups.backward(
            do, dlse, q, k, v, block_indices, sink, o, lse, block_size, causal, scale, at_once
        )
        return dq, dk.to(k.dtype), dv.to(v.dtype), dsink.to(sink.dtype)
    dtype = accumulator(q.dtype)
    dq = torch.empty_like(q, memory_format=torch.contiguous_format)
    dk, dv = k.new_zeros(k.shape, dtype=dtype), v.new_zeros(v.shape, dtype=dtype)
    work = _Work.of(q, k, v, block_indices, block_size, causal, copies=(3, 6))
    sources, sums = (_Rows.of(k), _Rows.of(v)), (_Rows.of(dk), _Rows.of(dv))
    sinks = sink.to(dtype).view(work.kv_heads, 1, -1)
    dsink = torch.zeros_like(sinks)
    for block in work.blocks():
        x, dy = work.take(q, block).to(dtype), work.take(do, block).to(dtype)
        norm, dnorm = work.take(lse, block, -torch.inf), work.take(dlse, block).unsqueeze(-1)
        delta = (dy * work.take(o, block)).sum(-1)
        share = kept_share(norm, sinks).unsqueeze(-1)
        dsink -= (sink_share(norm, sinks) * delta).sum((0, 1, 3)).unsqueeze(1)
        dx = torch.zeros_like(x)
        for tile in work.tiles(block, block_indices):
            keys, values = (y.load(block.batches, tile.place).to(dtype) for y in sources)
            logits = products(x * scale, keys).masked_fill_(~tile.seen, -torch.inf)
            p = recomputed_weights(logits, norm)
            ds = products(dy, values).sub_(delta.unsqueeze(-1)).mul_(share).add_(dnorm)
            # p is 0 where a token is not seen, but do . v there may be NaN or have overflowed.
            ds.mul_(p).mul_(scale).masked_fill_(~tile.seen, 0)
            if work.span == 1:
                dx += mixtures(ds, keys).masked_fill_(tile.blind, 0)
            else:
                dx += mixtures(ds, finite(keys))
            sums[0].add(block.batches, tile, gathered_back(ds, x, 3))
            sums[1].add(block.batches, tile, gathered_back(p.mul_(share), dy, 3))
        work.put(dq, block, dx)
    return dq, dk.to(k.dtype), dv.to(v.dtype), dsink.flatten().to(sink.dtype)


@_block_sparse_attention.front
def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_indices: Tensor,
    *,
    block_size: int,
    causal: bool,
    sink: Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """o[s,h] = sum_j e^(l_j) v_j / (sum_j e^(l_j) + e^sink_h), l_j = scale * q[s,h] . k_j, over the
    tokens j of the blocks that query s selects for key head h // (Hq/Hkv).

    q              [B,S,Hq,D].
    k, v           [B,N,Hkv,D] and [B,N,Hkv,Dv], Hq a multiple of Hkv; N may be 0.
    block_indices  [B,Sq,Hkv,L], int32 or int64. Block i is tokens i*block_size .. of k, the last
                   block may be short; ids < 0 or >= ceil(N/block_size) stand for none. A block
                   named twice counts twice. Sq = S: a list for each query. Sq =
                   ceil(S/block_size): a list for each block of queries; query s uses list
                   s // block_size.
    block_size     tokens of a block, 1 to 2^20.
    causal         query s stands at N-S+s and sees tokens up to its own, also inside a block.
    sink           [Hq], q's dtype or float32: a logit per head that takes part in the denominator
                   and has no value; -inf is no sink, +inf makes the output 0.
    scale          of the logits; D**-0.5 if None.
    return_lse     also return lse[B,S,Hq] = log sum_j e^(l_j), natural, without the sink; float32
                   (float64 for float64).
    Returns o[B,S,Hq,Dv] in q's dtype. A query that sees nothing: o = 0, lse = -inf. Tokens that a
    query does not see have no influence on its output, whatever they hold (NaN, Inf).
    Differentiable in q, k, v and sink, through o and lse.
    Raises ValueError for shapes that disagree, Hq not a multiple of Hkv, other Sq or block_size.
    *Source:* Yuan et al. 2025, arXiv:2502.11089 (selection branch); MiniMax-M3's block-sparse
    layers.
    """
    o, lse = _block_sparse_attention.call(
        q,
        k,
        v,
        block_indices,
        block_size=block_size,
        causal=causal,
        sink=sink,
        scale=max(q.shape[-1], 1) ** -0.5 if scale is None else scale,
    )
    return (o, lse) if return_lse else o


def _layout(S: int, Sq: int, Hq: int, Hkv: int, block_size: int) -> str | None:
    if block_size < 1:
        return f"block_size is {block_size}; must be >= 1"
    if text := bounds.above(bounds.BLOCK, block_size=block_size):
        return text
    if Hkv == 0 or Hq % Hkv:
        return f"q has Hq = {Hq} heads; must be a multiple of the Hkv = {Hkv} heads of k"
    if Sq not in (S, -(-S // block_size)):
        return (
            f"block_indices has Sq = {Sq} lists; expected S = {S} or ceil(S/block_size) ="
            f" {-(-S // block_size)}"
        )
    return None


block_sparse_attention.check(_layout)
block_sparse_attention_backward.check(_layout)


@_block_sparse_attention.gradient(save="q k v block_indices sink o lse")
def _(saved: Any, do: Tensor, dlse: Tensor) -> dict[str, Tensor | None]:
    q = saved.q
    dq, dk, dv, dsink = block_sparse_attention_backward(
        do,
        dlse,
        q,
        saved.k,
        saved.v,
        saved.block_indices,
        q.new_full((q.shape[2],), -torch.inf) if saved.sink is None else saved.sink,
        saved.o,
        saved.lse,
        block_size=saved.block_size,
        causal=saved.causal,
        scale=saved.scale,
    )
    return {"q": dq, "k": dk, "v": dv, "sink": None if saved.sink is None else dsink}


def _seen_tokens(
    N: int, S: int, s: int, named: np.ndarray, block_size: int, causal: bool
) -> list[int]:
    """The tokens that query s attends to, in the order of its list."""
    tokens = [
        token
        for block in named
        if 0 <= block * block_size < N
        for token in range(block * block_size, min(N, (block + 1) * block_size))
    ]
    return [token for token in tokens if not causal or token <= N - S + s]


@_block_sparse_attention.reference
def _reference(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    block_indices: np.ndarray,
    block_size: int,
    causal: bool,
    sink: np.ndarray | None,
    scale: float,
) -> tuple[np.ndarray, np.ndarray]:
    (B, S, Hq, _), (_, N, Hkv, Dv) = q.shape, v.shape
    o, lse = np.zeros((B, S, Hq, Dv)), np.full((B, S, Hq), -np.inf)
    for b, s, h in np.ndindex(B, S, Hq):
        own = s if block_indices.shape[1] == S else s // block_size
        g = h // (Hq // Hkv)
        tokens = _seen_tokens(N, S, s, block_indices[b, own, g], block_size, causal)
        if tokens:
            logits = scale * k[b, tokens, g] @ q[b, s, h]
            lse[b, s, h] = np.logaddexp.reduce(logits)
            total = lse[b, s, h] if sink is None else np.logaddexp(lse[b, s, h], sink[h])
            o[b, s, h] = np.exp(logits - total) @ v[b, tokens, g]
    return o, lse


@block_sparse_attention_backward.reference
def _(
    do: np.ndarray,
    dlse: np.ndarray,
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    block_indices: np.ndarray,
    sink: np.ndarray,
    o: np.ndarray,
    lse: np.ndarray,
    block_size: int,
    causal: bool,
    scale: float,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    (B, S, Hq, _), (_, N, Hkv, _) = q.shape, v.shape
    dq, dk, dv, dsink = np.zeros_like(q), np.zeros_like(k), np.zeros_like(v), np.zeros(Hq)
    for b, s, h in np.ndindex(B, S, Hq):
        if lse[b, s, h] == -np.inf:
            continue
        own = s if block_indices.shape[1] == S else s // block_size
        g = h // (Hq // Hkv)
        tokens = _seen_tokens(N, S, s, block_indices[b, own, g], block_size, causal)
        keys, values = k[b, tokens, g], v[b, tokens, g]
        delta = do[b, s, h] @ o[b, s, h]
        with_sink = np.logaddexp(lse[b, s, h], sink[h])
        share = np.exp(lse[b, s, h] - with_sink)
        p = np.exp(scale * keys @ q[b, s, h] - lse[b, s, h])
        ds = scale * p * (share * (values @ do[b, s, h] - delta) + dlse[b, s, h])
        dq[b, s, h] = ds @ keys
        np.add.at(dk[b, :, g], tokens, ds[:, None] * q[b, s, h])
        np.add.at(dv[b, :, g], tokens, share * p[:, None] * do[b, s, h])
        dsink[h] -= np.exp(sink[h] - with_sink) * delta
    return dq, dk, dv, dsink


@_block_sparse_attention.sample
def _sample(rng: np.random.Generator, dims: dict[str, Any]) -> dict[str, Any]:
    blocks = -(-dims["N"] // dims["block_size"])
    ids = rng.integers(0, max(blocks, 1), tuple(dims[name] for name in ("B", "Sq", "Hkv", "L")))
    # Any id outside the blocks stands for none, not only -1.
    none = rng.choice([-1, blocks, -(2**31), 2**31 - 1], ids.shape)
    return {"block_indices": np.where(rng.random(ids.shape) < 0.2, none, ids)}


@block_sparse_attention_backward.sample
def _(rng: np.random.Generator, dims: dict[str, Any]) -> dict[str, Any]:
    B, S, N, Hq, Hkv, D, Dv = (dims[name] for name in ("B", "S", "N", "Hq", "Hkv", "D", "Dv"))
    out = {
        "q": rng.standard_normal((B, S, Hq, D)),
        "k": rng.standard_normal((B, N, Hkv, D)),
        "v": rng.standard_normal((B, N, Hkv, Dv)),
        "sink": rng.standard_normal(Hq),
        **_sample(rng, dims),
    }
    if _layout(S, dims["Sq"], Hq, Hkv, dims["block_size"]):
        return out  # such a call is refused
    # The weights are exp(logits - lse), so the lse must belong to the logits.
    rest = {name: dims[name] for name in ("block_size", "causal", "scale")}
    out["o"], out["lse"] = _reference(**out, **rest)
    return out
