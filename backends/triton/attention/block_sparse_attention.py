"""block_sparse_attention: the query heads of a key head are the rows of a tile.

The gradients of keys and values go block by block: a program takes some tokens of one block and
meets all queries that name it, in order. Which those are is found by a sort.
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor
from triton import cdiv, jit

from transom.kernels.attention.block_sparse_attention import (
    block_sparse_attention,
    block_sparse_attention_backward,
    span_of,
)
from transom.requires import at_most, last_dim_contiguous

from .._language import dot, mixture, narrow
from .._launch import launch, programs, tile_for
from .._offer import floats, offer
from .._segments import by_target
from ..moe._gemm import power_of_two
from ..moe._weights import precision
from ._keys import LN2, LOG2E, gathered, kept_share, softmax_step


@jit
def _group(number, S, Hkv, G, BG: tl.constexpr):
    """(query of all batches, batch, its place, key head, heads of all query heads, which are there)
    of a piece of work."""
    query, g = tl.cast(number // Hkv, tl.int64), number % Hkv
    member = tl.arange(0, BG)
    head = g * G + tl.minimum(member, G - 1)
    return query, query // S, (query % S).to(tl.int32), g, head, member < G


@jit
def _tokens(block, inner, N, last, size, BK: tl.constexpr):
    """(tokens, which of them are seen) of a tile of a block, none behind `last`."""
    inside = inner + tl.arange(0, BK)
    token = block * size + inside
    seen = (inside < size) & (token < N) & (token <= last)
    return tl.minimum(tl.maximum(token, 0), N - 1).to(tl.int64), seen


@jit
def _forward(
    q,
    k,
    v,
    blocks,
    sink,
    o,
    lse,
    k_batch,
    k_row,
    k_head,
    v_batch,
    v_row,
    v_head,
    work,
    S,
    N,
    Sq,
    Hkv,
    G,
    L,
    size,
    span,
    scale,
    CAUSAL: tl.constexpr,
    D: tl.constexpr,
    V: tl.constexpr,
    BD: tl.constexpr,
    BV: tl.constexpr,
    BG: tl.constexpr,
    BK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # One query and key head at a time, its blocks in the list's order. Bound by the tensor cores
    # where G is large, else by the blocks' bytes.
    H, count = Hkv * G, tl.cdiv(N, size)
    for number in range(tl.program_id(0), work, tl.num_programs(0)):
        query, batch, s, g, head, there = _group(number, S, Hkv, G, BG)
        x = gathered(q + query * H * D, head * D, there, 0, BD, D, 0, q.dtype.element_ty)
        largest = tl.full((BG,), float("-inf"), tl.float32)
        mass = tl.zeros((BG,), tl.float32)
        sum = tl.zeros((BG, BV), tl.float32)
        last = N - 1
        if CAUSAL:
            last = N - S + s
        list = blocks + ((batch * Sq + s // span) * Hkv + g) * L
        for slot in range(0, L):
            block = tl.load(list + slot)
            if (block >= 0) & (block < count):
                chosen = block.to(tl.int32)
                stop = tl.minimum(size, tl.minimum(N - 1, last) + 1 - chosen * size)
                for inner in range(0, stop, BK):
                    token, seen = _tokens(chosen, inner, N, last, size, BK)
                    keys = gathered(
                        k + batch * k_batch + g * k_head,
                        token * k_row,
                        seen,
                        0,
                        BD,
                        D,
                        0,
                        q.dtype.element_ty,
                    )
                    values = gathered(
                        v + batch * v_batch + g * v_head,
                        token * v_row,
                        seen,
                        0,
                        BV,
                        V,
                        0,
                        q.dtype.element_ty,
                    )
                    logits = dot(x, tl.trans(keys), tl.zeros((BG, BK), tl.float32), PRECISION)
                    logits = tl.where(seen[None, :], logits * scale, float("-inf"))
                    weights, earlier, largest, mass = softmax_step(logits, largest, mass)
                    sum = mixture(weights, values, sum * earlier[:, None], PRECISION)
        norm = largest * LN2 + tl.log(mass)
        out = sum / tl.where(mass == 0, 1.0, mass)[:, None]
        if sink is not None:
            out *= kept_share(norm, tl.load(sink + head).to(tl.float32))[:, None]
        tl.store(lse + query * H + head, norm, mask=there)
        _put(o, query * H + head, there, out, V, BV)


@jit
def _put(base, row, there, tile, D: tl.constexpr, BLOCK: tl.constexpr):
    if D > 0:  # Ascend's lowering refuses a stride of 0
        column = tl.arange(0, BLOCK)
        at = base + row[:, None] * D + column[None, :]
        inside = there[:, None] & (column < D)[None, :]
        tl.store(at, narrow(tile, base.dtype.element_ty), mask=inside)


@jit
def _slopes(
    q,
    do,
    o,
    lse,
    dlse,
    sink,
    keys,
    values,
    seen,
    query,
    head,
    there,
    H,
    scale,
    D: tl.constexpr,
    V: tl.constexpr,
    BD: tl.constexpr,
    BV: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """(dS * scale, share * p, x, do) of some heads of a query and a tile of keys."""
    x = gathered(q + query * H * D, head * D, there, 0, BD, D, 0, q.dtype.element_ty)
    dy = gathered(do + query * H * V, head * V, there, 0, BV, V, 0, q.dtype.element_ty)
    out = gathered(o + query * H * V, head * V, there, 0, BV, V, 0, q.dtype.element_ty)
    delta = tl.sum(dy.to(tl.float32) * out.to(tl.float32), 1)
    norm = tl.load(lse + query * H + head, mask=there, other=float("-inf"))
    dnorm = tl.load(dlse + query * H + head, mask=there, other=0.0)
    share = kept_share(norm, tl.load(sink + head).to(tl.float32))
    none = tl.zeros((x.shape[0], keys.shape[0]), tl.float32)
    logits = dot(x, tl.trans(keys), none, PRECISION) * scale
    p = tl.exp(logits - tl.where(norm == float("-inf"), float("inf"), norm)[:, None])
    ds = dot(dy, tl.trans(values), none, PRECISION) - delta[:, None]
    ds = (ds * share[:, None] + dnorm[:, None]) * p * scale
    taken = seen[None, :] & (norm != float("-inf"))[:, None]
    return tl.where(taken, ds, 0.0), tl.where(taken, p * share[:, None], 0.0), x, dy


@jit
def _dq(
    q,
    do,
    o,
    lse,
    dlse,
    sink,
    k,
    v,
    blocks,
    dq,
    dsink,
    k_batch,
    k_row,
    k_head,
    v_batch,
    v_row,
    v_head,
    work,
    S,
    N,
    Sq,
    Hkv,
    G,
    L,
    size,
    span,
    scale,
    CAUSAL: tl.constexpr,
    D: tl.constexpr,
    V: tl.constexpr,
    BD: tl.constexpr,
    BV: tl.constexpr,
    BG: tl.constexpr,
    BK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    H, count = Hkv * G, tl.cdiv(N, size)
    for number in range(tl.program_id(0), work, tl.num_programs(0)):
        query, batch, s, g, head, there = _group(number, S, Hkv, G, BG)
        total = tl.zeros((BG, BD), tl.float32)
        last = N - 1
        if CAUSAL:
            last = N - S + s
        list = blocks + ((batch * Sq + s // span) * Hkv + g) * L
        for slot in range(0, L):
            block = tl.load(list + slot)
            if (block >= 0) & (block < count):
                chosen = block.to(tl.int32)
                stop = tl.minimum(size, tl.minimum(N - 1, last) + 1 - chosen * size)
                for inner in range(0, stop, BK):
                    token, seen = _tokens(chosen, inner, N, last, size, BK)
                    keys = gathered(
                        k + batch * k_batch + g * k_head,
                        token * k_row,
                        seen,
                        0,
                        BD,
                        D,
                        0,
                        q.dtype.element_ty,
                    )
                    values = gathered(
                        v + batch * v_batch + g * v_head,
                        token * v_row,
                        seen,
                        0,
                        BV,
                        V,
                        0,
                        q.dtype.element_ty,
                    )
                    ds, _, _, _ = _slopes(
                        q,
                        do,
                        o,
                        lse,
                        dlse,
                        sink,
                        keys,
                        values,
                        seen,
                        query,
                        head,
                        there,
                        H,
                        scale,
                        D,
                        V,
                        BD,
                        BV,
                        PRECISION,
                    )
                    total = mixture(ds, keys, total, PRECISION)
        _put(dq, query * H + head, there, total, D, BD)
        dy = gathered(do + query * H * V, head * V, there, 0, BV, V, 0, q.dtype.element_ty)
        out = gathered(o + query * H * V, head * V, there, 0, BV, V, 0, q.dtype.element_ty)
        delta = tl.sum(dy.to(tl.float32) * out.to(tl.float32), 1)
        norm = tl.load(lse + query * H + head, mask=there, other=0.0)
        drain = tl.load(sink + head).to(tl.float32)
        lost = tl.where(drain == float("-inf"), 0.0, 1.0 / (1.0 + tl.exp(norm - drain)))
        tl.store(dsink + query * H + head, -lost * delta, mask=there)


@jit
def _dkv(
    q,
    do,
    o,
    lse,
    dlse,
    sink,
    k,
    v,
    order,
    starts,
    dk,
    dv,
    k_batch,
    k_row,
    k_head,
    v_batch,
    v_row,
    v_head,
    B,
    S,
    N,
    Sq,
    Hkv,
    G,
    L,
    size,
    span,
    scale,
    CAUSAL: tl.constexpr,
    D: tl.constexpr,
    V: tl.constexpr,
    BD: tl.constexpr,
    BV: tl.constexpr,
    BG: tl.constexpr,
    BK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # dk and dv of BK tokens of a block: all queries of all lists that name it, in order.
    H, count, tiles = Hkv * G, tl.cdiv(N, size), tl.cdiv(size, BK)
    for number in range(tl.program_id(0), B * Hkv * count * tiles, tl.num_programs(0)):
        owner = number // tiles
        block, g, batch = owner % count, owner // count % Hkv, owner // count // Hkv
        inside = number % tiles * BK + tl.arange(0, BK)
        token = block * size + inside
        exists = (inside < size) & (token < N)
        at = tl.minimum(token, N - 1).to(tl.int64)
        wide = tl.cast(batch, tl.int64)
        base = k + wide * k_batch + g * k_head
        keys = gathered(base, at * k_row, exists, 0, BD, D, 0, q.dtype.element_ty)
        base = v + wide * v_batch + g * v_head
        values = gathered(base, at * v_row, exists, 0, BV, V, 0, q.dtype.element_ty)
        dkeys = tl.zeros((BK, BD), tl.float32)
        dvalues = tl.zeros((BK, BV), tl.float32)
        member = tl.arange(0, BG)
        head = g * G + tl.minimum(member, G - 1)
        for i in range(tl.load(starts + owner), tl.load(starts + owner + 1)):
            list = (tl.load(order + i) // L // Hkv % Sq).to(tl.int32)
            for s in range(list * span, tl.minimum(list * span + span, S)):
                seen = exists
                if CAUSAL:
                    seen = seen & (token <= N - S + s)
                ds, p, x, dy = _slopes(
                    q,
                    do,
                    o,
                    lse,
                    dlse,
                    sink,
                    keys,
                    values,
                    seen,
                    wide * S + s,
                    head,
                    member < G,
                    H,
                    scale,
                    D,
                    V,
                    BD,
                    BV,
                    PRECISION,
                )
                dkeys = mixture(tl.trans(ds), x, dkeys, PRECISION)
                dvalues = mixture(tl.trans(p), dy, dvalues, PRECISION)
        row = (wide * N + at) * Hkv + g
        _put(dk, row, exists, dkeys, D, BD)
        _put(dv, row, exists, dvalues, V, BV)


def _plan(
    q: Tensor, k: Tensor, v: Tensor, indices: Tensor, block_size: int, causal: bool, entry: str
):
    """(sizes, constants) that all three kernels take; entry: whose tiles."""
    (_, S, Hq, D), (_, Sq, Hkv, L) = q.shape, indices.shape
    N, V, G = k.shape[1], v.shape[3], Hq // Hkv
    if q.dtype == torch.float32:
        entry = {"tiles": "f32", "backward": "backward_f32"}[entry]
    entry = f"block_sparse_attention.{entry}"
    sizes = (S, N, Sq, Hkv, G, L, block_size, span_of(S, Sq, block_size))
    return sizes, dict(
        tile=tile_for(entry, q),
        entry=entry,
        CAUSAL=causal,
        D=D,
        V=V,
        BD=power_of_two(D),
        BV=power_of_two(V),
        BG=power_of_two(G),
        PRECISION=precision(q.dtype, q.dtype, q),
    )


_REQUIRES = (
    *floats("q"),
    last_dim_contiguous("k", "v"),
    at_most("N", 2**30),
    at_most("D", 512),
    at_most("Dv", 512),
)


@offer(block_sparse_attention, *_REQUIRES)
def forward(
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
    """o and lse."""
    B, S, Hq, _ = q.shape
    o = q.new_zeros((B, S, Hq, v.shape[3]))
    lse = torch.full((B, S, Hq), -torch.inf, dtype=torch.float32, device=q.device)
    if lse.numel() and k.shape[1] and block_indices.numel():
        sizes, more = _plan(q, k, v, block_indices, block_size, causal, "tiles")
        work = B * S * k.shape[2]
        launch(
            _forward,
            programs(q, work, more["tile"]),
            q.contiguous(),
            k,
            v,
            block_indices.contiguous(),
            None if sink is None else sink.contiguous(),
            o,
            lse,
            *k.stride()[:3],
            *v.stride()[:3],
            work,
            *sizes,
            scale * LOG2E,
            **more,
        )
    return o, lse


@offer(block_sparse_attention_backward, *_REQUIRES)
def backward(
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
    """(dq, dk, dv, dsink)."""
    (B, S, Hq, _), (_, N, Hkv, _) = q.shape, k.shape
    dq, dk, dv = (torch.zeros(a.shape, dtype=a.dtype, device=a.device) for a in (q, k, v))
    dsink = torch.zeros((B * S, Hq), dtype=torch.float32, device=q.device)
    if lse.numel() and N and block_indices.numel():
        sizes, more = _plan(q, k, v, block_indices, block_size, causal, "backward")
        q, do, o, lse, dlse, sink = (a.contiguous() for a in (q, do, o, lse, dlse, sink))
        args, work = (q, do, o, lse, dlse, sink, k, v), B * S * Hkv
        strides = (*k.stride()[:3], *v.stride()[:3])
        launch(
            _dq,
            programs(q, work, more["tile"]),
            *args,
            block_indices.contiguous(),
            dq,
            dsink,
            *strides,
            work,
            *sizes,
            scale,
            **more,
        )
        count = cdiv(N, block_size)
        owner = torch.arange(B * Hkv, device=q.device).view(B, 1, Hkv, 1) * count
        named = (block_indices >= 0) & (block_indices < count)
        target = torch.where(named, owner + block_indices.long(), -1)
        order, starts = by_target(target, B * Hkv * count)
        most = B * Hkv * count * cdiv(block_size, more["tile"]["BK"])
        launch(
            _dkv,
            programs(q, most, more["tile"]),
            *args,
            order,
            starts,
            dk,
            dv,
            *strides,
            B,
            *sizes,
            scale,
            **more,
        )
    return dq, dk, dv, dsink.sum(0).to(sink.dtype)
