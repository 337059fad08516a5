"""Block-sparse attention block by block: all queries that name a block meet it in one product.

Worth it where a block is named many times: its keys are read where they stand, once for all those
queries, while a gather would copy them for each. Sums over blocks and over queries run in the order
of the blocks' numbers, and within a block in that of the queries.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from transom.config import workspace_bytes
from transom.dtypes import accumulator
from transom.kernels._ordered_sum import add_rows

from ._online_softmax import finite, kept_share, recomputed_weights, sink_share

# Queries that must name a block on the average, for the steps it takes to be worth it.
OFTEN = 4


def queries_at_once(q: Tensor, v: Tensor, indices: Tensor, block_size: int) -> int:
    """How many queries' logits fit the workspace; 0 where a gather of the keys is the better way.

    That is on accelerators, where many small products cost more than the memory's bandwidth, where
    lists are shared by queries, and where few queries name the same block.
    """
    (_, s, hq, d), (_, lists, _, length), (_, n, _, dv) = q.shape, indices.shape, v.shape
    if q.device.type != "cpu" or lists != s or not n * length * hq:
        return 0
    # The logits and, block by block, which are seen; the pairs and their sort; queries and sums.
    item = accumulator(q.dtype).itemsize
    bytes_each = hq * (length * (block_size * 2 * item + 128) + 3 * (d + dv) * item)
    fit = min(s, workspace_bytes() // bytes_each)
    return fit if fit * length >= OFTEN * -(-n // block_size) else 0


class _Pairs(NamedTuple):
    """The (query, named block) pairs of some queries of one batch, sorted by head and block.

    A row is a query and a key head: row = query * Hkv + head. Pairs of no block are left out.
    """

    row: Tensor
    position: Tensor
    groups: list[tuple[int, int, int]]
    """(head, first token, pairs) of each block that is named."""

    @classmethod
    def of(cls, indices: Tensor, first: int, tokens: int, block_size: int) -> _Pairs:
        """`indices` [t,Hkv,L]; query 0 stands at token `first`."""
        t, heads, length = indices.shape
        blocks = -(-tokens // block_size)
        number = indices.long()
        head = torch.arange(heads, device=indices.device)[:, None]
        valid = ((number >= 0) & (number < blocks)).flatten()
        kept = valid.nonzero()[:, 0]
        key = (number + head * blocks).flatten()[kept]
        key, order = torch.sort(key, stable=True)
        row = torch.div(kept[order], length, rounding_mode="floor")
        named, counts = torch.unique_consecutive(key, return_counts=True)
        groups = [
            (which // blocks, which % blocks * block_size, count)
            for which, count in zip(named.tolist(), counts.tolist(), strict=True)
        ]
        return cls(row, row // heads + first, groups)

    def each(self) -> Iterator[tuple[slice, int, int]]:
        """(pairs, head, first token) of each block."""
        start = 0
        for head, token, count in self.groups:
            yield slice(start, start + count), head, token
            start += count

    def seen(self, part: slice, token: int, count: int, causal: bool) -> Tensor | None:
        """[pairs,1,count]: which tokens a pair's query sees; None: all."""
        if not causal:
            return None
        tokens = torch.arange(token, token + count, device=self.position.device)
        return (tokens <= self.position[part, None])[:, None]


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    block_size: int,
    causal: bool,
    sink: Tensor | None,
    scale: float,
    at_once: int,
) -> tuple[Tensor, Tensor]:
    """o and lse of block_sparse_attention; `at_once` from `queries_at_once`."""
    dtype = accumulator(q.dtype)
    (batch, queries, hq, _), (_, n, heads, width) = q.shape, v.shape
    o = q.new_empty((batch, queries, hq, width))
    lse = q.new_empty((batch, queries, hq), dtype=dtype)
    sinks = None if sink is None else sink.to(dtype)
    for b, some in _cuts(batch, queries, at_once):
        x = _rows(q[b, some], heads, dtype) * scale
        pairs = _Pairs.of(indices[b, some], n - queries + some.start, n, block_size)
        logits = x.new_full((pairs.row.shape[0], x.shape[1], block_size), -torch.inf)
        for part, head, token in pairs.each():
            keys = _block(k, b, slice(token, token + block_size), head, dtype)
            mine = logits[part, :, : keys.shape[0]]
            mine.copy_(x[pairs.row[part]] @ keys.T)
            seen = pairs.seen(part, token, keys.shape[0], causal)
            if seen is not None:
                mine.masked_fill_(~seen, -torch.inf)
        largest = x.new_full(x.shape[:2], -torch.inf)
        each = pairs.row[:, None].expand(-1, x.shape[1])
        largest.scatter_reduce_(0, each, logits.amax(-1), "amax")
        shift = largest.masked_fill(largest == -torch.inf, 0.0)
        weights = logits.sub_(shift[pairs.row].unsqueeze(-1)).exp_()
        mass = torch.zeros_like(largest)
        add_rows(mass, pairs.row, weights.sum(-1))
        total = x.new_zeros(*x.shape[:2], width)
        for part, head, token in pairs.each():
            values = _block(v, b, slice(token, token + block_size), head, dtype)
            mine = weights[part, :, : values.shape[0]]
            spoilt = ~values.isfinite().all(-1)
            if spoilt.any():  # reaches the queries that see it, and only those
                seen = pairs.seen(part, token, values.shape[0], causal)
                mine.masked_fill_(spoilt if seen is None else seen & spoilt, torch.nan)
                values = finite(values)
            add_rows(total.flatten(1), pairs.row[part], (mine @ values).flatten(1))
        norm = (shift + mass.log()).masked_fill(largest == -torch.inf, -torch.inf).view(-1, hq)
        result = (total / mass.masked_fill(mass == 0, 1.0).unsqueeze(-1)).view(-1, hq, width)
        if sinks is not None:
            result *= kept_share(norm, sinks).unsqueeze(-1)
        o[b, some], lse[b, some] = result, norm
    return o, lse


def backward(
    do: Tensor,
    dlse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    indices: Tensor,
    sink: Tensor,
    o: Tensor,
    lse: Tensor,
    block_size: int,
    causal: bool,
    scale: float,
    at_once: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of q, k, v and sink, those of k, v and sink in the accumulator's dtype."""
    dtype = accumulator(q.dtype)
    (batch, queries, _, _), (_, n, heads, _) = q.shape, v.shape
    dq = torch.empty_like(q, memory_format=torch.contiguous_format)
    dk, dv = k.new_zeros(k.shape, dtype=dtype), v.new_zeros(v.shape, dtype=dtype)
    sinks = sink.to(dtype)
    dsink = torch.zeros_like(sinks)
    for b, some in _cuts(batch, queries, at_once):
        x, dy = (_rows(y[b, some], heads, dtype) for y in (q, do))
        delta = (dy * _rows(o[b, some], heads, dtype)).sum(-1)
        norm = lse[b, some]
        dsink -= (sink_share(norm, sinks) * delta.view(norm.shape)).sum(0)
        share = kept_share(norm, sinks).view(delta.shape)
        norm, dnorm = norm.reshape(delta.shape), dlse[b, some].reshape(delta.shape)
        dx = torch.zeros_like(x)
        pairs = _Pairs.of(indices[b, some], n - queries + some.start, n, block_size)
        for part, head, token in pairs.each():
            tokens = slice(token, min(token + block_size, n))
            keys, values = (_block(y, b, tokens, head, dtype) for y in (k, v))
            row = pairs.row[part]
            mine, dmine = x[row], dy[row]
            seen = pairs.seen(part, token, keys.shape[0], causal)
            logits = (mine * scale) @ keys.T
            if seen is not None:
                logits.masked_fill_(~seen, -torch.inf)
            p = recomputed_weights(logits, norm[row])
            kept = share[row].unsqueeze(-1)
            ds = (dmine @ values.T).sub_(delta[row].unsqueeze(-1)).mul_(kept)
            ds.add_(dnorm[row].unsqueeze(-1)).mul_(p).mul_(scale)
            if seen is not None:
                # p is 0 there, but do . v may be NaN or have overflowed.
                ds.masked_fill_(~seen, 0)
            add_rows(dx.flatten(1), row, (ds @ finite(keys)).flatten(1))
            dk[b, tokens, head] += ds.flatten(0, 1).T @ finite(mine).flatten(0, 1)
            dv[b, tokens, head] += p.mul_(kept).flatten(0, 1).T @ finite(dmine).flatten(0, 1)
        dq[b, some] = dx.view(-1, *q.shape[2:])
    return dq, dk, dv, dsink


def _cuts(batch: int, queries: int, at_once: int) -> Iterator[tuple[int, slice]]:
    for b in range(batch):
        for start in range(0, queries, at_once):
            yield b, slice(start, min(start + at_once, queries))


def _block(x: Tensor, batch: int, tokens: slice, head: int, dtype: torch.dtype) -> Tensor:
    """One block's keys or values, [n,D]; contiguous, so that x's strides change no bit."""
    return x[batch, tokens, head].to(dtype).contiguous()


def _rows(x: Tensor, heads: int, dtype: torch.dtype) -> Tensor:
    """x[t,Hq,D] -> [t*Hkv, Hq/Hkv, D], contiguous likewise."""
    return x.to(dtype).contiguous().view(x.shape[0] * heads, x.shape[1] // heads, x.shape[2])
