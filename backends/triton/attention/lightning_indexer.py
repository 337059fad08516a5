"""lightning_indexer: scores of some queries at a time, of which each one's best are found exactly.

Scores stand in the workspace for as many queries as fit, never for all. A query's top_k-th largest
score is found four bits at a time: sixteen candidates are compared with every score and counted.
Comparisons are of floats, so that zeros of both signs tie and NaN is never counted.
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor
from triton import cdiv, jit

from transom import config
from transom.kernels.attention.lightning_indexer import (
    lightning_indexer,
    lightning_indexer_kl,
    lightning_indexer_kl_backward,
)
from transom.requires import at_most, last_dim_contiguous

from .._language import dot
from .._launch import launch, programs, tile_for
from .._offer import floats, offer
from ..moe._gemm import power_of_two
from ._indexer_kl import listed_scores, log_softmax, through_scores
from ._keys import gathered

LOWEST = tl.constexpr(-0x7F800001)
"""`_number`'s argument for -inf; what is below is NaN."""


@jit
def _score(
    q,
    k,
    weights,
    visible,
    scores,
    k_batch,
    k_row,
    first,
    groups,
    each,
    S,
    H,
    N,
    D: tl.constexpr,
    BD: tl.constexpr,
    BQ: tl.constexpr,
    BH: tl.constexpr,
    BK: tl.constexpr,
):
    # Scores of groups of up to `each` queries of one batch with a tile of BK keys, which stays on
    # the chip; a query's heads are the rows of a product. Bound by the tensor cores.
    tiles, per_batch = tl.cdiv(N, BK), tl.cdiv(S, each)
    for number in range(tl.program_id(0), groups * tiles, tl.num_programs(0)):
        group, start = first + number // tiles, number % tiles * BK
        batch, s = tl.cast(group // per_batch, tl.int64), group % per_batch * each
        j = start + tl.arange(0, BK)
        row = tl.minimum(j, N - 1).to(tl.int64) * k_row
        keys = gathered(k + batch * k_batch, row, j < N, 0, BD, D, 0, k.dtype.element_ty)
        for i in range(0, tl.minimum(each, S - s)):
            query = batch * S + s + i
            limit = tl.minimum(tl.load(visible + query), N)
            if limit > start:
                total = tl.zeros((BK,), tl.float32)
                for h in range(0, H, BH):
                    head = h + tl.arange(0, BH)
                    there = head < H
                    head = tl.minimum(head, H - 1)
                    at = q + query * H * D
                    x = gathered(at, head * D, there, 0, BD, D, 0, q.dtype.element_ty)
                    dots = dot(x, tl.trans(keys), tl.zeros((BH, BK), tl.float32), "ieee")
                    factor = tl.load(weights + query * H + head).to(tl.float32)
                    # Compared, since a maximum may lose NaN; a head that is not there adds nothing.
                    parts = tl.where(dots < 0, 0.0, dots) * factor[:, None]
                    total += tl.sum(tl.where(there[:, None], parts, 0.0), 0)
                into = scores + (tl.cast(number // tiles, tl.int64) * each + i) * N
                tl.store(into + j, total, mask=j < limit)


@jit
def _number(order):
    """The float32 at a place in ascending order, an int32; -inf for places of NaN below it."""
    order = tl.maximum(order, LOWEST)
    return (order ^ ((order >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@jit
def _select(scores, visible, out, first, groups, each, S, N, top_k, BN: tl.constexpr):
    # A query at a time. Its scores are read eight times for the threshold, once to count what lies
    # above it, once to write: bound by the cache's bandwidth, behind the scores' product.
    per_batch = tl.cdiv(S, each)
    for i in range(tl.program_id(0), groups * each, tl.num_programs(0)):
        group = first + i // each
        batch, s = tl.cast(group // per_batch, tl.int64), group % per_batch * each + i % each
        here = s < S  # a batch's last group may be short
        query = batch * S + tl.minimum(s, S - 1)
        limit = tl.minimum(tl.maximum(tl.load(visible + query), 0), N).to(tl.int32)
        limit = tl.where(here, limit, 0)
        row, into = scores + tl.cast(i, tl.int64) * N, out + query * top_k
        order = tl.cast(-(2**31), tl.int32)
        digit = tl.arange(0, 16)
        for turn in range(0, 8):
            step = tl.cast(1, tl.int32) << (28 - 4 * turn)
            candidate = _number(order + digit * step)
            count = tl.zeros((16,), tl.int32)
            for start in range(0, limit, BN):
                j = start + tl.arange(0, BN)
                score = tl.load(row + j, mask=j < limit, other=float("nan"))
                reached = score[:, None] >= candidate[None, :]
                count += tl.sum(reached.to(tl.int32), 0)
            # Fewer than top_k scores in all: everything from -inf on is selected.
            order += tl.maximum(tl.sum((count >= top_k).to(tl.int32), 0) - 1, 0) * step
        threshold = _number(order)
        above = tl.zeros((BN,), tl.int32)
        for start in range(0, limit, BN):
            j = start + tl.arange(0, BN)
            score = tl.load(row + j, mask=j < limit, other=float("nan"))
            above += (score > threshold).to(tl.int32)
        room = top_k - tl.sum(above, 0)
        written = tl.cast(0, tl.int32)
        for start in range(0, limit, BN):
            j = start + tl.arange(0, BN)
            score = tl.load(row + j, mask=j < limit, other=float("nan"))
            level = (score == threshold).to(tl.int32)
            # Of equal scores the first ones, as many as there is room for.
            kept = (score > threshold) | ((level > 0) & (tl.cumsum(level, 0) <= room))
            room -= tl.sum(level, 0)
            at = written + tl.cumsum(kept.to(tl.int32), 0) - 1
            tl.store(into + at, j, mask=kept)
            written += tl.sum(kept.to(tl.int32), 0)
        for start in range(written, tl.where(here, top_k, 0), BN):
            place = start + tl.arange(0, BN)
            tl.store(into + place, tl.full((BN,), -1, tl.int32), mask=place < top_k)


@offer(
    lightning_indexer,
    *floats("q"),
    last_dim_contiguous("k"),
    at_most("N", 2**30),
    at_most("D", 512),
)
def forward(q: Tensor, k: Tensor, weights: Tensor, top_k: int, *, visible: Tensor) -> Tensor:
    """The top_k keys j < visible[b,s] by sum_h weights[b,s,h] * relu(q[b,s,h] . k[b,j])."""
    (B, S, H, D), N = q.shape, k.shape[1]
    out = torch.empty((B, S, top_k), dtype=torch.int32, device=q.device)
    if not out.numel():
        return out
    entry = "lightning_indexer." + ("f32" if q.dtype == torch.float32 else "score")
    tile = tile_for(entry, q)
    finder = tile_for("lightning_indexer.select", q)
    q, weights, visible = q.contiguous(), weights.contiguous(), visible.contiguous()
    each = min(tile["BQ"], S)
    groups = B * cdiv(S, each)
    at_once = max(1, min(groups, config.workspace_bytes() // (4 * each * max(1, N))))
    scores = torch.empty((at_once * each, N), dtype=torch.float32, device=q.device)
    for first in range(0, groups, at_once):
        some = min(at_once, groups - first)
        if N:
            launch(
                _score,
                programs(q, some * cdiv(N, tile["BK"]), tile),
                q,
                k,
                weights,
                visible,
                scores,
                *k.stride()[:2],
                first,
                some,
                each,
                S,
                H,
                N,
                tile=tile,
                entry=entry,
                D=D,
                BD=power_of_two(D),
            )
        launch(
            _select,
            programs(q, some * each, finder),
            scores,
            visible,
            out,
            first,
            some,
            each,
            S,
            N,
            top_k,
            tile=finder,
            entry="lightning_indexer.select",
        )
    return out


_KL = (*floats("q"), last_dim_contiguous("k"), at_most("N", 2**30), at_most("D", 512))


@offer(lightning_indexer_kl, *_KL)
def kl(q: Tensor, k: Tensor, weights: Tensor, target: Tensor, indices: Tensor) -> Tensor:
    """loss[b,s] = sum_l target_l * (log target_l - log softmax(I)_l)."""
    q, weights, indices = q.contiguous(), weights.contiguous(), indices.contiguous()
    scores = listed_scores(q, k, weights, indices)
    goal = torch.where(scores == -torch.inf, 0.0, target.float())
    # 0 * log 0 is 0 here, and what is not listed has target 0.
    terms = goal * (goal.log() - log_softmax(scores))
    return torch.where(goal == 0, 0.0, terms).sum(2)


@offer(lightning_indexer_kl_backward, *_KL)
def kl_backward(
    q: Tensor, k: Tensor, weights: Tensor, target: Tensor, indices: Tensor, dloss: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dq, dk, dweights, dtarget), from dI = dloss * (softmax(I) * sum(target) - target)."""
    q, weights, indices = q.contiguous(), weights.contiguous(), indices.contiguous()
    scores = listed_scores(q, k, weights, indices)
    listed, outer = scores != -torch.inf, dloss[..., None]
    goal, log_p = torch.where(listed, target.float(), 0.0), log_softmax(scores)
    share = torch.where(listed, log_p.exp(), 0.0)
    dscores = outer * (share * goal.sum(2, keepdim=True) - goal)
    dtarget = torch.where(goal == 0, 0.0, outer * (1 + goal.log() - log_p)).to(target.dtype)
    dq, dk, dweights = through_scores(q, k, weights, indices, dscores)
    return dq, dk, dweights, dtarget
