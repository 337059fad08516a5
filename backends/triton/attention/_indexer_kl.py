"""The indexer's loss and its gradients: scores of listed keys, and what flows back through them.

What a query gives to each key that it lists is written and then summed by key, as in the gradients
of sparse_attention.
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor
from triton import cdiv, jit

from transom import config

from .._language import dot, mixture, narrow
from .._launch import launch, programs, tile_for
from .._segments import by_target, sum_rows
from ..moe._gemm import power_of_two
from ..moe._weights import precision
from ._keys import gathered


@jit
def _listed(
    k,
    indices,
    query,
    first,
    S,
    N,
    L,
    k_batch,
    k_row,
    D: tl.constexpr,
    BD: tl.constexpr,
    BK: tl.constexpr,
):
    """(place, whether a key is listed there, the keys) of a tile of a query's list."""
    place = first + tl.arange(0, BK)
    j = tl.load(indices + query * L + tl.minimum(place, L - 1))
    seen = (place < L) & (j >= 0) & (j < N)
    row = tl.where(seen, j, 0).to(tl.int64) * k_row
    keys = gathered(k + query // S * k_batch, row, seen, 0, BD, D, 0, k.dtype.element_ty)
    return place, seen, keys


@jit
def _heads(q, weights, query, h, H, D: tl.constexpr, BD: tl.constexpr, BH: tl.constexpr):
    """(head, whether it is there, its q, its weight) of BH heads from h on."""
    head = h + tl.arange(0, BH)
    there = head < H
    head = tl.minimum(head, H - 1)
    x = gathered(q + query * H * D, head * D, there, 0, BD, D, 0, q.dtype.element_ty)
    factor = tl.load(weights + query * H + head, mask=there, other=0.0).to(tl.float32)
    return head, there, x, factor


@jit
def _score(
    q,
    k,
    weights,
    indices,
    scores,
    k_batch,
    k_row,
    queries,
    S,
    H,
    N,
    L,
    D: tl.constexpr,
    BD: tl.constexpr,
    BH: tl.constexpr,
    BK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # scores[s,l] = sum_h weights relu(q . k) of the listed keys; -inf where none is listed.
    tiles = tl.cdiv(L, BK)
    for number in range(tl.program_id(0), queries * tiles, tl.num_programs(0)):
        query = tl.cast(number // tiles, tl.int64)
        place, seen, keys = _listed(
            k, indices, query, number % tiles * BK, S, N, L, k_batch, k_row, D, BD, BK
        )
        total = tl.zeros((BK,), tl.float32)
        for h in range(0, H, BH):
            _, _, x, factor = _heads(q, weights, query, h, H, D, BD, BH)
            dots = dot(x, tl.trans(keys), tl.zeros((BH, BK), tl.float32), PRECISION)
            total += tl.sum(tl.where(dots < 0, 0.0, dots) * factor[:, None], 0)
        at = scores + query * L + place
        tl.store(at, tl.where(seen, total, float("-inf")), mask=place < L)


@jit
def _dq(
    q,
    k,
    weights,
    indices,
    dscores,
    dq,
    dweights,
    k_batch,
    k_row,
    queries,
    S,
    H,
    N,
    L,
    D: tl.constexpr,
    BD: tl.constexpr,
    BH: tl.constexpr,
    BK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # dq and dweights of BH heads of a query.
    blocks = tl.cdiv(H, BH)
    for number in range(tl.program_id(0), queries * blocks, tl.num_programs(0)):
        query = tl.cast(number // blocks, tl.int64)
        head, there, x, factor = _heads(q, weights, query, number % blocks * BH, H, D, BD, BH)
        total = tl.zeros((BH, BD), tl.float32)
        along = tl.zeros((BH,), tl.float32)
        for first in range(0, L, BK):
            place, seen, keys = _listed(
                k, indices, query, first, S, N, L, k_batch, k_row, D, BD, BK
            )
            slope = tl.load(dscores + query * L + place, mask=place < L, other=0.0)
            # Selected, no mask: where a mask is itself loaded, Ascend reads the whole tile.
            slope = tl.where(seen, slope, 0.0)[None, :]
            dots = dot(x, tl.trans(keys), tl.zeros((BH, BK), tl.float32), PRECISION)
            along += tl.sum(tl.where(dots < 0, 0.0, dots) * slope, 1)
            ddots = tl.where(dots > 0, factor[:, None] * slope, 0.0)
            total = mixture(ddots, keys, total, PRECISION)
        column = tl.arange(0, BD)
        at = dq + (query * H + head)[:, None] * D + column[None, :]
        inside = there[:, None] & (column < D)[None, :]
        tl.store(at, narrow(total, dq.dtype.element_ty), mask=inside)
        tl.store(dweights + query * H + head, narrow(along, dweights.dtype.element_ty), mask=there)


@jit
def _give(
    q,
    k,
    weights,
    indices,
    dscores,
    given,
    k_batch,
    k_row,
    first,
    some,
    S,
    H,
    N,
    L,
    D: tl.constexpr,
    BD: tl.constexpr,
    BH: tl.constexpr,
    BK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    # given[i,l] = what query first + i gives to the key that it lists at l.
    tiles = tl.cdiv(L, BK)
    for number in range(tl.program_id(0), some * tiles, tl.num_programs(0)):
        i = tl.cast(number // tiles, tl.int64)
        query = first + i
        place, seen, keys = _listed(
            k, indices, query, number % tiles * BK, S, N, L, k_batch, k_row, D, BD, BK
        )
        slope = tl.load(dscores + query * L + place, mask=place < L, other=0.0)
        slope = tl.where(seen, slope, 0.0)[None, :]
        total = tl.zeros((BK, BD), tl.float32)
        for h in range(0, H, BH):
            _, _, x, factor = _heads(q, weights, query, h, H, D, BD, BH)
            dots = dot(x, tl.trans(keys), tl.zeros((BH, BK), tl.float32), PRECISION)
            ddots = tl.where(dots > 0, factor[:, None] * slope, 0.0)
            total = mixture(tl.trans(ddots), x, total, PRECISION)
        column = tl.arange(0, BD)
        at = given + (i * L + place)[:, None] * D + column[None, :]
        tl.store(at, total, mask=(place < L)[:, None] & (column < D)[None, :])


def _constants(q: Tensor):
    entry = "lightning_indexer." + ("kl_f32" if q.dtype == torch.float32 else "kl")
    tile, D = tile_for(entry, q), q.shape[3]
    more = dict(BD=power_of_two(D), PRECISION=precision(q.dtype, q.dtype, q))
    return tile, dict(tile=tile, entry=entry, D=D, **more)


def listed_scores(q: Tensor, k: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
    """[B,S,L] float32, -inf where no key is listed; arguments contiguous but for k."""
    (B, S, H, _), N, L = q.shape, k.shape[1], indices.shape[2]
    scores = torch.full((B, S, L), -torch.inf, dtype=torch.float32, device=q.device)
    if N and scores.numel():
        tile, more = _constants(q)
        launch(
            _score,
            programs(q, B * S * cdiv(L, tile["BK"]), tile),
            q,
            k,
            weights,
            indices,
            scores,
            *k.stride()[:2],
            B * S,
            S,
            H,
            N,
            L,
            **more,
        )
    return scores


def log_softmax(scores: Tensor) -> Tensor:
    """Over the listed keys; 0 where a query lists none, and nothing of use where a key is not."""
    total = scores.logsumexp(2, keepdim=True)
    return scores - torch.where(total == -torch.inf, 0.0, total)


def through_scores(
    q: Tensor, k: Tensor, weights: Tensor, indices: Tensor, dscores: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dweights); arguments contiguous but for k."""
    (B, S, H, D), N, L = q.shape, k.shape[1], indices.shape[2]
    dq, dweights = torch.zeros_like(q), torch.zeros_like(weights)
    sums = torch.zeros((B * N, D), dtype=torch.float32, device=q.device)
    if sums.numel() and dq.numel() and L:
        tile, more = _constants(q)
        launch(
            _dq,
            programs(q, B * S * cdiv(H, tile["BH"]), tile),
            q,
            k,
            weights,
            indices,
            dscores,
            dq,
            dweights,
            *k.stride()[:2],
            B * S,
            S,
            H,
            N,
            L,
            **more,
        )
        batch = torch.arange(B, device=q.device)[:, None, None] * N
        target = torch.where((indices >= 0) & (indices < N), indices.long() + batch, -1)
        target = target.flatten(0, 1)
        at_once = max(1, min(B * S, config.workspace_bytes() // (4 * L * D)))
        given = torch.empty((at_once * L, 1, D), dtype=torch.float32, device=q.device)
        for first in range(0, B * S, at_once):
            some = min(at_once, B * S - first)
            launch(
                _give,
                programs(q, some * cdiv(L, tile["BK"]), tile),
                q,
                k,
                weights,
                indices,
                dscores,
                given,
                *k.stride()[:2],
                first,
                some,
                S,
                H,
                N,
                L,
                **more,
            )
            order, starts = by_target(target[first : first + some], B * N)
            sum_rows(given, order, starts, sums, add=True)
    return dq, sums.view(B, N, D).to(k.dtype), dweights
