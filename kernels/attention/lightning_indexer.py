"""The lightning indexer: score every key for every query with many small heads, keep the best."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from transom import config
from transom.declare import op
from transom.kernels import _bounds as bounds
from transom.kernels._ordered_sum import add_rows

# Keys scored at a time: wide enough that a matrix product dominates the merge of the best so far.
_KEYS = 2048


@op(
    "q[B,S,H,D], k[B,N,D], weights[B,S,H], visible[B,S] -> indices[B,S,top_k]",
    dtypes="q: float; k: q; weights: q | f32; visible: index; indices: i32",
    flops="2*B*S*N*H*(D+1)",
    accumulate="H*D",
    autocast="low: q k; f32: weights",
    batch="B",
    varying="B S M N",
    examples=[
        dict(B=2, S=9, N=13, H=4, D=8, top_k=5),
        dict(B=1, S=1024, N=1024, H=64, D=128, top_k=512),
        dict(B=1, S=1, N=32768, H=64, D=128, top_k=2048),
    ],
)
def lightning_indexer(
    q: Tensor, k: Tensor, weights: Tensor, top_k: int, *, visible: Tensor
) -> Tensor:
    """The top_k keys j < visible[b,s] by I[b,s,j] = sum_h weights[b,s,h] * relu(q[b,s,h] . k[b,j]).

    q        [B, S, H, D], k [B, N, D]: one key for all heads
    weights  [B, S, H], of any sign: scores may be negative
    top_k    1 to 2^20; may exceed N
    visible  [B, S]: the first visible[b,s] keys may be selected; taken into 0 .. N
    Returns indices [B, S, top_k] int32, new memory: selected keys in ascending order, then -1.  Of
    equal scores the lower index is kept.  A key whose score is NaN is never selected; a score of
    +inf is above all others, and a key whose score is -inf is selected if there is room.  Scores
    are float32 (float64 for float64 inputs); they are made for a block of queries and keys at a
    time.  There is no gradient: the indexer learns from `lightning_indexer_kl`.
    Errors: ValueError for other top_k and for shapes, TypeError for dtypes.
    Source: DeepSeek-V3.2 report, arXiv:2512.02556, eq. 1.
    """
    batch, queries, heads, dim = q.shape
    keys = k.shape[1]
    wide = torch.promote_types(q.dtype, torch.float32)
    indices = torch.full((batch, queries, top_k), -1, dtype=torch.int32, device=q.device)
    limit = visible.clamp(0, keys)[..., None]
    budget, size = config.workspace_bytes(), wide.itemsize
    tile = max(1, min(keys, max(_KEYS, top_k), budget // (2 * max(1, heads + dim) * size)))
    # A query's products with a tile for every head, and about eight words a candidate to merge; a
    # sequence's tile of keys.
    query, sequence = tile * heads * size + 64 * (tile + top_k), tile * dim * size
    some = max(1, budget // max(1, queries * query + sequence))
    step = max(1, min(queries, (budget - sequence) // query))
    for b in range(0, batch, some):
        for s in range(0, queries, step):
            block = slice(b, b + some), slice(s, s + step)
            asked, factor = q[block].to(wide), weights[block].to(wide)[..., None, :]
            score = asked.new_empty(*asked.shape[:2], 0)
            index = indices.new_empty(score.shape)
            for n in range(0, keys, tile):
                part = k[b : b + some, n : n + tile].to(wide)
                here = torch.arange(n, n + part.shape[1], dtype=torch.int32, device=q.device)
                dots = (asked.flatten(1, 2) @ part.mT).relu_().unflatten(1, asked.shape[1:3])
                scored = (factor @ dots).squeeze(2)
                allowed = (here < limit[block]) & ~scored.isnan()
                score = torch.cat([score, scored], 2)
                index = torch.cat([index, torch.where(allowed, here, -1)], 2)
                score, index = _keep_best(score, index, top_k)
            indices[block][..., : index.shape[2]] = index
    return indices


def _keep_best(score: Tensor, index: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """The top_k best candidates, in the order they came in and packed to the front.

    Candidates come in ascending order of their index, -1 marks one that does not count.  topk alone
    says nothing about ties; its last value does: all above it stay, and of those equal to it as
    many of the first as there is room for.
    """
    valid = index >= 0
    score = score.masked_fill(~valid, -torch.inf)
    if score.shape[2] > top_k:
        last = score.topk(top_k, sorted=False).values.amin(2, keepdim=True)
        above = score > last
        level = valid & (score == last)
        keep = above | (level & (level.cumsum(2) <= top_k - above.sum(2, keepdim=True)))
    else:
        keep = valid
    width = min(top_k, score.shape[2])
    # Everything that goes lands in one column more, which is cut off.
    place = torch.where(keep, keep.cumsum(2) - 1, width)
    best = score.new_full((*score.shape[:2], width + 1), -torch.inf).scatter_(2, place, score)
    kept = index.new_full(best.shape, -1).scatter_(2, place, index)
    return best[..., :width], kept[..., :width]


@lightning_indexer.reference
def _(q, k, weights, top_k, visible):  # type: ignore[no-untyped-def]
    batch, queries = q.shape[:2]
    indices = np.full((batch, queries, top_k), -1)
    for b in range(batch):
        for s in range(queries):
            seen = min(max(visible[b, s], 0), k.shape[1])
            with np.errstate(invalid="ignore", over="ignore"):
                dots = np.maximum(q[b, s] @ k[b, :seen].T, 0)
                score = (weights[b, s][:, None] * dots).sum(0)
            ranked = [j for j in np.argsort(-score, kind="stable") if not np.isnan(score[j])]
            chosen = sorted(ranked[:top_k])
            indices[b, s, : len(chosen)] = chosen
    return indices


@lightning_indexer.check
def _(top_k: int) -> str | None:
    if top_k < 1:
        return f"top_k is {top_k}; must be at least 1"
    return bounds.above(bounds.TOP_K, top_k=top_k)


@lightning_indexer.sample
def _(rng, dims):  # type: ignore[no-untyped-def]
    # Small whole numbers: scores are exact in every dtype and often equal, so that the selection is
    # one and the same whatever the order of a sum, and the rule for ties is always in play. Now and
    # then keys with infinite numbers and NaN.
    batch, queries, keys, heads, dim = (dims[d] for d in "BSNHD")
    k = rng.integers(-2, 3, (batch, keys, dim)).astype(np.float64)
    if rng.random() < 0.3:
        k[rng.random(k.shape) < 0.1] = rng.choice([np.inf, -np.inf, np.nan])
    return {
        "q": rng.integers(-2, 3, (batch, queries, heads, dim)).astype(np.float64),
        "k": k,
        "weights": rng.integers(-2, 4, (batch, queries, heads)).astype(np.float64) / 2,
        "visible": rng.integers(0, keys + 2, (batch, queries)),
    }


_KL_DTYPES = "q: float; k: q; weights: q | f32; target: q | f32; indices: index"


@op(
    "q[B,S,H,D], k[B,N,D], weights[B,S,H], target[B,S,L], indices[B,S,L] -> loss[B,S]",
    dtypes=_KL_DTYPES + "; loss: acc(q)",
    flops="2*B*S*L*H*(D+1)",
    accumulate="H*D+L",
    autocast="low: q k; f32: weights target",
    batch="B",
    examples=[dict(B=2, S=5, H=4, D=8, N=13, L=6), dict(B=1, S=1024, H=64, D=128, N=1024, L=512)],
)
def lightning_indexer_kl(
    q: Tensor, k: Tensor, weights: Tensor, target: Tensor, indices: Tensor
) -> Tensor:
    """loss[b,s] = sum_l target_l * (log target_l - log softmax(I)_l), I over the keys indices[b,s].

    I is the score of `lightning_indexer`; the softmax is over the listed keys, a -1 is no part
    of it, and a key listed twice counts twice.  This is KL(target || softmax(I)) when the
    target sums to 1, as the head-summed, L1-normalised attention over the listed keys does.

    q, k, weights  as in lightning_indexer
    target         [B, S, L], at least 0; detach it where it comes from the layer that learns
    indices        [B, S, L]: any value < 0 or >= N stands for none, as in sparse_attention
    Returns loss [B, S], float32 (float64 for float64): 0 for a query that lists no key.
    Gradients reach q, k, weights and target (0 where a target is 0: its own is infinite there).
    Errors: ValueError for shapes, TypeError for dtypes.
    Source: DeepSeek-V3.2 report, arXiv:2512.02556, eqs. 3 and 4.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    loss = torch.zeros(q.shape[:2], dtype=wide, device=q.device)
    for b, block in _blocks(q, k, indices):
        scored = _Listed(q[b, block], k[b], weights[b, block], indices[b, block])
        goal = torch.where(scored.valid, target[b, block].to(wide), 0.0)
        terms = goal * (goal.log() - scored.log_softmax())
        # 0 * log 0 is 0 here, and an entry that is not listed has target 0.
        loss[b, block] = torch.where(goal == 0, 0.0, terms).sum(1)
    return loss


def _blocks(q: Tensor, k: Tensor, indices: Tensor) -> list[tuple[int, slice]]:
    """(sequence, queries) blocks whose gathered keys and scores stay within the workspace."""
    batch, queries, heads, dim = q.shape
    listed = indices.shape[2]
    if k.shape[1] == 0 or listed == 0:
        return []
    each = listed * (3 * dim + 4 * heads + 8) * torch.promote_types(q.dtype, torch.float32).itemsize
    step = max(1, config.workspace_bytes() // each)
    return [(b, slice(s, s + step)) for b in range(batch) for s in range(0, queries, step)]


class _Listed:
    """Scores of the listed keys of a block of queries: rows [R, L, D], dots [R, H, L], I [R, L]."""

    def __init__(self, q: Tensor, k: Tensor, weights: Tensor, indices: Tensor) -> None:
        wide = torch.promote_types(q.dtype, torch.float32)
        self.q, self.weights = q.to(wide), weights.to(wide)
        self.valid = (indices >= 0) & (indices < k.shape[0])
        self.index = torch.where(self.valid, indices, -1)
        rows = k[self.index.clamp(min=0).long()].to(wide)
        self.rows = torch.where(self.valid[..., None], rows, 0.0)
        self.dots = self.q @ self.rows.mT
        self.score = (self.weights[:, None] @ self.dots.relu()).squeeze(1)

    def log_softmax(self) -> Tensor:
        """log softmax(I) over the listed keys; meaningless (but finite) where nothing is listed."""
        score = self.score.masked_fill(~self.valid, -torch.inf)
        total = score.logsumexp(1, keepdim=True)
        return self.score - torch.where(self.valid.any(1, keepdim=True), total, 0.0)


@lightning_indexer_kl.reference
def _(q, k, weights, target, indices):  # type: ignore[no-untyped-def]
    batch, queries = q.shape[:2]
    loss = np.zeros((batch, queries))
    for b in range(batch):
        for s in range(queries):
            listed = (indices[b, s] >= 0) & (indices[b, s] < k.shape[1])
            if listed.any():
                rows, goal = k[b, indices[b, s][listed]], target[b, s][listed]
                score = (weights[b, s][:, None] * np.maximum(q[b, s] @ rows.T, 0)).sum(0)
                score = score - score.max()
                log_p = score - np.log(np.exp(score).sum())
                some = goal != 0
                loss[b, s] = (goal[some] * (np.log(goal[some]) - log_p[some])).sum()
    return loss


def _sample_lists(rng, dims):  # type: ignore[no-untyped-def]
    """Distinct keys in ascending order, then -1, and a target that sums to 1."""
    batch, queries, keys, length = (dims[d] for d in "BSNL")
    indices = np.full((batch, queries, length), -1)
    target = rng.random((batch, queries, length))
    for b in range(batch):
        for s in range(queries):
            some = int(rng.integers(0, min(length, keys) + 1))
            indices[b, s, :some] = np.sort(rng.choice(keys, some, replace=False)) if some else []
            target[b, s, :some] /= max(target[b, s, :some].sum(), 1e-3)
    return {"indices": indices, "target": target}


lightning_indexer_kl.sample(_sample_lists)


@op(
    "q[B,S,H,D], k[B,N,D], weights[B,S,H], target[B,S,L], indices[B,S,L], dloss[B,S]"
    " -> dq[B,S,H,D], dk[B,N,D], dweights[B,S,H], dtarget[B,S,L]",
    dtypes=_KL_DTYPES + "; dloss: acc(q); dq: q; dk: k; dweights: weights; dtarget: target",
    flops="2*B*S*L*H*(3*D+2)",
    accumulate="H*D+L+S",
    batch="B",
    examples=[dict(B=2, S=5, H=4, D=8, N=13, L=6), dict(B=1, S=1024, H=64, D=128, N=1024, L=512)],
)
def lightning_indexer_kl_backward(
    q: Tensor, k: Tensor, weights: Tensor, target: Tensor, indices: Tensor, dloss: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of lightning_indexer_kl, from dI = dloss * (softmax(I) * sum(target) - target).

    dweights_h = sum_l dI_l relu(q_h . k_l); dq_h = sum_l dI_l weights_h [q_h . k_l > 0] k_l;
    dk_j = sum over queries, heads and places l that list j of dI_l weights_h [q_h . k_j > 0] q_h;
    dtarget_l = dloss * (1 + log target_l - log softmax(I)_l).

    dloss [B, S]; the other arguments as in lightning_indexer_kl.
    Returns dq, dk, dweights, dtarget: new tensors in the dtypes of what they belong to.  Sums are
    float32 (float64 for float64); those over queries are taken in the order of the queries.
    Errors: those of lightning_indexer_kl.
    Source: derived from arXiv:2512.02556, eqs. 1 and 4; checked against finite differences.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    dq, dweights, dtarget = (x.new_zeros(x.shape) for x in (q, weights, target))
    dk = torch.zeros(k.shape, dtype=wide, device=k.device)
    for b, block in _blocks(q, k, indices):
        scored = _Listed(q[b, block], k[b], weights[b, block], indices[b, block])
        goal = torch.where(scored.valid, target[b, block].to(wide), 0.0)
        log_p, outer = scored.log_softmax(), dloss[b, block, None].to(wide)
        share = torch.where(scored.valid, log_p.exp(), 0.0)
        dscore = outer * (share * goal.sum(1, keepdim=True) - goal)
        dgoal = torch.where(goal == 0, 0.0, outer * (1 + goal.log() - log_p))
        dtarget[b, block] = dgoal.to(target.dtype)
        dweights[b, block] = (scored.dots.relu() @ dscore[..., None]).squeeze(2).to(weights.dtype)
        ddots = scored.weights[..., None] * dscore[:, None]
        ddots = torch.where(scored.dots > 0, ddots, 0.0)
        dq[b, block] = (ddots @ scored.rows).to(q.dtype)
        drows = ddots.mT @ scored.q
        add_rows(dk[b], scored.index.flatten(), drows.flatten(0, 1))
    return dq, dk.to(k.dtype), dweights, dtarget


@lightning_indexer_kl_backward.reference
def _(q, k, weights, target, indices, dloss):  # type: ignore[no-untyped-def]
    dq, dk, dweights, dtarget = (np.zeros_like(x) for x in (q, k, weights, target))
    batch, queries = q.shape[:2]
    for b in range(batch):
        for s in range(queries):
            listed = (indices[b, s] >= 0) & (indices[b, s] < k.shape[1])
            if not listed.any():
                continue
            at = indices[b, s][listed]
            rows, goal = k[b, at], target[b, s][listed]
            dots = q[b, s] @ rows.T
            score = (weights[b, s][:, None] * np.maximum(dots, 0)).sum(0)
            p = np.exp(score - score.max())
            p /= p.sum()
            dscore = dloss[b, s] * (p * goal.sum() - goal)
            some = goal != 0
            dtarget[b, s, np.flatnonzero(listed)[some]] = dloss[b, s] * (
                1 + np.log(goal[some]) - np.log(p[some])
            )
            dweights[b, s] = np.maximum(dots, 0) @ dscore
            ddots = np.where(dots > 0, weights[b, s][:, None] * dscore, 0.0)
            dq[b, s] = ddots @ rows
            np.add.at(dk[b], at, ddots.T @ q[b, s])
    return dq, dk, dweights, dtarget


lightning_indexer_kl_backward.sample(_sample_lists)


@lightning_indexer_kl.gradient(save="q k weights target indices")
def _(saved, dloss):  # type: ignore[no-untyped-def]
    dq, dk, dweights, dtarget = lightning_indexer_kl_backward(
        saved.q, saved.k, saved.weights, saved.target, saved.indices, dloss
    )
    return {"q": dq, "k": dk, "weights": dweights, "target": dtarget}
