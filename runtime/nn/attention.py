"""Sparse attention layers with their caches: window, HCA and CSA (V4), DSA (V3.2)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .. import config
from ..kernels.attention.lightning_indexer import lightning_indexer, lightning_indexer_kl
from ..kernels.attention.sparse_attention import sparse_attention
from .attention_cache import AttentionCache
from .attention_parts import (
    Compressor,
    Indexer,
    IndexShape,
    RMSNorm,
    TokenKeys,
    Where,
    rms_normalize,
    wide,
)
from .expected import expect
from .rotary import Angles, Rotary
from .untouched import plain, slower


class AttentionResult(NamedTuple):
    """output [B, S, hidden]; the cache after these tokens; index_loss [B, S] if asked for."""

    output: Tensor
    cache: AttentionCache
    index_loss: Tensor | None


@dataclass(frozen=True)
class SharedShape:
    """Numbers of V4 layers, whose one key head is the value too: all its forms share them.

    hidden, heads, head_dim   width of x, query heads, width of a head
    q_rank                    width of the query's latent
    out_groups, out_rank      heads are projected in groups to out_rank each, then to hidden
    window                    raw tokens a query sees, itself included
    eps                       of every RMS norm
    normalize_q               divide every query head by its own root mean square (V4, not V4.1)
    """

    hidden: int
    heads: int
    head_dim: int
    q_rank: int
    out_groups: int
    out_rank: int
    window: int
    eps: float
    normalize_q: bool = True


@dataclass(frozen=True)
class LatentShape:
    """Numbers of multi-head latent attention: a token is one latent row with a roped tail.

    hidden, heads      width of x, query heads
    q_rank, kv_rank    widths of the query's and of the token's latent
    nope, rope, value  channels of a head's key that are not roped, that are, and of its value
    eps                of both RMS norms
    scale              of the logits; None: (nope + rope) ** -0.5 (V3.2: times mscale ** 2)
    """

    hidden: int
    heads: int
    q_rank: int
    kv_rank: int
    nope: int
    rope: int
    value: int
    eps: float
    scale: float | None = None


class SparseAttention(nn.Module):
    """One attention layer that reads few of the tokens it has seen; made by one of its four forms.

    `window`  the latest tokens only
    `hca`     and every entry of a strong compression
    `csa`     and the entries, of a mild compression, that an indexer selects
    `dsa`     the tokens that an indexer selects

    A layer is called with x [B, S, hidden], any S, and the cache its last call returned (None at
    the start of a sequence): in whatever chunks a sequence comes, its outputs are the same.  Blocks
    and positions are counted from the first token given, so sequences must begin at slot 0: pad on
    the right.  Selection has no gradient: an indexer learns from the loss that
    `with_index_loss=True` returns, its inputs detached, and that loss reaches nothing else.
    """

    @staticmethod
    def window(
        shape: SharedShape,
        rotary: Rotary,
        *,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> SharedAttention:
        """A layer that sees the latest `shape.window` tokens and a sink."""
        return SharedAttention(shape, rotary, device=device, dtype=dtype)

    @staticmethod
    def hca(
        shape: SharedShape,
        rotary: Rotary,
        *,
        ratio: int,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> SharedAttention:
        """A layer that also sees every complete block of `ratio` tokens as one entry."""
        return SharedAttention(shape, rotary, ratio=ratio, device=device, dtype=dtype)

    @staticmethod
    def csa(
        shape: SharedShape,
        rotary: Rotary,
        *,
        ratio: int,
        index: IndexShape,
        overlap: bool = True,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> SharedAttention:
        """A layer that also sees `index.top_k` entries of `ratio` tokens, the ones best scored."""
        return SharedAttention(
            shape, rotary, ratio=ratio, overlap=overlap, index=index, device=device, dtype=dtype
        )

    @staticmethod
    def dsa(
        shape: LatentShape,
        rotary: Rotary,
        *,
        index: IndexShape,
        index_rotary: Rotary,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> LatentAttention:
        """A layer that sees the `index.top_k` tokens best scored."""
        return LatentAttention(shape, rotary, index, index_rotary, device=device, dtype=dtype)

    def forward(
        self, x: Tensor, cache: AttentionCache | None = None, *, with_index_loss: bool = False
    ) -> AttentionResult:
        """x [B, S, hidden] after `cache` -> output, next cache, and the indexer's loss or None."""
        raise TypeError("SparseAttention: made itself; expected window, hca, csa or dsa to make it")


class SharedAttention(SparseAttention):
    """A V4 layer: q, window tokens and entries roped, K = V, one softmax with a sink, roped back.

    qr = RMSNorm(wq_a x); q = rope(wq_b qr / rms); kv = rope(RMSNorm(wkv x)); entries from the
    compressor, entry w visible to the token at t if w < (t + 1) // ratio; out = wo_b(wo_a(o)), o
    turned back by the query's angles, because values were turned by their own.

    ratio 0 has no entries; overlap and index as in Compressor and SparseAttention.csa.
    `rotary` serves q, kv, entries and the indexer alike.
    Source: DeepSeek-V4 report, arXiv:2606.19348, sections 2.3 and 4.
    """

    def __init__(
        self,
        shape: SharedShape,
        rotary: Rotary,
        *,
        ratio: int = 0,
        overlap: bool = False,
        index: IndexShape | None = None,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if shape.heads % shape.out_groups:
            raise ValueError(
                f"SparseAttention: heads is {shape.heads}; must divide by out_groups = "
                f"{shape.out_groups}"
            )
        if shape.window < 1:
            raise ValueError(f"SparseAttention: window is {shape.window}; must be at least 1")
        if index is not None and ratio < 1:
            raise ValueError(f"SparseAttention: ratio is {ratio} with an index; must be at least 1")
        where: Where = {"device": device, "dtype": dtype}
        self.shape, self.rotary, self.ratio = shape, rotary, ratio
        hidden, size = shape.hidden, shape.heads * shape.head_dim
        self.wq_a = nn.Linear(hidden, shape.q_rank, bias=False, **where)
        self.q_norm = RMSNorm(shape.q_rank, shape.eps, **where)
        self.wq_b = nn.Linear(shape.q_rank, size, bias=False, **where)
        self.wkv = nn.Linear(hidden, shape.head_dim, bias=False, **where)
        self.kv_norm = RMSNorm(shape.head_dim, shape.eps, **where)
        self.sink = nn.Parameter(torch.zeros(shape.heads, device=device, dtype=dtype))
        # One matrix a group, stored like a linear layer's: [groups * out_rank, size / groups].
        self.wo_a = nn.Linear(
            size // shape.out_groups, shape.out_groups * shape.out_rank, bias=False, **where
        )
        self.wo_b = nn.Linear(shape.out_groups * shape.out_rank, hidden, bias=False, **where)
        self.compressor: Compressor | None = None
        self.indexer: Indexer | None = None
        self.index_keys: Compressor | None = None
        if ratio:
            self.compressor = Compressor(
                hidden, shape.head_dim, ratio, rotary, shape.eps, overlap=overlap, **where
            )
        if index is not None:
            self.indexer = Indexer(hidden, shape.q_rank, index, rotary, **where)
            self.index_keys = Compressor(
                hidden, index.dim, ratio, rotary, shape.eps, overlap=overlap, **where
            )

    def forward(
        self, x: Tensor, cache: AttentionCache | None = None, *, with_index_loss: bool = False
    ) -> AttentionResult:
        """x [B, S, hidden] after `cache` -> output, next cache, and the indexer's loss or None.

        Errors: ValueError for with_index_loss=True without an indexer.
        """
        if with_index_loss and self.indexer is None:
            raise ValueError("SparseAttention: with_index_loss is True; the layer has no indexer")
        shape, old = self.shape, cache or AttentionCache(0)
        expect("SparseAttention", "x", x, "B S hidden", hidden=shape.hidden)
        index = 0 if self.indexer is None else self.indexer.shape.dim
        old.check(
            x.shape[0],
            local=shape.head_dim,
            entries=shape.head_dim if self.compressor is not None else 0,
            keys=index,
            states=(self.compressor is not None, self.index_keys is not None),
        )
        tokens = x.shape[1]
        angles = self.rotary.angles(old.position, tokens, device=x.device)
        qr = self.q_norm(self.wq_a(x))
        q = self.wq_b(qr).unflatten(-1, (shape.heads, shape.head_dim))
        if shape.normalize_q:
            q = rms_normalize(q, shape.eps).to(x.dtype)
        q = self.rotary.turn(q, angles)
        local = _append(old.local, self.rotary.turn(self.kv_norm(self.wkv(x)), angles))

        entries, state = x.new_empty(x.shape[0], 0, shape.head_dim), None
        keys, index_state, indices, asked = None, None, None, None
        visible = _positions(old.position + 1, x) // max(1, self.ratio)
        if self.compressor is not None:
            entries, state = self.compressor(x, old.state)
            entries = _append(old.entries, entries)
        if self.indexer is not None and self.index_keys is not None:
            keys, index_state = self.index_keys(x.detach(), old.index_state)
            keys = _append(old.keys, keys)
            indices, asked = _select(self.indexer, x, qr, keys, visible, angles)

        o, lse = sparse_attention(
            q,
            entries,
            indices,
            visible=visible,
            local_kv=local,
            window=shape.window,
            sink=self.sink,
            scale=shape.head_dim**-0.5,
            return_lse=True,
        )
        loss = None
        if with_index_loss and keys is not None and indices is not None and asked is not None:
            scale = shape.head_dim**-0.5
            target = attention_target(q, entries, indices, lse, scale=scale, sink=self.sink)
            loss = lightning_indexer_kl(asked[0], keys, asked[1], target, indices)
        output = self._project(self.rotary.turn(o, angles, inverse=True))
        after = AttentionCache(
            old.position + tokens,
            _latest(local, shape.window - 1),
            entries if self.compressor is not None else None,
            keys,
            state,
            index_state,
        )
        return AttentionResult(output, after, loss)

    def _project(self, o: Tensor) -> Tensor:
        """[B, S, H, D] -> [B, S, hidden]: each group of heads by itself, then all together."""
        groups, rank = self.shape.out_groups, self.shape.out_rank
        grouped = o.flatten(2).unflatten(2, (groups, -1))
        if plain(self.wo_a):
            weight = self.wo_a.weight.unflatten(0, (groups, rank))
            return self.wo_b(torch.einsum("bsgi,gri->bsgr", grouped, weight).flatten(2))
        slower("SparseAttention", "wo_a", self.wo_a)
        # Of what the layer makes of every group only that group's own outputs count.
        each = self.wo_a(grouped).unflatten(-1, (groups, rank))
        return self.wo_b(each.diagonal(dim1=2, dim2=3).movedim(-1, 2).flatten(2))


class LatentAttention(SparseAttention):
    """A V3.2 layer: queries are brought into the latent space, and attend to selected latent rows.

    row = [RMSNorm(wkv_a x), rope(tail)]; head h's query is [q_nope wk_h, rope(q_rope)]; attention
    mixes the latent parts of the rows, and wv_h takes the mixture to the head's value.  The
    indexer's rotary is its own: V3.2 pairs its halves, while the layer pairs neighbours.
    Source: DeepSeek-V3.2 report, arXiv:2512.02556, section 2.1; DeepSeek-V2, arXiv:2405.04434.
    """

    def __init__(
        self,
        shape: LatentShape,
        rotary: Rotary,
        index: IndexShape,
        index_rotary: Rotary,
        *,
        device: torch.device | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if rotary.dim != shape.rope or rotary.span != "last":
            raise ValueError(
                f"SparseAttention: rotary turns the {rotary.span} {rotary.dim} channels; must be "
                f"the last rope = {shape.rope}"
            )
        where: Where = {"device": device, "dtype": dtype}
        self.shape, self.rotary, self.index_rotary = shape, rotary, index_rotary
        hidden, heads, rank = shape.hidden, shape.heads, shape.kv_rank
        self.wq_a = nn.Linear(hidden, shape.q_rank, bias=False, **where)
        self.q_norm = RMSNorm(shape.q_rank, shape.eps, **where)
        self.wq_b = nn.Linear(shape.q_rank, heads * (shape.nope + shape.rope), bias=False, **where)
        self.wkv_a = nn.Linear(hidden, rank + shape.rope, bias=False, **where)
        self.kv_norm = RMSNorm(rank, shape.eps, **where)
        self.wkv_b = nn.Linear(rank, heads * (shape.nope + shape.value), bias=False, **where)
        self.wo = nn.Linear(heads * shape.value, hidden, bias=False, **where)
        self.indexer = Indexer(hidden, shape.q_rank, index, index_rotary, **where)
        self.index_keys = TokenKeys(hidden, index.dim, index_rotary, **where)

    def forward(
        self, x: Tensor, cache: AttentionCache | None = None, *, with_index_loss: bool = False
    ) -> AttentionResult:
        """x [B, S, hidden] after `cache` -> output, next cache, and the indexer's loss or None."""
        shape, old = self.shape, cache or AttentionCache(0)
        expect("SparseAttention", "x", x, "B S hidden", hidden=shape.hidden)
        width, index = shape.kv_rank + shape.rope, self.indexer.shape.dim
        old.check(x.shape[0], local=0, entries=width, keys=index, states=(False, False))
        tokens = x.shape[1]
        angles = self.rotary.angles(old.position, tokens, device=x.device)
        index_angles = self.index_rotary.angles(old.position, tokens, device=x.device)
        qr = self.q_norm(self.wq_a(x))
        q = self.wq_b(qr).unflatten(-1, (shape.heads, shape.nope + shape.rope))
        q = self.rotary.turn(q, angles)
        latent, tail = self.wkv_a(x).split([shape.kv_rank, shape.rope], -1)
        rows = self.rotary.turn(torch.cat([self.kv_norm(latent), tail], -1), angles)
        rows = _append(old.entries, rows)
        keys = _append(old.keys, self.index_keys(x.detach(), index_angles))
        visible = _positions(old.position + 1, x)
        indices, asked = _select(self.indexer, x, qr, keys, visible, index_angles)

        attend = self._absorbed if plain(self.wkv_b) else self._expanded
        o, target = attend(q, rows, indices, visible, with_index_loss)
        loss = None
        if target is not None:
            loss = lightning_indexer_kl(asked[0], keys, asked[1], target, indices)
        output = self.wo(o.flatten(2))
        after = AttentionCache(old.position + tokens, entries=rows, keys=keys)
        return AttentionResult(output, after, loss)

    def _scale(self) -> float:
        shape = self.shape
        return (shape.nope + shape.rope) ** -0.5 if shape.scale is None else shape.scale

    def _absorbed(
        self, q: Tensor, rows: Tensor, indices: Tensor, visible: Tensor, with_target: bool
    ) -> tuple[Tensor, Tensor | None]:
        """o [B, S, H, value], and the indexer's target: wkv_b's weight moves to q and o, so that
        one latent row is key and value of all heads."""
        shape, scale = self.shape, self._scale()
        weight = self.wkv_b.weight.unflatten(0, (shape.heads, -1))
        wk, wv = weight.split([shape.nope, shape.value], 1)
        nope, rope = q.split([shape.nope, shape.rope], -1)
        q = torch.cat([torch.einsum("bshn,hnr->bshr", nope, wk), rope], -1)
        o, lse = sparse_attention(
            q, rows, indices, visible=visible, scale=scale, v_dim=shape.kv_rank, return_lse=True
        )
        target = attention_target(q, rows, indices, lse, scale=scale) if with_target else None
        return torch.einsum("bshr,hvr->bshv", o, wv), target

    def _expanded(
        self, q: Tensor, rows: Tensor, indices: Tensor, visible: Tensor, with_target: bool
    ) -> tuple[Tensor, Tensor | None]:
        """The same where wkv_b is no plain nn.Linear any more (LoRA, hooks): it is called on every
        row, and every head attends to keys and values of its own."""
        shape, scale, batch = self.shape, self._scale(), q.shape[0]
        slower("SparseAttention", "wkv_b", self.wkv_b)
        latent, tail = rows.split([shape.kv_rank, shape.rope], -1)
        made = self.wkv_b(latent).unflatten(-1, (shape.heads, -1)).transpose(1, 2)
        key, value = made.split([shape.nope, shape.value], -1)
        tail = tail[:, None].expand(-1, shape.heads, -1, -1)
        own = torch.cat([value, key, tail], -1).flatten(0, 1)
        asks = nn.functional.pad(q, (shape.value, 0)).transpose(1, 2).flatten(0, 1)[:, :, None]

        def of_head(x: Tensor) -> Tensor:
            return x.repeat_interleave(shape.heads, 0)

        listed = of_head(indices)
        o, lse = sparse_attention(
            asks,
            own,
            listed,
            visible=of_head(visible),
            scale=scale,
            v_dim=shape.value,
            return_lse=True,
        )
        target = None
        if with_target:
            # Each head attends to listed rows only, so that their mean is the heads' joint share.
            each = attention_target(asks, own, listed, lse, scale=scale)
            target = each.unflatten(0, (batch, shape.heads)).mean(1)
        return o.squeeze(2).unflatten(0, (batch, shape.heads)).transpose(1, 2), target


@torch.no_grad()
def attention_target(
    q: Tensor, kv: Tensor, indices: Tensor, lse: Tensor, *, scale: float, sink: Tensor | None = None
) -> Tensor:
    """target[b,s,l] = sum_h p_hl / sum_hl p_hl: what the layer attends to, as the indexer's goal.

    p is the layer's own softmax over all it sees, window and sink included; listed keys only are
    reported, so that the window cannot stand in for them.

    q [B, S, H, D], kv [B, N, D], indices [B, S, L] and scale as given to sparse_attention, lse
    [B, S, H] as it returned it, sink [H].
    Returns [B, S, L] float32 (float64 for float64): 0 behind a -1; rows sum to 1, or 0 if nothing
    is listed.  Constant to autograd; queries are taken in blocks that fit the workspace.
    Source: DeepSeek-V3.2 report, arXiv:2512.02556, section 2.1.1.
    """
    q, total = q.detach(), lse if sink is None else torch.logaddexp(lse, wide(sink))
    batch, queries, heads, dim = q.shape
    target = torch.zeros(indices.shape, dtype=lse.dtype, device=q.device)
    if kv.shape[1] == 0 or target.numel() == 0:
        return target
    each = indices.shape[2] * (2 * dim + 2 * heads) * lse.element_size()
    step = max(1, config.workspace_bytes() // each)
    for b in range(batch):
        for s in range(0, queries, step):
            at = indices[b, s : s + step].long()
            listed = ((at >= 0) & (at < kv.shape[1]))[:, None]
            rows = wide(kv[b, at.clamp(0, kv.shape[1] - 1)])
            logits = wide(q[b, s : s + step]) @ rows.mT * scale
            p = torch.exp(logits - total[b, s : s + step, :, None])
            shares = torch.where(listed, p, 0.0).sum(1)
            mass = shares.sum(1, keepdim=True)
            target[b, s : s + step] = shares / torch.where(mass > 0, mass, 1.0)
    return target


def _select(
    indexer: Indexer, x: Tensor, qr: Tensor, keys: Tensor, visible: Tensor, angles: Angles
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """The keys each query selects, and what the indexer asked with: q and weights."""
    q, weights = indexer(x.detach(), qr.detach(), angles)
    # More places than there are keys would only carry -1.
    top_k = min(indexer.shape.top_k, max(1, keys.shape[1]))
    return lightning_indexer(q, keys, weights, top_k, visible=visible), (q, weights)


def _positions(first: int, x: Tensor) -> Tensor:
    """first, first + 1, ... for the tokens of x [B, S, hidden]: [B, S]."""
    tokens = torch.arange(first, first + x.shape[1], device=x.device)
    return tokens.expand(x.shape[0], -1)


def _append(rows: Tensor | None, new: Tensor) -> Tensor:
    return new if rows is None else torch.cat([rows, new], 1)


def _latest(rows: Tensor, count: int) -> Tensor:
    """The last `count` rows; a copy if some are dropped, since a view would keep all of them."""
    drop = rows.shape[1] - count
    return rows[:, drop:].clone() if drop > 0 else rows
